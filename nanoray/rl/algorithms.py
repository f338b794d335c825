"""The algorithms of reinforcement learning as a table; `objective` is the formula.

Every algorithm here rewards the whole completion, takes its baseline from the other samples of
the same prompt, and minimises

    sum over samples b of  w_b * sum over sampled tokens t of  (policy_bt + kl_coef * kl_bt)

They differ in the advantage A_b (`Advantage`), in how a token's ratio r = p_learner / p_sampler
bounds its term policy_bt (`Bound`), in whether r is the token's own or the completion's, and in
the weight w_b that the terms are averaged with (`Average`). The weights are made of counts of the
whole step, so the losses of micro-batches and workers, and their gradients, are simply added.

In a step whose samples all come from the learner's own weights r is 1 by definition: the learner
takes exp(lp - lp.detach()), and the sampler's floating point noise never enters the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Advantage = Literal["centred", "standardised", "leave-one-out"]
"""Of a sample's reward in its group: r - mean; (r - mean) / std; r - mean of the *others*."""

Bound = Literal["objective", "weight"]
"""``objective``: -min(r A, clip(r) A), which stops at a clipped token's gradient (PPO, arXiv
1707.06347). ``weight``: -clip(r).detach() A log p, where every token keeps a gradient: importance
sampling with truncated weights."""

Average = Literal["tokens", "samples", "sums", "budget"]
"""The weight of a token of a completion with n sampled tokens, in a step of B completions: 1 / all
sampled tokens of the step; 1 / (B n), the mean of the completions' means; 1 / B, the mean of their
sums; 1 / (B max_new_tokens), the same on the scale of a token."""


@dataclass(frozen=True)
class Algorithm:
    """One row of the table.

    Attributes:
        low, high: a ratio is clipped to [low, high].
        sequence_ratio: r is the geometric mean over the completion's sampled tokens, for each.
        filters_degenerate: groups with all rewards equal shall not reach the learner, and the
            caller samples others in their place.
    """

    name: str
    advantage: Advantage
    bound: Bound
    low: float
    high: float
    average: Average
    sequence_ratio: bool = False
    filters_degenerate: bool = False


_TABLE = (
    # nanochat's: REINFORCE (Williams 1992) with the group's mean as baseline. The cap of 2 on the
    # weight is the usual one of truncated importance sampling between sampler and learner.
    Algorithm("reinforce", "centred", "weight", 0.0, 2.0, "tokens"),
    # DeepSeekMath, arXiv 2402.03300. (With its KL term: kl_coef 0.04.)
    Algorithm("grpo", "standardised", "objective", 0.8, 1.2, "samples"),
    # arXiv 2503.20783: no division by the deviation (it favours questions that are nearly all
    # right or wrong) nor by the length (it favours long wrong answers).
    Algorithm("dr_grpo", "centred", "objective", 0.8, 1.2, "budget"),
    # arXiv 2402.14740: the whole completion is one action.
    Algorithm("rloo", "leave-one-out", "weight", 0.0, 2.0, "sums"),
    # arXiv 2503.14476: clip-higher, token-level average, dynamic sampling.
    Algorithm("dapo", "standardised", "objective", 0.8, 1.28, "tokens", filters_degenerate=True),
    # arXiv 2507.18071: the ratio of whole completions, whose range is three orders narrower.
    Algorithm(
        "gspo", "standardised", "objective", 1 - 3e-4, 1 + 4e-4, "samples", sequence_ratio=True
    ),
    # MiniMax-M1, arXiv 2506.13585: no lower bound; the cap, which the paper leaves open, is ours.
    Algorithm("cispo", "standardised", "weight", 0.0, 5.0, "tokens"),
)
ALGORITHMS = {algorithm.name: algorithm for algorithm in _TABLE}
