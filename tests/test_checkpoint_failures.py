"""Failures while saving: the checkpoint before stands, and the error says what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import (
    assert_content,
    assert_latest,
    make_snapshot,
    make_writers,
    names,
    new_bucket,
    no_warning,
    save_step,
)

from nanoray import storage
from nanoray.checkpoint import delete, delete_incomplete, list_steps, open_latest
from nanoray.checkpoint import writer as writer_module
from nanoray.checkpoint.writer import Snapshot
from nanoray.errors import NanorayError
from nanoray.lease import LeaseLostError


def full_disk(*_args: object, **_options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# --- failures while saving


def assert_save_fails(root: str, step: int, match: str) -> None:
    with pytest.raises(NanorayError, match=match) as error:
        save_step(make_writers(root), step)
    assert "\n" not in str(error.value)
    assert "the checkpoint before it is intact" in str(error.value)


@pytest.mark.parametrize("broken", ["write_text", "write_bytes", "staged"])
def test_a_failing_write(root: str, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    save_step(make_writers(root), 1)
    with monkeypatch.context() as patch:
        patch.setattr(storage, broken, full_disk)
        assert_save_fails(root, 2, "step 2 could not be saved to .*No space left on device")
    assert storage.list_names(root) == ["step_000001"], "no debris"
    assert_latest(root, 1)
    save_step(make_writers(root), 2)
    assert_latest(root, 2)


def test_the_error_comes_with_the_next_save(
    local_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (writer,) = make_writers(local_root)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "staged", full_disk)
        writer.save(make_snapshot(1, 0, 1))
        with pytest.raises(NanorayError, match="step 1 could not be saved"):
            writer.save(make_snapshot(2, 0, 1))
    writer.wait()  # told once
    assert writer.last_save_s is None
    writer.save(make_snapshot(2, 0, 1))
    writer.wait()
    assert_latest(local_root, 2)


def test_cleaning_up_may_fail_too(local_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(make_writers(local_root), 1)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "staged", full_disk)
        patch.setattr(storage, "exists", full_disk)
        assert_save_fails(local_root, 2, "No space left")
    assert_latest(local_root, 1)


def test_a_failure_keeps_what_another_start_has_published(
    local_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker left over from a killed start gives up waiting; the new start has saved."""
    waits, give_up = threading.Event(), threading.Event()

    def wait_in_vain(*_args: object) -> None:
        waits.set()
        give_up.wait()
        raise OSError("worker 1 wrote no part")

    left_over = make_writers(local_root, world_size=2, attempt="old")[0]
    monkeypatch.setattr(left_over, "_await_part", wait_in_vain)
    left_over.save(make_snapshot(1, 0, 2))
    waits.wait()
    save_step(make_writers(local_root, attempt="new"), 1, version=1)
    give_up.set()
    with pytest.raises(NanorayError, match="worker 1 wrote no part"):
        left_over.wait()
    assert_latest(local_root, 1)


def test_errors_of_a_store_s_own_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class EndpointConnectionError(Exception):
        pass

    def down(*_args: object) -> None:
        raise EndpointConnectionError("could not connect")

    monkeypatch.setattr(storage, "write_bytes", down)
    assert_save_fails(new_bucket(), 1, "could not connect")


def test_a_bug_keeps_its_class(local_root: str) -> None:
    (writer,) = make_writers(local_root)
    writer.save(Snapshot(step=1, optimizer=[], meta={"not JSON": object()}))
    with pytest.raises(TypeError, match="not JSON serializable"):
        writer.wait()
    assert list_steps(local_root) == []


def test_a_lost_lease_writes_nothing(local_root: str) -> None:
    save_step(make_writers(local_root), 1)

    def lost() -> None:
        raise LeaseLostError("lost")

    with pytest.raises(LeaseLostError):
        save_step(make_writers(local_root, guard=lost), 2)
    assert storage.list_names(local_root) == ["step_000001"]
    with pytest.raises(LeaseLostError):  # not even over a step that is there
        save_step(make_writers(local_root, guard=lost), 1, version=1)
    assert_latest(local_root, 1)


def test_a_lease_lost_while_saving_publishes_nothing(local_root: str) -> None:
    save_step(make_writers(local_root), 1)
    calls = []

    def lost_later() -> None:
        calls.append(1)
        if len(calls) > 1:
            raise LeaseLostError("lost")

    with pytest.raises(LeaseLostError):
        save_step(make_writers(local_root, guard=lost_later), 2)
    assert list_steps(local_root) == [1]


@pytest.mark.parametrize("other_attempt", [False, True])
def test_a_worker_that_never_writes_its_part(
    local_root: str, monkeypatch: pytest.MonkeyPatch, other_attempt: bool
) -> None:
    monkeypatch.setattr(writer_module, "PART_DEADLINE_S", 0.2)
    save_step(make_writers(local_root, world_size=2), 1)
    first = make_writers(local_root, world_size=2)[0]
    if other_attempt:  # the note of a killed start is none of ours
        old = make_writers(local_root, world_size=2, attempt="old")[1]
        old.save(make_snapshot(2, 1, 2))
        old.wait()
    first.save(make_snapshot(2, 0, 2))
    with pytest.raises(NanorayError, match=r"step 2 .*worker 1 wrote no part within 0 s"):
        first.wait()
    assert names(local_root, 2) == []
    assert_latest(local_root, 1)


