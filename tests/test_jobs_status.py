"""``python -m jobs.status``: runs in every state, folders that are none, homes that are URIs."""

from __future__ import annotations

import http.server
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.status import main, read_run, read_runs
from nanoray import storage
from nanoray.lease import Lease

STEP = {"step": 7, "loss": 2.5, "tokens_per_s": 1000.0, "eta_s": 90.0, "batch_hash": "ab"}


@pytest.fixture(params=["local", "memory"])
def base(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A NANORAY_HOME: a folder, or a bucket."""
    bucket = f"memory://status-{uuid.uuid4().hex[:8]}/home"
    home = str(tmp_path / "home") if request.param == "local" else bucket
    monkeypatch.setenv("NANORAY_HOME", home)
    return home


def make_run(base: str, run: str, **files: Any) -> str:
    """A run's folder with the JSON files given by stem; ``metrics`` is a list of records."""
    folder = storage.join(base, "runs", run)
    for stem, content in files.items():
        if stem == "metrics":
            text = "".join(json.dumps(record) + "\n" for record in content)
            storage.write_text(storage.join(folder, "metrics.jsonl"), text)
        else:
            storage.write_text(storage.join(folder, f"{stem}.json"), json.dumps(content))
    return folder


CONFIG = {"stage": "pretrain", "num_iterations": 10}
# Of a process on a machine that is not this one: all there is to go by is the heartbeat.
ELSEWHERE = {"token": "t", "host": "elsewhere", "pid": 1, "released": False}


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_states_and_order(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    now = time.time()
    live = ELSEWHERE | {"heartbeat": now - 2}
    dead = ELSEWHERE | {"heartbeat": now - 500}
    earlier = ELSEWHERE | {"heartbeat": now - 600}
    over = dead | {"released": True}
    make_run(base, "live", config=CONFIG, lease=live, metrics=[STEP, {"step": 7, "val_bpb": 1.0}])
    make_run(base, "new", config=CONFIG, lease=live)
    make_run(base, "killed", config=CONFIG, lease=earlier, metrics=[STEP])
    # Stopped once, killed when it went on.
    make_run(base, "again", config=CONFIG, lease=dead, summary={"status": "stopped"})
    make_run(base, "ended", config=CONFIG, lease=over, metrics=[STEP],
             summary={"status": "finished", "tokens_per_s": 900.0})  # fmt: skip
    make_run(base, "halted", config=CONFIG, lease=over, summary={"status": "stopped"})
    make_run(base, "bad", config=CONFIG, lease=over, summary={"status": "failed", "error": "NaN"})
    storage.write_text(storage.join(base, "runs", "notes", "x.txt"), "mine")
    if storage.is_local(base):
        storage.write_text(storage.join(base, "runs", "stray"), "a file")
    make_run(base, "damaged", config=[1, 2])
    torn = make_run(base, "torn", lease=over)
    storage.write_text(storage.join(torn, "config.json"), '{"stage": "pre')

    runs = {run["run"]: run for run in told(capsys)["runs"]}
    states = [(name, run["status"]) for name, run in runs.items()]
    assert states == [
        ("live", "running"), ("new", "starting"), ("again", "lost"), ("killed", "lost"),
        ("bad", "failed"), ("halted", "stopped"), ("ended", "finished"),
        ("damaged", "unreadable"), ("torn", "unreadable"), ("notes", "foreign"),
        *([("stray", "foreign")] if storage.is_local(base) else []),
    ]  # fmt: skip
    assert runs["live"] == runs["live"] | {
        "stage": "pretrain", "step": 7, "num_iterations": 10, "loss": 2.5, "tokens_per_s": 1000.0,
        "eta_s": 90.0, "writer": "elsewhere:1",
    }  # fmt: skip
    assert 2 <= runs["live"]["age_s"] < 10
    assert "eta_s" not in runs["killed"]
    assert runs["ended"]["tokens_per_s"] == 900.0
    assert runs["bad"]["problem"] == "NaN"
    assert "ValueError: config.json holds no JSON object" in runs["damaged"]["problem"]
    assert "JSONDecodeError" in runs["torn"]["problem"]


def test_a_real_lease(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(base, "mine", config=CONFIG, metrics=[STEP])
    lease = Lease(folder)
    try:
        (run,) = told(capsys)["runs"]
        assert (run["status"], run["writer"].split(":")[1]) == ("running", str(os.getpid()))
        assert run["age_s"] < 10
    finally:
        lease.release()
    assert told(capsys)["runs"][0]["status"] == "lost"  # it ended without a summary


def test_the_table(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "no runs under" in capsys.readouterr().out
    make_run(base, "d12", config=CONFIG, lease=ELSEWHERE | {"heartbeat": time.time()},
             metrics=[STEP])  # fmt: skip
    make_run(base, "[red]x\x1b[2J", other={})
    assert main([]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "d12" in line)
    for cell in ("pretrain", "running", "7/10", "2.5000", "1,000", "1:30"):
        assert cell in row
    assert "[red]x" in out
    assert "\x1b" not in out


def test_only_the_log_s_end_is_read(base: str) -> None:
    records = [STEP | {"step": i, "note": "x" * 200} for i in range(1, 1001)]
    folder = make_run(base, "long", config=CONFIG, metrics=records)
    torn = storage.read_bytes(storage.join(folder, "metrics.jsonl")) + b'{"step": 1001, "lo'
    storage.write_bytes(storage.join(folder, "metrics.jsonl"), torn)
    assert read_runs(base)[0].step == 1000


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["config.json", "summary.json", "lease.json", "metrics.jsonl"]),
        st.binary(max_size=60)
        | st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(
                        "stage status step loss heartbeat released pid host boot num_iterations "
                        "tokens_per_s eta_s error pid_namespace process_started".split()
                    ),
                    inner,
                    max_size=6,
                )
            ),
            max_leaves=12,
        ).map(lambda value: json.dumps(value).encode()),
        max_size=4,
    )
)
def test_no_folder_is_a_crash(files: dict[str, bytes]) -> None:
    root = f"memory://wild-{uuid.uuid4().hex[:8]}/runs"
    for name, data in files.items():
        storage.write_bytes(storage.join(root, "r", name), data)
    run = read_run(root, "r")
    json.dumps(vars(run), allow_nan=False)
    assert run.problem or run.status not in ("unreadable", "foreign")


