"""`python -m jobs.sft` as its users meet it: the plan, and every mistake as one sentence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_snapshot
from pretrain_runs import hashes, losses, run_plan, weights
from sft_runs import make_base, sft_flags, sft_plan, write_conversations

import jobs.eval
import jobs.sft
from nanoray.checkpoint import DamagedCheckpointError
from nanoray.checkpoint.writer import CheckpointWriter
from nanoray.config import UsageError
from nanoray.errors import NanorayError
from nanoray.train.record import check_resume, record_config
from nanoray.train.sft_plan import SftPlan

Flags = Callable[..., list[str]]


@pytest.fixture(scope="module")
def trained(corpus: str, tokenizer_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small base run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANORAY_HOME", str(tmp_path_factory.mktemp("base")))
        return make_base(corpus, tokenizer_dir, "base")


@pytest.fixture
def base(home: Path, trained: str) -> str:
    """Its copy, the run ``base`` of the test's own home, with two checkpoints."""
    folder = home / "runs" / "base"
    shutil.copytree(trained, folder)
    return str(folder)


@pytest.fixture
def chats(tmp_path: Path) -> str:
    return write_conversations(tmp_path / "chats.jsonl", 60, (1, 12))


@pytest.fixture
def flags(base: str, chats: str) -> Flags:
    def make(**changes: Any) -> list[str]:
        values = {"from_run": "base", "mixture": chats, "run": "mine"} | changes
        places = [values.pop(name) for name in ("from_run", "mixture", "run")]
        return [*sft_flags(*places, **values), "--dry-run"]

    return make


def files_under(home: Path) -> set[str]:
    return {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}


def test_a_dry_run_prints_the_plan_and_leaves_nothing(
    flags: Flags, home: Path, chats: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_under(home)
    assert jobs.sft.main(flags()) == 0
    printed = capsys.readouterr().out
    assert "base/checkpoints/step_000003: depth 2, width 32" in printed
    assert f"{chats}*1.0" in printed
    assert "60 conversations in" in printed
    assert "loss on the assistant tokens" in printed
    assert "dry run: configuration, data and resources are fine" in printed
    assert files_under(home) == before


def test_a_run_has_the_name_of_its_base(base: str, chats: str, home: Path) -> None:
    for where in ("base", base, f"{base}/", f"{base}/checkpoints/step_000003"):
        assert sft_plan(where, chats, None).run == "base-sft"


LONG = {"messages": [{"role": "user", "content": "long " * 400},
                     {"role": "assistant", "content": "yes"}]}  # fmt: skip
NO_ANSWER = {"messages": [{"role": "user", "content": "hello"}]}
TWICE = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"from_run": None}, UsageError, "give the base model: --from-run NAME"),
        ({"from_run": "nobody"}, NanorayError, "there is no run nobody .* the runs there are base"),
        ({"from_step": 2}, NanorayError, "no complete checkpoint of step 2; there are 3"),
        ({"run": "base"}, NanorayError, "--run base is the base run itself; give the new run"),
        ({"run": "../up"}, NanorayError, "not a usable name"),
        ({"max_seq_len": 48}, NanorayError, "1024 is not divisible by --max-seq-len 48"),
        ({"max_seq_len": 512}, NanorayError, "512 is beyond what the base model .* lower it"),
        ({"mixture": "nothing"}, NanorayError, "names 'nothing', which is no task .*identity"),
        ({"mixture": " , "}, NanorayError, "is empty; write NAME"),
        ({"mixture": "identity*-1"}, NanorayError, "no positive number of epochs"),
        ({"mixture": "identity*0.0001"}, NanorayError, "are none; take more epochs"),
        ({"mixture": "gone/away.jsonl"}, NanorayError, "there is no file .*away.jsonl; check"),
        ({"validation": "nothing"}, NanorayError, "names 'nothing', which is no task"),
        ({"validation": "gone.jsonl"}, NanorayError, "there is no file .*gone.jsonl"),
        ({"chatcore_tasks": "riddles"}, NanorayError, "no task 'riddles'; there are .*gsm8k"),
        ({"chatcore_tasks": "identity"}, NanorayError, "identity is for training.*leave it out"),
        ({"words": "none.txt", "mixture": "simple-spelling"}, NanorayError, "none.txt"),
        ({"mixture": "gsm8k", "data_dir": "nowhere"}, NanorayError, "no train .*--data-dir"),
        ({"num_workers": "500"}, NanorayError, "500 workers .* this machine has"),
        ({"init_lr_frac": 0}, UsageError, "--init-lr-frac"),
        ({"train_on": "user"}, UsageError, "--train-on"),
    ],
)
def test_mistakes_are_named(
    flags: Flags, home: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = files_under(home)
    with pytest.raises(error, match=message) as raised:
        jobs.sft.main(flags(**changes))
    assert "\n" not in str(raised.value)
    assert files_under(home) == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps(TWICE), "line 3: .*message 1 is from 'user', but it is assistant's turn"),
        (json.dumps(NO_ANSWER), "line 3: the conversation has no answer of the assistant"),
        ('{"messages": [', "line 3: no JSON"),
        ('"hello"', "line 3: a JSON object is expected"),
    ],
)
@pytest.mark.parametrize("flag", ["mixture", "validation"])
def test_a_malformed_conversation_is_named_before_anything_starts(
    flags: Flags, chats: str, tmp_path: Path, line: str, message: str, flag: str
) -> None:
    lines = Path(chats).read_text().splitlines()
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([*lines[:2], line, *lines[2:4]]) + "\n")
    with pytest.raises(NanorayError, match=f"bad.jsonl, {message}") as raised:
        jobs.sft.main(flags(**{flag: str(bad)}))
    assert "\n" not in str(raised.value)


