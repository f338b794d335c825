"""How a token is drawn from logits, for rows that each have their own parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanoray.errors import NanorayError

MAX_BIAS = 100.0  # OpenAI's range; logits lie within ±15, so that it forces or forbids a token
_NUCLEUS_GUESS = 128  # likeliest tokens looked at first for top-p, instead of sorting them all
_COLUMN = 8
_MASK_64 = 2**64 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How a request is continued. Raises NanorayError on construction for a value out of range.

    Filters apply in this order, each to what the one before left: logit_bias, temperature,
    top_k, top_p, min_p.
    """

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens (among equals, any or all); 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens whose probabilities first reach this sum (arXiv 1904.09751)."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest (arXiv 2407.01082)."""
    seed: int = 0
    """With the sample's index and the position it alone determines each draw."""
    n: int = 1
    """Samples of the same prompt."""
    max_tokens: int = 256
    """Most new tokens, forced ones (a tool's output) included."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are cut from its text."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the answer, beside the engine's own."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these ids before all else, -100 to 100."""
    top_logprobs: int = 0
    """How many of the likeliest tokens are told beside each sampled one."""

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0, 100)
        _check_integer("top_k", self.top_k, 0)
        _check_number("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise NanorayError("top_p must be above 0: it would leave no token to sample.")
        _check_number("min_p", self.min_p, 0, 1)
        _check_integer("seed", self.seed, None)
        if not -(2**63) <= self.seed < 2**64:
            raise NanorayError(f"seed must fit into 64 bits, not be {self.seed}.")
        _check_integer("n", self.n, 1)
        _check_integer("max_tokens", self.max_tokens, 1)
        _check_integer("top_logprobs", self.top_logprobs, 0)
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise NanorayError(f"stop must be a tuple of non-empty strings, not {self.stop!r}.")
        for token in (*self.stop_token_ids, *self.logit_bias):
            _check_integer("a token id in stop_token_ids or logit_bias", token, 0)
        for token, bias in self.logit_bias.items():
            _check_number(f"logit_bias of token {token}", bias, -MAX_BIAS, MAX_BIAS)
        filters = {"top_k": self.top_k > 0, "top_p": self.top_p < 1, "min_p": self.min_p > 0}
        if self.temperature == 0 and any(filters.values()):
            names = ", ".join(name for name, used in filters.items() if used)
            raise NanorayError(
                f"temperature 0 always takes the likeliest token and contradicts {names}: "
                "leave one of them out."
            )


def _check_number(name: str, value: object, low: float, high: float) -> None:
    valid = isinstance(value, int | float) and not isinstance(value, bool)
    if not (valid and math.isfinite(value) and low <= value <= high):  # type: ignore[arg-type, operator]
        raise NanorayError(f"{name} must be a number from {low} to {high}, not {value!r}.")


def _check_integer(name: str, value: object, low: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or (low is not None and value < low):
        limit = "" if low is None else f" of at least {low}"
        raise NanorayError(f"{name} must be a whole number{limit}, not {value!r}.")


def uniform(seed: int, sample: int, position: int) -> float:
    """A draw from [0, 1) that only its arguments determine, in steps of 2^-53 (splitmix64)."""
    state = seed & _MASK_64
    for value in (sample, position):
        state = _mix(state ^ _mix(value))
    return (state >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


# Token ids with their log-probabilities by the raw softmax, the likeliest first.
Likeliest = list[tuple[int, float]]


@dataclass(frozen=True)
class Drawn:
    """One token a row, all on the host."""

    tokens: list[int]
    logprobs: list[float]  # of the raw softmax; NaN where the row's logits are not finite
    sampled_logprobs: list[float]  # of the distribution drawn from; 0 at temperature 0
    top_logprobs: list[Likeliest]  # as many as the row's parameters ask for


@torch.inference_mode()
def sample(
    logits_BV: Tensor, params_B: Sequence[SamplingParams], uniforms_B: Sequence[float]
) -> Drawn:
    """Draw one token a row by inverting the cumulative distribution at the row's uniform.

    logits_BV: fp32, left as they are. Rows are independent, and the tokens lie in the order of
    their ids: a rounding error moves a boundary by as much, and never swaps two tokens.
    """
    if logits_BV.device.type == "mps":  # has no fp64
        logits_BV = logits_BV.cpu()
    scores_BV = _with_bias(logits_BV, params_B)
    drawn = [b for b, params in enumerate(params_B) if params.temperature > 0]
    all_drawn = len(drawn) == len(params_B)
    tokens_B = logits_BV.new_zeros(len(params_B), dtype=torch.long)
    sampled_B = logits_BV.new_zeros(len(params_B))
    if not all_drawn:
        tokens_B = scores_BV.argmax(-1)
    if drawn:
        rows_R = slice(None) if all_drawn else torch.tensor(drawn, device=logits_BV.device)
        params_R = [params_B[b] for b in drawn]
        scores_RC, ids_RC = _candidates(scores_BV[rows_R], params_R)
        scores_RC = _filtered(scores_RC, params_R)
        # fp64: over a large vocabulary fp32 sums lose the small probabilities.
        cdf_RC = scores_RC.double().softmax(-1).cumsum_(-1)
        points_R = torch.tensor([uniforms_B[b] for b in drawn], dtype=torch.float64)
        points_R1 = points_R.to(cdf_RC.device).unsqueeze(1) * cdf_RC[:, -1:]
        # The first whose sum exceeds the point; NaNs would lead past the end.
        chosen_R1 = torch.searchsorted(cdf_RC, points_R1, right=True)
        chosen_R1.clamp_(max=scores_RC.size(1) - 1)
        tokens_B[rows_R] = ids_RC.gather(1, chosen_R1).squeeze(1)
        sampled_B[rows_R] = scores_RC.log_softmax(-1).gather(1, chosen_R1).squeeze(1)
    total_B = logits_BV.logsumexp(-1)
    raw_B = logits_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1) - total_B
    # One copy from the device for everything; ids below 2^53 are exact in fp64.
    host = torch.stack((tokens_B.double(), raw_B.double(), sampled_B.double())).tolist()
    tops: list[Likeliest] = [[] for _ in params_B]
    if asked := [b for b, params in enumerate(params_B) if params.top_logprobs]:
        most = max(params_B[b].top_logprobs for b in asked)
        rows_A = torch.tensor(asked, device=logits_BV.device)
        for b, top in zip(asked, likeliest(logits_BV[rows_A], total_B[rows_A], most)):
            tops[b] = top[: params_B[b].top_logprobs]
    return Drawn([int(token) for token in host[0]], host[1], host[2], tops)


def likeliest(logits_NV: Tensor, total_N: Tensor, k: int) -> list[Likeliest]:
    """The k likeliest tokens of each row (all, if there are fewer). total_N: logsumexp."""
    values_NK, ids_NK = logits_NV.topk(min(k, logits_NV.size(1)), dim=-1)
    logprobs_NK = values_NK - total_N.unsqueeze(1)
    return [list(zip(*row)) for row in zip(ids_NK.tolist(), logprobs_NK.tolist())]


def _with_bias(logits_BV: Tensor, params_B: Sequence[SamplingParams]) -> Tensor:
    biased = [(b, params.logit_bias) for b, params in enumerate(params_B) if params.logit_bias]
    if not biased:
        return logits_BV
    logits_BV = logits_BV.clone()
    for b, bias in biased:
        ids = torch.tensor(list(bias), device=logits_BV.device)
        logits_BV[b, ids] += torch.tensor(list(bias.values()), device=logits_BV.device)
    return logits_BV


def _candidates(scores_RV: Tensor, params_R: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Scores [R, C] and ids of all tokens, or of the top k if every row has a top_k; by id."""
    V = scores_RV.size(1)
    if any(not 0 < params.top_k < V for params in params_R):
        return scores_RV, torch.arange(V, device=scores_RV.device).expand_as(scores_RV)
    ids_RC = _largest(scores_RV, max(params.top_k for params in params_R)).sort(-1).values
    return scores_RV.gather(1, ids_RC), ids_RC


def _largest(scores_RV: Tensor, k: int) -> Tensor:
    """The ids of the k largest scores [R, k].

    In two steps, on a CPU a fifth of torch.topk's time: the k largest of all lie in the k columns
    (ids that are equal modulo V / _COLUMN) of largest maxima.
    """
    R, V = scores_RV.shape
    width = V // _COLUMN
    if V % _COLUMN or k > width:
        return torch.topk(scores_RV, k, sorted=False).indices
    scores_RJW = scores_RV.view(R, _COLUMN, width)
    columns_R1K = scores_RJW.amax(1, keepdim=True).topk(k, sorted=False).indices
    chosen_RJK = scores_RJW.gather(2, columns_R1K.expand(R, _COLUMN, k))
    chosen_RK = chosen_RJK.flatten(1).topk(k, sorted=False).indices
    columns_RK = columns_R1K[:, 0].gather(1, chosen_RK % k)
    return columns_RK + chosen_RK // k * width


def _filtered(scores_RC: Tensor, params_R: Sequence[SamplingParams]) -> Tensor:
    """Scores divided by the temperature, -inf where a filter removes a token."""
    C = scores_RC.size(1)

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=scores_RC.device).unsqueeze(1)

    # Dividing the distance to the largest score overflows to -inf at worst, never to NaN.
    scores_RC = scores_RC - scores_RC.amax(-1, keepdim=True)
    scores_RC = scores_RC / column([params.temperature for params in params_R]).clamp_(min=1e-30)
    top_ks = [min(params.top_k or C, C) for params in params_R]
    if min(top_ks) < C:
        largest = torch.topk(scores_RC, max(k for k in top_ks if k < C), dim=-1).values
        kth_R1 = torch.tensor(top_ks, device=scores_RC.device).unsqueeze(1)
        least_R1 = largest.gather(1, kth_R1.clamp(max=largest.size(1)) - 1)
        least_R1 = torch.where(kth_R1 < C, least_R1, -torch.inf)
        scores_RC = scores_RC.masked_fill(scores_RC < least_R1, -torch.inf)
    if any(params.top_p < 1 for params in params_R):
        least_R1 = _nucleus_floor(scores_RC, column([params.top_p for params in params_R]))
        scores_RC = scores_RC.masked_fill(scores_RC < least_R1, -torch.inf)
    if any(params.min_p > 0 for params in params_R):
        least_R1 = column([params.min_p for params in params_R]).log()  # the largest score is 0
        scores_RC = scores_RC.masked_fill(scores_RC < least_R1, -torch.inf)
    return scores_RC


def _nucleus_floor(scores_RC: Tensor, top_p_R1: Tensor) -> Tensor:
    """The least score inside each row's nucleus; -inf where top_p is 1."""
    C = scores_RC.size(1)
    total_R1 = scores_RC.logsumexp(-1, keepdim=True)
    count = min(_NUCLEUS_GUESS, C)
    while True:
        largest_RN = torch.topk(scores_RC, count, dim=-1).values
        sums_RN = (largest_RN - total_R1).exp().cumsum(-1)
        short_R1 = (sums_RN < top_p_R1).sum(-1, keepdim=True)  # tokens that do not yet reach it
        if count == C or not bool(((short_R1 == count) & (top_p_R1 < 1)).any()):
            break
        count = min(8 * count, C)
    least_R1 = largest_RN.gather(1, short_R1.clamp(max=count - 1))
    return torch.where(top_p_R1 < 1, least_R1, -torch.inf)
