"""Which nodes do which kind of work, by the label ``nanoray-role`` that nodes may carry.

Roles are trainer, data and rollout (and head, where drivers run). Work of a kind is placed on the
nodes of its role while the cluster has any, and anywhere in a cluster without such nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ray
from ray._private.state import available_resources_per_node, state

ROLE_LABEL = "nanoray-role"
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
