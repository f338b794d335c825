"""Jobs that start on one cluster at the same moment take turns, and may wait for room."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nanoray.errors import NanorayError
from nanoray.fleet.connect import Needs, NoRoomError, on_cluster, preflight
from nanoray.fleet.placement import (
    ROLE_LABEL,
    Role,
    has_roles,
    label_selector,
)

Settled = TypeVar("Settled")

TURN_DEADLINE_S = 120.0
HELD_DEADLINE_S = 300.0
LOOK_PERIOD_S = 20.0
_NAME = "nanoray-turn"


@ray.remote(num_cpus=0, max_restarts=0)
class _Turn:
    """A lock by its name, which one actor can have: it falls open when its job ends, however."""


@contextlib.contextmanager
def turn(deadline_s: float = 0.0) -> Iterator[Callable[[], None]]:
    """The right to look for room on the cluster and to take it; yields what gives it back early.

    Two jobs that find the same room free could each take half of what both need, and wait for ever
    for the other half: workers that hold all CPUs wait for data that no CPU is left to pack.
    It goes back by itself after `HELD_DEADLINE_S`: a job that cannot start must not hold up others.

    Raises:
        NanorayError: others have been starting for ``deadline_s``, or `TURN_DEADLINE_S` if that is
            longer.
    """
    if not on_cluster():  # a Ray of one's own
        yield lambda: None
        return
    actor = _take(max(deadline_s, TURN_DEADLINE_S))

    def give_back() -> None:
        with contextlib.suppress(Exception):  # it must not hide why a run ends
            ray.kill(actor)

    timer = threading.Timer(HELD_DEADLINE_S, give_back)
    timer.daemon = True
    timer.start()
    try:
        yield give_back
    finally:
        timer.cancel()
        give_back()


def _take(deadline_s: float) -> ray.actor.ActorHandle:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            return _Turn.options(name=_NAME, scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        # The name is taken; or, where Ray fails to load its class, by a job that is just ending.
        except (ValueError, AssertionError) as error:
            if time.monotonic() > deadline:
                raise NanorayError(
                    f"another job has been starting on this cluster for {deadline_s:.0f} s; "
                    f"wait until it trains, or stop it, then run the command again"
                ) from error
        time.sleep(0.3)


@contextlib.contextmanager
def when_there_is_room(
    settle: Callable[[], tuple[Settled, Sequence[Needs]]],
    wait_s: float = 0.0,
    say: Callable[[str], None] = print,
) -> Iterator[tuple[Settled, Callable[[], None]]]:
    """`turn`, once the cluster has what is needed; yields what was settled, and what gives the
    turn back early.

    While it waits others may start, and an autoscaler is asked for the nodes that are missing. In
    a cluster with roles it waits for a node of every role that is needed: which roles an
    autoscaler could add, Ray (2.60) does not tell.

    Args:
        settle: what depends on the cluster as it is at that moment (whether there are GPUs), and
            what that needs.
        wait_s: most time to wait for room.
        say: is told that, and for what, once.

    Raises:
        NoRoomError: what is missing still, in one sentence.
        NanorayError: see `preflight` and `turn`.
    """
    deadline = time.monotonic() + wait_s
    told = False
    while True:
        left_s = deadline - time.monotonic()
        with turn(left_s) as give_back:
            settled, needs = settle()
            late = left_s <= 0 or not on_cluster()
            missing = _missing(needs, all_roles=not late)
            if missing is None:
                yield settled, give_back
                return
        if late:
            raise missing
        if not told:
            say(f"waiting for room, {wait_s:.0f} s at most: {missing}")
            told = True
        _wait_for_room(needs, min(deadline, time.monotonic() + LOOK_PERIOD_S))


def _missing(needs: Sequence[Needs], all_roles: bool) -> NoRoomError | None:
    """``all_roles``: no node of one role is taken for another's while that may still come."""
    try:
        for one in needs:
            others = one.others_role if one.other_cpus or one.other_gpus else None
            for role in (one.role, others) if all_roles and has_roles() else ():
                if role and not label_selector(role):
                    raise NoRoomError(f"there is no {role} node")
            preflight(one)
    except NoRoomError as error:
        return error
    return None


def _wait_for_room(needs: Sequence[Needs], until: float) -> None:
    """Until the workers could be placed: a placement group that waits is what autoscalers heed.

    Only a sign that it is worth to look again: Ray Train makes a group of its own, and the
    preflight also knows what cannot be reserved. Memory is not asked for: an autoscaler does not
    know how much of it a node brings, unless its file says so.
    """
    places = _places(needs)
    group = placement_group(
        [resources for resources, _selector in places],
        bundle_label_selector=[selector for _resources, selector in places],
    )
    try:
        time.sleep(1.0)
        # In short waits, which a signal can interrupt.
        with contextlib.suppress(ray.exceptions.RayError):
            while not group.wait(timeout_seconds=1) and time.monotonic() < until:
                pass
    finally:
        remove_placement_group(group)


def _places(needs: Sequence[Needs]) -> list[tuple[dict[str, float], dict[str, str]]]:
    """Resources and label selector of every worker, and of the others where no need is theirs and
    no node: those that are there all jobs use in turn.
    """
    roles = {one.role for one in needs}
    places = []
    for one in needs:
        worker = {
            "CPU": one.cpus_per_worker,
            "GPU": one.gpus_per_worker,
        }
        places += [(worker, one.role)] * one.num_workers
        if one.others_role not in roles and not (
            one.others_role and label_selector(one.others_role)
        ):
            places.append(({"CPU": one.other_cpus, "GPU": one.other_gpus}, one.others_role))
    return [
        ({kind: amount for kind, amount in resources.items() if amount}, _selector(role))
        for resources, role in places
        if any(resources.values())
    ]


def _selector(role: Role | None) -> dict[str, Any]:
    """As `label_selector`, but in a cluster with roles for this one's, whose nodes may come."""
    if role and has_roles():
        return {ROLE_LABEL: role}
    return label_selector(role) if role else {}
