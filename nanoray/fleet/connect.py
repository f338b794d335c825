"""The one way to a cluster: connect, and a preflight of what a plan needs.

Local: starts Ray on this machine, closed to others. With ``RAY_ADDRESS`` set, as inside a Ray
job, it joins that cluster.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nanoray import storage
from nanoray.errors import NanorayError
from nanoray.fleet.placement import (
    ROLE_LABEL,
    Role,
    count_places,
    free_nodes,
    label_selector,
    living_nodes,
    nodes_for,
)
from nanoray.machine import available_cpus


class NoRoomError(NanorayError):
    """A cluster or a machine has too little of something; more nodes would mend it."""


CONNECT_DEADLINE_S = 5.0
# A node may have to unpack the job and start its first worker; a shortfall is told before.
PREFLIGHT_DEADLINE_S = 60.0
# Tasks come and go, and what a job held that has just ended takes a moment to be free.
ROOM_DEADLINE_S = 2.0
# A local Ray gets more logical CPUs than there are cores: trainers sleep while they wait for data
# and data tasks while they wait for room, and a trainer sets its own number of threads.
EXTRA_LOGICAL_CPUS = 2


def on_cluster() -> bool:
    """Whether `connect` would join a running cluster rather than start Ray here."""
    return bool(os.environ.get("RAY_ADDRESS"))


def worker_environment() -> dict[str, str]:
    """Variables that a process which computes must be started with.

    glibc's arenas: a loop that runs in a thread (Ray Train's) would have one of its own, which is
    cut back after every block that is freed (see nanoray/model/heap.py): 5 % of a step on CPUs.
    torch settles where it keeps compiled code when it is imported, and writes that into the
    environment: there is no telling the user's own value from its default.
    Ray 2.60 lets a process that has reserved no GPU see all of them.
    """
    variables = {"MALLOC_ARENA_MAX": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
    if storage.is_local(storage.home()):
        variables["TORCHINDUCTOR_CACHE_DIR"] = storage.join(storage.home(), "cache", "inductor")
    return variables


def connect(
    *, dashboard: bool = False, quiet: bool = True, namespace: str | None = "nanoray"
) -> None:
    """Connect this process to Ray, once.

    Raises:
        NanorayError: the cluster of ``RAY_ADDRESS`` does not answer; or Ray does not start here.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # report() waits for this poll, and lost workers are noticed by it (default: 2 s).
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    options: dict[str, Any] = {
        "namespace": namespace,
        "log_to_driver": not quiet,
        "logging_level": "error" if quiet else "info",
    }
    if on_cluster():
        try:
            _check_reachable(os.environ["RAY_ADDRESS"])
            ray.init(address=os.environ["RAY_ADDRESS"], **options)
        except (OSError, RuntimeError, ValueError) as error:
            raise NanorayError(
                f"the Ray cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']} cannot be joined: "
                f"{str(error).splitlines()[0]}; check the address and RAY_AUTH_MODE, or unset "
                f"RAY_ADDRESS to run on this machine"
            ) from error
        return
    _lock_local_ray()
    if "CUDA_VISIBLE_DEVICES" in os.environ and not _visible_gpus():
        options["num_gpus"] = 0  # Ray counts every word of that variable, -1 too
    if sys.platform == "darwin":
        options["num_gpus"] = 0  # Apple's cannot be shared out: the process that trains takes it
    # Ray runs workers at niceness 15: anything else on the machine would go before training,
    # even Ray's own daemons, and threads that compute in step wait for the slowest.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ |= worker_environment()  # of all processes: a runtime_env would start new ones
    # Every Ray process wakes a hundred times a second, which training pays for on few cores:
    # keep one idle worker instead of one a CPU, and do not watch for notices of preemption.
    os.environ.setdefault("RAY_num_workers_soft_limit", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        ray.init(
            address="local",
            num_cpus=available_cpus() + EXTRA_LOGICAL_CPUS,
            include_dashboard=dashboard,
            dashboard_host="127.0.0.1",
            object_store_memory=local_object_store_bytes(),
            **options,
        )
    except Exception as error:  # Ray's own, and without a type
        raise NanorayError(
            f"Ray did not start on this machine ({error}); it gives itself 30 s: run the command "
            f"again when the machine has less to do"
        ) from error


def _check_reachable(address: str) -> None:
    """Ray itself waits for minutes for an address at which nobody listens. Raises OSError."""
    host, colon, port = address.rsplit("/", 1)[-1].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_DEADLINE_S).close()


