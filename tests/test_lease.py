"""One live writer for a run: refused, taken over, lost, released."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from nanoray import lease as lease_module
from nanoray import storage
from nanoray.errors import NanorayError
from nanoray.lease import EXPIRY_S, Lease, LeaseLostError, check_token, is_alive, read_lease

HOLDER = """
import sys
from nanoray.errors import NanorayError
from nanoray.lease import Lease
print("ready", flush=True)
for run_dir in iter(sys.stdin.readline, ""):
    try:
        lease = Lease(run_dir.strip())
        print("won", flush=True)
    except NanorayError as error:
        print(error, flush=True)
"""


class Holder:
    """Another process, which takes the lease of every run that it is told."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid

    def send(self, run_dir: str) -> None:
        assert self.process.stdin
        print(run_dir, file=self.process.stdin, flush=True)

    def answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()


@pytest.fixture
def holders() -> Iterator[Callable[[int], list[Holder]]]:
    started: list[Holder] = []

    def start(count: int) -> list[Holder]:
        new = [Holder() for _ in range(count)]
        started.extend(new)
        assert [holder.answer() for holder in new] == ["ready"] * count
        return new

    yield start
    for holder in started:
        holder.process.kill()
        holder.process.communicate()


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    return str(tmp_path / "runs" / "d12")


def content(run_dir: str) -> dict[str, Any]:
    found = read_lease(run_dir)
    assert found is not None
    return found


def write_lease(run_dir: str, **changes: Any) -> None:
    """A lease of this very process, with changes."""
    lease = {
        "token": "other",
        **lease_module._machine(),
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "heartbeat": time.time(),
        "released": False,
    }
    storage.write_text(storage.join(run_dir, "lease.json"), json.dumps(lease | changes))


def eventually(condition: Callable[[], bool], deadline_s: float = 10) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "not within the deadline"
        time.sleep(0.01)


