"""`python -m jobs.eval` on a tiny run: figures, files, mistakes; any number of actors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain_runs import run_plan, tiny_plan

from jobs import eval as job
from nanoray.checkpoint.loading import load_model
from nanoray.config import UsageError
from nanoray.errors import NanorayError
from nanoray.evals.infer import decode_bytes, measure
from nanoray.evals.sample import PROMPTS, naive_generate, sample_report
from nanoray.metrics import read_records
from nanoray.tasks.spelling import SpellingBee


@pytest.fixture(scope="module")
def run_home(
    tmp_path_factory: pytest.TempPathFactory, corpus: str, tokenizer_dir: str
) -> tuple[Path, float]:
    """A home with the run "tiny", and the validation bits per byte that its training told."""
    home = tmp_path_factory.mktemp("eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANORAY_HOME", str(home))
        plan = tiny_plan(corpus, tokenizer_dir, "tiny", num_iterations=6)
        run_plan(plan)
        records = read_records(f"{plan.run_dir}/metrics.jsonl")
    return home, next(r["val_bpb"] for r in records if "val_bpb" in r)


@pytest.fixture
def use_home(run_home: tuple[Path, float], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANORAY_HOME", str(run_home[0]))
    return run_home[0] / "runs" / "tiny" / "evals" / "step_000006"


def metrics(folder: Path, suite: str) -> dict[str, Any]:
    record = json.loads((folder / f"{suite}.json").read_text())
    assert record["stage"] == "eval"
    assert record["suite"] == suite
    found: dict[str, Any] = record["metrics"]
    return found


def test_bpb_is_that_of_training(run_home: tuple[Path, float], use_home: Path) -> None:
    words = ["--run=tiny", "--eval-tokens=2048", "--dtype=float32"]
    assert job.main(["bpb", *words]) == 0
    found = metrics(use_home, "bpb")
    assert found["val_bpb"] == pytest.approx(run_home[1], rel=1e-5)
    assert found["train_bpb"] > 0
    assert found["train_bpb"] != found["val_bpb"]


def test_samples_are_those_of_the_naive_forward(use_home: Path) -> None:
    assert job.main(["sample", "--run=tiny", "--dtype=float32", "--num-free=0"]) == 0
    loaded = load_model("tiny", dtype="float32")
    generate = naive_generate(loaded.model, loaded.tokenizer, 42, torch.device("cpu"))
    text = (use_home / "samples.md").read_text()
    assert text == sample_report(generate, loaded.tokenizer, step=6, num_free=0)
    assert all(prompt in text for prompt in PROMPTS)


def test_infer_tells_every_batch_size(use_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--run=tiny", "--batch-sizes=1,3", "--prompt-tokens=20", "--new-tokens=5"]
    assert job.main(["infer", *words, "--repeats=1"]) == 0
    found = metrics(use_home, "infer")
    for size in (1, 3):
        assert found[f"infer/ttft_s@{size}"] > 0
        assert found[f"infer/mfu@{size}"] > 0
        assert found[f"infer/decode_tokens_per_s@{size}"] == pytest.approx(
            size / found[f"infer/token_s@{size}"]
        )
    assert "TTFT" in capsys.readouterr().out
    with pytest.raises(NanorayError, match="more than this model can read"):
        job.main(["infer", "--run=tiny", "--prompt-tokens=5000", "--dry-run"])


def test_infer_tells_no_figure_that_is_noise(
    use_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanoray.evals.infer.statistics.median", lambda _seconds: 1.0)
    monkeypatch.setattr("nanoray.evals.infer.copy_bandwidth", lambda _device: 1.0)
    model = load_model("tiny", dtype="float32").model
    with pytest.raises(NanorayError, match="raise --new-tokens or --repeats"):
        measure(model, [1], prompt_tokens=4, new_tokens=2, repeats=1, seed=0)


def test_a_decoding_step_reads_matrices_and_what_the_windows_show(use_home: Path) -> None:
    model = load_model("tiny", dtype="float32").model
    matrices = sum(
        p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name
    ) - sum(p.numel() for name, p in model.named_parameters() if name.endswith("wte.weight"))
    matrices -= sum(p.numel() for n, p in model.named_parameters() if n == "smear_gate.weight")
    keys = 2 * model.config.kv_dim * sum(min(w + 1, 10) for w in model.config.window_sizes())
    assert decode_bytes(model, 3, 10) == 4 * (matrices + 3 * keys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bpb", "--run=nope"], "no run nope"),
        (["bpb", "--run=tiny", "--step=4"], "step 4"),
        (["bpb", "--run=tiny", "--corpus=absent"], "absent"),
        (["core", "--run=tiny", "--bundle=/nowhere"], "core.yaml"),
        (["chat", "--run=tiny", "--tasks=chess"], "no task 'chess'"),
        (["chat", "--run=tiny", "--tasks=arithmetic,identity"], "identity is for training"),
        (["chat", "--run=tiny", "--tasks=spelling-bee", "--words=/nowhere"], "/nowhere"),
        (["chat", "--run=tiny", "--tasks=arc-easy", "--data-dir=/nowhere"], "/nowhere"),
        (["sample", "--run=tiny", "--num-actors=500"], "500 workers"),
    ],
)
def test_a_mistake_is_one_sentence(
    use_home: Path, words: list[str], message: str, request: pytest.FixtureRequest
) -> None:
    if "--num-actors=500" in words:
        request.getfixturevalue("ray_session")
    with pytest.raises(NanorayError, match=message) as error:
        job.main(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bpb"], "give the model"),
        (["bpb", "--run=a", "--hf-path=b"], "one of the two"),
        (["nonsense"], "usage:"),
        (["infer", "--run=a", "--batch-sizes=1,x"], "numbers with commas between"),
        (["infer", "--run=a", "--batch-sizes=²"], "numbers with commas between"),
        (["core", "--run=tiny", "--max-per-task=0"], "at least one, or -1 for all"),
        (["chat", "--run=tiny", "--max-per-task=0"], "at least one, or -1 for all"),
        (["core", "--run=tiny", "--tasks=,"], "at least one name"),
        (["chat", "--run=tiny", "--tasks="], "at least one name"),
        (["chat", "--run=tiny", "--num-samples=2"], "needs a --temperature above 0"),
    ],
)
def test_bad_usage(use_home: Path, words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        job.main(words)


@pytest.mark.slow
def test_figures_do_not_depend_on_the_number_of_actors(
    use_home: Path, ray_session: None, shared_data: Path
) -> None:
    bpb = ["bpb", "--run=tiny", "--eval-tokens=2048", "--dtype=float32"]
    core = ["core", "--run=tiny", "--dtype=float32", "--tasks=copa,winograd", "--max-per-task=40"]
    core.append(f"--bundle={shared_data / 'core' / 'eval_bundle'}")
    found = {}
    chat = ["chat", "--run=tiny", "--dtype=float32", "--tasks=arc-easy,arithmetic"]
    chat += [f"--data-dir={shared_data}", "--max-per-task=300", "--max-tokens=4"]
    for words in (bpb, core, chat):
        for actors in (1, 2):
            assert job.main([*words, f"--num-actors={actors}"]) == 0
            found[actors] = metrics(use_home, words[0])
        assert found[1] == found[2]
    csv = (use_home / "core.csv").read_text()
    assert csv.splitlines()[-1].startswith("CORE")


@pytest.mark.slow
def test_the_default_tasks_of_the_chat_suite(use_home: Path, shared_data: Path) -> None:
    words = shared_data / "words" / "words_alpha.txt"
    chat = ["chat", "--run=tiny", f"--data-dir={shared_data}", f"--words={words}"]
    assert job.main([*chat, "--max-per-task=20", "--max-tokens=8"]) == 0
    found = metrics(use_home, "chat")
    names = ["arc-easy", "arc-challenge", "mmlu", "gsm8k", "humaneval", "spelling-bee"]
    assert set(found) == {"chatcore", *(f"chat/{name}" for name in names)}
    guessed = [0.25, 0.25, 0.25, 0, 0, SpellingBee("test", str(words), 1).baseline]
    centred = [(found[f"chat/{n}"] - b) / (1 - b) for n, b in zip(names, guessed)]
    assert found["chatcore"] == pytest.approx(sum(centred) / 6)
    lines = (use_home / "chat_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["task"] for line in lines] == [n for n in names for _ in range(20)]