@pytest.fixture
def jobs_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """What a Ray dashboard answers about jobs; the status codes to answer with can be changed."""
    jobs = [
        {"type": "SUBMISSION", "submission_id": "s1", "job_id": "01000000", "status": "RUNNING",
         "entrypoint": "python -m jobs.pretrain --run d12", "start_time": int(1000 * time.time())},
        {"type": "SUBMISSION", "submission_id": "s2", "job_id": None, "status": "SUCCEEDED",
         "entrypoint": "python -m jobs.sft", "start_time": 1},
    ]  # fmt: skip
    code = [200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            version = {"version": "4", "ray_version": "2.60.0", "ray_commit": "x"}
            body = json.dumps(version if "version" in self.path else jobs).encode()
            self.send_response(code[0])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{server.server_port}")
    yield code
    server.shutdown()
    server.server_close()


def test_live_jobs(home: Path, jobs_server: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    (job,) = told(capsys)["jobs"]
    assert job == job | {
        "job": "s1", "status": "running", "entrypoint": "python -m jobs.pretrain --run d12"
    }  # fmt: skip
    jobs_server[0] = 401  # no token: the runs are told all the same
    make_run(str(home), "d12", config=CONFIG)
    assert main([]) == 1
    out = capsys.readouterr().out
    assert "d12" in out
    assert "the cluster's jobs cannot be read" in out