def test_nothing_to_train_on(flags: Flags, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(f"{json.dumps(LONG)}\n" * 3)
    with pytest.raises(NanorayError, match=r"none of the 3 conversations .* raise --max-seq-len"):
        jobs.sft.main(flags(mixture=str(tmp_path / "long.jsonl")))


def test_without_a_corpus_the_spelling_tasks_need_words(
    flags: Flags, corpus: str, tmp_path: Path
) -> None:
    jobs.sft.main(flags(mixture="simple-spelling*0.001"))
    hidden = Path(f"{corpus}-hidden")
    os.rename(corpus, hidden)
    try:
        with pytest.raises(NanorayError, match="no corpus at"):
            jobs.sft.main(flags(mixture="simple-spelling*0.001"))
        (tmp_path / "words.txt").write_text("\n".join(f"w{chr(97 + i)}rd" for i in range(26)))
        given = flags(mixture="simple-spelling*0.001", words=str(tmp_path / "words.txt"))
        assert jobs.sft.main(given) == 0
    finally:
        os.rename(hidden, corpus)


@pytest.fixture
def stopped(base: str, chats: str) -> SftPlan:
    """A run that was stopped after its third step."""
    plan = sft_plan("base", chats, "mine", num_iterations=8)
    record_config(plan)
    assert run_plan(plan, stop_step=3)["status"] == "stopped"
    return plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture": "identity"}, r"--mixture: was .*chats\.jsonl\*1\.0, is identity\*1\.0"),
        ({"train_on": "all"}, "--train-on: was assistant, is all"),
        ({"from_step": 3}, "--from-step: was None, is 3"),
        ({"load_optimizer": False}, "--load-optimizer: was True, is False"),
        ({"num_iterations": 9}, "--num-iterations: was 8, is 9"),
    ],
)
def test_a_run_goes_on_as_it_was_begun(
    stopped: SftPlan, flags: Flags, changes: dict[str, Any], message: str
) -> None:
    kept = weights(stopped, 3)
    with pytest.raises(NanorayError, match=f"run mine exists with another.*\n.*{message}"):
        jobs.sft.main(flags(**({"num_iterations": 8} | changes)))
    assert weights(stopped, 3) == kept
    may_differ = {"device_batch_size": 3, "save_every": 2, "num_workers": "1:2",
                  "chatcore_every": 5, "chatcore_tasks": "arithmetic"}  # fmt: skip
    assert jobs.sft.main(flags(num_iterations=8, **may_differ)) == 0


