"""Which nodes do which kind of work, by the label ``nanoray-role`` that nodes may carry.

Roles are trainer, data and rollout (and head, where drivers run). Work of a kind is placed on the
nodes of its role while the cluster has any, and anywhere in a cluster without such nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ray

ROLE_LABEL = "nanoray-role"
Role = Literal["trainer", "data", "rollout"]


def living_nodes() -> list[dict[str, Any]]:
    """The connected cluster's nodes, as `ray.nodes` describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


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
