"""A Ray cluster of several nodes on this machine, to try things out before they cost money.

    python cluster/local.py up              # a head, a trainer, a data and a rollout node
    eval "$(python cluster/local.py env)"   # for `ray job submit` and the jobs in this shell
    python cluster/local.py status
    python cluster/local.py kill trainer    # SIGKILL all of a node, as a lost machine
    python cluster/local.py add trainer
    python cluster/local.py down            # ends what `up` and `add` started, nothing else

Every node has a loopback address of its own (Linux). Ray opens the ports between nodes on all
interfaces even so; they answer only those who have the token that lies, readable by its owner
alone, in the cluster's folder (numbers for Prometheus need none). What `up` finds in the
environment (NANORAY_HOME, credentials of a store) is what the jobs see, as with an image.

With `up --gpus N` each trainer and rollout node offers N GPUs. They are this machine's first N, the
same on every node: nodes share them as they share its cores, and memory is not divided.

With `up --redis` the head keeps what it knows in a Redis: after `kill head`, `add head` brings it
back at the same address, and the other nodes, which have waited, go on with it.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import head_store
import processes
import requests
from processes import Process

UP_DEADLINE_S = 90.0
# What KubeRay gives its workers, too; Ray's own default is 60 s.
WAIT_FOR_HEAD_S = 600
_LONGEST_DIR = 32  # characters: with what Ray puts behind it, a socket's path has at most 107


class ClusterError(Exception):
    """What went wrong and how to mend it, in one sentence."""


@dataclass(frozen=True)
class Role:
    """What a node of a role offers. The files for AWS, GCP and Kubernetes have the same roles."""

    cpus: int
    memory_bytes: int
    object_store_bytes: int
    gpus: bool = False  # whether it offers those of `up --gpus`


# The head runs drivers and Ray's own services, no tasks (logical CPUs: 0), as on real clusters.
ROLES = {
    "head": Role(0, 2 * 2**30, 100 * 2**20),
    "trainer": Role(2, 4 * 2**30, 200 * 2**20, gpus=True),
    "data": Role(2, 2 * 2**30, 200 * 2**20),
    "rollout": Role(2, 4 * 2**30, 200 * 2**20, gpus=True),
}


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
        self.nodes: list[Process] = []
        self.gpus = 0  # of each node whose role has any
        self.redis_port = 0  # none: nothing outlives the head
        self.redis: Process | None = None
        # What it says is believed: jobs go to its address, and its processes are killed.
        if self.folder.exists() and self.folder.lstat().st_uid != os.getuid():
            raise ClusterError(f"{self.folder} is another user's; take another --dir")
        if self._state_file.exists():
            state = json.loads(self._state_file.read_text())
            self.address, self.dashboard = state["address"], state["dashboard"]
            self.nodes = [Process(**node) for node in state["nodes"]]
            self.gpus = state.get("gpus", 0)  # not in those of before there were any
            self.redis_port = state["redis_port"]
            self.redis = Process(**state["redis"]) if state["redis"] else None

    def up(self, roles: Sequence[str], redis: bool = False, gpus: int = 0) -> None:
        """Start a head and a node for each of ``roles``; returns when all of them have joined.

        Args:
            redis: keep what the head knows in a Redis, so that it can come back.
            gpus: logical ones of each trainer and rollout node; nobody looks whether they exist.

        Raises:
            ClusterError: it is up already, a program is missing, or a node did not come up (what
                has started stays, for its logs and for `down`).
        """
        if self.is_up():
            raise ClusterError(
                f"a cluster is up in {self.folder}; `down` ends it, `add` makes it larger"
            )
        if redis and (program := head_store.missing_program()):
            raise ClusterError(
                f"--redis needs the program {program}, which is not on the PATH; install it "
                f"(Debian: `apt-get install {program}`) or leave --redis out"
            )
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        self._token_file.unlink(missing_ok=True)
        with open(os.open(self._token_file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as f:
            f.write(secrets.token_hex(32))
        self.nodes, self.gpus = [], gpus
        self.address = f"{_host(0)}:{processes.free_port(_host(0))}"
        self.dashboard = f"http://{_host(0)}:{processes.free_port(_host(0))}"
        self.redis, self.redis_port = None, 0
        if redis:
            self.redis_port = processes.free_port(_host(0))
            head_store.prepare(self._redis_folder, _host(0), self.redis_port)
        self.add("head")  # nodes that come before it answers give up
        self.add(*roles)

    def add(self, *roles: str) -> None:
        """Start a node for each of ``roles`` and wait until all have joined.

        Raises:
            ClusterError: a node did not come up, or it is a head that cannot come back.
        """
        if not self.address:
            raise ClusterError(f"no cluster is up in {self.folder}; `up` starts one")
        if "head" in roles:
            self._check_that_a_head_is_missing()
            self._start_redis()
        for node in [self._start(role) for role in roles]:
            self._wait_for(node)

    def kill(self, name: str) -> None:
        """SIGKILL all of a node: what losing a machine looks like to the others.

        Args:
            name: of a node (``trainer-1``) or a role, whose first living node is taken.
        """
        for node in self.nodes:
            process = node.found()
            if process and name in (node.name, node.role):
                processes.lose(process)
                return
        raise ClusterError(f"no node {name} is alive; `status` lists them")

    def down(self) -> None:
        """End all nodes, then the head, then Redis, and remove the folder, if there is one."""
        heads = [node for node in self.nodes if node.role == "head"]
        others = [node for node in self.nodes if node.role != "head"]
        for group in (others, heads, [self.redis] if self.redis else []):
            processes.end([process for node in group if (process := node.found())])
        if self._state_file.exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    def is_up(self) -> bool:
        """Whether anything of it runs."""
        return any(one.found() for one in (*self.nodes, self.redis) if one)

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

    def gpus_of(self, role: str) -> int:
        """How many GPUs a node of a role offers."""
        return self.gpus if ROLES[role].gpus else 0

    def environment(self) -> dict[str, str]:
        """What a client of this cluster needs in its environment."""
        return {
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token_file),
        }

    def _check_that_a_head_is_missing(self) -> None:
        heads = [node for node in self.nodes if node.role == "head"]
        if any(head.found() for head in heads):
            raise ClusterError("the head is alive, and a cluster has one; `kill head` ends it")
        if heads and not self.redis_port:
            raise ClusterError(
                "what the head knew died with it, as this cluster has no Redis; `down`, then "
                "`up --redis` starts one whose head can come back"
            )

    @property
    def _redis_folder(self) -> Path:
        return self.folder / "redis"

    def _start_redis(self) -> None:
        """Start this cluster's Redis unless it runs or there is none; its data are in its files."""
        if not self.redis_port or (self.redis and self.redis.found()):
            return
        command = head_store.command(self._redis_folder)
        log = self.folder / "redis.log"
        self.redis = processes.start("redis", "redis", command, os.environ, log)
        self._save()
        deadline = time.monotonic() + UP_DEADLINE_S
        while not processes.listens(_host(0), self.redis_port):
            if self.redis.found() is None or time.monotonic() > deadline:
                raise ClusterError(f"Redis did not start; {self.folder}/redis.log says why")
            time.sleep(0.05)

    def _start(self, role: str) -> Process:
        number = sum(node.role == role for node in self.nodes) + 1
        # A head that comes back does so at the address where the others wait for it.
        name, host = f"{role}-{number}", _host(0 if role == "head" else len(self.nodes))
        offer = ROLES[role]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block",
                   "--disable-usage-stats", f"--node-ip-address={host}",
                   # The GPUs always, or every node finds all of the machine's for itself.
                   f"--num-cpus={offer.cpus}", f"--num-gpus={self.gpus_of(role)}",
                   f"--memory={offer.memory_bytes}",
                   f"--object-store-memory={offer.object_store_bytes}",
                   f"--labels=nanoray-role={role},nanoray-node={name}",
                   # Nodes that share a machine would take each other's ports and, as disks of
                   # their own, remove each other's copies of a job's working dir.
                   "--min-worker-port=0", "--max-worker-port=0",
                   f"--temp-dir={self.folder / name}",
                   f"--dashboard-agent-listen-port={processes.free_port(host)}"]  # fmt: skip
        if role == "head":
            command += ["--head", f"--port={_port(self.address)}", f"--dashboard-host={host}",
                        f"--dashboard-port={_port(self.dashboard)}",
                        f"--ray-client-server-port={processes.free_port(host)}"]  # fmt: skip
        else:
            command += [f"--address={self.address}", "--include-log-monitor=false"]
        log = self.folder / f"{name}.log"
        node = processes.start(name, role, command, self._node_environment(role), log)
        self.nodes.append(node)
        self._save()
        return node

    def _node_environment(self, role: str) -> dict[str, str]:
        own = {k: v for k, v in os.environ.items() if k not in self.environment()}
        # Another cluster's token would go before ours, and its Redis is not ours to write.
        others = [name for name in own if name.startswith(("RAY_AUTH_TOKEN", "RAY_REDIS_"))]
        for name in others:
            del own[name]
        if self.redis_port:
            own["RAY_gcs_rpc_server_reconnect_timeout_s"] = str(WAIT_FOR_HEAD_S)
            if role == "head":
                own |= head_store.head_environment(self._redis_folder, _host(0), self.redis_port)
        return own | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token_file),
            "RAY_USAGE_STATS_ENABLED": "0",
            # A stopped job has this long to finish its step and save (default: 3 s).
            "RAY_JOB_STOP_WAIT_TIME_S": "60",
            "RAY_CHDIR_TO_TRIAL_DIR": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
            # What Serve's proxies cannot say themselves.
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy:middlewares",
            # `python` in a job's command is the one that runs this.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }

    def _save(self) -> None:
        state = {
            "address": self.address,
            "dashboard": self.dashboard,
            "nodes": [asdict(node) for node in self.nodes],
            "gpus": self.gpus,
            "redis_port": self.redis_port,
            "redis": asdict(self.redis) if self.redis else None,
        }
        aside = self._state_file.with_suffix(".tmp")
        aside.write_text(json.dumps(state, indent=1))
        aside.replace(self._state_file)

    def _wait_for(self, node: Process) -> None:
        deadline = time.monotonic() + UP_DEADLINE_S
        while node.name not in self.alive():
            if node.found() is None or time.monotonic() > deadline:
                how = "ended at once" if node.found() is None else "did not join in time"
                raise ClusterError(
                    f"node {node.name} {how}; the logs in {self.folder}/{node.name}* say why, "
                    f"`down` ends what has started"
                )
            time.sleep(0.25)


