"""The board where a run's workers report, and the gauges that Ray exports of their numbers."""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import ray
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nanoray.errors import NanorayError
from nanoray.metrics import Record, Sink


@ray.remote(num_cpus=0, max_restarts=0)
class Board:
    """Where the workers of a run post records and read whether to stop; one small actor a run."""

    def __init__(self) -> None:
        self._records: deque[dict[str, Any]] = deque(maxlen=10_000)
        self._stop = ""
        self._stopped_s = self._asked_s = 0.0  # when: the flag went up, a worker last asked
        self._verdict: dict[str, Any] = {}
        self._start_step = 0

    def start_from(self, step: int) -> None:
        """Which checkpoint the workers that start next go on from."""
        self._start_step = step

    def start_step(self) -> int:
        return self._start_step

    def post(self, record: dict[str, Any]) -> None:
        self._records.append(record)

    def drain(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The records since the last call, and the verdict (empty while there is none)."""
        records = list(self._records)
        self._records.clear()
        return records, self._verdict

    def stop(self, reason: str) -> None:
        if not self._stop:
            self._stop, self._stopped_s = reason, time.monotonic()

    def stop_reason(self) -> str:
        """Why to stop, or an empty string; asked by the workers, twice a second."""
        self._asked_s = time.monotonic()
        return self._stop

    def unheard_s(self) -> float:
        """For how long no worker has been there to hear that it is to stop."""
        since_s = max(self._stopped_s, self._asked_s)
        return time.monotonic() - since_s if self._stop else 0.0

    def conclude(self, verdict: dict[str, Any]) -> None:
        """How the run ended: its summary, or {"error": ...}. An error stands."""
        if "error" not in self._verdict:
            self._verdict = verdict

    def failed(self) -> bool:
        return "error" in self._verdict


def start_board(name: str) -> Any:
    """A board on the driver's own node: it shall not be lost before the driver is."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Board.options(name=name, scheduling_strategy=here).remote()  # type: ignore[attr-defined]


@contextlib.contextmanager
def mistakes_told(board: Any) -> Iterator[None]:
    """A NanorayError in the block is the run's verdict: no restart mends it.

    It is said before it ends the group; others may wait for this worker in a collective.
    """
    try:
        yield
    except NanorayError as error:
        ray.get(board.conclude.remote({"error": str(error)}), timeout=30)
        raise


class StopWatch:
    """Reads a board's stop flag in a thread, so that a training step never waits for it."""

    def __init__(self, board: Any, period_s: float = 0.5) -> None:
        self._board = board
        self._period_s = period_s
        self._reason = ""
        self._closed = threading.Event()
        threading.Thread(target=self._poll, name="stop-watch", daemon=True).start()

    def _poll(self) -> None:
        while not self._closed.wait(self._period_s):
            try:
                self._reason = ray.get(self._board.stop_reason.remote(), timeout=5)
            except ray.exceptions.GetTimeoutError:
                continue
            except ray.exceptions.RayError:
                self._reason = "the run's driver is gone"
                return

    def __call__(self) -> str:
        """Why to stop, or an empty string."""
        return self._reason

    def close(self) -> None:
        self._closed.set()


def gauge_name(stage: str, key: str) -> str:
    """The Ray gauge of a record's key; Prometheus sees it as ``ray_<name>``.

    Keys such as ``pass@4`` and ``chat/gsm8k`` have characters that Ray would discard the gauge for.
    """
    return re.sub(r"[^a-zA-Z0-9_]", "_", f"nanoray_{stage}_{key}")


def gauge_sink(stage: str, run: str) -> Sink:
    """A metrics sink that exports every number as a Ray gauge, see `gauge_name`.

    The gauge ``not_finite`` tells how many numbers of the last record were NaN or infinite: Ray's
    exporter leaves these out, so that their own gauges are gone.
    """
    gauges: dict[str, Gauge] = {}

    def sink(record: Record) -> None:
        numbers = {
            key: value
            for key, value in record.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        not_finite = sum(not math.isfinite(value) for value in numbers.values())
        for key, value in {**numbers, "not_finite": not_finite}.items():
            if key not in gauges:
                gauges[key] = Gauge(
                    gauge_name(stage, key), description=f"{key} of {stage}", tag_keys=("run",)
                )
                gauges[key].set_default_tags({"run": run})
            gauges[key].set(value)

    return sink
