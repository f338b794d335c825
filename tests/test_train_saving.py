"""Saves that fail while a run trains: tried once more at once, by all workers together."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checkpoints import assert_latest, make_snapshot, make_writers, names
from gloo import run_gloo
from pretrain_runs import blocks_of, losses, run_plan, tiny_plan, work

from nanoray.checkpoint import Checkpoint, list_steps
from nanoray.checkpoint.writer import CheckpointWriter, SaveFailedError, Snapshot
from nanoray.lease import LeaseLostError
from nanoray.metrics import Record
from nanoray.train.run_plan import RunPlan
from nanoray.train.saving import AgreedSaves
from nanoray.train.stages import run_worker
from nanoray.train.worker import Hooks
from nanoray.train.world import World

STEPS = 20
honest_save = CheckpointWriter._save


class FailingSaves:
    """In the place of `CheckpointWriter._save`: a rank's first ``times`` saves from a step on."""

    def __init__(self, step: int, times: int, rank: int = 0) -> None:
        self.step, self.times, self.rank = step, times, rank
        self.tried: list[int] = []

    def patch(self) -> Any:
        def save(writer: CheckpointWriter, folder: str, snapshot: Snapshot) -> None:
            self.tried.append(snapshot.step)
            if writer._rank == self.rank and snapshot.step >= self.step and self.times:
                self.times -= 1
                raise OSError(errno.ENOSPC, "No space left on device")
            honest_save(writer, folder, snapshot)

        return mock.patch.object(CheckpointWriter, "_save", save)


def test_a_disk_that_was_full_once(home: Path, corpus: str, tokenizer_dir: str) -> None:
    plan = tiny_plan(corpus, tokenizer_dir, "once", save_every=5, keep_checkpoints=9)
    saves = FailingSaves(step=10, times=1)
    with saves.patch():
        assert run_plan(plan)["status"] == "finished"
    assert saves.tried[:2] == [5, 10]
    assert 10 < saves.tried[2] < 15, "again at once, not an interval later"
    assert list_steps(plan.checkpoints_dir) == [5, saves.tried[2], 15, 20]


