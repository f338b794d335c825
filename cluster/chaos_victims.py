"""Who can be killed while the pipeline of `chaos.py` runs: where they are, and how they die."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import requests
from chaos_stages import STAGES
from local import LocalCluster

# Two of Ray Data's own outlive every job. One of Ray Train's outlives a killed driver where several
# Rays share the machine: it cannot tell which one to ask (2.60). They hold no CPUs.
RAYS_OWN_ACTORS = {"_StatsActor", "_AutoscalingCoordinatorActor", "PlacementGroupCleaner"}
REPLICA = "ServeReplica:chat:Chat"
_PACKING = "tokenize_and_pack"


class WrongError(Exception):
    """Something is not as it must be; says what."""


# ---- the ground on which it happens


class Ground:
    """The cluster, the home of its runs, and what can be seen and killed there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        os.environ["NANORAY_HOME"] = str(self.home)  # the nodes inherit it
        self.cluster = LocalCluster(folder / "c")
        self._token = str(folder / "c" / "token")

    @property
    def environment(self) -> dict[str, str]:
        """For jobs."""
        return os.environ | self.cluster.environment()

    def api(self, path: str, method: str = "GET", **options: Any) -> requests.Response:
        """Ask the dashboard. Raises WrongError: it does not answer."""
        headers = {"Authorization": f"Bearer {Path(self._token).read_text()}"}
        url = f"{self.cluster.dashboard}{path}"
        try:
            response = requests.request(method, url, headers=headers, timeout=60, **options)
            response.raise_for_status()
        except requests.RequestException as error:
            raise WrongError(f"Ray's dashboard does not answer: {error}") from error
        return response

    def _listed(self, what: str, **filters: str) -> list[dict[str, Any]]:
        equal = [(key, "=", value) for key, value in filters.items()]
        names = ("filter_keys", "filter_predicates", "filter_values")
        wanted = [(name, word) for one in equal for name, word in zip(names, one)]
        params = [("limit", "10000"), ("detail", "1"), *wanted]
        answer = self.api(f"/api/v0/{what}", params=params)
        found: list[dict[str, Any]] = answer.json()["data"]["result"]["result"]
        return found

    def actors(self, class_name: str | None = None) -> list[dict[str, Any]]:
        """The living actors (of a class), as Ray describes them."""
        alive = self._listed("actors", state="ALIVE")
        return [actor for actor in alive if class_name in (None, actor["class_name"])]

    def node_names(self) -> dict[str, str]:
        """Ray's id of a living node -> our name of it."""
        nodes = self._listed("nodes", state="ALIVE")
        return {node["node_id"]: node["labels"]["nanoray-node"] for node in nodes}

    def processes(self, role: str | None = None) -> dict[int, psutil.Process]:
        """All that the living nodes (of a role) have started, by pid."""
        nodes = [node for node in self.cluster.nodes if role in (None, node.role)]
        family: list[psutil.Process] = []
        for root in [process for node in nodes if (process := node.found())]:
            with contextlib.suppress(psutil.NoSuchProcess):  # it dies at this moment
                family += [root, *root.children(recursive=True)]
        return {process.pid: process for process in family}

    def replace_node(self, name: str) -> None:
        """SIGKILL a node's raylet, see it take its processes along, start another such node."""
        (node,) = [node for node in self.cluster.nodes if node.name == name]
        if process := node.found():
            for child in process.children():
                if child.name() == "raylet":
                    child.kill()
        wait_for(lambda: node.found() is None, 30, f"node {name} lives on without its raylet")
        self.cluster.add(node.role)

    def leftovers(self) -> list[str]:
        """What a run has left over: actors and tasks, and processes that nobody looks after."""
        told = [
            f"actor {actor['class_name']} ({actor['state']})"
            for actor in self._listed("actors")
            if actor["state"] != "DEAD" and actor["class_name"] not in RAYS_OWN_ACTORS
        ]
        family = self.processes()
        titles = [_title(process) for process in family.values()]
        told += [f"process {title}" for title in titles if _PACKING in title]
        for process in psutil.process_iter():
            if process.pid not in family and self._is_ours(process):
                told.append(f"orphan {process.pid} {_title(process)[:80]}")
        return told

    def _is_ours(self, process: psutil.Process) -> bool:
        """Whether a process was started by the cluster, whoever its parent is by now."""
        try:
            living = process.status() != psutil.STATUS_ZOMBIE
            return living and process.environ().get("RAY_AUTH_TOKEN_PATH") == self._token
        except psutil.Error:
            return False


