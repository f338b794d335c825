"""One run has one live writer: ``lease.json`` with a heartbeat.

A second live start is refused. A dead writer is taken over: at once when its process is gone from
this machine, else when its heartbeat is older than `EXPIRY_S`. A writer that finds another's
token in the file has lost the run and must stop.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from typing import Any

import psutil
from filelock import FileLock

from nanoray import storage
from nanoray.errors import NanorayError

HEARTBEAT_S = 5.0
EXPIRY_S = 30.0


class LeaseLostError(NanorayError):
    """Another writer took this run over."""


def read_lease(run_dir: str) -> dict[str, Any] | None:
    """The lease's content, or None where there is none (or it is unreadable)."""
    try:
        lease = json.loads(storage.read_bytes(storage.join(run_dir, "lease.json")))
    except (FileNotFoundError, ValueError):
        return None
    return lease if isinstance(lease, dict) else None


def is_alive(lease: dict[str, Any]) -> bool:
    """Whether the writer of a lease lives, as far as can be seen from here."""
    if lease.get("released"):
        return False
    if lease.get("host") == socket.gethostname() and lease.get("boot") == psutil.boot_time():
        try:
            process = psutil.Process(int(lease["pid"]))
            started = process.create_time()
            return (
                process.status() != psutil.STATUS_ZOMBIE
                and abs(started - float(lease["process_started"])) < 1
            )
        except (psutil.NoSuchProcess, KeyError, ValueError):
            return False
    return time.time() - float(lease.get("heartbeat", 0)) < EXPIRY_S


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
        if storage.is_local(self.run_dir):
            with FileLock(storage.join(self.run_dir, ".lease.lock"), timeout=10):
                self._take()
        else:
            # Object stores have no lock: of two that write at once, the later write wins, and
            # the other sees it here or at its next heartbeat.
            self._take()
            time.sleep(1.0)
            self.check()

    def _take(self) -> None:
        holder = read_lease(self.run_dir)
        if holder and is_alive(holder):
            age_s = time.time() - float(holder.get("heartbeat", 0))
            raise NanorayError(
                f"run {self.run_dir.rsplit('/', 1)[-1]} is being written by process "
                f"{holder.get('pid')} on {holder.get('host')} (last sign of life {age_s:.0f} s "
                f"ago); stop that one first, or take another --run"
            )
        self._write()

    def _write(self, released: bool = False) -> None:
        lease = {
            "token": self.token,
            "host": socket.gethostname(),
            "boot": psutil.boot_time(),
            "pid": os.getpid(),
            "process_started": psutil.Process().create_time(),
            "heartbeat": time.time(),
            "released": released,
        }
        storage.write_text(self._uri, json.dumps(lease))

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                check_token(self.run_dir, self.token)
                self._write()
            except LeaseLostError:
                self._lost.set()
                return
            except OSError:  # a full disk must not end a heartbeat that may succeed later
                continue

    @property
    def lost(self) -> bool:
        return self._lost.is_set()

    def check(self) -> None:
        """Raise LeaseLostError if another writer took over."""
        check_token(self.run_dir, self.token)

    def release(self) -> None:
        """Give the run free; idempotent."""
        self._stop.set()
        self._thread.join(timeout=10)
        holder = read_lease(self.run_dir)
        if holder and holder.get("token") == self.token:
            self._write(released=True)


def check_token(run_dir: str, token: str) -> None:
    """Raise LeaseLostError unless ``token`` still holds the run (workers call this)."""
    holder = read_lease(run_dir)
    if holder is None or holder.get("token") != token:
        raise LeaseLostError(
            f"this process lost the run {run_dir.rsplit('/', 1)[-1]} to another writer and stops"
        )