@pytest.mark.parametrize("small_disk", ["8m"], indirect=True)
def test_a_disk_that_is_really_full_for_a_while(
    small_disk: Path, corpus: str, tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics, samples and the summary, which cannot be written either, do not end the run."""
    monkeypatch.setenv("NANORAY_HOME", str(small_disk))
    changes = {"save_every": 5, "sample_every": 3, "keep_checkpoints": 9}
    plan = tiny_plan(corpus, tokenizer_dir, "squeezed", **changes)
    ballast = small_disk / "ballast"
    warnings = []

    def fill(record: Record) -> None:
        if record["step"] == 8:
            disk = os.statvfs(small_disk)
            ballast.write_bytes(bytes(disk.f_bavail * disk.f_frsize))

    def make_room(record: Record) -> None:
        if "warning" in record:
            warnings.append(record["warning"])
        if "trying once more" in record.get("warning", ""):
            ballast.unlink()

    hooks = Hooks(sinks=[fill], post=make_room)
    world = World(0, 1, torch.device("cpu"))
    assert run_worker(plan, world, blocks_of(), hooks, 0)["status"] == "finished"
    assert list(losses(plan)) == list(range(1, STEPS + 1))
    again, *later = [step for step in list_steps(plan.checkpoints_dir) if step > 5]
    assert 10 < again < 15
    assert later == [15, 20]
    assert any("samples" in said and "No space left" in said for said in warnings)
    assert "Step 18" in (small_disk / "runs" / "squeezed" / "samples.md").read_text()


def test_a_disk_that_stays_full(home: Path, corpus: str, tokenizer_dir: str) -> None:
    plan = tiny_plan(corpus, tokenizer_dir, "full", save_every=5, keep_checkpoints=9)
    saves = FailingSaves(step=10, times=99)
    with saves.patch(), pytest.raises(SaveFailedError, match=r"No space left .* run the same"):
        run_plan(plan)
    assert len(saves.tried) == 3
    assert max(losses(plan)) < 15, "it does not train on for nothing"
    assert list_steps(plan.checkpoints_dir) == [5]
    assert run_plan(plan)["status"] == "finished"


def test_the_last_save_is_tried_again(home: Path, corpus: str, tokenizer_dir: str) -> None:
    plan = tiny_plan(corpus, tokenizer_dir, "last")
    saves = FailingSaves(step=STEPS, times=1)
    with saves.patch():
        assert run_plan(plan)["status"] == "finished"
    assert saves.tried == [STEPS, STEPS]
    assert list_steps(plan.checkpoints_dir) == [STEPS]
    hopeless = tiny_plan(corpus, tokenizer_dir, "hopeless")
    with FailingSaves(step=STEPS, times=2).patch(), pytest.raises(SaveFailedError):
        run_plan(hopeless)


def work_with_failures(
    rank: int, world_size: int, plan: RunPlan, failing_rank: int, times: int
) -> str:
    saves = FailingSaves(10, times, failing_rank)
    with saves.patch():
        try:
            status: str = work(rank, world_size, plan)["status"]
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return status


@pytest.mark.slow
# Without --save-every it is the last step's save, whose two tries write into one folder.
@pytest.mark.parametrize(("failing_rank", "save_every"), [(0, 5), (1, 5), (1, 0)])
def test_workers_try_again_together(
    home: Path, corpus: str, tokenizer_dir: str, failing_rank: int, save_every: int
) -> None:
    plan = tiny_plan(corpus, tokenizer_dir, "shaken", save_every=save_every)
    ended = run_gloo(work_with_failures, 2, plan, failing_rank, 1)
    assert ended == ["finished"] * 2
    assert list(losses(plan)) == list(range(1, STEPS + 1))
    with Checkpoint(plan.checkpoints_dir, STEPS) as checkpoint:
        checkpoint.verify()


@pytest.mark.slow
def test_workers_give_up_together(home: Path, corpus: str, tokenizer_dir: str) -> None:
    plan = tiny_plan(corpus, tokenizer_dir, "lost", save_every=5)
    ended = run_gloo(work_with_failures, 2, plan, 1, 99)
    assert all("No space left on device" in reason for reason in ended), "every worker raises"
    assert list_steps(plan.checkpoints_dir) == [5]


def test_a_second_try_does_not_read_the_first_one_s_notes(local_root: str) -> None:
    first, second = make_writers(local_root, world_size=2)
    with FailingSaves(2, 1, rank=1).patch():
        second.save(make_snapshot(2, 1, 2))
        assert isinstance(second.outcome(), SaveFailedError)
    assert names(local_root, 2), "the note of its failure"
    first.save(make_snapshot(2, 0, 2))
    assert "No space left" in str(first.outcome())
    second._explained(OSError("late"), f"{local_root}/step_000002", 2)  # after the cleaning
    for writer in (first, second):
        writer.save(make_snapshot(2, writer._rank, 2))
    assert [writer.outcome() for writer in (first, second)] == [None, None]
    assert_latest(local_root, 2)


def test_the_first_worker_gives_up_waiting(local_root: str) -> None:
    """Where the other one could not even write a note of its failure."""
    first = make_writers(local_root, world_size=2)[0]
    first.save(make_snapshot(2, 0, 2))
    assert not first.failed
    first.give_up()
    assert "another worker could not save its part" in str(first.outcome())


def test_a_lost_lease_is_not_tried_again(local_root: str) -> None:
    def lost() -> None:
        raise LeaseLostError("lost")

    (writer,) = make_writers(local_root, guard=lost)
    posts: list[Any] = []
    saves = AgreedSaves(writer, World(0, 1, torch.device("cpu")), posts.append)
    writer.save(make_snapshot(1, 0, 1))
    with pytest.raises(LeaseLostError):
        saves.settle()
    assert not posts
