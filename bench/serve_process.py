"""The chat service as a process, as its benchmark starts it, and a run for it to serve."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import psutil

ROOT = Path(__file__).parents[1]


def make_run(folder: str) -> str:
    """A random chat model of the demo's shape, as a run."""
    import torch

    from nanoray.checkpoint.writer import CheckpointWriter, Snapshot
    from nanoray.model.config import GPTConfig
    from nanoray.model.gpt import GPT
    from nanoray.tokenizer import ByteTokenizer

    config = GPTConfig(512, ByteTokenizer().vocab_size, 4, 4, 4, 256)
    model = GPT(config)
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)
        model.lm_head.weight.normal_(0, 0.3)
    root = f"{folder}/runs/random/checkpoints"
    writer = CheckpointWriter(root, rank=0, world_size=1, attempt="a", keep=1, guard=lambda: None)
    meta = {"stage": "sft", "step": 1, "model_config": config.to_dict()}
    files = ByteTokenizer().to_files()
    writer.save(Snapshot(1, [], model=model.state_dict(), meta=meta, files=files))
    writer.wait()
    return f"{folder}/runs/random"


class Server:
    """The job's process, its address and its replicas."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.process, self.url = process, url

    def client(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=120)
        return aiohttp.ClientSession(self.url, connector=connector, timeout=timeout)

    def rss_mb(self) -> float:
        """Memory of the replicas and the proxy."""
        total = 0
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline()[:1])
                if "ServeReplica" in title or "ProxyActor" in title:
                    total += process.memory_info().rss
        return total / 2**20

    async def busy_slots(self, http: aiohttp.ClientSession) -> int:
        async with http.get("/stats") as response:
            models = (await response.json())["models"]
        return sum(int(stats["busy_slots"] + stats["waiting"]) for stats in models.values())


@contextlib.contextmanager
def service(run: str, *flags: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jobs.serve", f"--run={run}", f"--port={port}", *flags]
    command += ["--max-len=1024", "--dtype=float32"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            sys.stderr.write(line.decode())
            if line.startswith(b"ready"):
                break
        else:
            raise SystemExit("the service did not start")
        yield Server(process, f"http://127.0.0.1:{port}")
        process.send_signal(signal.SIGINT)
        process.wait(120)
    finally:
        process.kill()
