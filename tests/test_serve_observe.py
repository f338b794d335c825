"""What the service counts and logs of a request; the API keys, which it never shows."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from nanoray.errors import NanorayError
from serve.keys import read_api_keys
from serve.observe import METRICS, MemoryMeter, Observer, RequestRecord


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_request_is_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    meter, clock = MemoryMeter(), Clock()
    observer = Observer(meter, logging.getLogger("test.access"), clock)
    with caplog.at_level(logging.INFO, "test.access"):
        record = observer.request("/v1/chat/completions", "demo", request_id="r1")
        record.prompt_tokens(7)
        record.queued(0.2)
        clock.now = 0.3
        record.tokens(1)
        clock.now = 0.7
        record.tokens(4)
        clock.now = 1.0
        record.finish(200, "stop")
        record.finish(499, "abort")
        left = observer.request("/v1/chat/completions", "demo")
        left.finish(499, "abort")
    lines = [json.loads(line.message) for line in caplog.records]
    assert lines[0] == {
        "request_id": "r1",
        "method": "POST",
        "route": "/v1/chat/completions",
        "model": "demo",
        "status": 200,
        "finish_reason": "stop",
        "prompt_tokens": 7,
        "generation_tokens": 5,
        "e2e_request_latency_s": 1.0,
        "time_to_first_token_s": 0.3,
        "inter_token_latency_s": 0.1,
        "request_queue_time_s": 0.2,
    }
    assert len(lines) == 2
    labels = ("model", "demo")
    assert meter.counters == {
        ("nanoray_prompt_tokens", (labels,)): 7,
        ("nanoray_generation_tokens", (labels,)): 5,
        ("nanoray_request_success", (("finished_reason", "stop"), labels)): 1,
        ("nanoray_request_failure", (labels, ("status", "499"))): 1,
    }
    first = meter.buckets["nanoray_time_to_first_token_seconds", (labels,)]
    assert METRICS["nanoray_time_to_first_token_seconds"].bounds[first.index(1)] == 0.5
    assert sum(meter.buckets["nanoray_e2e_request_latency_seconds", (labels,)]) == 2


def ended(record: RequestRecord, caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    """What the log says of a request that ends now."""
    with caplog.at_level(logging.INFO, "nanoray.access"):
        record.finish(200, "stop")
    return json.loads(caplog.records[-1].message)


def test_the_time_before_the_engine_counts(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    clock.now = 10.0
    record = Observer(clock=clock).request("/v1/completions", "demo", arrived_s=7.0)
    record.queued(0.5)
    clock.now = 11.0
    record.tokens(1)
    line = ended(record, caplog)
    assert line["request_queue_time_s"] == 3.5
    assert line["time_to_first_token_s"] == line["e2e_request_latency_s"] == 4.0
    assert "inter_token_latency_s" not in line


def test_between_tokens_is_between_those_of_one_sample(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    record = Observer(clock=clock).request("/v1/completions", "demo")
    for step in range(1, 11):
        clock.now = step * 0.1
        for index in range(8):
            record.tokens(1, index)
    clock.now = 5.0
    record.tokens(3, 8)  # all at once, after a long wait: says nothing of the time between
    line = ended(record, caplog)
    assert line["inter_token_latency_s"] == 0.1
    assert line["time_to_first_token_s"] == 0.1
    assert line["generation_tokens"] == 83


def test_a_model_that_is_let_go_leaves_no_gauge_behind() -> None:
    meter = MemoryMeter()
    observer = Observer(meter)
    stats = {"running": 2, "waiting": 3, "busy_tokens": 30, "cache_capacity_tokens": 100}
    stats |= {"prompt_tokens": 40, "cached_prompt_tokens": 10}
    observer.engines({"old": stats, "new": stats})
    gauges = {
        "nanoray_num_requests_running": 2,
        "nanoray_num_requests_waiting": 3,
        "nanoray_kv_cache_usage_perc": 0.3,
    }
    old, new = (("model", "old"),), (("model", "new"),)
    assert meter.gauges == {(name, of): v for name, v in gauges.items() for of in (old, new)}
    observer.engines({"new": stats})
    assert {name: meter.gauges[name, old] for name in gauges} == dict.fromkeys(gauges, 0)
    assert {name: meter.gauges[name, new] for name in gauges} == gauges
    observer.engines({"old": stats, "new": stats})  # another engine, which counts from zero
    assert meter.counters["nanoray_prefix_cache_queries", old] == 80


# ---- keys


def test_api_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_api_keys(None) == ()
    file = tmp_path / "keys"
    file.write_text("# for the team\nsecret-number-1\n\n  secret-number-2  \n")
    assert read_api_keys(str(file)) == ("secret-number-1", "secret-number-2")
    monkeypatch.setenv("NANORAY_API_KEYS", "from-the-environment,secret-number-1")
    assert read_api_keys(None) == ("from-the-environment", "secret-number-1")
    assert len(read_api_keys(str(file))) == 3


@pytest.mark.parametrize("content", [None, b"", b"# none\n\n", b"short\n", b"two words\n", b"\xff"])
def test_keys_that_are_none_do_not_open_the_door(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(NanorayError) as error:
        read_api_keys(str(file))
    assert "short" not in str(error.value)
    assert "two words" not in str(error.value)
