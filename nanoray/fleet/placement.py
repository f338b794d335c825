"""Which nodes do which kind of work, by the label ``nanoray-role`` that nodes may carry.

Roles are trainer, data and rollout (and head, where drivers run). Work of a kind is placed on the
nodes of its role while the cluster has any, and anywhere in a cluster without such nodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import ray
from ray._private.state import available_resources_per_node, state

from nanoray.errors import NanorayError

ROLE_LABEL = "nanoray-role"
_LOOK_PERIOD_S = 5.0
Role = Literal["trainer", "data", "rollout"]


def living_nodes() -> list[dict[str, Any]]:
    """The connected cluster's nodes that take new work, as `ray.nodes` describes them."""
    leaving = draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def draining_nodes() -> set[str]:
    """Ids of the nodes that are to go, such as spot machines that were given notice: Ray starts
    nothing new on them.
    """
    # What Ray Train's own watcher asks; there is no public way (2.60).
    return set(state.get_draining_nodes())


def free_nodes() -> list[dict[str, Any]]:
    """`living_nodes`, but with what nobody holds of each at this moment as its resources."""
    free = available_resources_per_node()
    return [{**node, "Resources": free.get(node["NodeID"], {})} for node in living_nodes()]


def nodes_for(role: Role | None, nodes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of ``nodes`` that work of this role is placed on; None: work that goes anywhere."""
    own = [node for node in nodes if role and _role(node) == role]
    return own or list(nodes)


def label_selector(role: Role) -> dict[str, str]:
    """Ray's selector for work of this role; empty while no living node has the role."""
    own = any(_role(node) == role for node in living_nodes())
    return {ROLE_LABEL: role} if own else {}


def has_roles() -> bool:
    """Whether any living node has a role, be it the head's."""
    return any(_role(node) for node in living_nodes())


class RoleWatch:
    """Notices when the last node goes that work of a role could be placed on.

    Such work waits without a word until there is one again.

    Args:
        deadlines_s: most seconds without a node, by role, unless there is `progress` even so;
            roles that have no node at the start are not watched.
        tell: gets a sentence when the last node of a role goes, and when there is one again.
    """

    def __init__(self, deadlines_s: Mapping[Role, float], tell: Callable[[str], None]) -> None:
        self._deadlines_s = {role: s for role, s in deadlines_s.items() if label_selector(role)}
        self._tell = tell
        self._gone_since: dict[Role, float] = {}
        self._next_look = 0.0

    def progress(self) -> None:
        """Work goes on, with what there was: the deadline is put off."""
        self._gone_since = dict.fromkeys(self._gone_since, time.monotonic())

    def look(self) -> None:
        """To be called often; looks every few seconds.

        Raises:
            NanorayError: there is still no node of a role after the deadline.
        """
        now = time.monotonic()
        if not self._deadlines_s or now < self._next_look:
            return
        self._next_look = now + _LOOK_PERIOD_S
        try:
            there = {_role(node) for node in living_nodes()}
        except ray.exceptions.RayError:
            return  # the head is away; others tell of that
        for role, deadline_s in self._deadlines_s.items():
            if role in there:
                if self._gone_since.pop(role, None) is not None:
                    self._tell(f"there is a {role} node again")
            elif role not in self._gone_since:
                self._gone_since[role] = now
                self._tell(f"no {role} node is left; waiting {deadline_s:.0f} s at most for one")
            elif now - self._gone_since[role] > deadline_s:
                raise NanorayError(
                    f"no {role} node has come within {deadline_s:.0f} s; the last checkpoint "
                    f"stands, and the same command goes on from it: add such a node (label "
                    f"{ROLE_LABEL}={role}), then run it again"
                )


def count_places(nodes: Sequence[Mapping[str, Any]], wanted: Mapping[str, float]) -> int:
    """How many workers that each want so much there is room for: none may span two nodes."""
    return sum(
        # Not `//`: 1 // 0.1 is 9.
        min(
            int(node["Resources"].get(kind, 0) / amount + 1e-9)
            for kind, amount in wanted.items()
            if amount
        )
        for node in nodes
    )


def _role(node: Mapping[str, Any]) -> str | None:
    role: str | None = (node.get("Labels") or {}).get(ROLE_LABEL)
    return role
