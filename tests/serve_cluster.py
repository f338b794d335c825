"""A Ray cluster of one node with a token, as `ray start --head` makes it, and the chat on it."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
CANARY = "xyzzy-canary-7319"  # in every prompt
KEY = "test-key-" + secrets.token_hex(16)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of a condition."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come about in {seconds:g} s"
        time.sleep(0.1)
    return value


class Cluster:
    """The head node as a process, its dashboard's address, and the chat's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temp = Path("/tmp") / f"nr-{secrets.token_hex(4)}"  # Ray's sockets want short paths
        self._port, self.url = free_port(), ""
        self.token = secrets.token_hex(32)
        self._dashboard = f"http://127.0.0.1:{free_port()}"
        from serve.proxy import CALLBACK

        hidden = ("RAY_", "NANORAY_")
        self._env = {k: v for k, v in os.environ.items() if not k.startswith(hidden)} | {
            "NANORAY_HOME": os.environ["NANORAY_HOME"],
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": str(ROOT),
            **CALLBACK,
        }
        self._keys = folder / "keys"
        self._keys.write_text(KEY + "\n")
        self._http_port = free_port()
        self.url = f"http://127.0.0.1:{self._http_port}"
        self._head = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        port = self._dashboard.rsplit(":", 1)[1]
        flags = f"--head --block --num-cpus=6 --include-dashboard=true --dashboard-port={port}"
        with (self.folder / "head.log").open("wb") as log:
            return subprocess.Popen(
                [
                    *(str(BIN / "ray"), "start", *flags.split(), f"--port={self._port}"),
                    *(f"--temp-dir={self.temp}", "--object-store-memory=100000000"),
                    "--node-ip-address=127.0.0.1",
                ],
                env=self._env,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def config(self, **user_config: Any) -> dict[str, Any]:
        """serve/chat.yaml for this cluster, with these values in its user_config."""
        config: dict[str, Any] = yaml.safe_load((ROOT / "serve" / "chat.yaml").read_text())
        config["http_options"]["port"] = self._http_port
        deployment = config["applications"][0]["deployments"][0]
        del deployment["autoscaling_config"]
        deployment |= {"num_replicas": 2, "max_ongoing_requests": 16, "max_queued_requests": 30}
        deployment["user_config"] |= {
            "num_slots": 8,
            "max_len": 4000,
            "dtype": "float32",
            "api_keys_file": str(self._keys),
            **user_config,
        }
        return config

    def deploy_by_command(self, config: dict[str, Any]) -> None:
        """``serve deploy``."""
        file = self.folder / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        wait_for(self._is_up, 120, "the dashboard")
        command = [str(BIN / "serve"), "deploy", str(file), "--address", self._dashboard]
        subprocess.run(command, env=self._env, check=True, timeout=120, capture_output=True)

    def deploy(self, config: dict[str, Any]) -> None:
        """What the command sends, without a new process."""
        self._api("PUT", config).raise_for_status()

    def status(self) -> str:
        """All that Serve tells about the applications."""
        return self._api("GET").text

    def is_running(self) -> bool:
        """Whether Serve has done what it was told to."""
        application = self._api("GET").json()["applications"].get("chat", {})
        return application.get("status") == "RUNNING"

    def _api(self, method: str, body: Any = None) -> httpx.Response:
        url = f"{self._dashboard}/api/serve/applications/"
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.request(method, url, json=body, headers=headers, timeout=30)

    def _is_up(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self._api("GET").status_code == 200
        return False

    def job(self, *flags: str) -> subprocess.CompletedProcess[str]:
        """``python -m jobs.serve`` in this cluster."""
        return subprocess.run(
            [sys.executable, "-m", "jobs.serve", *flags],
            env=self._env | {"RAY_ADDRESS": f"127.0.0.1:{self._port}"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def replicas(self) -> list[int]:
        """The replicas' process ids."""
        processes = psutil.Process(self._head.pid).children(recursive=True)
        found = []
        for process in processes:
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[:1] and "ServeReplica" in process.cmdline()[0]:
                    found.append(process.pid)
        return found

    def logs(self) -> Iterator[Path]:
        """All files that Ray, Serve and the replicas have written."""
        return (path for path in self.temp.rglob("*") if path.is_file())

    def stop(self) -> None:
        head = psutil.Process(self._head.pid)
        for process in [head, *head.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._head.wait(10)