def test_the_next_holder_clears_what_a_killed_one_left_half_written(
    run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL between writing aside and renaming; its place is taken by a process that is gone."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_paths: os._exit(9))
        child = os.fork()
        if child == 0:
            storage.write_text(storage.join(run_dir, "lease.json"), "{}")
            os._exit(0)  # not reached
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    storage.write_text(storage.join(run_dir, ".hidden"), "mine")
    (left_over,) = Path(run_dir).glob(".lease.json.*.tmp")
    lease = Lease(run_dir)
    assert not left_over.exists()
    assert sorted(set(os.listdir(run_dir)) - {".lease.lock"}) == [".hidden", "lease.json"]
    with pytest.raises(NanorayError, match="is being written by process"):
        Lease(run_dir)
    lease.release()


def test_take_and_release(run_dir: str) -> None:
    lease = Lease(run_dir)
    assert content(run_dir)["token"] == lease.token
    assert content(run_dir)["pid"] == os.getpid()
    lease.check()
    check_token(run_dir, lease.token)
    lease.release()
    assert content(run_dir)["released"]
    lease.release()  # idempotent
    after = Lease(run_dir)
    assert after.token != lease.token
    after.release()


def test_object_store() -> None:
    run_dir = f"memory://bucket-{uuid.uuid4().hex[:8]}/runs/d12"
    lease = Lease(run_dir)
    with pytest.raises(NanorayError, match="run d12 is being written"):
        Lease(run_dir)
    lease.release()
    assert not is_alive(content(run_dir))


def test_second_live_start_is_refused(run_dir: str, holders: Callable[[int], list[Holder]]) -> None:
    (holder,) = holders(1)
    holder.send(run_dir)
    assert holder.answer() == "won"
    host = content(run_dir)["host"]
    with pytest.raises(NanorayError) as error:
        Lease(run_dir)
    assert f"run d12 is being written by process {holder.pid} on {host}" in str(error.value)
    assert "stop that one first, or take another --run" in str(error.value)


def test_a_killed_writer_is_taken_over_at_once(
    run_dir: str, holders: Callable[[int], list[Holder]]
) -> None:
    (holder,) = holders(1)
    holder.send(run_dir)
    assert holder.answer() == "won"
    holder.process.kill()
    eventually(lambda: psutil.Process(holder.pid).status() == psutil.STATUS_ZOMBIE)
    start = time.monotonic()
    lease = Lease(run_dir)  # not even reaped by its parent yet
    assert time.monotonic() - start < 5
    assert content(run_dir)["token"] == lease.token
    lease.release()


def test_of_racing_starts_exactly_one_wins(
    tmp_path: Path, holders: Callable[[int], list[Holder]]
) -> None:
    racers = holders(3)
    for attempt in range(8):
        run_dir = str(tmp_path / f"run{attempt}")
        for racer in racers:
            racer.send(run_dir)
        answers = [racer.answer() for racer in racers]
        assert answers.count("won") == 1, answers
        winner = racers[answers.index("won")]
        assert content(run_dir)["pid"] == winner.pid
        refused = [answer for answer in answers if answer != "won"]
        assert all(f"is being written by process {winner.pid}" in text for text in refused)


@pytest.mark.parametrize(
    ("changes", "alive"),
    [
        ({}, True),
        ({"heartbeat": 0}, True),  # the process is there: a stalled heartbeat is no death
        ({"released": True}, False),
        ({"process_started": 1.0}, False),  # the pid was given to another process
        ({"pid": 2**22 + 1}, False),  # beyond the largest pid
        ({"host": "elsewhere"}, True),
        ({"host": "elsewhere", "heartbeat": time.time() - EXPIRY_S - 1}, False),
        ({"boot": 1.0, "heartbeat": 0}, False),  # before a restart of this machine
        ({"pid_namespace": "pid:[1]", "pid": 2**22 + 1}, True),  # a container of the same name
    ],
)
def test_life(run_dir: str, changes: dict[str, Any], alive: bool) -> None:
    write_lease(run_dir, **changes)
    assert is_alive(content(run_dir)) == alive


def test_another_host_is_taken_over_when_its_heartbeat_expires(
    run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lease(run_dir, host="elsewhere", pid=7)
    with pytest.raises(NanorayError, match="process 7 on elsewhere"):
        Lease(run_dir)
    monkeypatch.setattr(lease_module, "EXPIRY_S", 0.2)
    time.sleep(0.25)
    lease = Lease(run_dir)
    assert content(run_dir)["token"] == lease.token
    lease.release()


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_an_unreadable_lease_is_none(run_dir: str, text: str) -> None:
    storage.write_text(storage.join(run_dir, "lease.json"), text)
    assert read_lease(run_dir) is None
    Lease(run_dir).release()


def test_heartbeat_and_loss(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.02)
    lease = Lease(run_dir)
    first = content(run_dir)["heartbeat"]
    eventually(lambda: content(run_dir)["heartbeat"] > first)
    assert not lease.lost

    # Repeated, because a heartbeat that has read the old token may be about to write it again.
    def take_over() -> bool:
        write_lease(run_dir)
        return lease.lost

    eventually(take_over)
    with pytest.raises(LeaseLostError, match="lost the run d12 to another writer"):
        lease.check()
    with pytest.raises(LeaseLostError):
        check_token(run_dir, lease.token)
    lease.release()
    assert content(run_dir)["token"] == "other", "a loser leaves the winner's lease alone"
    assert not content(run_dir)["released"]


def test_a_writer_that_was_halted_does_not_write_over_its_heir(
    run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has seen its own token, sleeps for minutes, and wakes up to write its heartbeat."""
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.02)
    lease = Lease(run_dir)
    halted, heir_has_written = threading.Event(), threading.Event()
    write = lease._write

    def halt(released: bool = False) -> None:
        halted.set()
        heir_has_written.wait(0.5)  # the heir waits for the lock, if there is one
        write(released)

    monkeypatch.setattr(lease, "_write", halt)
    assert halted.wait(5)
    with FileLock(storage.join(run_dir, ".lease.lock")):
        write_lease(run_dir)
        heir_has_written.set()
    eventually(lambda: lease.lost)
    assert content(run_dir)["token"] == "other"
    lease.release()


@pytest.mark.parametrize("junk", [{"heartbeat": None}, {"heartbeat": "now"}, {"pid": None}])
def test_a_lease_of_other_content_is_a_dead_one(run_dir: str, junk: dict[str, Any]) -> None:
    lease = {**lease_module._machine(), "pid": os.getpid(), "process_started": 0, "heartbeat": 0}
    for key in ("host", "boot"):
        assert not is_alive({**lease, **junk, key: "elsewhere"})
    assert not is_alive({**lease, **junk})


def test_a_removed_run_is_a_lost_one(run_dir: str) -> None:
    lease = Lease(run_dir)
    storage.remove(run_dir)
    with pytest.raises(LeaseLostError):
        lease.check()
    lease.release()
    assert not storage.exists(run_dir)


def test_an_outage_does_not_end_the_heartbeat(
    run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.02)
    lease = Lease(run_dir)
    failures = []

    def down(*_args: object) -> None:
        failures.append(1)
        raise ConnectionError if len(failures) % 2 else RuntimeError("the store's own class")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_text", down)
        eventually(lambda: len(failures) >= 3)
    before = content(run_dir)["heartbeat"]
    eventually(lambda: content(run_dir)["heartbeat"] > before)
    assert not lease.lost
    lease.release()


def test_release_on_a_full_disk_does_not_hide_why_the_run_ends(
    run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease(run_dir)

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "write_text", full)
    lease.release()


def test_a_held_lock_has_a_deadline(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "LOCK_DEADLINE_S", 0.1)
    storage.make_dirs(run_dir)
    with (
        FileLock(storage.join(run_dir, ".lease.lock")),
        pytest.raises(NanorayError, match="was held by another start"),
    ):
        Lease(run_dir)