def test_conversations_that_changed_are_refused(stopped: SftPlan, flags: Flags, chats: str) -> None:
    text = Path(chats).read_text()
    Path(chats).write_text(text.replace("cat", "dog", 1))
    with pytest.raises(NanorayError, match="the mixture has changed since the run began"):
        jobs.sft.main(flags(num_iterations=8))
    Path(chats).write_text(text)
    assert jobs.sft.main(flags(num_iterations=8)) == 0


@pytest.mark.parametrize("what", ["gone", "on"])
def test_a_run_goes_on_without_its_base(
    stopped: SftPlan, base: str, chats: str, home: Path, what: str
) -> None:
    """The base run may have been trained on, or be removed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANORAY_HOME", str(home / "undisturbed"))
        whole = sft_plan(base, chats, "whole", num_iterations=8)
        run_plan(whole)
    if what == "gone":
        shutil.rmtree(base)
    else:
        shutil.copytree(f"{whole.checkpoints_dir}/step_000008", f"{base}/checkpoints/step_000008")
    resumed = sft_plan("base", chats, "mine", num_iterations=8)
    assert resumed.base == stopped.base
    assert not check_resume(resumed)
    assert (resumed.base in resumed.inputs()) is False
    assert run_plan(resumed)["status"] == "finished"
    assert (losses(resumed), hashes(resumed)) == (losses(whole), hashes(whole))
    assert weights(resumed, 8) == weights(whole, 8)


def test_a_damaged_base(base: str, chats: str, flags: Flags) -> None:
    plan = sft_plan("base", chats, "mine")
    model = Path(base, "checkpoints", "step_000003", "model.safetensors")
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpointError, match=r"step_000003/model.safetensors is damaged"):
        run_plan(plan)
    Path(base, "checkpoints", "step_000003", "meta.json").write_text("{}")
    with pytest.raises(DamagedCheckpointError, match=r"meta.json is damaged"):
        jobs.sft.main(flags())


def test_a_home_may_move(stopped: SftPlan, base: str, home: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        shutil.copytree(home, home.parent / "moved")
        patch.setenv("NANORAY_HOME", str(home.parent / "moved"))
        shutil.rmtree(home)
        resumed = sft_plan("base", stopped.config["mixture"].split("*")[0], "mine",
                           num_iterations=8)  # fmt: skip
        assert not check_resume(resumed)
        assert run_plan(resumed)["status"] == "finished"


def test_a_base_must_tell_how_it_was_trained(flags: Flags, tmp_path: Path) -> None:
    root = str(tmp_path / "strange" / "checkpoints")
    writer = CheckpointWriter(root, rank=0, world_size=1, attempt="a", keep=1, guard=lambda: None)
    writer.save(make_snapshot(1, 0, 1))
    writer.wait()
    with pytest.raises(NanorayError, match=r"meta.json does not tell how .* no 'plan'\); take a"):
        jobs.sft.main(flags(from_run=str(tmp_path / "strange")))


def test_a_pretraining_run_is_not_gone_on_with(
    base: str, chats: str, corpus: str, tokenizer_dir: str, flags: Flags
) -> None:
    make_base(corpus, tokenizer_dir, "mine")
    with pytest.raises(NanorayError, match="run mine "):
        jobs.sft.main(flags())


def test_its_checkpoint_is_evaluated_in_conversation(
    stopped: SftPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["chat", "--run=mine", "--tasks=arithmetic", "--max-per-task=3", "--max-tokens=8"]
    assert jobs.eval.main(flags) == 0
    assert "ChatCORE" in capsys.readouterr().out
    assert list(Path(stopped.run_dir, "evals").rglob("chat*"))
