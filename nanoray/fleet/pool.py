"""A supervised pool of actors: work is dealt to whoever is free, a lost actor is replaced."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import ray

from nanoray.errors import NanorayError

Item = TypeVar("Item")
Result = TypeVar("Result")


@ray.remote(max_restarts=0)
class _PoolActor:
    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._make = make
        self._work: Callable[[Any], Any] | None = None

    def run(self, item: Any) -> Any:
        if self._work is None:  # not in the constructor, whose errors arrive as a dead actor
            self._work = self._make()
        return self._work(item)


class ActorPool(Generic[Item, Result]):
    """Actors that each hold what ``make`` built (a model, say) and apply it to items.

    Results must be a function of the item alone: an item whose actor was lost is done again by
    another one.

    Args:
        make: called once in every actor; returns the function of one item.
        size: how many actors.
        name: what they do, for the dashboard and messages.
        num_cpus, num_gpus: logical resources of each.
        max_losses: actors lost before `map` gives up.
    """

    def __init__(
        self,
        make: Callable[[], Callable[[Item], Result]],
        size: int,
        *,
        name: str,
        num_cpus: float = 1,
        num_gpus: float = 0,
        max_losses: int = 3,
    ) -> None:
        assert size >= 1
        self._name = name
        self._max_losses = max_losses
        self._losses = 0
        self._make = ray.put(make)  # pickled once, however many actors
        self._options = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self._started = 0
        self.actors = [self._start() for _ in range(size)]

    def _start(self) -> Any:
        self._started += 1
        name = f"nanoray-{self._name}-{self._started}-{ray.get_runtime_context().get_job_id()}"
        return _PoolActor.options(name=name, **self._options).remote(self._make)  # type: ignore[attr-defined]

    def map(self, items: Sequence[Item], deadline_s: float) -> Iterator[tuple[int, Result]]:
        """Yield (index of the item, result) as they are done, in any order.

        Args:
            deadline_s: for one item, the actor's start included; an actor that takes longer is
                taken for lost.

        Raises:
            NanorayError: what ``make`` or the work says of a user's mistake, or more than
                ``max_losses`` lost actors.
        """
        waiting = deque(range(len(items)))
        running: dict[Any, tuple[int, Any, float]] = {}
        free = list(self.actors)
        while waiting or running:
            while waiting and free:
                index, actor = waiting.popleft(), free.pop()
                running[actor.run.remote(items[index])] = (index, actor, time.monotonic())
            # Wakes now and then, because a hung actor never becomes ready.
            ready, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
            for ref in ready:
                index, actor, _since = running.pop(ref)
                try:
                    result = ray.get(ref)
                except ray.exceptions.RayTaskError as error:
                    raise users_error(error) from error
                except ray.exceptions.RayActorError as error:
                    waiting.appendleft(index)
                    free.append(self._replace(actor, loss_reason(error)))
                    continue
                free.append(actor)
                yield index, result
            for ref, (index, actor, since) in list(running.items()):
                if time.monotonic() - since > deadline_s:
                    del running[ref]
                    waiting.appendleft(index)
                    free.append(self._replace(actor, f"no answer within {deadline_s:.0f} s"))

    def _replace(self, actor: Any, reason: str) -> Any:
        self._losses += 1
        ray.kill(actor)
        if self._losses > self._max_losses:
            raise NanorayError(
                f"the {self._name} pool lost {self._losses} actors, the last one because: {reason}"
            )
        new = self._start()
        self.actors[self.actors.index(actor)] = new
        return new

    def close(self) -> None:
        """Kill the actors."""
        for actor in self.actors:
            ray.kill(actor)


def loss_reason(error: ray.exceptions.RayActorError) -> str:
    """Why an actor was lost, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def users_error(error: ray.exceptions.RayTaskError) -> Exception:
    """A user's mistake as the actor told it; anything else with the actor's traceback."""
    cause: Any = error.cause
    if isinstance(cause, NanorayError):
        return NanorayError(str(cause).splitlines()[0])
    return error
