"""Whoever has no token gets nothing from a cluster, and nobody's secrets get into files."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from pretrain_runs import run_plan, tiny_flags, tiny_plan

from nanoray import storage
from nanoray.errors import NanorayError
from nanoray.train.record import record_config, record_failure

ROOT = Path(__file__).parents[1]
NAMES = (
    *("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "FSSPEC_FTP_PASSWORD"),
    *("NANORAY_API_KEYS", "RAY_AUTH_TOKEN"),
)
CANARIES = {name: f"canary{secrets.token_hex(16)}" for name in NAMES}


def leaks(folder: Path, canaries: dict[str, str] = CANARIES) -> list[str]:
    """The secrets that stand in files under a folder, and where."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            found += [f"{name} in {path}" for name, s in canaries.items() if s.encode() in content]
    return found


# Storage URIs.

WORD = st.text("abcXYZ019._~!$&'()*+,;=%-", min_size=1)


@given(WORD, WORD, st.sampled_from(["ftp", "sftp", "https", "s3", "smb"]))
def test_a_storage_uri_with_a_password_is_refused_and_not_repeated(
    user: str, word: str, scheme: str
) -> None:
    word += "-hunter2"
    with pytest.raises(NanorayError, match="must hold no password") as told:
        storage.normalize(f"{scheme}://{user}:{word}@host/folder")
    assert word not in str(told.value)


@pytest.mark.parametrize("door", ["NANORAY_HOME", "corpus", "tokenizer"])
def test_no_door_takes_a_password(
    door: str, home: Path, corpus: str, tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"ftp://user:{CANARIES['FSSPEC_FTP_PASSWORD']}@host/folder"
    if door == "NANORAY_HOME":
        monkeypatch.setenv(door, uri)
    given = {"corpus": corpus, "tokenizer_dir": tokenizer_dir, "run": "open"}
    given |= {"corpus": {"corpus": uri}, "tokenizer": {"tokenizer_dir": uri}}.get(door, {})
    with pytest.raises(NanorayError, match="must hold no password") as told:
        tiny_plan(**given)
    assert "canary" not in str(told.value)


@pytest.mark.parametrize("uri", ["s3://bucket/a:b@c", "abfs://box@account.net/x", "hdfs://me@host"])
def test_what_only_looks_like_a_password_is_none(uri: str) -> None:
    assert storage.normalize(uri) == uri


# A run's files.


def test_a_runs_folder_holds_nothing_of_the_environment(
    home: Path, corpus: str, tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, secret in CANARIES.items():
        monkeypatch.setenv(name, secret)
    plan = tiny_plan(corpus, tokenizer_dir, "dumped", num_iterations=2, sample_every=1)
    record_config(plan)
    assert run_plan(plan)["status"] == "finished"
    record_failure(plan, "for a look at it")
    written = {path.name for path in Path(plan.run_dir).rglob("*")}
    assert {"config.json", "summary.json", "metrics.jsonl", "samples.md", "meta.json"} <= written
    assert not leaks(home)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="nrs-"))  # sockets lie within
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class CommandLines:
    """The command lines of all that a process starts: they are every user's of the machine."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._over = threading.Event()
        self.seen: set[str] = set()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.5):
            try:
                for child in self._process.children(recursive=True):
                    self.seen.add(" ".join(child.cmdline()))
            except psutil.Error:
                continue

    def close(self) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.slow
def test_a_job_keeps_its_secrets(
    home: Path, corpus: str, tokenizer_dir: str, short_folder: Path
) -> None:
    """From its own files and output, from Ray's logs, and from command lines."""
    environment = os.environ | CANARIES | {"RAY_TMPDIR": str(short_folder), "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(
        [
            *(sys.executable, "-m", "jobs.pretrain"),
            *tiny_flags(corpus, tokenizer_dir, "kept", num_iterations=20, sample_every=10),
        ],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines = CommandLines(job.pid)
    said, _ = job.communicate(timeout=180)
    lines.close()
    assert job.returncode == 0, said
    assert "canary" not in said
    assert any("raylet" in line for line in lines.seen)
    assert not [line for line in lines.seen if "canary" in line]
    assert (home / "runs" / "kept" / "config.json").exists()
    assert not leaks(home)
    assert list(short_folder.rglob("raylet.out"))
    assert not leaks(short_folder)


# A cluster.


class Head:
    """`cluster/local.py` with a head alone; the canaries are in its environment and its jobs'."""

    def __init__(self, folder: Path) -> None:
        self.dir = folder / "c"
        self._run("up", "--trainer", "0", "--data", "0", "--rollout", "0")
        state = json.loads((self.dir / "cluster.json").read_text())
        self.address: str = state["address"]
        self.dashboard: str = state["dashboard"]
        self.token = (self.dir / "token").read_text()
        (head,) = (node for node in state["nodes"] if node["role"] == "head")
        self._flags = dict(
            word.split("=", 1) for word in psutil.Process(head["pid"]).cmdline() if "=" in word
        )

    def url(self, port_flag: str) -> str:
        """``host:port`` of a service of the head."""
        return f"{self._flags['--node-ip-address']}:{self._flags[port_flag]}"

    def _run(self, *words: str) -> None:
        subprocess.run(
            [sys.executable, "cluster/local.py", "--dir", str(self.dir), *words],
            cwd=ROOT, env=os.environ | CANARIES, check=True, timeout=300,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, method: str, path: str, token: str | None, **body: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return requests.request(method, path, headers=headers, json=body or None, timeout=60)

    def close(self) -> None:
        self._run("down")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="nrs-"))
    made = Head(folder)
    yield made
    made.close()
    shutil.rmtree(folder, ignore_errors=True)


