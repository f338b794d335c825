"""The rollout pool on Ray: a supervising actor, the actors that sample, and the learner's side.

`start_pool` starts the supervising actor on the driver's node (it needs no CPU, and lives as long
as the driver); every learner worker talks to it through a `PoolClient`. There is no collective that
could hang: a version of the weights is one object in the object store, which the actors fetch.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import ray
from numpy.typing import NDArray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nanoray import fleet, storage
from nanoray.config.rl import MAX_ACTORS
from nanoray.errors import NanorayError, NoGpuError
from nanoray.fleet.pool import loss_reason, users_error
from nanoray.metrics import Sink
from nanoray.rl.groups import Group
from nanoray.rl.ledger import LedgerRules
from nanoray.rl.seat import ActorLostError, Weights, WeightsLostError
from nanoray.rl.supervisor import Supervisor
from nanoray.rl.terms import PoolSettings, Taken

STATUS_FILE = "rl_status.json"
SCALE_FILE = "rl_scale.json"
_LOCAL_PERIOD_S = 1.0
_REMOTE_PERIOD_S = 10.0  # an object store has seen enough by then
_EVENTS_PERIOD_S = 1.0
_FETCH_DEADLINE_S = 120.0
_STOP_PERIOD_S = 0.5  # a learner that waits for groups asks so often whether to stop


class BundleSampler(Protocol):
    """What an actor holds, see `sampler.Sampler`."""

    def load_weights(self, buffer: NDArray[np.uint8], version: int) -> None: ...

    def sample(self, numbers: Sequence[int]) -> list[Group]: ...


Open = Callable[[], BundleSampler]


@ray.remote(max_restarts=0, max_task_retries=0)
class _RolloutActor:
    def __init__(self, open_sampler: Open) -> None:
        self._open = open_sampler
        self._loading = threading.Lock()
        self._key = (-1, -1)

    def start(self) -> dict[str, Any]:  # not in __init__, whose errors arrive as a dead actor
        self._sampler = self._open()
        return {"pid": os.getpid(), "node": _short(ray.get_runtime_context().get_node_id())}

    def load(self, key: tuple[int, int], box: list[Any]) -> None:
        with self._loading:
            if key > self._key:
                buffer = ray.get(box[0], timeout=_FETCH_DEADLINE_S)
                self._sampler.load_weights(buffer, key[1])
                self._key = key

    def sample(self, numbers: Sequence[int], key: tuple[int, int], box: list[Any]) -> list[Group]:
        self.load(key, box)
        return self._sampler.sample(numbers)


class _RayRollouts:
    """`seat.Rollouts`, with Ray's errors told apart."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def ready(self) -> Mapping[str, Any]:
        who: Mapping[str, Any] = await self._answer(self._handle.start.remote())
        return who

    async def load(self, weights: Weights) -> None:
        await self._answer(self._handle.load.remote(weights.key, weights.content))

    async def sample(self, numbers: Sequence[int], weights: Weights) -> list[Group]:
        ref = self._handle.sample.remote(numbers, weights.key, weights.content)
        groups: list[Group] = await self._answer(ref)
        return groups

    def kill(self) -> None:
        ray.kill(self._handle)

    async def _answer(self, ref: Any) -> Any:
        try:
            return await ref
        except ray.exceptions.RayTaskError as error:
            cause = users_error(error)
            if isinstance(error.cause, NoGpuError):  # another node's may be fine
                raise ActorLostError(str(cause)) from error
            if isinstance(cause, NanorayError):
                raise cause from error
            if isinstance(error.cause, ray.exceptions.ObjectLostError):
                raise WeightsLostError from error
            raise ActorLostError(f"it failed: {error.cause!r}") from error
        except ray.exceptions.RayActorError as error:
            raise ActorLostError(loss_reason(error)) from error
        except ray.exceptions.RayError as error:  # the answer was lost with the actor's node
            raise ActorLostError(f"its answer is lost ({type(error).__name__})") from error


