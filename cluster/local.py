"""A Ray cluster of several nodes on this machine, to try things out before they cost money.

    python cluster/local.py up              # a head, a trainer, a data and a rollout node
    eval "$(python cluster/local.py env)"   # for `ray job submit` and the jobs in this shell
    python cluster/local.py status
    python cluster/local.py kill trainer    # SIGKILL one node's raylet, as a lost machine
    python cluster/local.py add trainer
    python cluster/local.py down            # ends what `up` and `add` started, nothing else

Every node has a loopback address of its own (Linux). Ray opens the ports between nodes on all
interfaces even so; they answer only those who have the token that lies, readable by its owner
alone, in the cluster's folder (numbers for Prometheus need none). What `up` finds in the
environment (NANORAY_HOME, credentials of a store) is what the jobs see, as with an image.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

UP_DEADLINE_S = 90.0
STOP_DEADLINE_S = 20.0
_LONGEST_DIR = 32  # characters: with what Ray puts behind it, a socket's path has at most 107


class ClusterError(Exception):
    """What went wrong and how to mend it, in one sentence."""


@dataclass(frozen=True)
class Role:
    """What a node of a role offers. The files for AWS, GCP and Kubernetes have the same roles."""

    cpus: int
    memory_bytes: int
    object_store_bytes: int


# The head runs drivers and Ray's own services, no tasks (logical CPUs: 0), as on real clusters.
ROLES = {
    "head": Role(0, 2 * 2**30, 100 * 2**20),
    "trainer": Role(2, 4 * 2**30, 200 * 2**20),
    "data": Role(2, 2 * 2**30, 200 * 2**20),
    "rollout": Role(2, 4 * 2**30, 200 * 2**20),
}


@dataclass(frozen=True)
class Node:
    """A ``ray start --block`` process; its pid means it only with its time of start."""

    name: str
    role: str
    pid: int
    started: float

    def process(self) -> psutil.Process | None:
        """The process, or None if it is over."""
        try:
            process = psutil.Process(self.pid)
            alive = process.create_time() == self.started
            return process if alive and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


class LocalCluster:
    """A cluster and its folder, which holds its token, ports, processes and Ray's logs.

    Args:
        folder: absolute, at most 32 characters long.

    Raises:
        ClusterError: the folder's name is too long.
    """

    def __init__(self, folder: Path) -> None:
        if len(str(folder)) > _LONGEST_DIR:
            raise ClusterError(
                f"--dir {folder} is longer than {_LONGEST_DIR} characters, which sockets do not "
                f"bear; take a shorter one"
            )
        self.folder = folder
        self._state_file = folder / "cluster.json"
        self._token_file = folder / "token"
        self.address = ""
        self.dashboard = ""
        self.nodes: list[Node] = []
        if self._state_file.exists():
            state = json.loads(self._state_file.read_text())
            self.address, self.dashboard = state["address"], state["dashboard"]
            self.nodes = [Node(**node) for node in state["nodes"]]

    def up(self, roles: Sequence[str]) -> None:
        """Start a head and a node for each of ``roles``; returns when all of them have joined.

        Raises:
            ClusterError: it is up already, or a node did not come up (what has started stays,
                for its logs and for `down`).
        """
        if any(node.process() for node in self.nodes):
            raise ClusterError(
                f"a cluster is up in {self.folder}; `down` ends it, `add` makes it larger"
            )
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            raise ClusterError(f"{self.folder} is another user's; take another --dir")
        self.folder.chmod(0o700)
        self._token_file.unlink(missing_ok=True)
        with open(os.open(self._token_file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as f:
            f.write(secrets.token_hex(32))
        self.nodes = []
        self.address = f"{_host(0)}:{_free_port(_host(0))}"
        self.dashboard = f"http://{_host(0)}:{_free_port(_host(0))}"
        self.add("head")  # nodes that come before it answers give up
        self.add(*roles)

    def add(self, *roles: str) -> None:
        """Start a node for each of ``roles`` and wait until all have joined."""
        for node in [self._start(role) for role in roles]:
            self._wait_for(node)

    def kill(self, name: str) -> None:
        """SIGKILL the raylet of a node: what losing a machine looks like to the others.

        Args:
            name: of a node (``trainer-1``) or a role, whose first living node is taken.
        """
        for node in self.nodes:
            process = node.process()
            if process and name in (node.name, node.role):
                for child in process.children():
                    if child.name() == "raylet":
                        child.kill()
                _end([process])
                return
        raise ClusterError(f"no node {name} is alive; `status` lists them")

    def down(self) -> None:
        """End all nodes, the head last, and remove the folder; nothing happens if there is none."""
        nodes = [process for node in self.nodes if (process := node.process())]
        _end(nodes[1:])
        _end(nodes[:1])
        if self._state_file.exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    def alive(self) -> set[str]:
        """Names of the nodes that the head takes for alive; empty while it does not answer."""
        token = self._token_file.read_text()
        try:
            answer = requests.get(
                f"{self.dashboard}/api/v0/nodes",
                params={"detail": "1"},
                headers={"Authorization": f"Bearer {token}"},
                timeout=10,
            )
            answer.raise_for_status()
        except requests.RequestException:
            return set()
        nodes: list[dict[str, Any]] = answer.json()["data"]["result"]["result"]
        return {node["labels"]["nanoray-node"] for node in nodes if node["state"] == "ALIVE"}

    def environment(self) -> dict[str, str]:
        """What a client of this cluster needs in its environment."""
        return {
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token_file),
        }

    def _start(self, role: str) -> Node:
        number = sum(node.role == role for node in self.nodes) + 1
        name, host = f"{role}-{number}", _host(len(self.nodes))
        offer = ROLES[role]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block",
                   "--disable-usage-stats", f"--node-ip-address={host}",
                   f"--num-cpus={offer.cpus}", f"--memory={offer.memory_bytes}",
                   f"--object-store-memory={offer.object_store_bytes}",
                   f"--labels=nanoray-role={role},nanoray-node={name}",
                   # Nodes that share a machine would take each other's ports and, as disks of
                   # their own, remove each other's copies of a job's working dir.
                   "--min-worker-port=0", "--max-worker-port=0",
                   f"--temp-dir={self.folder / name}",
                   f"--dashboard-agent-listen-port={_free_port(host)}"]  # fmt: skip
        if role == "head":
            command += ["--head", f"--port={_port(self.address)}", f"--dashboard-host={host}",
                        f"--dashboard-port={_port(self.dashboard)}",
                        f"--ray-client-server-port={_free_port(host)}"]  # fmt: skip
        else:
            command += [f"--address={self.address}", "--include-log-monitor=false"]
        with open(self.folder / f"{name}.log", "ab") as log:
            child = subprocess.Popen(
                command,
                env=self._node_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # ctrl-C in this terminal is not for the cluster
            )
        node = Node(name, role, child.pid, psutil.Process(child.pid).create_time())
        self.nodes.append(node)
        self._save()
        return node

    def _node_environment(self) -> dict[str, str]:
        own = {k: v for k, v in os.environ.items() if k not in self.environment()}
        own.pop("RAY_AUTH_TOKEN", None)  # another cluster's, which would go before ours
        return own | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token_file),
            "RAY_USAGE_STATS_ENABLED": "0",
            # A stopped job has this long to finish its step and save (default: 3 s).
            "RAY_JOB_STOP_WAIT_TIME_S": "60",
            "RAY_CHDIR_TO_TRIAL_DIR": "0",
            # `python` in a job's command is the one that runs this.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }

    def _save(self) -> None:
        state = {"address": self.address, "dashboard": self.dashboard}
        aside = self._state_file.with_suffix(".tmp")
        aside.write_text(json.dumps(state | {"nodes": [asdict(n) for n in self.nodes]}, indent=1))
        aside.replace(self._state_file)

    def _wait_for(self, node: Node) -> None:
        deadline = time.monotonic() + UP_DEADLINE_S
        while node.name not in self.alive():
            if node.process() is None or time.monotonic() > deadline:
                how = "ended at once" if node.process() is None else "did not join in time"
                raise ClusterError(
                    f"node {node.name} {how}; the logs in {self.folder}/{node.name}* say why, "
                    f"`down` ends what has started"
                )
            time.sleep(0.25)


def _end(processes: Sequence[psutil.Process]) -> None:
    """SIGTERM, then SIGKILL to what is left of the processes and of all they had started."""
    family = list(processes)
    for process in processes:
        family += process.children(recursive=True)
        process.send_signal(signal.SIGTERM)
    _gone, left = psutil.wait_procs(family, timeout=STOP_DEADLINE_S)
    for process in left:
        process.kill()  # psutil checks that the pid still means the same process
    psutil.wait_procs(left, timeout=STOP_DEADLINE_S)


def _host(number: int) -> str:
    """Loopback addresses from 127.0.0.2 on: what is on 127.0.0.1 Ray moves to the network's."""
    return f"127.0.0.{number + 2}"


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _port(address: str) -> str:
    return address.rsplit(":", 1)[1]


