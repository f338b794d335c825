"""Which parameter gets which optimiser and which hyperparameters: the recipe's table.

Parameters are known by nanochat's names (`transformer.h.0.attn.c_q.weight` and so on).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Recipe = Literal["july", "february"]

REFERENCE_WIDTH = 768
"""The width at which nanochat tuned the learning rates of head and embeddings (d12)."""
REFERENCE_BATCH_TOKENS = 2**19
"""The batch size at which nanochat tuned the learning rates, in tokens."""
ADAM_EPS = 1e-10
SMEAR_LR = 0.2
"""Smear and backout: nanochat scales this one with neither width nor batch."""


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share one optimiser and its hyperparameters.

    `lr` is the rate at multiplier 1, with every scaling of the recipe (width, batch, shape)
    already in it.
    """

    kind: Literal["adamw", "muon"]
    names: tuple[str, ...]
    """For Muon all of one shape [rows, cols]."""
    lr: float
    weight_decay: float
    """AdamW's is not scheduled (but it acts through the scheduled lr); Muon's is."""
    beta2: float
    beta1: float = 0.0
    """AdamW only: Muon's momentum comes from the schedule."""
    eps: float = ADAM_EPS
    """AdamW only."""


@dataclass(frozen=True)
class _AdamRow:
    """One row of the AdamW table: betas and decay of a role, by recipe."""

    betas: tuple[float, float]
    weight_decay: float


_ADAM_TABLE: dict[Recipe, dict[str, _AdamRow]] = {
    "july": {
        "head": _AdamRow((0.8, 0.96), 0.01),
        "embedding": _AdamRow((0.8, 0.995), 0.001),
        "value_embedding": _AdamRow((0.8, 0.995), 0.01),
        "resid": _AdamRow((0.8, 0.95), 0.05),
        "x0": _AdamRow((0.96, 0.95), 0.0),
        "smear": _AdamRow((0.8, 0.95), 0.0),
    },
    "february": {
        "head": _AdamRow((0.8, 0.95), 0.0),
        "embedding": _AdamRow((0.8, 0.95), 0.0),
        "value_embedding": _AdamRow((0.8, 0.95), 0.0),
        "resid": _AdamRow((0.8, 0.95), 0.0),
        "x0": _AdamRow((0.96, 0.95), 0.0),
    },
}
_MUON_BETA2: dict[Recipe, float] = {"july": 0.9, "february": 0.95}

_ROLES = (
    ("matrix", re.compile(r"transformer\.h\.\d+\..+")),
    ("head", re.compile(r"lm_head\.weight")),
    ("embedding", re.compile(r"transformer\.wte\.weight")),
    ("value_embedding", re.compile(r"value_embeds\.\d+\.weight")),
    ("resid", re.compile(r"resid_lambdas")),
    ("x0", re.compile(r"x0_lambdas")),
    ("smear", re.compile(r"smear_gate\.weight|smear_lambda|backout_lambda")),
)


def check_recipe(recipe: str) -> None:
    """Raise ValueError unless the recipe is one that we know."""
    if recipe not in _ADAM_TABLE:
        raise ValueError(f"unknown recipe {recipe!r}: choose july or february")


def role_of(name: str) -> str:
    """The role of a parameter by its name: matrix, head, embedding, ... ValueError if none."""
    for role, pattern in _ROLES:
        if pattern.fullmatch(name):
            return role
    raise ValueError(f"no optimiser is known for a parameter named {name!r}: add it to a role")


