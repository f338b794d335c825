"""The one door for numbers: ``metrics.jsonl``, wandb, and whatever sinks are plugged in.

``step`` in a record is the number of optimiser steps done. A key that was not measured at a step
is absent. Keys are those of the README's table and stay stable.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from nanoray import storage
from nanoray.errors import NanorayError

Record = Mapping[str, Any]
Sink = Callable[[Record], None]
WANDB_DEADLINE_S = 60.0


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
        uri: the file. On an object store the log grows in memory and is uploaded by `sync`.
        keep_until_step: records of later steps are cut off (they are about to be done again).
        sinks: called with every record, in order.
    """

    def __init__(self, uri: str, keep_until_step: int, sinks: Sequence[Sink] = ()) -> None:
        self._uri = uri
        self._sinks = list(sinks)
        kept = [r for r in read_records(uri) if r.get("step", 0) <= keep_until_step]
        self._lines = [json.dumps(record) + "\n" for record in kept]
        storage.write_text(uri, "".join(self._lines))
        self._file = None
        if storage.is_local(uri):
            self._lines = []
            self._file = open(storage.normalize(uri), "a", encoding="utf-8")  # noqa: SIM115

    def log(self, record: Record) -> None:
        """Append one record (JSON numbers and strings) and flush it."""
        line = json.dumps({key: _plain(value) for key, value in record.items()}) + "\n"
        if self._file:
            with self._explained():
                self._file.write(line)
                self._file.flush()
        else:
            self._lines.append(line)
        for sink in self._sinks:
            sink(record)

    def sync(self) -> None:
        """Make the log durable: fsync, or upload to the object store."""
        with self._explained():
            if self._file:
                os.fsync(self._file.fileno())
            else:
                storage.write_text(self._uri, "".join(self._lines))

    def close(self) -> None:
        for sink in self._sinks:
            if isinstance(sink, WandbSink):
                sink.close()
        self.sync()
        if self._file:
            with self._explained():
                self._file.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise NanorayError(
                f"metrics cannot be written to {self._uri} ({error}); make room or mend the "
                f"storage, then run the same command again to go on from the last checkpoint"
            ) from error


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
