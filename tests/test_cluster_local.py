"""The local cluster: nodes with roles, the token, `ray job submit`, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import requests
from pretrain_runs import tiny_flags

from nanoray.checkpoint import Checkpoint, list_steps

REPOSITORY = Path(__file__).parents[1]
DEADLINE_S = 300.0  # of one thing; on a quiet machine all of it takes a minute or two


def wait_for(what: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + deadline_s
    while not what():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.5)


class Cluster:
    """`cluster/local.py` as a user runs it, in a folder and with a home of its own."""

    def __init__(self, folder: Path) -> None:
        self.dir = folder / "c"
        self.home = folder / "home"
        self.environment = os.environ | {"NANORAY_HOME": str(self.home), "OMP_NUM_THREADS": "1"}

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "cluster/local.py", "--dir", str(self.dir), *words]
        return subprocess.run(
            command, cwd=REPOSITORY, env=self.environment, capture_output=True, text=True,
            timeout=DEADLINE_S, check=check,
        )  # fmt: skip

    def ray(self, *words: str) -> subprocess.CompletedProcess[str]:
        """The command `ray` with the environment that `env` prints."""
        lines = [line.removeprefix("export ") for line in self.run("env").stdout.splitlines()]
        own = dict(line.split("=", 1) for line in lines)
        command = [sys.executable, "-m", "ray.scripts.scripts", *words]
        return subprocess.run(
            command, cwd=REPOSITORY, env=self.environment | own, capture_output=True, text=True,
            timeout=DEADLINE_S, check=False,
        )  # fmt: skip

    def submit(self, name: str, flags: list[str]) -> None:
        made = self.ray("job", "submit", "--no-wait", "--submission-id", name, "--working-dir", ".",
                        "--", "python", "-m", "jobs.pretrain", *flags)  # fmt: skip
        assert made.returncode == 0, made.stdout + made.stderr

    def status(self, name: str) -> str:
        told = self.ray("job", "status", name)
        return told.stdout + told.stderr

    def ended(self, run: str) -> bool:
        summary = self.home / "runs" / run / "summary.json"
        return summary.exists() and '"finished"' in summary.read_text()

    def steps(self, run: str) -> int:
        log = self.home / "runs" / run / "metrics.jsonl"
        return log.read_bytes().count(b"batch_hash") if log.exists() else 0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="nrc-"))  # short: sockets lie within
    made = Cluster(folder)
    try:
        made.run("up", "--rollout", "0")
        yield made
    finally:
        made.run("down")
        shutil.rmtree(folder)


@pytest.mark.slow
def test_nodes_have_roles_and_a_token_keeps_strangers_out(cluster: Cluster) -> None:
    state = json.loads((cluster.dir / "cluster.json").read_text())
    assert [node["role"] for node in state["nodes"]] == ["head", "trainer", "data"]
    listed = cluster.run("status").stdout
    assert listed.count(" alive ") == 3
    token = cluster.dir / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(cluster.dir.stat().st_mode) == 0o700

    for path in ("/api/jobs/", "/nodes?view=summary", "/api/v0/nodes", "/api/serve/applications/"):
        assert requests.get(state["dashboard"] + path, timeout=30).status_code == 401, path
        wrong = {"Authorization": f"Bearer {'0' * 64}"}
        answer = requests.get(state["dashboard"] + path, headers=wrong, timeout=30)
        assert answer.status_code in (401, 403), path
    secret = token.read_text()
    logs = [path for path in cluster.dir.rglob("*") if path.is_file() and path != token]
    assert logs
    assert not [path for path in logs if secret.encode() in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_submitted_run_is_stopped_and_goes_on(
    cluster: Cluster, corpus: str, tokenizer_dir: str
) -> None:
    # Long enough to be stopped on the way, short enough to end by itself.
    flags = tiny_flags(corpus, tokenizer_dir, "tiny", num_iterations=300, num_workers=2)
    cluster.submit("first", flags)
    wait_for(lambda: cluster.steps("tiny") >= 20)
    stopped = cluster.ray("job", "stop", "first")
    assert "was stopped" in stopped.stdout + stopped.stderr
    assert "run tiny stopped" in cluster.ray("job", "logs", "first").stdout

    root = str(cluster.home / "runs" / "tiny" / "checkpoints")
    (step,) = list_steps(root)
    assert 20 <= step < 300
    with Checkpoint(root, step) as checkpoint:
        assert checkpoint.meta["step"] == step
    actors = cluster.ray("list", "actors", "--filter", "state!=DEAD", "--format", "json").stdout
    # Two of Ray Data's own outlive every job; they hold no CPUs.
    left = {actor["class_name"] for actor in json.loads(actors[actors.index("[") :])}
    assert left <= {"_StatsActor", "_AutoscalingCoordinatorActor"}

    cluster.submit("second", flags)
    wait_for(lambda: cluster.ended("tiny"))
    wait_for(lambda: "succeeded" in cluster.status("second"))
    assert list_steps(root)[-1] == 300
    records = (cluster.home / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    trained = [r["step"] for r in map(json.loads, records) if "batch_hash" in r]
    assert trained == list(range(1, 301))  # none twice, none left out

    # What went to the cluster is the code, and nothing else.
    packages = list(cluster.dir.glob("head-1/session_2*/runtime_resources/working_dir_files/*/"))
    assert packages
    junk = {"tests", "bench", "cluster", "docs", ".git", ".venv", ".ci"}
    for package in packages:
        assert (package / "nanoray").is_dir()
        assert not junk & set(os.listdir(package))


@pytest.mark.slow
def test_a_lost_node_is_seen_and_replaced(cluster: Cluster) -> None:
    cluster.run("kill", "data")
    wait_for(lambda: cluster.run("status").stdout.count(" alive ") == 2)
    assert "data-1" in cluster.run("status").stdout
    assert cluster.run("add", "data").stdout.count(" alive ") == 3
    refused = cluster.run("kill", "data-1", check=False)
    assert refused.returncode == 1
    assert refused.stderr == "error: no node data-1 is alive; `status` lists them\n"
    refused = cluster.run("up", check=False)
    assert refused.returncode == 1
    assert "a cluster is up" in refused.stderr


@pytest.mark.slow
def test_down_ends_what_was_started_and_nothing_else(cluster: Cluster) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        state = json.loads((cluster.dir / "cluster.json").read_text())
        # A node's pid that has come to mean another process since.
        state["nodes"].append({"name": "x-1", "role": "data", "pid": bystander.pid, "started": 1.0})
        (cluster.dir / "cluster.json").write_text(json.dumps(state))
        cluster.run("down")
        assert bystander.poll() is None
    finally:
        bystander.send_signal(signal.SIGKILL)
        bystander.wait()
    assert not cluster.dir.exists()
    left = [p for p in psutil.process_iter(["cmdline"]) if str(cluster.dir) in str(p.info)]
    assert not left
    assert "no cluster is up" in cluster.run("status").stdout
    cluster.run("down")  # once more, and nothing happens


def test_a_folder_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 40)
    command = [sys.executable, "cluster/local.py", "--dir", str(folder), "status"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "take a shorter one" in done.stderr
    assert "Traceback" not in done.stderr
