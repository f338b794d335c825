"""A harness for code that needs several ranks: processes on this machine, joined by gloo.

    results = run_gloo(worker, 4, argument)     # worker(rank, world_size, argument), per rank

The workers come from a fork server that has torch loaded, so starting one takes well under a
second. A file store joins them: no port to be free.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_gloo(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """Run `fn(rank, world_size, *args)` in `world_size` gloo ranks; the results by rank.

    Args:
        fn: a function at module level (it is imported in the workers).
        world_size: number of processes. The default process group is initialised.
        args: picklable arguments.
        timeout_s: deadline for all of them together; also of every collective.

    Raises:
        RuntimeError: a rank raised or died; the message holds its traceback.
        TimeoutError: the deadline passed; the message names the ranks that were still running.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])
    with tempfile.TemporaryDirectory(prefix="gloo-") as folder:
        workers: list[BaseProcess] = [
            context.Process(
                target=_worker,
                args=(fn, rank, world_size, folder, timeout_s, args),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        try:
            for worker in workers:
                worker.start()
            _wait(workers, Path(folder), timeout_s)
        finally:
            for worker in workers:
                if worker.pid is not None:
                    worker.kill()
                    worker.join()
        return [
            torch.load(Path(folder) / f"result_{rank}.pt", weights_only=False)
            for rank in range(world_size)
        ]


def _wait(workers: list[BaseProcess], folder: Path, timeout_s: float) -> None:
    """Wait until all workers have ended well; raise as soon as one has not."""
    deadline = time.monotonic() + timeout_s
    while True:
        failed = [r for r, worker in enumerate(workers) if worker.exitcode not in (None, 0)]
        if failed:
            time.sleep(0.2)  # those that fail because a peer is gone write their reports, too
            reports = [
                f"rank {r} (exit code {workers[r].exitcode}):\n{path.read_text()}"
                for r in range(len(workers))
                if (path := folder / f"error_{r}.txt").exists()
            ]
            silent = f"rank {failed[0]} died with exit code {workers[failed[0]].exitcode}"
            raise RuntimeError("\n".join(reports) or silent)
        running = [r for r, worker in enumerate(workers) if worker.exitcode is None]
        if not running:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {running} were still running after {timeout_s} s")
        workers[running[0]].join(0.05)


def _worker(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    timeout_s: float,
    args: tuple[Any, ...],
) -> None:
    # Without this, gloo resolves the host's name, which on some machines leads nowhere.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        result = fn(rank, world_size, *args)
        torch.save(result, Path(folder) / f"result_{rank}.pt")
        dist.barrier()  # nobody leaves while a peer still talks to it
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error_{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
