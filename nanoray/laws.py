"""The laws of the dial: what follows from ``depth``.

Source: nanochat's speedrun (July 2026), which takes the batch-size exponent from "Power Lines"
(arXiv 2505.13738) and the weight-decay rule from arXiv 2405.13698. Plain arithmetic: how many
parameters a depth has is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

REFERENCE_DEPTH = 12
REFERENCE_BATCH_TOKENS = 2**19
BATCH_EXPONENT = 0.383
# Below this depth the weight-decay law extrapolates to absurd values (d4: 1.89).
SMALLEST_DECAY_DEPTH = 8


def model_width(depth: int, aspect_ratio: int, head_dim: int) -> int:
    """depth × aspect_ratio, rounded up to a multiple of head_dim."""
    return -(-depth * aspect_ratio // head_dim) * head_dim


@dataclass(frozen=True)
class Scaling:
    """What the laws say for one depth and one ratio of tokens to parameters."""

    scaling_parameters: int  # N: block matrices + head
    horizon_tokens: int  # D = ratio · N
    batch_tokens: int  # B, a power of two unless it was given
    weight_decay: float  # λ for that batch
    weight_decay_capped: bool


def scale(
    parameters_at: Callable[[int], int],
    depth: int,
    *,
    ratio: float,
    weight_decay: float,
    batch_tokens: int | None = None,
    cap: bool = True,
) -> Scaling:
    """Horizon, batch and weight decay of a model.

    Args:
        parameters_at: depth → N, at the same vocabulary and shape rules.
        ratio: training tokens per parameter of N.
        weight_decay: λ at the reference (d12, 2¹⁹ tokens a batch).
        batch_tokens: the batch really used, when it is not the law's.
        cap: whether λ is capped below depth 8; not where the user gave λ.

    The decay law extrapolates badly downwards, so below depth 8 λ is that of depth 8 (same
    ratio, same vocabulary) wherever the law would give more.
    """
    reference = ratio * parameters_at(REFERENCE_DEPTH)

    def law_batch(tokens: int) -> int:
        predicted = REFERENCE_BATCH_TOKENS * (tokens / reference) ** BATCH_EXPONENT
        return int(2 ** round(math.log2(predicted)))

    def law_decay(batch: int, tokens: int) -> float:
        return weight_decay * math.sqrt(batch / REFERENCE_BATCH_TOKENS) * (reference / tokens)

    tokens = int(ratio * parameters_at(depth))
    batch = batch_tokens or law_batch(tokens)
    decay = law_decay(batch, tokens)
    capped = False
    if cap and depth < SMALLEST_DECAY_DEPTH:
        smallest = int(ratio * parameters_at(SMALLEST_DECAY_DEPTH))
        limit = law_decay(law_batch(smallest), smallest)
        capped = decay > limit
        decay = min(decay, limit)
    return Scaling(parameters_at(depth), tokens, batch, decay, capped)