def _print_status(cluster: LocalCluster) -> None:
    if not any(node.process() for node in cluster.nodes):
        print(f"no cluster is up in {cluster.folder}")
        return
    joined = cluster.alive()
    print(f"{cluster.address}, dashboard {cluster.dashboard}, logs in {cluster.folder}")
    for node in cluster.nodes:
        state = "alive" if node.name in joined else "starting or lost"
        offer = ROLES[node.role]
        print(
            f"  {node.name:<10} pid {node.pid:<8} {state if node.process() else 'dead':<16} "
            f"{offer.cpus} CPUs, {offer.memory_bytes / 2**30:g} GiB"
        )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python cluster/local.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Path(tempfile.gettempdir()) / f"nanoray-cluster-{os.getuid()}"
    parser.add_argument("--dir", type=Path, default=default, help=f"its folder ({default})")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start it")
    workers = [role for role in ROLES if role != "head"]
    for role in workers:
        up.add_argument(f"--{role}", type=int, default=1, metavar="N", help=f"{role} nodes (1)")
    commands.add_parser("down", help="end it")
    commands.add_parser("status", help="its nodes")
    commands.add_parser("env", help="shell lines for its clients")
    commands.add_parser("add", help="one more node").add_argument("role", choices=workers)
    commands.add_parser("kill", help="lose a node").add_argument("node")
    args = parser.parse_args(argv)
    try:
        cluster = LocalCluster(args.dir.absolute())
        if args.command == "up":
            cluster.up([role for role in workers for _ in range(getattr(args, role))])
        elif args.command == "down":
            cluster.down()
            return 0
        elif args.command == "env":
            for name, value in cluster.environment().items():
                print(f"export {name}={shlex.quote(value)}")
            return 0
        elif args.command == "add":
            cluster.add(args.role)
        elif args.command == "kill":
            cluster.kill(args.node)
        _print_status(cluster)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
