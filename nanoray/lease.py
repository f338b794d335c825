"""One run has one live writer: ``lease.json`` with a heartbeat.

A second live start is refused. A dead writer is taken over: at once when its process is gone from
this machine, else when its heartbeat is older than `EXPIRY_S`. A writer that finds another's
token in the file has lost the run and must stop.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import psutil
from filelock import FileLock, Timeout

from nanoray import storage
from nanoray.errors import NanorayError

HEARTBEAT_S = 5.0
EXPIRY_S = 30.0
LOCK_DEADLINE_S = 10.0


class LeaseLostError(NanorayError):
    """Another writer took this run over."""


def read_lease(run_dir: str) -> dict[str, Any] | None:
    """The lease's content, or None where there is none (or it is unreadable)."""
    try:
        lease = json.loads(storage.read_bytes(storage.join(run_dir, "lease.json")))
    except (FileNotFoundError, ValueError):
        return None
    return lease if isinstance(lease, dict) else None


def _machine() -> dict[str, Any]:
    """What two processes must have in common for a pid to mean the same to both."""
    namespace = ""
    with contextlib.suppress(OSError):  # containers of one host may share its name
        namespace = os.readlink("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": psutil.boot_time(),
        "pid_namespace": namespace,
    }


def is_alive(lease: dict[str, Any]) -> bool:
    """Whether the writer of a lease lives, as far as can be seen from here."""
    if lease.get("released"):
        return False
    if all(lease.get(key) == value for key, value in _machine().items()):
        try:
            process = psutil.Process(int(lease["pid"]))
            started = process.create_time()
            return (
                process.status() != psutil.STATUS_ZOMBIE
                and abs(started - float(lease["process_started"])) < 1
            )
        except (psutil.NoSuchProcess, KeyError, ValueError, TypeError):
            return False
    return _age_s(lease) < EXPIRY_S


def _age_s(lease: dict[str, Any]) -> float:
    """Seconds since the last heartbeat; for ever where the file does not tell."""
    heartbeat = lease.get("heartbeat")
    return time.time() - heartbeat if isinstance(heartbeat, int | float) else math.inf


class Lease:
    """The right to write a run, renewed by a thread until `release`.

    Raises:
        NanorayError: another live process writes this run.
    """

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir
        self.token = uuid.uuid4().hex
        self._uri = storage.join(run_dir, "lease.json")
        self._lost = threading.Event()
        self._stop = threading.Event()
        self._acquire()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def _acquire(self) -> None:
        storage.make_dirs(self.run_dir)
        with self._locked():
            self._take()
        if not storage.is_local(self.run_dir):
            # Object stores have no lock: of two that write at once, the later write wins, and
            # the other sees it here or at its next heartbeat.
            time.sleep(1.0)
            self.check()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Look and write as one act, where files can be locked."""
        if not storage.is_local(self.run_dir):
            yield
            return
        lock = FileLock(storage.join(self.run_dir, ".lease.lock"), timeout=LOCK_DEADLINE_S)
        try:
            lock.acquire()
        except Timeout as error:
            raise NanorayError(
                f"{lock.lock_file} was held by another start of this run for "
                f"{LOCK_DEADLINE_S:.0f} s; stop that one first"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def _take(self) -> None:
        holder = read_lease(self.run_dir)
        if holder and is_alive(holder):
            age_s = _age_s(holder)
            raise NanorayError(
                f"run {self.run_dir.rsplit('/', 1)[-1]} is being written by process "
                f"{holder.get('pid')} on {holder.get('host')} (last sign of life {age_s:.0f} s "
                f"ago); stop that one first, or take another --run"
            )
        storage.remove_half_written(self.run_dir)
        self._write()

    def _write(self, released: bool = False) -> None:
        lease = {
            "token": self.token,
            **_machine(),
            "pid": os.getpid(),
            "process_started": psutil.Process().create_time(),
            "heartbeat": time.time(),
            "released": released,
        }
        storage.write_text(self._uri, json.dumps(lease))

    def _renew(self, released: bool = False) -> None:
        self.check()  # locking would make the folder of a removed run anew
        with self._locked():
            self.check()  # a process that was halted since may have lost the run
            self._write(released)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                self._renew()
            except LeaseLostError:
                self._lost.set()
                return
            except Exception:  # a full disk or an outage of the store may pass
                continue

    @property
    def lost(self) -> bool:
        return self._lost.is_set()

    def check(self) -> None:
        """Raise LeaseLostError if another writer took over."""
        check_token(self.run_dir, self.token)

    def release(self) -> None:
        """Give the run free; idempotent. Never raises: it must not hide why a run ends."""
        self._stop.set()
        self._thread.join(timeout=10)
        # A lease that cannot be written (disk full) ends with this process all the same.
        with contextlib.suppress(Exception):
            self._renew(released=True)


def check_token(run_dir: str, token: str) -> None:
    """Raise LeaseLostError unless ``token`` still holds the run (workers call this)."""
    holder = read_lease(run_dir)
    if holder is None or holder.get("token") != token:
        raise LeaseLostError(
            f"this process lost the run {run_dir.rsplit('/', 1)[-1]} to another writer and stops"
        )
