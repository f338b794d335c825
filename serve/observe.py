"""What the service tells about itself: metrics under vLLM's names, and one log line a request.

Neither holds a word of a prompt or an answer. Knows no Ray: numbers go to a `Meter`, and
serve/ray_meter.py is the one that Prometheus sees.
"""

from __future__ import annotations

import json
import logging
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_WAIT_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ANSWER_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(frozen=True)
class Metric:
    """One metric: its kind, what it means, and a histogram's upper bounds."""

    kind: str
    description: str
    bounds: tuple[float, ...] = ()
    labels: tuple[str, ...] = ("model",)


# Named as vLLM names them, so that its dashboards need only our prefix.
METRICS = {
    "nanoray_time_to_first_token_seconds": Metric(
        "histogram", "From the request's arrival to its first token.", _WAIT_SECONDS
    ),
    "nanoray_inter_token_latency_seconds": Metric(
        "histogram", "Between the tokens of an answer, its mean.", _TOKEN_SECONDS
    ),
    "nanoray_request_queue_time_seconds": Metric(
        "histogram", "From the request's arrival to a slot of the engine.", _WAIT_SECONDS
    ),
    "nanoray_e2e_request_latency_seconds": Metric(
        "histogram", "From the request's arrival to its end.", _ANSWER_SECONDS
    ),
    "nanoray_num_requests_running": Metric("gauge", "Sequences in the engine's slots."),
    "nanoray_num_requests_waiting": Metric("gauge", "Sequences that wait for a slot."),
    "nanoray_kv_cache_usage_perc": Metric(
        "gauge", "Share of the cache that holds tokens of running sequences, 0-1."
    ),
    "nanoray_config_refused": Metric(
        "gauge", "1 while the newest config is refused and the one before serves on.", labels=()
    ),
    "nanoray_prefix_cache_queries": Metric("counter", "Prompt tokens looked up in the cache."),
    "nanoray_prefix_cache_hits": Metric("counter", "Prompt tokens found in the cache."),
    "nanoray_prompt_tokens": Metric("counter", "Prompt tokens of requests."),
    "nanoray_generation_tokens": Metric("counter", "Tokens generated for requests."),
    "nanoray_request_success": Metric(
        "counter", "Requests answered, by how.", labels=("model", "finished_reason")
    ),
    "nanoray_request_failure": Metric(
        "counter", "Requests refused, failed or left, by status.", labels=("model", "status")
    ),
}


