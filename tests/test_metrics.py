"""metrics.jsonl: appended, cut back on resume, readable by every JSON reader."""

from __future__ import annotations

import json
import math
import uuid
from pathlib import Path

import pytest

from nanoray import storage
from nanoray.errors import NanorayError
from nanoray.metrics import MetricsLog, Record, read_records


@pytest.fixture(params=["local", "memory"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "run" / "metrics.jsonl")
    return f"memory://bucket-{uuid.uuid4().hex[:8]}/run/metrics.jsonl"


def steps(uri: str) -> list[int]:
    return [record["step"] for record in read_records(uri)]


def test_no_file(uri: str) -> None:
    assert read_records(uri) == []


def test_append_and_flush(uri: str) -> None:
    log = MetricsLog(uri, 0)
    for step in (1, 2):
        log.log({"step": step, "loss": 1.5, "name": "d12"})
        if storage.is_local(uri):
            assert steps(uri) == list(range(1, step + 1)), "on disk at once"
    if not storage.is_local(uri):
        assert steps(uri) == [], "uploaded by sync only"
    log.sync()
    assert read_records(uri)[1] == {"step": 2, "loss": 1.5, "name": "d12"}
    log.log({"step": 3})
    log.close()
    assert steps(uri) == [1, 2, 3]


def test_cut_back_on_resume(uri: str) -> None:
    log = MetricsLog(uri, 0)
    for step in range(1, 8):
        log.log({"step": step, "start": 1})
    log.close()
    log = MetricsLog(uri, 5)
    assert steps(uri) == [1, 2, 3, 4, 5]
    log.log({"step": 6, "start": 2})
    log.close()
    assert [(r["step"], r["start"]) for r in read_records(uri)][-2:] == [(5, 1), (6, 2)]
    MetricsLog(uri, 0).close()
    assert steps(uri) == []


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b"12", b'"', b"\xff\xfe", b'{"step": 3}'])
def test_torn_last_line(uri: str, tail: bytes) -> None:
    whole = b'{"step": 1}\n{"step": 2}\n'
    storage.write_bytes(uri, whole + tail)
    complete = 3 if tail.endswith(b"}") else 2
    assert steps(uri) == list(range(1, complete + 1))
    log = MetricsLog(uri, 10)
    log.log({"step": complete + 1})
    log.close()
    assert steps(uri) == list(range(1, complete + 2)), "no line is glued to the torn one"


def test_nan_becomes_null(uri: str) -> None:
    log = MetricsLog(uri, 0)
    log.log({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e308})
    log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(storage.read_text(uri), parse_constant=refuse)
    assert record == {"step": 1, "a": None, "b": None, "c": None, "d": 1e308}


def test_sinks(uri: str) -> None:
    seen: list[tuple[str, Record]] = []
    log = MetricsLog(
        uri, 0, [lambda r: seen.append(("first", r)), lambda r: seen.append(("second", r))]
    )
    log.log({"step": 1, "loss": 2.0})
    log.close()
    assert seen == [("first", {"step": 1, "loss": 2.0}), ("second", {"step": 1, "loss": 2.0})]


def test_a_full_disk_is_explained() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    log = MetricsLog(f"memory://bucket-{uuid.uuid4().hex[:8]}/metrics.jsonl", 0)
    log._file = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(NanorayError, match=r"metrics cannot be written to .*No space left"):
        log.log({"step": 1})
    with pytest.raises(NanorayError, match="metrics cannot be written"):
        log.close()
