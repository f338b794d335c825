"""Jobs that start on one cluster at the same moment take turns."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nanoray.errors import NanorayError
from nanoray.fleet.connect import on_cluster

TURN_DEADLINE_S = 120.0
_NAME = "nanoray-turn"


@ray.remote(num_cpus=0, max_restarts=0)
class _Turn:
    """A lock by its name, which one actor can have: it falls open when its job ends, however."""


@contextlib.contextmanager
def turn() -> Iterator[Callable[[], None]]:
    """The right to look for room on the cluster and to take it; yields what gives it back early.

    Two jobs that find the same room free could each take half of what both need, and wait for ever
    for the other half: workers that hold all CPUs wait for data that no CPU is left to pack.

    Raises:
        NanorayError: another job has been starting for `TURN_DEADLINE_S`.
    """
    if not on_cluster():  # a Ray of one's own
        yield lambda: None
        return
    actor = _take()

    def give_back() -> None:
        with contextlib.suppress(Exception):  # it must not hide why a run ends
            ray.kill(actor)

    try:
        yield give_back
    finally:
        give_back()


def _take() -> ray.actor.ActorHandle:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    deadline = time.monotonic() + TURN_DEADLINE_S
    while True:
        try:
            return _Turn.options(name=_NAME, scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        # The name is taken; or, where Ray fails to load its class, by a job that is just ending.
        except (ValueError, AssertionError) as error:
            if time.monotonic() > deadline:
                raise NanorayError(
                    f"another job has been starting on this cluster for {TURN_DEADLINE_S:.0f} s; "
                    f"wait until it trains, or stop it, then run the command again"
                ) from error
        time.sleep(0.3)
