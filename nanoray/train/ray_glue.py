"""Ray Train around the plain loop: start, watch, stop, restart."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import ray
import ray.train
import torch
from ray.data import ExecutionOptions
from ray.train import DataConfig
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig

from nanoray import fleet, storage
from nanoray.config import parse_worker_range
from nanoray.data.blocks import Block, Cursor, Stream
from nanoray.data.stream import training_dataset, worker_blocks
from nanoray.errors import NanorayError
from nanoray.lease import Lease, LeaseLostError, check_token
from nanoray.machine import available_cpus
from nanoray.metrics import Sink, WandbSink
from nanoray.model.precision import reserved_device
from nanoray.tokenizer import Tokenizer
from nanoray.train.needs import DATA_CPUS
from nanoray.train.policies import PlacedPolicy, Trainer
from nanoray.train.resume import choose_start
from nanoray.train.run_plan import RunPlan, StreamRunPlan
from nanoray.train.stages import run_worker
from nanoray.train.watch import TrainingHealthError
from nanoray.train.worker import Hooks
from nanoray.train.world import World

TRAINER_DEADLINE_S = 600.0  # without any node that could train
ENDING_DEADLINE_S = 30.0  # of Ray Train, after a mistake that no restart mends
STOP_DEADLINE_S = 10.0  # for a worker to hear that it is to stop; they ask twice a second
# Ray tells Prometheus about a process's numbers every 10 s, the last ones included: a NaN that ends
# a run, or its last evaluation, but for a run that was over in no time.
LINGER_S = 11.0
LINGER_SHARE = 0.02
Watcher = Callable[[dict[str, Any]], None]
# What a worker runs: (plan, world, hooks, step of the checkpoint to go on from) -> summary.
Run = Callable[[Any, World, Hooks, int], dict[str, Any]]


def fit(
    plan: RunPlan,
    lease: Lease,
    watch: Watcher,
    run: Run | None = None,
    feeders: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Run a plan on the connected cluster until it is finished, stopped or beyond help.

    SIGTERM and SIGINT make the workers finish their step, save, and end.

    Args:
        watch: gets every record that the first worker posts, in order.
        run: what each worker runs; None: the stage of the plan, fed by Ray Data.
        feeders: logical resources that elastic training leaves to those who feed such a ``run``.

    Returns:
        The run's summary.

    Raises:
        NanorayError: a user's mistake found by a worker, a lost lease, or workers that failed
            more often than ``max_failures`` allows.
    """
    board = fleet.start_board(f"nanoray-board-{plan.run}-{lease.token[:8]}")
    trainer = _trainer(plan, lease, board, run, feeders)
    outcome: dict[str, Any] = {}

    def fit_in_thread() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:  # handed to the main thread below
            outcome["error"] = error

    thread = threading.Thread(target=fit_in_thread, name="fit", daemon=True)
    verdict: dict[str, Any] = {}
    others: fleet.Role = "rollout" if run else "data"  # who feeds the workers
    # Without trainers nothing goes on; without the others an evaluation may, which tells nothing.
    deadlines_s: dict[fleet.Role, float] = {"trainer": _trainer_deadline_s(plan), others: 3600.0}
    roles = fleet.RoleWatch(deadlines_s, lambda text: watch({"warning": text}))

    def watch_progress(record: dict[str, Any]) -> None:
        roles.progress()
        watch(record)

    with _stop_signals(board) as told_to_stop:
        thread.start()
        while thread.is_alive() and "error" not in verdict:
            thread.join(timeout=0.5)
            verdict = _relay(board, watch_progress)
            roles.look()
            if lease.lost:
                error = f"run {plan.run} was taken over by another writer"
                _give_up(board, thread, error)
                raise LeaseLostError(error)
            if told_to_stop.is_set() and not verdict and _nobody_hears(board):
                error = (
                    f"run {plan.run} was told to stop while it had no workers; its last "
                    f"checkpoint, if it has any, stands, and the same command goes on from it"
                )
                _give_up(board, thread, error)
                raise NanorayError(error)
    if "error" in verdict:
        # A process that ends while a thread of it is still within Ray may crash.
        thread.join(ENDING_DEADLINE_S)
        raise NanorayError(verdict["error"])
    storage.remove(_ray_storage(plan))
    ray.kill(board)
    if "error" in outcome:
        raise NanorayError(
            f"run {plan.run} failed: {_cause(outcome['error'])}; the last checkpoint "
            f"stands, and the same command goes on from it"
        ) from outcome["error"]
    return verdict


