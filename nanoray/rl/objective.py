"""Advantages and losses of reinforcement learning: one formula for the table of `algorithms`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoray.errors import NanorayError
from nanoray.rl.algorithms import Algorithm, Average

_STD_EPS = 1e-6
_MAX_WEIGHT = 5.0  # of the algorithms that bound the objective; the others have their own
_MAX_LOG_RATIO = 20.0  # exp() of it is finite, and no bound lies so high


def advantages(algorithm: Algorithm, rewards_GN: Tensor) -> Tensor:
    """Advantages [G, N] of N samples each of G prompts, in the rewards' dtype (take float64).

    The deviation is the population's (divided by N). Raises NanorayError for N < 2.
    """
    N = rewards_GN.size(1)
    if N < 2:
        raise NanorayError(
            f"{algorithm.name} compares the samples of one prompt; take at least 2 a prompt"
        )
    centred_GN = rewards_GN - rewards_GN.mean(1, keepdim=True)
    if algorithm.advantage == "leave-one-out":
        return centred_GN * (N / (N - 1))
    if algorithm.advantage == "standardised":
        return centred_GN / (rewards_GN.std(1, correction=0, keepdim=True) + _STD_EPS)
    return centred_GN


@dataclass(frozen=True)
class Totals:
    """Counts of the whole step, over all micro-batches and workers.

    Attributes:
        tokens: sampled tokens (ones in the masks).
        samples: completions.
        max_new_tokens: most new tokens that a completion could have had.
    """

    tokens: int
    samples: int
    max_new_tokens: int


def _token_weights(average: Average, mask_BT: Tensor, totals: Totals) -> Tensor:
    """[B, T], 0 where the mask is; they sum to 1 over the step (`tokens`, `samples`)."""
    if average == "tokens":
        return mask_BT / totals.tokens
    if average == "samples":
        return mask_BT / (totals.samples * mask_BT.sum(1, keepdim=True).clamp(min=1))
    return mask_BT / (totals.samples * (totals.max_new_tokens if average == "budget" else 1))


def policy_loss(
    algorithm: Algorithm,
    logprobs_BT: Tensor,
    behaviour_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    totals: Totals,
    *,
    on_policy: bool,
    entropy_BT: Tensor,
    reference_BT: Tensor | None = None,
    kl_coef: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """The share of some whole completions in the step's loss, and their metrics.

    Args:
        logprobs_BT: of the targets under the learner's weights, differentiable, fp32 (`score`).
        behaviour_BT: of the targets under the distribution that they were sampled from.
        advantages_B: of each completion, see `advantages`.
        mask_BT: 1 or True where the target was sampled, else 0; nothing else counts, whatever
            the other tensors hold there.
        on_policy: all tokens were sampled with the learner's very weights (max staleness 0).
        entropy_BT: of the learner's distributions, for the metrics.
        reference_BT: log-probs of the targets under the weights to stay close to. Its term is
            the estimator k3 (http://joschu.net/blog/kl-approx.html), differentiated as it stands,
            as in GRPO; without it kl_coef must be 0.

    Returns:
        The loss in fp32: added up over the step's parts it is the loss to descend.
    """
    assert reference_BT is not None or kl_coef == 0, "a KL term needs reference log-probs"
    sampled_BT = mask_BT.bool()
    mask_BT = sampled_BT.float()
    own_BT = logprobs_BT.detach()
    # log r, first of the distributions themselves (for the metrics), then as it is differentiated.
    measured_BT = _log_ratio(own_BT, behaviour_BT, sampled_BT)
    log_ratio_BT = _log_ratio(logprobs_BT, own_BT if on_policy else behaviour_BT, sampled_BT)
    if algorithm.sequence_ratio:
        lengths_B1 = mask_BT.sum(1, keepdim=True).clamp(min=1)
        log_ratio_BT = (log_ratio_BT.sum(1, keepdim=True) / lengths_B1).expand_as(log_ratio_BT)
    ratio_BT = log_ratio_BT.clamp(max=_MAX_LOG_RATIO).exp()
    if algorithm.bound == "objective":
        # A bad token that has got likelier keeps its gradient, but with a weight that is truncated.
        one_BT = (log_ratio_BT - log_ratio_BT.detach()).exp()
        ratio_BT = torch.where(ratio_BT > _MAX_WEIGHT, _MAX_WEIGHT * one_BT, ratio_BT)
    clipped_BT = ratio_BT.clamp(algorithm.low, algorithm.high)
    advantages_B1 = advantages_B.to(logprobs_BT.dtype).unsqueeze(1)
    if algorithm.bound == "objective":
        policy_BT = -torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)
        bounded_BT = clipped_BT * advantages_B1 < ratio_BT * advantages_B1
    else:
        # d log p with a value that does not depend on it: log p itself may be -100 and more.
        one_BT = _log_ratio(logprobs_BT, own_BT, sampled_BT).exp()
        policy_BT = -clipped_BT.detach() * advantages_B1 * one_BT
        bounded_BT = clipped_BT != ratio_BT
    kl_BT = torch.zeros_like(policy_BT)
    if reference_BT is not None:
        kl_BT = _k3(_log_ratio(reference_BT, logprobs_BT, sampled_BT))
    weights_BT = _token_weights(algorithm.average, mask_BT, totals)
    loss = (weights_BT * (policy_BT + kl_coef * kl_BT)).sum()
    return loss, Metrics.of(sampled_BT, entropy_BT, kl_BT.detach(), bounded_BT, measured_BT)


def _log_ratio(over_BT: Tensor, under_BT: Tensor, sampled_BT: Tensor) -> Tensor:
    """0 where nothing was sampled: what stands there may be anything."""
    return torch.where(sampled_BT, over_BT - under_BT, 0.0)


def _k3(log_ratio_BT: Tensor) -> Tensor:
    """Of KL(p | q), from samples of p and log q/p: never negative, unbiased."""
    log_ratio_BT = log_ratio_BT.clamp(max=_MAX_LOG_RATIO)
    return log_ratio_BT.expm1() - log_ratio_BT


_SUMS = ("tokens", "entropy", "kl", "clipped", "ratio", "ratio_squared", "mismatch_kl")


@dataclass(frozen=True)
class Metrics:
    """Sums over sampled tokens, which can be added over micro-batches and workers.

    Attributes:
        sums: float64, on the CPU, in the order of _SUMS.
        ratio_max: float64 scalar, likewise.
    """

    sums: Tensor
    ratio_max: Tensor

    @classmethod
    def of(
        cls,
        sampled_BT: Tensor,
        entropy_BT: Tensor,
        kl_BT: Tensor,
        bounded_BT: Tensor,
        log_ratio_BT: Tensor,
    ) -> Metrics:
        # On the CPU: Apple's GPUs know no float64, and workers that share a node cannot add up what
        # lies on several GPUs.
        sampled_BT, entropy_BT, kl_BT, bounded_BT, log_ratio_BT = (
            tensor.detach().cpu()
            for tensor in (sampled_BT, entropy_BT, kl_BT, bounded_BT, log_ratio_BT)
        )
        log_ratio_BT = log_ratio_BT.double().clamp(max=_MAX_LOG_RATIO)
        ratio_BT = torch.where(sampled_BT, log_ratio_BT.exp(), 0.0)
        columns = (
            torch.ones_like(ratio_BT),
            entropy_BT.double(),
            kl_BT.double(),
            bounded_BT.double(),
            ratio_BT,
            ratio_BT.square(),
            _k3(log_ratio_BT),
        )
        sums = torch.stack([torch.where(sampled_BT, column, 0.0).sum() for column in columns])
        return cls(sums, ratio_BT.amax())

    def __add__(self, other: Metrics) -> Metrics:
        return Metrics(self.sums + other.sums, torch.maximum(self.ratio_max, other.ratio_max))

    def figures(self) -> dict[str, float]:
        """Means over the sampled tokens.

        entropy; kl: to the reference (0 without one); clip_fraction: of tokens whose term the
        algorithm bounded; ratio_mean, ratio_max: learner over sampler, measured even where the
        step is on-policy; ess: effective sample size of these ratios, as a fraction (Kish);
        mismatch_kl: of the sampler's distribution from the learner's (k3).
        """
        sums = dict(zip(_SUMS, self.sums.tolist()))
        tokens = max(sums["tokens"], 1.0)
        return {
            "entropy": sums["entropy"] / tokens,
            "kl": sums["kl"] / tokens,
            "clip_fraction": sums["clipped"] / tokens,
            "ratio_mean": sums["ratio"] / tokens,
            "ratio_max": self.ratio_max.item(),
            "ess": sums["ratio"] ** 2 / (tokens * max(sums["ratio_squared"], 1e-300)),
            "mismatch_kl": sums["mismatch_kl"] / tokens,
        }


def score(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets under the distribution that the engine samples from.

    Args:
        logits: [..., V], any float dtype; the arithmetic is fp32.
        targets: int64 [...], ids in [0, V).
        temperature: above 0.
        top_k: as the engine's; 0 keeps all. The target always belongs to the k: where rounding,
            or weights newer than the sampler's, put it lower, it takes the place of the last.

    Returns:
        Log-probs [...], differentiable, and entropies [...], detached; fp32.
    """
    assert temperature > 0, "at temperature 0 nothing is sampled"
    targets_1 = targets.unsqueeze(-1)
    if 0 < top_k < logits.size(-1):
        kept = logits.detach().topk(top_k, dim=-1).indices
        absent_1 = (kept != targets_1).all(-1, keepdim=True)
        last_1 = torch.where(absent_1, targets_1, kept[..., -1:])
        kept = torch.cat((kept[..., :-1], last_1), -1)
        logits = logits.gather(-1, kept)
        targets_1 = (kept == targets_1).int().argmax(-1, keepdim=True)
    scores = logits.float() / temperature
    logprobs = scores.log_softmax(-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets_1).squeeze(-1), entropy