def build_groups(
    model_named_shapes: Mapping[str, Sequence[int]],
    recipe: Recipe,
    *,
    embedding_lr: float,
    unembedding_lr: float,
    matrix_lr: float,
    scalar_lr: float,
    weight_decay: float,
    width: int,
    batch_tokens: int,
) -> list[ParamGroup]:
    """Assign every parameter to a group, with the recipe's scaling of the base rates.

    Head, embedding and value embeddings scale with (width/768)^-1/2; these, the residual and
    x0 scalars and the matrices scale with sqrt(batch_tokens / 2^19); matrices of shape
    [rows, cols] with sqrt(max(1, rows/cols)); smear and backout with nothing.

    Args:
        model_named_shapes: parameter name -> shape, of the whole model.
        recipe: july or february.
        embedding_lr, unembedding_lr, matrix_lr, scalar_lr: base rates, before scaling.
        weight_decay: Muon's decay, already scaled by the law in `nanoray.laws`.
        width: the model's width (n_embd).
        batch_tokens: tokens of one optimiser step on all ranks.

    Raises:
        ValueError: an unknown recipe or parameter name, or a block parameter that is no matrix.
    """
    check_recipe(recipe)
    members: dict[str, list[str]] = {}
    for name in model_named_shapes:
        members.setdefault(role_of(name), []).append(name)
    batch_scale = (batch_tokens / REFERENCE_BATCH_TOKENS) ** 0.5
    width_scale = (width / REFERENCE_WIDTH) ** -0.5
    adam_lr = {
        "head": unembedding_lr * width_scale * batch_scale,
        "embedding": embedding_lr * width_scale * batch_scale,
        "value_embedding": embedding_lr
        * (0.5 if recipe == "july" else 1.0)
        * width_scale
        * batch_scale,
        "resid": scalar_lr * 0.01 * batch_scale,
        "x0": scalar_lr * batch_scale,
        "smear": SMEAR_LR,
    }
    table = _ADAM_TABLE[recipe]
    unplaced = [role for role in members if role != "matrix" and role not in table]
    if unplaced:
        raise ValueError(
            f"the {recipe} recipe has no parameters like {members[unplaced[0]][0]!r}: "
            "use the recipe that the model was built with"
        )
    groups = [
        ParamGroup(
            kind="adamw",
            names=tuple(members[role]),
            lr=adam_lr[role],
            weight_decay=row.weight_decay,
            beta1=row.betas[0],
            beta2=row.betas[1],
        )
        for role, row in table.items()
        if role in members
    ]
    return groups + _muon_groups(
        {name: tuple(model_named_shapes[name]) for name in members.get("matrix", [])},
        matrix_lr * batch_scale,
        weight_decay,
        _MUON_BETA2[recipe],
    )


def _muon_groups(
    shapes: Mapping[str, tuple[int, ...]], lr: float, weight_decay: float, beta2: float
) -> list[ParamGroup]:
    """One Muon group per matrix shape, the rate scaled by it."""
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, shape in shapes.items():
        if len(shape) != 2:
            raise ValueError(f"Muon needs matrices, but {name!r} has shape {tuple(shape)}")
        by_shape.setdefault(shape, []).append(name)
    return [
        ParamGroup(
            kind="muon",
            names=tuple(names),
            lr=lr * max(1.0, shape[0] / shape[1]) ** 0.5,
            weight_decay=weight_decay,
            beta2=beta2,
        )
        for shape, names in sorted(by_shape.items())
    ]


def scale_rates(groups: Sequence[ParamGroup], factor: float) -> list[ParamGroup]:
    """The same groups with every learning rate times ``factor``, those that no flag sets too."""
    return [replace(group, lr=group.lr * factor) for group in groups]


def backward_order(names: Sequence[str]) -> list[str]:
    """Names in the order in which a backward pass completes their gradients.

    Head first, then the layers from the last to the first with their value embeddings, then
    everything that all layers share (embedding, scalars), which is complete only at the end.
    Buckets are communicated in this order. It need not be exact: a gradient that comes later
    than its place only delays those behind it.
    """

    def key(name: str) -> tuple[int, int]:
        if name.startswith("lm_head."):
            return (0, 0)
        layer = re.match(r"(?:transformer\.h|value_embeds)\.(\d+)\.", name)
        return (1, -int(layer.group(1))) if layer else (2, 0)

    return sorted(names, key=key)
