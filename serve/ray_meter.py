"""The meter that Prometheus sees: METRICS as Ray metrics, with each replica's own labels by Ray."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util import metrics as ray_metrics

from serve.observe import METRICS


class RayMeter:
    """A `serve.observe.Meter`. Ray exports a counter under its name with ``_total``."""

    def __init__(self) -> None:
        self._counters: dict[str, ray_metrics.Counter] = {}
        self._gauges: dict[str, ray_metrics.Gauge] = {}
        self._histograms: dict[str, ray_metrics.Histogram] = {}
        for name, metric in METRICS.items():
            if metric.kind == "counter":
                self._counters[name] = ray_metrics.Counter(name, metric.description, metric.labels)
            elif metric.kind == "gauge":
                self._gauges[name] = ray_metrics.Gauge(name, metric.description, metric.labels)
            else:
                self._histograms[name] = ray_metrics.Histogram(
                    name, metric.description, list(metric.bounds), metric.labels
                )

    def count(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self._counters[name].inc(value, dict(labels))

    def gauge(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self._gauges[name].set(value, dict(labels))

    def observe(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self._histograms[name].observe(value, dict(labels))