HARMLESS = {"entrypoint": "true"}
SERVED = {"applications": [{"name": "x", "import_path": "serve.app:app", "route_prefix": "/"}]}
REQUESTS = [
    ("GET", "/api/jobs/", {}),
    ("POST", "/api/jobs/", HARMLESS),
    ("POST", "/api/jobs/x/stop", {}),
    ("DELETE", "/api/jobs/x", {}),
    ("GET", "/api/jobs/x/logs", {}),
    ("PUT", "/api/packages/gcs/x.zip", {}),
    ("GET", "/nodes?view=summary", {}),
    ("GET", "/api/cluster_status", {}),
    ("GET", "/api/v0/nodes", {}),
    ("GET", "/api/v0/actors", {}),
    ("GET", "/api/v0/logs?node_id=x", {}),
    ("GET", "/logical/actors", {}),
    ("GET", "/api/serve/applications/", {}),
    ("PUT", "/api/serve/applications/", SERVED),
    ("DELETE", "/api/serve/applications/", {}),
]
AGENT_REQUESTS = [
    ("POST", "/api/job_agent/jobs/", HARMLESS),
    ("POST", "/api/job_agent/jobs/x/stop", {}),
    ("DELETE", "/api/job_agent/jobs/x", {}),
    ("GET", "/api/job_agent/jobs/x/logs", {}),
]


@pytest.mark.slow
def test_without_the_token_no_request_is_answered(head: Head) -> None:
    agent = f"http://{head.url('--dashboard-agent-listen-port')}"
    asked = [(head.dashboard, *request) for request in REQUESTS]
    asked += [(agent, *request) for request in AGENT_REQUESTS]
    for base, method, path, body in asked:
        assert head.ask(method, base + path, None, **body).status_code == 401, path
        assert head.ask(method, base + path, "0" * 64, **body).status_code == 403, path
    jobs = head.ask("GET", f"{head.dashboard}/api/jobs/", head.token)
    assert (jobs.status_code, jobs.json()) == (200, []), "none was started"
    served = head.ask("GET", f"{head.dashboard}/api/serve/applications/", head.token)
    assert (served.status_code, served.json()["applications"]) == (200, {})


INTRUDER = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False)
print("it is in:", ray.nodes())
"""


@pytest.mark.slow
def test_without_the_token_nobody_joins(head: Head) -> None:
    """Neither as a driver (the GCS) nor through Ray's client server; with it, both work."""
    client = f"ray://{head.url('--ray-client-server-port')}"
    hidden = ("RAY_AUTH", "RAY_ADDRESS")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    without = {"RAY_AUTH_MODE": "disabled"}
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    right = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token}

    def start(where: str, how: dict[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", INTRUDER, where], cwd=head.dir, env=plain | how,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    refused = [
        (where, how, start(where, how))
        for where in (head.address, client)
        for how in (without, wrong)
    ]
    for where, how, process in refused:
        said, _ = process.communicate(timeout=240)
        assert process.returncode != 0, (where, how)
        assert "it is in" not in said, (where, how)
    # By themselves: Ray gives the server behind its client 30 s to start.
    for where in (head.address, client):
        process = start(where, right)
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, (where, said)
        assert "it is in" in said, where


@pytest.mark.slow
def test_a_strange_token_is_told_in_a_sentence(head: Head) -> None:
    environment = os.environ | {
        "RAY_ADDRESS": head.address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0" * 64,
    }
    command = "from nanoray import config, fleet; config.run_job(lambda _: fleet.connect())"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]  # after Ray's own warnings
    assert re.match(r"error: the Ray cluster at RAY_ADDRESS=.* cannot be joined: ", last)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_submitted_job_has_secrets_that_nobody_is_shown(head: Head) -> None:
    script = "import os; print('it has', sum('canary' in v for v in os.environ.values()))"
    made = head.ask(
        "POST", f"{head.dashboard}/api/jobs/", head.token,
        entrypoint=f'{sys.executable} -c "{script}"', submission_id="kept",
    )  # fmt: skip
    assert made.status_code == 200, made.text
    answers = [""]
    deadline = time.monotonic() + 120
    while '"SUCCEEDED"' not in answers[-1]:
        assert '"FAILED"' not in answers[-1]
        assert time.monotonic() < deadline
        time.sleep(0.3)
        answers.append(head.ask("GET", f"{head.dashboard}/api/jobs/kept", head.token).text)
    for path in ("/api/jobs/", "/api/v0/jobs?detail=1", "/api/v0/runtime_envs?detail=1"):
        answers.append(head.ask("GET", head.dashboard + path, head.token).text)
    logs = head.ask("GET", f"{head.dashboard}/api/jobs/kept/logs", head.token).text
    assert f"it has {len(CANARIES) - 1}" in logs, "the token comes from a file"
    hidden = CANARIES | {"token": head.token}
    told = "\n".join([*answers, logs])
    assert not [name for name, secret in hidden.items() if secret in told]
    assert leaks(head.dir, hidden) == [f"token in {head.dir / 'token'}"]
