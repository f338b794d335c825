"""A run that goes on: without its chat model, from another configuration, under its own name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from pretrain_runs import hashes, run_plan, tiny_plan, weights
from rl_runs import rl_plan, run_alone

from nanoray import storage
from nanoray.checkpoint import Checkpoint, list_steps
from nanoray.errors import NanorayError
from nanoray.rl.plan import RlPlan
from nanoray.train.record import check_resume, record_config

# The KL term needs the chat model to the end.
PENALISED = {"kl_coef": 0.5, "num_iterations": 4}


@pytest.fixture
def base(home: Path, corpus: str, tokenizer_dir: str) -> str:
    plan = tiny_plan(corpus, tokenizer_dir, "base", num_iterations=2, max_seq_len=128)
    assert run_plan(plan)["status"] == "finished"
    return plan.run_dir


@pytest.fixture
def stopped(base: str) -> RlPlan:
    """A run of the chat model ``base``, stopped after its second step."""
    plan = rl_plan("base", "mine", **PENALISED)
    record_config(plan)
    assert run_alone(plan, stop_step=2)["status"] == "stopped"
    return plan


@pytest.mark.parametrize("what", ["run gone", "checkpoint gone", "trained on"])
def test_a_run_goes_on_without_its_chat_model(
    stopped: RlPlan, base: str, home: Path, what: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANORAY_HOME", str(home / "undisturbed"))
        whole = rl_plan(base, "whole", **PENALISED)
        run_alone(whole)
    folder = Path(base, "checkpoints", "step_000002")
    if what == "run gone":
        shutil.rmtree(base)
    elif what == "checkpoint gone":
        shutil.rmtree(folder)
    else:  # and its newest checkpoint is another
        shutil.copytree(Path(whole.checkpoints_dir, "step_000004"), folder.parent / "step_000004")
    resumed = rl_plan("base", "mine", **PENALISED)
    assert resumed.base == stopped.base
    assert not check_resume(resumed)
    assert resumed.base not in resumed.inputs()
    assert run_alone(resumed, start_step=2)["status"] == "finished"
    assert hashes(resumed) == hashes(whole)
    assert weights(resumed, 4) == weights(whole, 4)


def test_the_reference_is_the_model_that_the_run_began_with(stopped: RlPlan, base: str) -> None:
    (step,) = list_steps(stopped.reference_dir)
    with Checkpoint.at(stopped.base) as began, Checkpoint(stopped.reference_dir, step) as kept:
        before, reference = began.model_state(), kept.model_state()
    assert all(torch.equal(before[name], reference[name]) for name in before)
    assert before.keys() == reference.keys()
    assert f"its copy in {stopped.reference_dir}" in "\n".join(stopped.describe())
    without = rl_plan(base, "without")
    assert not list_steps(without.reference_dir), "nobody would read it"


def test_a_reference_that_cannot_be_had_any_more_is_named(stopped: RlPlan, base: str) -> None:
    shutil.rmtree(stopped.reference_dir)
    rl_plan("base", "mine", **PENALISED)
    assert list_steps(stopped.reference_dir), "copied anew while there is the chat model"
    shutil.rmtree(stopped.reference_dir)
    shutil.rmtree(base)
    with pytest.raises(NanorayError, match=r"--kl-coef compares .*step_000002, which is gone"):
        rl_plan("base", "mine", **PENALISED)


def test_a_run_without_a_checkpoint_needs_its_chat_model(base: str) -> None:
    rl_plan("base", "mine")
    shutil.rmtree(base)
    with pytest.raises(NanorayError, match="there is no run base"):
        rl_plan("base", "mine")


def test_another_chat_model_under_the_same_name_is_refused(stopped: RlPlan, base: str) -> None:
    with pytest.raises(NanorayError, match="--from-run: was base, is"):
        check_resume(rl_plan(base, "mine", **PENALISED))


def test_the_run_is_called_after_the_chat_run(base: str) -> None:
    for named in ("base", base, f"{base}/checkpoints/step_000002"):
        assert rl_plan(named, None).run == "base-rl"


def test_resume_refuses_another_algorithm(base: str) -> None:
    plan = rl_plan("base", "kept", num_iterations=1)
    record_config(plan)
    run_alone(plan)
    assert check_resume(plan), "it is finished"
    with pytest.raises(NanorayError, match="--algorithm: was reinforce, is grpo"):
        check_resume(rl_plan("base", "kept", num_iterations=1, algorithm="grpo"))
    # What is sampled together has a part in the last bits of what is sampled.
    with pytest.raises(NanorayError, match="--questions-per-call: was 2, is 1"):
        check_resume(rl_plan("base", "kept", num_iterations=1, questions_per_call=1))
    assert check_resume(rl_plan("base", "kept", num_iterations=1, rollout_actors="1:4"))


def test_a_disk_that_is_full_when_the_ledger_is_saved(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on, and what it goes on from after a loss is the checkpoint before."""
    write_bytes = storage.write_bytes

    def full(uri: str, data: bytes) -> None:
        if "step_000002/meta.json" in uri:  # the ledger is in it
            raise OSError(28, "No space left on device")
        write_bytes(uri, data)

    plan = rl_plan("base", "full", save_every=1)
    record_config(plan)
    posted: list[object] = []
    monkeypatch.setattr(storage, "write_bytes", full)
    assert run_alone(plan, post=posted.append)["status"] == "finished"
    assert "No space left" in str(posted)
    assert list_steps(plan.checkpoints_dir) == [1, 3]
