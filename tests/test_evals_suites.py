"""The suites of `jobs.eval`: damaged models get no figures; where figures are kept; bad shards."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from engine_models import one_thread, tiny
from pretrain_runs import run_plan, tiny_plan

from nanoray.checkpoint.loading import LoadedModel
from nanoray.errors import NanorayError
from nanoray.evals.suites import BpbSuite, ModelSource, SampleSuite, Subject
from nanoray.tokenizer import ByteTokenizer

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, corpus: str, tokenizer_dir: str
) -> tuple[str, Path]:
    """A run's checkpoint, and a copy of its corpus whose first shard is cut off."""
    folder = tmp_path_factory.mktemp("suites")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANORAY_HOME", str(folder))
        plan = tiny_plan(corpus, tokenizer_dir, "tiny", num_iterations=1)
        run_plan(plan)
    damaged = folder / "damaged"
    shutil.copytree(corpus, damaged)
    shard = damaged / "shard_00000.parquet"
    shard.write_bytes(shard.read_bytes()[:1000])
    return f"{plan.run_dir}/checkpoints/step_000001", damaged


@pytest.mark.parametrize(
    ("copy", "figures"),
    [
        ("checkpoints/home/runs/a/checkpoints", "checkpoints/home/runs/a/evals"),
        ("kept", "kept/evals"),
    ],
)
def test_figures_lie_beside_the_checkpoints(
    checkpoint: tuple[str, Path], tmp_path: Path, copy: str, figures: str
) -> None:
    shutil.copytree(checkpoint[0], tmp_path / copy / "step_000001")
    subject = ModelSource(str(tmp_path / copy / "step_000001")).load()
    assert subject.folder == f"{tmp_path}/{figures}/step_000001"


def test_a_folder_of_hugging_face_means_the_same_in_every_actor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    assert ModelSource(None, hf_path="own").hf_path == f"{tmp_path}/own"
    assert ModelSource(None, hf_path="gpt2").hf_path == "gpt2"


def test_bad_shards_fail_or_are_left_out(checkpoint: tuple[str, Path]) -> None:
    where, damaged = checkpoint
    subject = ModelSource(where, dtype="float32").load()

    def measure(on_bad: str) -> dict[str, float]:
        suite = BpbSuite(str(damaged), 1024, 8, on_bad)  # type: ignore[arg-type]
        work = suite.worker(subject)
        return suite.report([work(item) for item in suite.items()]).metrics

    with pytest.raises(NanorayError, match=r"shard_00000\.parquet"):
        measure("fail")
    assert set(measure("skip")) == {"train_bpb", "val_bpb"}


def test_a_damaged_model_gets_no_bits_per_byte() -> None:
    suite = BpbSuite("nowhere", 1, 1)
    for value in (math.nan, math.inf):
        with pytest.raises(NanorayError, match="weights are damaged"):
            suite.report([(value, 1)] * len(suite.items()))


def test_a_damaged_model_gives_no_samples() -> None:
    model = tiny(sequence_len=256)
    with torch.no_grad():
        model.transformer.wte.weight.fill_(math.nan)
    tokenizer = ByteTokenizer()
    loaded = LoadedModel(model, tokenizer, {}, 1, "somewhere")
    device = torch.device("cpu")
    subject = Subject("", tokenizer, model, 256, device, lambda: None, loaded)  # type: ignore
    with pytest.raises(NanorayError, match=r"samples could not be drawn: .*not finite"):
        SampleSuite(2, 4, 1).worker(subject)(None)