class Meter(Protocol):
    """Where numbers go. `name` is one of METRICS, `labels` has its labels."""

    def count(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """Add to a counter; `value` is above 0."""

    def gauge(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """Set a gauge."""

    def observe(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """Add one observation to a histogram."""


_Key = tuple[str, tuple[tuple[str, str], ...]]


@dataclass
class MemoryMeter:
    """Numbers kept here, by name and labels."""

    counters: Counter[_Key] = field(default_factory=Counter)
    gauges: dict[_Key, float] = field(default_factory=dict)
    buckets: dict[_Key, list[int]] = field(default_factory=dict)
    """A histogram's counts up to each bound, and beyond the last."""

    def count(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self.counters[_key(name, labels)] += value  # type: ignore[assignment]

    def gauge(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self.gauges[_key(name, labels)] = value

    def observe(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        bounds = METRICS[name].bounds
        counts = self.buckets.setdefault(_key(name, labels), [0] * (len(bounds) + 1))
        counts[bisect_left(bounds, value)] += 1


def _key(name: str, labels: Mapping[str, str]) -> _Key:
    assert set(labels) == set(METRICS[name].labels), (name, labels)
    return name, tuple(sorted(labels.items()))


@dataclass
class _Sample:
    """One of a request's answers: when its tokens came, and how many after the first ones."""

    first_s: float
    last_s: float
    num_later: int = 0


class RequestRecord:
    """One request, from its arrival to its end. Made by Observer.request()."""

    def __init__(self, observer: Observer, fields: dict[str, Any], arrived_s: float | None) -> None:
        self._observer, self._fields = observer, fields
        now = observer.clock()
        self._start_s = now if arrived_s is None else arrived_s
        self._before_s = now - self._start_s  # in Serve's queue, and being read
        self._samples: dict[int, _Sample] = {}
        self._num_prompt = self._num_tokens = 0
        self._queue_s: float | None = None
        self._finished = False

    def prompt_tokens(self, n: int) -> None:
        """The prompts have n tokens in all."""
        self._num_prompt += n

    def queued(self, seconds: float) -> None:
        """The engine had no slot for so long."""
        self._queue_s = self._before_s + seconds

    def tokens(self, n: int, index: int = 0) -> None:
        """n more tokens of the sample with this index."""
        if not n:
            return
        self._num_tokens += n
        now = self._observer.clock()
        if sample := self._samples.get(index):
            sample.last_s = now
            sample.num_later += n
        else:
            self._samples[index] = _Sample(now, now)

    def finish(self, status: int, reason: str) -> None:
        """The end: HTTP status (499: the client has left) and "stop", "length", "abort", ….

        The first call counts, others do nothing: an error's handler and a `finally` may both come.
        """
        if self._finished:
            return
        self._finished = True
        now, model = self._observer.clock(), self._fields["model"]
        seconds = {"e2e_request_latency": now - self._start_s}
        samples = self._samples.values()
        if samples:
            first_s = min(sample.first_s for sample in samples)
            seconds["time_to_first_token"] = first_s - self._start_s
        if num_later := sum(sample.num_later for sample in samples):
            between_s = sum(sample.last_s - sample.first_s for sample in samples)
            seconds["inter_token_latency"] = between_s / num_later
        if self._queue_s is not None:
            seconds["request_queue_time"] = self._queue_s
        outcome = {"status": status, "finish_reason": reason}
        counts = {"prompt_tokens": self._num_prompt, "generation_tokens": self._num_tokens}
        times = {f"{name}_s": round(value, 4) for name, value in seconds.items()}
        self._observer.finished(model, outcome, counts, seconds, {**self._fields, **times})


class Observer:
    """Counts and logs the requests of a service.

    Args:
        meter: where numbers go.
        logger: of the access log: a JSON object a request, at level INFO.
        clock: seconds.
    """

    def __init__(
        self,
        meter: Meter | None = None,
        logger: logging.Logger | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.meter = meter or MemoryMeter()
        self.clock = clock
        self._logger = logger or logging.getLogger("nanoray.access")
        self._cache_before: dict[str, tuple[float, float]] = {}

    def request(
        self,
        route: str,
        model: str,
        *,
        method: str = "POST",
        request_id: str = "",
        arrived_s: float | None = None,
    ) -> RequestRecord:
        """The start of a request, before the engine's queue.

        Args:
            route: its path as the API defines it, without parameters.
            model: a served model's name, or "" while there is none: a client's own words must
                neither become a label nor reach the log.
            arrived_s: when it arrived, by our clock; by default now.
        """
        fields = {"request_id": request_id, "method": method, "route": route, "model": model}
        return RequestRecord(self, fields, arrived_s)

    def finished(
        self,
        model: str,
        outcome: Mapping[str, Any],
        counts: Mapping[str, int],
        seconds: Mapping[str, float],
        fields: Mapping[str, Any],
    ) -> None:
        """A request's end, from its record."""
        labels = {"model": model}
        for name, value in seconds.items():
            self.meter.observe(f"nanoray_{name}_seconds", value, labels)
        for name, number in counts.items():
            if number:
                self.meter.count(f"nanoray_{name}", number, labels)
        status = int(outcome["status"])
        if status < 400:
            reason = {"finished_reason": str(outcome["finish_reason"])}
            self.meter.count("nanoray_request_success", 1, labels | reason)
        else:
            self.meter.count("nanoray_request_failure", 1, labels | {"status": str(status)})
        self._logger.info(json.dumps({**fields, **outcome, **counts}))

    def engines(self, models: Mapping[str, Mapping[str, float]]) -> None:
        """What the engines do now: gauges, and counters since the last look (see Engine.stats)."""
        for model in self._cache_before.keys() - models.keys():
            self._engine(model, 0, 0, 0)  # it was let go; a gauge would keep its last value
            del self._cache_before[model]
        for model, stats in models.items():
            labels = {"model": model}
            usage = stats["busy_tokens"] / stats["cache_capacity_tokens"]
            self._engine(model, stats["running"], stats["waiting"], usage)
            now = (stats["prompt_tokens"], stats["cached_prompt_tokens"])
            before = self._cache_before.get(model, (0.0, 0.0))
            if now < before:  # another engine, which counts from zero
                before = (0.0, 0.0)
            for name, new, old in zip(("queries", "hits"), now, before):
                if new > old:
                    self.meter.count(f"nanoray_prefix_cache_{name}", new - old, labels)
            self._cache_before[model] = now

    def _engine(self, model: str, running: float, waiting: float, usage: float) -> None:
        labels = {"model": model}
        self.meter.gauge("nanoray_num_requests_running", running, labels)
        self.meter.gauge("nanoray_num_requests_waiting", waiting, labels)
        self.meter.gauge("nanoray_kv_cache_usage_perc", usage, labels)

    def config(self, refused: bool) -> None:
        """Whether the newest config is refused."""
        self.meter.gauge("nanoray_config_refused", float(refused), {})