def _give_up(board: Any, fitting: threading.Thread, error: str) -> None:
    """End what Ray Train does, without its workers."""
    ray.get(board.conclude.remote({"error": error}), timeout=30)
    # A process that ends while a thread of it is still within Ray may crash. A placement that is
    # waited for must come too late first.
    fitting.join(ENDING_DEADLINE_S + _placement_s())


def _cause(error: BaseException) -> str:
    """The innermost error that Ray Train's message quotes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (named or lines or [type(error).__name__])[-1]


def _relay(board: Any, watch: Watcher) -> dict[str, Any]:
    """Hand on the new records; returns the verdict, empty while there is none."""
    try:
        records, verdict = ray.get(board.drain.remote(), timeout=60)
    except ray.exceptions.RayError as error:
        raise NanorayError(
            f"the run's board is gone ({type(error).__name__}); its workers save and stop, and "
            f"the same command goes on from there"
        ) from error
    for record in records:
        watch(record)
    made: dict[str, Any] = verdict
    return made


@contextmanager
def _stop_signals(board: Any) -> Iterator[threading.Event]:
    """While open, SIGTERM and SIGINT put up the board's stop flag; a second SIGINT interrupts.

    The event tells that one has come.
    """
    come = threading.Event()

    def stop(number: int, _frame: object) -> None:
        come.set()
        board.stop.remote(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield come
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _nobody_hears(board: Any) -> bool:
    """Whether there seem to be no workers that could hear that they are to stop."""
    unheard_s: float = ray.get(board.unheard_s.remote(), timeout=60)
    return unheard_s > STOP_DEADLINE_S


def _trainer(
    plan: RunPlan,
    lease: Lease,
    board: Any,
    run: Run | None,
    feeders: Mapping[str, float] | None,
) -> Trainer:
    low, high = parse_worker_range(plan.config["num_workers"])
    gpus = float(plan.config["gpus_per_worker"] or 0)
    resources = {"CPU": float(plan.config["cpus_per_worker"])} | ({"GPU": gpus} if gpus else {})
    local = not fleet.on_cluster()
    plan = replace(plan)  # as new, without what it has worked out on the way
    datasets: dict[str, Any] = {}
    if run is None:
        assert isinstance(plan, StreamRunPlan)
        # On one machine packing takes cores from training.
        datasets["train"] = partial(_dataset, plan, board, 2 if local else None)
    scaling = ScalingConfig(
        num_workers=low if low == high else (low, high),
        use_gpu=gpus > 0,
        resources_per_worker=resources,
        label_selector=fleet.label_selector("trainer") or None,
    )
    trainer = Trainer(
        board,
        _train_loop,
        train_loop_config={
            "plan": plan,
            "token": lease.token,
            "board": board,
            "run": run,
            "linger_s": 0.0 if local else LINGER_S,
        },
        scaling_config=scaling,
        run_config=RunConfig(
            # A name of its own each time: what resumes is our checkpoint, not Ray Train's state.
            name=f"{plan.run}-{uuid.uuid4().hex[:8]}",
            storage_path=_ray_storage(plan),
            failure_config=FailureConfig(
                max_failures=int(plan.config["max_failures"]),
                # Placements that came too late count here: a lost node may take its time.
                controller_failure_limit=max(int(plan.config["max_failures"]), _placements(plan)),
            ),
            worker_runtime_env=None if local else {"env_vars": fleet.worker_environment()},
        ),
        datasets=datasets,
        # These take the place of the dataset's own options: order must be asked for here, too.
        dataset_config=DataConfig(
            datasets_to_split=list(datasets),
            execution_options=ExecutionOptions(preserve_order=True),
        ),
    )
    if low < high:
        # Workers that take every CPU would starve those who feed them.
        if run is None:
            trainer.scaling_policy = PlacedPolicy(
                scaling, {"CPU": 0 if gpus else DATA_CPUS}, "data"
            )
        else:
            trainer.scaling_policy = PlacedPolicy(scaling, feeders or {}, "rollout")
    return trainer


def _dataset(plan: StreamRunPlan, board: Any, concurrency: int | None) -> ray.data.Dataset:
    """Called in Ray Train's controller at every start, before the workers train."""
    with fleet.mistakes_told(board):
        start = choose_start(plan, lambda message: board.post.remote({"warning": message}))
        stream = plan.stream(plan.read_tokenizer())
    ray.get(board.start_from.remote(start.step), timeout=30)
    nodes = fleet.label_selector("data")
    return training_dataset(stream, start.slab, plan.tokenizer_dir, concurrency, nodes)