def _title(process: psutil.Process) -> str:
    """What Ray calls a worker's process (``ray::IDLE``), or its command."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def wait_for(what: Callable[[], bool], seconds: float, told: str) -> None:
    """Raises WrongError: it did not come about."""
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            raise WrongError(f"{told} within {seconds:.0f} s")
        time.sleep(0.25)


# ---- victims


@dataclass(frozen=True)
class Victim:
    """Who it is, and how it is killed."""

    name: str
    kill: Callable[[], None]


Job = subprocess.Popen[bytes]
# Finds those that live now, on the ground, beside the job's process (None: there is no job).
Find = Callable[[Ground, Job | None], list[Victim]]


@dataclass(frozen=True)
class Kind:
    """A kind of victim.

    Attributes:
        again: the job may end with it; then its command is run again.
        at_once: it lives at the beginning only, and is killed when it is first seen.
    """

    find: Find
    again: bool = False
    at_once: bool = False


def _actors(class_name: str) -> Find:
    def find(ground: Ground, _job: Job | None) -> list[Victim]:
        found = sorted(ground.actors(class_name), key=lambda actor: str(actor["actor_id"]))
        own = ground.processes()
        pids = [int(actor["pid"]) for actor in found]
        return [Victim(f"{class_name} {pid}", own[pid].kill) for pid in pids if pid in own]

    return find


def _nodes_of(class_name: str) -> Find:
    """Nodes on which actors of a class live."""

    def find(ground: Ground, _job: Job | None) -> list[Victim]:
        names = ground.node_names()
        found = {names.get(actor["node_id"], "head-1") for actor in ground.actors(class_name)}
        safe = sorted(name for name in found if not name.startswith("head"))
        return [Victim(name, partial(ground.replace_node, name)) for name in safe]

    return find


def _packers(ground: Ground, _job: Job | None) -> list[Victim]:
    found = ground.processes("data").values()
    busy = [process for process in found if _PACKING in _title(process)]
    return [Victim(f"packing task {process.pid}", process.kill) for process in busy]


def _data_nodes(ground: Ground, _job: Job | None) -> list[Victim]:
    if not any(_PACKING in _title(process) for process in ground.processes("data").values()):
        return []
    names = [n.name for n in ground.cluster.nodes if n.role == "data" and n.found()]
    return [Victim(name, partial(ground.replace_node, name)) for name in names]


def _driver(_ground: Ground, job: Job | None) -> list[Victim]:
    return [Victim(f"driver {job.pid}", job.kill)] if job else []


_LEARNING = {
    "worker": Kind(_actors("RayTrainWorker")),
    "trainer node": Kind(_nodes_of("RayTrainWorker")),
    "controller": Kind(_actors("TrainController"), again=True),
    "board": Kind(_actors("Board"), again=True),
    "driver": Kind(_driver, again=True),
}
_STREAMED = {
    **_LEARNING,
    "packing task": Kind(_packers, at_once=True),
    "data node": Kind(_data_nodes, at_once=True),
    "splitter": Kind(_actors("SplitCoordinator")),
}
KINDS: dict[str, dict[str, Kind]] = {
    "pretrain": _STREAMED,
    "sft": _STREAMED,
    "rl": {
        **_LEARNING,
        "rollout actor": Kind(_actors("_RolloutActor")),
        "rollout node": Kind(_nodes_of("_RolloutActor")),
        "rollout pool": Kind(_actors("_PoolActor"), again=True),
    },
    "serve": {
        "replica": Kind(_actors(REPLICA)),
        "replica's node": Kind(_nodes_of(REPLICA)),
        "proxy": Kind(_actors("ProxyActor")),
        "serve controller": Kind(_actors("ServeController")),
    },
}


@dataclass
class Strike:
    """What is killed in a stage.

    Attributes:
        moment: the part of the stage's steps after which it happens; 0: before the first.
        pick: which one, in [0, 1), where there are several.
        done: who it was, and when.
    """

    stage: str
    name: str
    moment: float
    pick: float
    done: str = ""

    @property
    def kind(self) -> Kind:
        return KINDS[self.stage][self.name]

    def attempt(self, ground: Ground, when: str, job: Job | None = None) -> None:
        """Kill the victim, if there is one by now."""
        victims = self.kind.find(ground, job)
        if victims:
            victim = victims[int(self.pick * len(victims))]
            with contextlib.suppress(psutil.NoSuchProcess):  # it was faster: the next one, then
                victim.kill()
                self.done = f"{victim.name} {when}"


def draw(seed: int, number: int) -> dict[str, Strike]:
    """The strikes of a run by stage: always the same ones for the same seed and number."""
    rng = random.Random(f"{seed}/{number}")
    strikes = {}
    for stage in STAGES:
        name = rng.choice(sorted(KINDS[stage]))
        # One in four comes before the first step.
        strikes[stage] = Strike(stage, name, max(0.0, rng.uniform(-0.2, 0.6)), rng.random())
    return strikes