@ray.remote(num_cpus=0, max_restarts=0)
class _PoolActor:
    """Runs the supervisor in the event loop of an asynchronous Ray actor."""

    def __init__(
        self,
        open_box: list[Any],
        rules: LedgerRules,
        settings: PoolSettings,
        options: Mapping[str, Any],
        name: str,
        run_dir: str,
    ) -> None:
        def launch(number: int) -> _RayRollouts:
            actor = _RolloutActor.options(  # type: ignore[attr-defined]
                name=f"{name}-{number}",
                max_concurrency=2,  # threads: weights come in while a bundle is sampled
                **options,
            )
            return _RayRollouts(actor.remote(open_box[0]))

        self._launch, self._rules, self._settings = launch, rules, settings
        self._run_dir = run_dir

    async def start(self) -> None:
        self.supervisor = Supervisor(self._launch, self._rules, self._settings)
        self._over = asyncio.Event()
        sink = fleet.gauge_sink("rollouts", self._run_dir.rsplit("/", 1)[-1])
        books = keep_books(self.supervisor, self._run_dir, self._over, sink, _leaving_nodes)
        self._keeper = asyncio.create_task(books)

    async def call(self, method: str, *args: Any) -> Any:
        """A coroutine of the supervisor."""
        return await getattr(self.supervisor, method)(*args)

    async def status(self) -> dict[str, Any]:
        return self.supervisor.status()

    async def resize(self, size: int | None) -> None:
        self.supervisor.resize(size)

    async def close(self) -> None:
        await self.supervisor.close()
        self._over.set()
        await self._keeper


def start_pool(
    open_sampler: Open,
    rules: LedgerRules,
    settings: PoolSettings,
    *,
    run_dir: str,
    num_cpus: float = 1,
    num_gpus: float = 0,
) -> Any:
    """Start the pool's supervising actor; the others follow when the learner begins.

    Args:
        open_sampler: called once in every rollout actor, such as `SamplerSettings.open`.
        run_dir: where `rl_status.json` is written and `rl_scale.json` looked for.
        num_cpus, num_gpus: logical resources of a rollout actor.

    Returns:
        Its handle, for `PoolClient`.
    """
    context = ray.get_runtime_context()
    here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)
    name = f"nanoray-rollouts-{run_dir.rsplit('/', 1)[-1]}-{context.get_job_id()}"
    pool = _PoolActor.options(name=name, scheduling_strategy=here).remote(  # type: ignore[attr-defined]
        [ray.put(open_sampler)],
        rules,
        settings,
        # The nodes of the start: where all of them are lost, the actors wait for new ones.
        {
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "label_selector": fleet.label_selector("rollout"),
        },
        name,
        run_dir,
    )
    ray.get(pool.start.remote(), timeout=_FETCH_DEADLINE_S)
    return pool


def close_pool(pool: Any) -> None:
    """End all actors of the pool. Never raises: it must not hide why a run ends."""
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(pool.close.remote(), timeout=10)
    ray.kill(pool)