def _host(number: int) -> str:
    """Loopback addresses from 127.0.0.2 on: what is on 127.0.0.1 Ray moves to the network's."""
    return f"127.0.0.{number + 2}"


def _port(address: str) -> str:
    return address.rsplit(":", 1)[1]


def _print_status(cluster: LocalCluster) -> None:
    if not cluster.is_up():
        print(f"no cluster is up in {cluster.folder}")
        return
    joined = cluster.alive()
    print(f"{cluster.address}, dashboard {cluster.dashboard}, logs in {cluster.folder}")
    for node in cluster.nodes:
        state = "alive" if node.name in joined else "starting or lost"
        offer = ROLES[node.role]
        print(
            f"  {node.name:<10} pid {node.pid:<8} {state if node.found() else 'dead':<16} "
            f"{offer.cpus} CPUs, {cluster.gpus_of(node.role)} GPUs, "
            f"{offer.memory_bytes / 2**30:g} GiB"
        )
    if redis := cluster.redis:
        print(f"  {redis.name:<10} pid {redis.pid:<8} {'alive' if redis.found() else 'dead'}")


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
    up.add_argument("--gpus", type=int, default=0, metavar="N",
                    help="GPUs of each trainer and rollout node (0), see above")  # fmt: skip
    up.add_argument("--redis", action="store_true", help="keep what the head knows, see above")
    commands.add_parser("down", help="end it")
    commands.add_parser("status", help="its nodes")
    commands.add_parser("env", help="shell lines for its clients")
    add = commands.add_parser("add", help="one more node, or the lost head")
    add.add_argument("role", choices=list(ROLES))
    commands.add_parser("kill", help="lose a node").add_argument("node")
    args = parser.parse_args(argv)
    try:
        cluster = LocalCluster(args.dir.absolute())
        if args.command == "up":
            roles = [role for role in workers for _ in range(getattr(args, role))]
            cluster.up(roles, redis=args.redis, gpus=args.gpus)
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