def _trainer_deadline_s(plan: RunPlan) -> float:
    """How long a run waits for another trainer node, where the last one is lost."""
    return max(TRAINER_DEADLINE_S, float(plan.config["wait_for_nodes"]))


def _placements(plan: RunPlan) -> int:
    """How many placements may come too late before a lost trainer node counts as lost for good."""
    return 1 + math.ceil(_trainer_deadline_s(plan) / _placement_s())


def _placement_s() -> float:
    """How long Ray Train waits for the places of a worker group."""
    # `fleet.connect` sets it, but not in a process where Ray runs already.
    return float(os.environ.get("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", 60))


def _ray_storage(plan: RunPlan) -> str:
    """Where Ray Train keeps its own small files: within the run."""
    return storage.join(plan.run_dir, ".ray")


def _train_loop(config: dict[str, Any]) -> None:
    """What Ray Train runs in every worker."""
    plan: RunPlan = config["plan"]
    board = config["board"]
    if ray.get(board.failed.remote(), timeout=30):
        return  # a restart after a mistake that no restart mends
    context = ray.train.get_context()
    size = context.get_world_size()
    with fleet.mistakes_told(board):
        device = _device(plan, size)
    world = World(context.get_world_rank(), size, device)
    if world.device.type == "cpu":
        # Ray sets OMP_NUM_THREADS to the reserved CPUs (1); the cores are ours to share.
        torch.set_num_threads(max(1, available_cpus() // context.get_local_world_size()))
    begun = time.monotonic()
    stop_watch = fleet.StopWatch(board) if world.is_first else None
    post = lambda record: board.post.remote(dict(record))  # noqa: E731
    # The first worker asks, for all: they go on from one checkpoint.
    asked = _start_step(plan, board, config["run"]) if world.is_first else 0
    start_step = world.gather(asked)[0]
    processes = world.gather(f"{socket.gethostname()}:{os.getpid()}")
    attempt = world.gather(uuid.uuid4().hex[:8])[0]  # a process number may come again
    if world.is_first:
        post({"workers": processes})
    hooks = Hooks(
        post=post,
        report=lambda record: ray.train.report({k: _plain(v) for k, v in record.items()}),
        stop_reason=stop_watch or (lambda: ""),
        guard=lambda: check_token(plan.run_dir, config["token"]),
        sinks=_sinks(plan) if world.is_first else [],
        attempt=attempt,
    )
    try:
        with fleet.mistakes_told(board):
            summary = (config["run"] or _run_stream)(plan, world, hooks, start_step)
        if world.is_first:
            ray.get(board.conclude.remote(summary), timeout=30)
            time.sleep(min(config["linger_s"], LINGER_SHARE * (time.monotonic() - begun)))
    except TrainingHealthError:  # all have it; the first to end ends all
        time.sleep(config["linger_s"])
        raise
    finally:
        if stop_watch:
            stop_watch.close()


def _device(plan: RunPlan, world_size: int) -> torch.device:
    """The best there is of what is this worker's."""
    device = reserved_device(on_gpu=bool(plan.config["gpus_per_worker"]))
    if device.type == "mps" and world_size > 1:  # gloo does not know MPS
        return torch.device("cpu")
    return device


def _start_step(plan: RunPlan, board: Any, run: Run | None) -> int:
    """Of the checkpoint to go on from: the one that the dataset begins after, if there is one."""
    if run is None:
        asked: int = ray.get(board.start_step.remote(), timeout=30)
        return asked
    with fleet.mistakes_told(board):
        return choose_start(plan, lambda message: board.post.remote({"warning": message})).step


def _run_stream(plan: RunPlan, world: World, hooks: Hooks, start_step: int) -> dict[str, Any]:
    assert isinstance(plan, StreamRunPlan)

    def open_blocks(stream: Stream, _tokenizer: Tokenizer, cursor: Cursor) -> Iterator[Block]:
        shard = ray.train.get_dataset_shard("train")
        return worker_blocks(shard, stream, cursor, world.rank, world.size)

    return run_worker(plan, world, open_blocks, hooks, start_step)


def _sinks(plan: RunPlan) -> list[Sink]:
    sinks = [fleet.gauge_sink(plan.stage, plan.run)]
    if plan.config["wandb"]:
        sinks.append(WandbSink(plan.config["wandb"], plan.run, plan.to_dict()))
    return sinks


def _plain(value: Any) -> Any:
    # A numpy scalar in a report is an error of the controller that is not retried (Ray 2.60).
    return value if isinstance(value, str | bool | int) else float(value)
