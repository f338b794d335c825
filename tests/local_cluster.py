"""`cluster/local.py` as a user runs it, in a folder and with a home of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import requests

from nanoray.metrics import read_records

REPOSITORY = Path(__file__).parents[1]
DEADLINE_S = 600.0  # of one thing; on a quiet machine all of a test takes a minute or two
ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}


def wait_for(what: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + deadline_s
    while not what():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.2)


class LocalCluster:
    """What its commands print is read by tests; while they wait, they ask the dashboard and the
    run's folder, as every command costs seconds of imports."""

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

    def ray(self, *words: str) -> str:
        """What the command `ray` prints, with the environment that `env` prints."""
        lines = [line.removeprefix("export ") for line in self.run("env").stdout.splitlines()]
        own = dict(line.split("=", 1) for line in lines)
        command = [sys.executable, "-m", "ray.scripts.scripts", *words]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=self.environment | own, capture_output=True, text=True,
            timeout=DEADLINE_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, name: str, flags: list[str], job: str = "pretrain") -> None:
        self.ray("job", "submit", "--no-wait", "--submission-id", name, "--working-dir", ".",
                 "--", "python", "-m", f"jobs.{job}", *flags)  # fmt: skip

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.dir / "cluster.json").read_text())
        return state

    def process(self, name: str) -> psutil.Process:
        """The process that was started as a node (or as Redis)."""
        started = [*self.state["nodes"], self.state["redis"]]
        (found,) = [process for process in started if process and process["name"] == name]
        return psutil.Process(found["pid"])

    def get(self, path: str, **parameters: str) -> Any:
        """What the head's dashboard answers."""
        token = (self.dir / "token").read_text()
        answer = requests.get(
            self.state["dashboard"] + path,
            params=parameters,
            headers={"Authorization": f"Bearer {token}"},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        return answer.json()

    def job(self, name: str) -> str:
        """A job's status in Ray's words."""
        status: str = self.get(f"/api/jobs/{name}")["status"]
        return status

    def succeeds(self, name: str) -> None:
        """Wait until a job is over, which must have succeeded."""
        wait_for(lambda: self.job(name) in ENDED)
        assert self.job(name) == "SUCCEEDED", self.get(f"/api/jobs/{name}/logs")["logs"]

    def nodes(self) -> dict[str, dict[str, Any]]:
        """By name, what the head says of the living nodes."""
        listed = self.get("/api/v0/nodes", detail="1")["data"]["result"]["result"]
        alive = [node for node in listed if node["state"] == "ALIVE"]
        return {node["labels"]["nanoray-node"]: node for node in alive}

    def actors(self) -> set[str]:
        """The classes of the actors that live, but for Ray's own that outlive every job."""
        listed = self.get("/api/v0/actors")["data"]["result"]["result"]
        alive = {actor["class_name"] for actor in listed if actor["state"] != "DEAD"}
        return alive - {"_StatsActor", "_AutoscalingCoordinatorActor"}  # they hold no CPUs

    def trained(self, run: str) -> list[int]:
        """The steps in a run's log, in order."""
        records = read_records(str(self.home / "runs" / run / "metrics.jsonl"))
        return [record["step"] for record in records if "batch_hash" in record]


@contextmanager
def local_cluster(*words: str) -> Iterator[LocalCluster]:
    """A cluster from `up` with these words; taken down afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="nrc-"))  # short: sockets lie within
    made = LocalCluster(folder)
    try:
        made.run("up", *words)
        yield made
    finally:
        made.run("down")
        shutil.rmtree(folder)