def test_the_first_worker_hears_of_another_s_failure(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait for the deadline, and says why."""
    save_step(make_writers(root, world_size=2), 1)
    first, second = make_writers(root, world_size=2)
    first.save(make_snapshot(2, 0, 2))
    monkeypatch.setattr(second, "_write_tensors", full_disk)
    second.save(make_snapshot(2, 1, 2))
    with pytest.raises(NanorayError, match=r"step 2 .*: \[Errno 28\] No space left on device"):
        second.wait()
    with pytest.raises(NanorayError, match=r"step 2 .*: worker 1: .*No space left on device"):
        first.wait()
    assert names(root, 2) == []
    assert_latest(root, 1)
    save_step(make_writers(root, world_size=2), 2)
    assert_latest(root, 2)


# --- for real: disks that are full, processes that are killed


class Forker:
    """A process that has torch imported, and runs code in children of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("checkpoints.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self.read() == "ready"

    def read(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def read_until(self, beginning: str) -> str:
        while not (line := self.read()).startswith(beginning):
            assert self.process.poll() is None, "the process ended"
        return line

    def start(self, code: str) -> int:
        """Begin to run one line of code in a child; returns its pid."""
        assert self.process.stdin
        print(code, file=self.process.stdin, flush=True)
        return int(self.read_until("pid").split()[1])


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    forker = Forker()
    yield forker
    forker.process.kill()
    forker.process.communicate()


def test_files_that_do_not_fit(local_root: str, forker: Forker) -> None:
    """The kernel refuses bytes beyond a limit (EFBIG)."""
    save_step(make_writers(local_root), 1)
    lines = [
        "import resource, signal",
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)",
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))",
        f"writer = make_writers({local_root!r})[0]",
        "writer.save(make_snapshot(2, 0, 1))",
        "try: writer.wait()",
        "except BaseException as error: print('error', type(error).__name__, error)",
    ]
    forker.start(f"exec({chr(10).join(lines)!r})")
    error = forker.read_until("error")
    assert error.startswith("error SaveFailedError checkpoint of step 2 could not be saved")
    assert "File too large" in error
    forker.read_until("end")
    assert storage.list_names(local_root) == ["step_000001"]
    assert_latest(local_root, 1)


def test_a_full_disk(small_disk: Path) -> None:
    """1 MB, of which a checkpoint takes 360 KB: the third does not fit. Two workers."""
    root = str(small_disk / "checkpoints")
    writers = make_writers(root, world_size=2, keep=3)
    save_step(writers, 1)
    save_step(writers, 2)
    with pytest.raises(NanorayError, match=r"step 3 could not .*No space left.*before it is int"):
        save_step(writers, 3)
    for writer in writers:
        with contextlib.suppress(NanorayError):  # the other one's, if that has failed as well
            writer.wait()
    assert_latest(root, 2)
    delete_incomplete(root)
    assert sorted(os.listdir(root)) == ["step_000001", "step_000002"]
    delete(root, 1)
    save_step(writers, 3)
    assert_latest(root, 3)


def test_a_disk_that_fills_up_at_every_moment(small_disk: Path) -> None:
    """Whatever write is the one that fails, the checkpoint before stands, and no debris."""
    root = str(small_disk / "checkpoints")
    save_step(make_writers(root), 1)
    filler = small_disk / "filler"
    outcomes = set()
    for free_pages in range(0, 110, 6):
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        filler.write_bytes(bytes(max(0, free - free_pages * 4096)))
        try:
            save_step(make_writers(root, keep=3), 2)
            outcomes.add("saved")
            assert_latest(root, 2)
            delete(root, 2)
        except NanorayError as error:
            assert "No space left" in str(error)  # noqa: PT017
            outcomes.add("failed")
        assert os.listdir(root) == ["step_000001"]
        assert_latest(root, 1)
        filler.unlink()
    assert outcomes == {"saved", "failed"}


def kill_while_saving(forker: Forker, root: str, kills: int) -> None:
    """After every kill the latest checkpoint is complete, right, and a start goes on from it."""
    rng = random.Random(kills)
    last = 0
    for _ in range(kills):
        pid = forker.start(f"save_for_ever({root!r}, {last + 1})")
        forker.read_until("saved")
        time.sleep(rng.uniform(0, 0.25))
        os.kill(pid, signal.SIGKILL)
        forker.read_until("end")
        latest = open_latest(root, no_warning)
        assert latest is not None
        with latest:
            assert latest.step > last
            last = latest.step
            assert_content(latest)
        assert len(list_steps(root)) <= 3
        delete_incomplete(root)
        assert all(names(root, step)[0] == "manifest.json" for step in list_steps(root))
        assert len(storage.list_names(root)) == len(list_steps(root))


@pytest.mark.slow
def test_three_kills_while_saving(local_root: str, forker: Forker) -> None:
    kill_while_saving(forker, local_root, 3)


@pytest.mark.slow
@pytest.mark.soak
def test_twenty_kills_while_saving(local_root: str, forker: Forker) -> None:
    kill_while_saving(forker, local_root, 20)