@contextlib.contextmanager
def events_told(pool: Any, tell: Callable[[str], None]) -> Iterator[None]:
    """While open, ``tell`` gets the text of every event of the pool, from a thread."""
    over = threading.Event()

    def follow() -> None:
        told = 0
        last_look = False
        while not last_look:
            last_look = over.wait(_EVENTS_PERIOD_S)
            with contextlib.suppress(ray.exceptions.RayError):  # that the learner will tell
                for event in ray.get(pool.status.remote(), timeout=10)["events"]:
                    if event["number"] > told:
                        told = event["number"]
                        tell(event["text"])

    thread = threading.Thread(target=follow, name="pool-events", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class PoolClient:
    """A learner worker's side; `take` is for every worker, the rest for the first one.

    Args:
        pool: what `start_pool` gave.
        attempt: names this start of the learner, the same for all its workers.
    """

    def __init__(self, pool: Any, attempt: str) -> None:
        self._pool, self._attempt = pool, attempt

    def begin(self, step: int, ledger: Mapping[str, Any] | None) -> None:
        """Forget what is under way; go on before ``step`` with the ledger of a checkpoint."""
        self._call("begin", step, ledger)

    def publish(self, version: int, weights: NDArray[np.uint8]) -> None:
        """Sample with these weights (`flat.pack`) from now on; does not wait for the actors."""
        # In a list a reference travels as such; the pool alone keeps it.
        self._call("publish", version, [ray.put(weights)])

    def take(self, step: int, stop_reason: Callable[[], str] = lambda: "") -> Taken:
        """The groups of a step; waits for them. Raises NanorayError: they cannot be had.

        Args:
            stop_reason: asked meanwhile; where there is one, all workers get no groups.
        """
        with self._own_errors():
            ref = self._pool.call.remote("take", self._attempt, step)
            while not ray.wait([ref], timeout=_STOP_PERIOD_S)[0]:
                if stop_reason():
                    self._call("stop")
                    break
            taken: Taken = ray.get(ref)
            return taken

    def evaluating(self, begins: bool) -> None:
        """An evaluation begins, or ends: the pool's size is not judged by it."""
        self._call("evaluating", begins)

    def trained(self, step: int) -> None:
        """The groups of ``step`` are in the weights."""
        self._call("trained", step)

    def ledger(self) -> Mapping[str, Any]:
        """What a checkpoint keeps: the state after the last trained step."""
        state: Mapping[str, Any] = self._call("ledger_state")
        return state

    def _call(self, method: str, *args: Any) -> Any:
        with self._own_errors():
            return ray.get(self._pool.call.remote(method, self._attempt, *args))

    @contextlib.contextmanager
    def _own_errors(self) -> Iterator[None]:
        try:
            yield
        except ray.exceptions.RayTaskError as error:
            raise users_error(error) from error
        except ray.exceptions.RayActorError as error:
            raise NanorayError(
                f"the rollout pool is gone ({loss_reason(error)}); run the command again"
            ) from error


def _leaving_nodes() -> set[str]:
    return {_short(node_id) for node_id in fleet.draining_nodes()}


def _short(node_id: str) -> str:
    return node_id[:8]


async def keep_books(
    supervisor: Supervisor,
    run_dir: str,
    over: asyncio.Event,
    sink: Sink = lambda _record: None,
    leaving_nodes: Callable[[], Collection[str]] = tuple,
) -> None:
    """Write the status, obey the scale file and the notices that nodes are given, about once a
    second.

    ``sink`` gets the status's `pool_numbers`; ``leaving_nodes`` tells which nodes are to go.
    Once ``over`` is set the status is written a last time: nobody else writes it, so that no
    older one can come after.
    """
    period_s = _LOCAL_PERIOD_S if storage.is_local(run_dir) else _REMOTE_PERIOD_S
    seen: str | None = None
    trouble = ""
    while True:
        last = over.is_set()
        try:
            version = await asyncio.to_thread(_scale_version, run_dir)
            seen, before = version, seen
            if before not in (None, version):  # what was there at the start is an old command
                supervisor.resize(await asyncio.to_thread(read_scale, run_dir))
            supervisor.vacate(await asyncio.to_thread(leaving_nodes))
            # Only this thread may look at the supervisor, which changes as it runs.
            status = supervisor.status()
            sink(pool_numbers(status))
            await asyncio.to_thread(write_status, status, run_dir)
            trouble = ""
        except Exception as error:  # a wrong command, a full disk, an outage that may pass
            cause = "" if isinstance(error, NanorayError) else f"{run_dir} cannot be used: "
            told, trouble = trouble, f"{cause}{error}"
            if trouble != told:
                supervisor.journal.tell(trouble)
        if last:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), period_s)


def pool_numbers(status: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a `Supervisor.status` that are watched: groups, and actors by state."""
    queue, states = status["queue"], [actor["state"] for actor in status["actors"]]
    return {
        "groups_waiting": queue["waiting"],
        "groups_in_flight": queue["in_flight"],
        "actors_wanted": status["target"],
        **{f"actors_{state}": states.count(state) for state in ("starting", "idle", "busy")},
    }


def write_status(status: Mapping[str, Any], run_dir: str) -> None:
    storage.write_text(storage.join(run_dir, STATUS_FILE), json.dumps(status, indent=1) + "\n")


def write_scale(run_dir: str, actors: int | None) -> None:
    """Tell the pool of a running job how many actors it shall have (None: scale itself again)."""
    # With the time, so that an object store tells a command given again from the one before.
    command = {"actors": actors, "time": time.time()}
    storage.write_text(storage.join(run_dir, SCALE_FILE), json.dumps(command))


def read_scale(run_dir: str) -> int | None:
    """The number asked for; null (None) lets the pool scale itself again.

    Raises:
        NanorayError: the file holds something else.
    """
    try:
        command = json.loads(storage.read_text(storage.join(run_dir, SCALE_FILE)))
        size = command["actors"]
    except (ValueError, TypeError, KeyError):
        size = 0
    if size is None or (type(size) is int and 1 <= size <= MAX_ACTORS):
        return size
    raise NanorayError(
        f'{SCALE_FILE} is not obeyed; write {{"actors": N}} into it, N from 1 to {MAX_ACTORS}'
    )


def _scale_version(run_dir: str) -> str:
    try:
        return storage.version(storage.join(run_dir, SCALE_FILE))
    except FileNotFoundError:
        return ""
