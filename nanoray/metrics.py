"""The one door for numbers: ``metrics.jsonl``, wandb, and whatever sinks are plugged in.

``step`` in a record is the number of optimiser steps done. A key that was not measured at a step
is absent. Keys are those of the README's table and stay stable.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanoray import storage

Record = Mapping[str, Any]
Sink = Callable[[Record], None]
WANDB_DEADLINE_S = 60.0
UPLOAD_PERIOD_S = 30.0  # of a log on an object store, so that others can follow a run


def read_records(uri: str) -> list[dict[str, Any]]:
    """All whole records of a metrics file; a last line torn by a crash is left out."""
    if not storage.exists(uri):
        return []
    records = []
    for line in storage.read_bytes(uri).split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null, so that every reader can parse the log."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsLog:
    """Appends records to ``metrics.jsonl`` and hands them to sinks.

    Args:
        uri: the file. On an object store the log grows in memory and is uploaded as a whole, by a
            thread every half a minute, and by `sync`.
        keep_until_step: records of later steps are cut off (they are about to be done again).
        sinks: called with every record, in order.
        guard: raises where the file is another writer's by now; asked before an upload, which would
            take its place.
    """

    def __init__(
        self,
        uri: str,
        keep_until_step: int,
        sinks: Sequence[Sink] = (),
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self._uri, self._guard = uri, guard
        self._sinks = list(sinks)
        self._writing = threading.Lock()
        self._uploader: threading.Thread | None = None
        self._next_upload = time.monotonic() + UPLOAD_PERIOD_S
        kept = [r for r in read_records(uri) if r.get("step", 0) <= keep_until_step]
        self._text = bytearray("".join(json.dumps(record) + "\n" for record in kept).encode())
        storage.write_bytes(uri, bytes(self._text))
        self._file = None
        if storage.is_local(uri):
            self._text.clear()  # it holds what could not be written yet
            self._file = open(storage.normalize(uri), "ab", buffering=0)  # noqa: SIM115

    def log(self, record: Record) -> None:
        """Append one record (JSON numbers and strings), at once where there is room for it."""
        line = json.dumps({key: _plain(value) for key, value in record.items()}) + "\n"
        self._text += line.encode()
        if self._file:
            with contextlib.suppress(OSError):
                self._append(self._file)
        elif time.monotonic() > self._next_upload:
            self._next_upload = time.monotonic() + UPLOAD_PERIOD_S
            self._start_upload()
        for sink in self._sinks:
            sink(record)

    def sync(self) -> None:
        """Make the log durable: fsync, or upload to the object store.

        A full disk, or a store that is away, costs no record: they are kept until they can be
        written, and whether a run goes on meanwhile is for its checkpoints to say.
        """
        with contextlib.suppress(Exception):  # every store has its own
            self._sync()

    def close(self) -> None:
        """Raises NanorayError where records are lost."""
        for sink in self._sinks:
            if isinstance(sink, WandbSink):
                sink.close()
        try:
            with storage.explained(
                f"metrics cannot be written to {self._uri}",
                "make room or mend the storage, then run the same command again to go on from "
                "the last checkpoint",
            ):
                self._sync()
        finally:
            if self._file:
                self._file.close()

    def _start_upload(self) -> None:
        if not (self._uploader and self._uploader.is_alive()):
            self._uploader = threading.Thread(target=self.sync, name="metrics", daemon=True)
            self._uploader.start()

    def _append(self, file: io.FileIO) -> None:
        while self._text:  # of what fits partly, the rest follows later
            del self._text[: file.write(self._text)]

    def _sync(self) -> None:
        if self._file:
            self._append(self._file)
            os.fsync(self._file.fileno())
            return
        with self._writing:  # what is uploaded later is newer
            self._guard()
            storage.write_bytes(self._uri, bytes(self._text))


class WandbSink:
    """Logs to Weights & Biases; a resumed run goes on in the same wandb run.

    Raises:
        NanorayError: wandb does not start (no key, no network).
    """

    def __init__(self, project: str, run: str, config: dict[str, Any]) -> None:
        import wandb  # slow to import, and few runs use it

        with storage.explained(
            "wandb does not start",
            "log in with `wandb login`, set WANDB_MODE=offline, or leave out --wandb",
        ):
            self._run = wandb.init(project=project, name=run, id=run, resume="allow", config=config)

    def __call__(self, record: Record) -> None:
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
        self._run.log(numbers, step=int(record["step"]))

    def close(self) -> None:
        """Send what is left: Ray kills its workers, and then wandb takes the run for crashed."""
        sending = threading.Thread(target=self._run.finish, name="wandb", daemon=True)
        sending.start()
        sending.join(WANDB_DEADLINE_S)