def _lock_local_ray() -> None:
    """Give the Ray started here a token of this process and its children only.

    A local Ray 2.60 turns token authentication on by itself and, without a token, writes one
    into the user's home. (Setting RAY_AUTH_MODE after ray's import would come too late.)
    """
    has_token = (
        "RAY_AUTH_TOKEN" in os.environ
        or "RAY_AUTH_TOKEN_PATH" in os.environ
        or os.path.exists(os.path.expanduser("~/.ray/auth_token"))
    )
    if os.environ.get("RAY_AUTH_MODE", "token") == "token" and not has_token:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def local_object_store_bytes() -> int:
    """A tenth of the memory, at most 2 GiB and at most what shared memory has room for."""
    limit = min(2 * 2**30, psutil.virtual_memory().total // 10)
    if os.path.isdir("/dev/shm"):
        limit = min(limit, int(shutil.disk_usage("/dev/shm").free * 0.8))
    return max(limit, 100 * 2**20)


@dataclass(frozen=True)
class Needs:
    """What a plan needs of a cluster.

    Attributes:
        num_workers: the smallest number of workers it can run with.
        cpus_per_worker, gpus_per_worker: logical resources of each.
        other_cpus, other_gpus: what must be left for others.
        others: who they are.
        flags: what to lower where there is too little; ``{}`` stands for cpus or gpus.
        role, others_role: of the nodes that the workers and the others are placed on.
        memory_bytes_per_worker: estimate of weights, gradients, states and activations.
        object_store_bytes: blocks in flight.
        paths: local files or folders that every node must see.
    """

    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    other_cpus: float
    memory_bytes_per_worker: int
    object_store_bytes: int
    paths: tuple[str, ...] = ()
    other_gpus: float = 0
    others: str = "data tasks"
    flags: str = "--num-workers or --{}-per-worker"
    role: Role | None = None
    others_role: Role | None = None


def local_resources() -> dict[str, float]:
    """What `connect` would offer on this machine, without starting Ray."""
    resources = {
        "CPU": float(available_cpus() + EXTRA_LOGICAL_CPUS),
        "memory": float(psutil.virtual_memory().available),
        "object_store_memory": float(local_object_store_bytes()),
    }
    gpus = _visible_gpus()
    return resources | {"GPU": float(gpus)} if gpus else resources


def _visible_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # As CUDA reads it: what comes after the first that is no device does not count.
        devices = [device.strip() for device in visible.split(",")]
        named = itertools.takewhile(re.compile(r"\d+|(GPU|MIG)-.+").fullmatch, devices)
        return len(list(named))
    return len([n for n in os.listdir("/dev") if n.startswith("nvidia") and n[6:].isdigit()])


def check_resources(needs: Needs, have: dict[str, float], where: str) -> None:
    """Raise NoRoomError naming the first shortfall.

    The memory of a cluster is compared as a whole, that of a machine as what is free now.
    """
    cpus = needs.num_workers * needs.cpus_per_worker + needs.other_cpus
    gpus = needs.num_workers * needs.gpus_per_worker + needs.other_gpus
    memory = needs.num_workers * needs.memory_bytes_per_worker
    if have.get("CPU", 0) < cpus:
        raise NoRoomError(
            f"{needs.num_workers} workers of {needs.cpus_per_worker:g} CPUs and "
            f"{needs.other_cpus:g} for {needs.others} need {cpus:g} logical CPUs, but {where} has "
            f"{have.get('CPU', 0):g}; lower {needs.flags.format('cpus')}, or add nodes"
        )
    if have.get("GPU", 0) < gpus:
        raise NoRoomError(
            f"{needs.num_workers} workers need {gpus:g} GPUs, but {where} has "
            f"{have.get('GPU', 0):g}; lower {needs.flags.format('gpus')}, or add GPU nodes"
        )
    if have.get("memory", memory) < memory:
        raise NoRoomError(
            f"training needs about {memory / 2**30:.1f} GiB of memory, but {where} has "
            f"{have['memory'] / 2**30:.1f} GiB; lower --depth or --device-batch-size"
        )
    if have.get("object_store_memory", needs.object_store_bytes) < needs.object_store_bytes:
        raise NoRoomError(
            f"the data stream needs about {needs.object_store_bytes / 2**20:.0f} MiB of object "
            f"store, but {where} has {have['object_store_memory'] / 2**20:.0f} MiB; give Ray more "
            f"(object_store_memory) or build the corpus with smaller row groups"
        )


def check_places(needs: Needs, nodes: Sequence[dict[str, Any]], where: str = "the nodes") -> None:
    """Raise NoRoomError if the workers do not fit on the nodes: none may span two of them.

    Args:
        nodes: as `ray.nodes` describes them.
    """
    wanted = {"CPU": needs.cpus_per_worker, "GPU": needs.gpus_per_worker}
    places = count_places(nodes, wanted)
    if places < needs.num_workers:
        gpus = f" and {needs.gpus_per_worker:g} GPUs" if needs.gpus_per_worker else ""
        raise NoRoomError(
            f"a worker needs {needs.cpus_per_worker:g} CPUs{gpus} on one node, and {where} have "
            f"room for {places} of {needs.num_workers}; lower {needs.flags.format('cpus')}, or add "
            f"larger nodes"
        )


def preflight(needs: Needs) -> None:
    """Compare a plan with the connected cluster; refuse at once rather than wait for ever.

    Where nodes have roles, those of the plan's are compared too; on a cluster that others may
    use, also what they leave (hold a `turn` meanwhile).

    Raises:
        NoRoomError: what is missing, in one sentence.
        NanorayError: a node does not see a path of the plan.
    """
    nodes = living_nodes()
    check_resources(needs, _total(nodes), "the cluster")
    check_roles(needs, nodes)
    if on_cluster():
        _check_room(needs)
    if len(nodes) > 1 and needs.paths:
        _check_paths(needs.paths, nodes)


def _check_room(needs: Needs) -> None:
    """Raise NoRoomError if others hold what the plan needs, and do not let go of it in time."""
    # Memory is nothing that anybody holds, and a full object store spills.
    needs = replace(needs, memory_bytes_per_worker=0, object_store_bytes=0)
    if needs.others_role == "data" and label_selector("data"):
        needs = replace(needs, other_cpus=0)  # all jobs' packing tasks take turns there
    deadline = time.monotonic() + ROOM_DEADLINE_S
    while True:
        free = free_nodes()
        try:
            check_roles(needs, free)
            check_resources(needs, _total(free), "the cluster")
            return
        except NoRoomError as error:
            if time.monotonic() > deadline:
                raise NoRoomError(
                    f"other jobs are using the cluster, and what they leave is not enough: "
                    f"{error}, or wait until one of them ends"
                ) from error
        time.sleep(0.1)


def check_roles(needs: Needs, nodes: Sequence[dict[str, Any]]) -> None:
    """Raise NoRoomError if the nodes on which work would be placed have not enough for it.

    Args:
        nodes: as `ray.nodes` describes them.
    """
    own, others = nodes_for(needs.role, nodes), nodes_for(needs.others_role, nodes)
    if own == others:
        check_places(needs, own)
        return
    alone = replace(needs, other_cpus=0, other_gpus=0, object_store_bytes=0)
    check_resources(alone, _total(own), f"the cluster (nodes with {ROLE_LABEL}={needs.role})")
    check_places(needs, own, f"the nodes with {ROLE_LABEL}={needs.role}")
    for kind, amount in (("CPU", needs.other_cpus), ("GPU", needs.other_gpus)):
        if _total(others).get(kind, 0) < amount:
            raise NoRoomError(
                f"{needs.others} need {amount:g} {kind}s, but the nodes with "
                f"{ROLE_LABEL}={needs.others_role} have {_total(others).get(kind, 0):g}; lower "
                f"{needs.flags.format(kind.lower() + 's')}, or add {needs.others_role} nodes"
            )


def _total(nodes: Sequence[dict[str, Any]]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for node in nodes:
        total.update(node["Resources"])
    return dict(total)


def _check_paths(paths: Sequence[str], nodes: Sequence[dict[str, Any]]) -> None:
    @ray.remote(num_cpus=0, max_retries=0)
    def missing() -> list[str]:
        return [path for path in paths if not os.path.exists(path)]

    pending = {
        missing.options(
            name="preflight-paths",
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(): node
        for node in nodes
    }
    done, late = ray.wait(list(pending), num_returns=len(pending), timeout=PREFLIGHT_DEADLINE_S)
    for ref in done:
        lost = ray.get(ref)
        if lost:
            raise NanorayError(
                f"node {pending[ref]['NodeManagerAddress']} does not see {lost[0]}; put "
                f"NANORAY_HOME on storage that all nodes share (a mounted folder or s3://...)"
            )
    if late:
        raise NanorayError(
            f"node {pending[late[0]]['NodeManagerAddress']} did not answer within "
            f"{PREFLIGHT_DEADLINE_S:.0f} s whether it sees the data; check that node"
        )
