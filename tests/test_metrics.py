"""metrics.jsonl: appended, cut back on resume, readable by every JSON reader."""

from __future__ import annotations

import json
import math
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanoray import metrics as metrics_module
from nanoray import storage
from nanoray.errors import NanorayError
from nanoray.metrics import MetricsLog, Record, WandbSink, read_records


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


@pytest.mark.slow
def test_wandb_gets_every_number_and_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline: what would be sent lies in a file. Without the end, a run counts as crashed."""
    from wandb.proto.wandb_internal_pb2 import Record as Sent  # type: ignore[attr-defined]

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = MetricsLog(str(tmp_path / "m.jsonl"), 0, [WandbSink("project", "d12", {"depth": 12})])
    log.log({"step": 1, "loss": 2.5, "name": "text is left out"})
    log.log({"step": 2, "loss": math.nan})
    log.log({"step": 2, "val_bpb": 1.25})
    log.close()
    (file,) = tmp_path.glob("wandb/offline-run-*-d12/run-d12.wandb")
    data, sent = file.read_bytes(), []
    start = 7  # of the file's own header; a record's is CRC (4 bytes), length (2), type (1)
    while start < len(data):
        end = start + 7 + int.from_bytes(data[start + 4 : start + 6], "little")
        sent.append(Sent.FromString(data[start + 7 : end]))
        start = end
    history = []
    for rows in (s.history.item for s in sent if s.HasField("history")):
        history.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in rows})
    assert [(row["_step"], row["step"], row.get("val_bpb")) for row in history] == [
        (1, 1, None),
        (2, 2, 1.25),
    ]
    assert history[0]["loss"] == 2.5
    assert all("name" not in row for row in history)
    (run,) = (s.run for s in sent if s.HasField("run"))
    assert (run.project, run.run_id, run.display_name) == ("project", "d12", "d12")
    assert any(s.HasField("exit") for s in sent)


def test_wandb_that_does_not_start_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**_settings: object) -> None:
        raise wandb.errors.UsageError("No API key configured.\nMore lines")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(NanorayError, match=r"^wandb does not start \(.*configured\.\); log in"):
        WandbSink("project", "d12", {})


def test_wandb_without_a_network_cannot_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    never = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **_settings: SimpleNamespace(finish=never.wait))
    monkeypatch.setattr(metrics_module, "WANDB_DEADLINE_S", 0.1)
    start = time.monotonic()
    WandbSink("project", "d12", {}).close()
    assert time.monotonic() - start < 5
    never.set()


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
    log._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    log.log({"step": 1})
    log.sync()
    with pytest.raises(NanorayError, match=r"metrics cannot be written to .*No space left"):
        log.close()


def test_no_record_is_lost_while_a_disk_is_full(small_disk: Path) -> None:
    uri = str(small_disk / "metrics.jsonl")
    log = MetricsLog(uri, 0)
    ballast = small_disk / "ballast"
    for step in range(1, 3001):
        if step == 1000:
            ballast.write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096))
        if step == 2000:
            assert steps(uri)[-1] < 1999, "the disk is full"
            ballast.unlink()
        log.log({"step": step, "loss": 1.5})
        if step % 100 == 0:
            log.sync()
    log.close()
    assert steps(uri) == list(range(1, 3001))


def test_a_log_on_a_bucket_can_be_followed() -> None:
    """Without a save in between, which may take an hour to come."""
    uri = f"memory://bucket-{uuid.uuid4().hex[:8]}/metrics.jsonl"
    log = MetricsLog(uri, 0)
    log.log({"step": 1})
    log._next_upload = 0.0  # the time has come
    log.log({"step": 2})
    wait_until(lambda: steps(uri) == [1, 2])
    log.log({"step": 3})
    time.sleep(0.1)
    assert steps(uri) == [1, 2], "not with every record"
    log.close()


def wait_until(fulfilled: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not fulfilled():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_no_record_is_lost_while_a_bucket_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"memory://bucket-{uuid.uuid4().hex[:8]}/metrics.jsonl"
    log = MetricsLog(uri, 0)
    log.log({"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", lambda *_: 1 / 0)  # an error of the store's own
        log.sync()
        with pytest.raises(NanorayError, match="metrics cannot be written to memory://"):
            log.close()
    log.log({"step": 2})
    log.close()
    assert steps(uri) == [1, 2]
