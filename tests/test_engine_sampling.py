"""Sampling: distributions against plain definitions, log-probs, seeds, bad parameters."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from engine_models import one_thread  # noqa: F401
from hypothesis import given, settings

from nanoray.engine.sampling import SamplingParams, _largest, sample, uniform
from nanoray.errors import NanorayError

pytestmark = pytest.mark.usefixtures("one_thread")


def reference(logits: list[float], params: SamplingParams) -> list[float]:
    """The distribution by the definitions, in fp64 and by sorting."""
    scores = [x + params.logit_bias.get(i, 0.0) for i, x in enumerate(logits)]
    if params.temperature == 0:
        return [float(i == scores.index(max(scores))) for i in range(len(scores))]
    weights = [math.exp((x - max(scores)) / params.temperature) for x in scores]

    def normalised() -> list[float]:
        return [weight / sum(weights) for weight in weights]

    def keep(kept: set[int]) -> None:
        for i in range(len(weights)):
            weights[i] *= i in kept

    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    if params.top_k:
        keep(set(order[: params.top_k]))
    if params.top_p < 1:
        kept, total = set(), 0.0
        for i in order:
            if total >= params.top_p:
                break
            kept.add(i)
            total += normalised()[i]
        keep(kept)
    keep({i for i, weight in enumerate(weights) if weight >= params.min_p * max(weights)})
    return normalised()


random_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 50]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
    logit_bias=st.dictionaries(st.integers(0, 6), st.sampled_from([-100.0, 1.5, 3.0]), max_size=2),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(random_params, min_size=1, max_size=4), st.integers(0, 2**32), st.integers(5, 300))
def test_rows_are_drawn_from_their_own_distribution(
    params: list[SamplingParams], seed: int, vocab: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_BV = torch.randn(len(params), max(vocab, 7), generator=generator) * 3
    wanted_B = [reference(row.tolist(), row_params) for row, row_params in zip(logits_BV, params)]
    points = 20
    for point in range(points):
        u = (point + 0.5) / points
        before = logits_BV.clone()
        drawn = sample(logits_BV, params, [u] * len(params))
        assert torch.equal(before, logits_BV)
        for b, (wanted, token) in enumerate(zip(wanted_B, drawn.tokens)):
            # u lies inside the token's interval of the cumulative distribution, by id.
            assert sum(wanted[:token]) < u + 1e-5
            assert sum(wanted[: token + 1]) > u - 1e-5
            assert drawn.sampled_logprobs[b] == pytest.approx(math.log(wanted[token]), abs=1e-4)
            raw = logits_BV[b].double().log_softmax(-1)[token].item()
            assert drawn.logprobs[b] == pytest.approx(raw, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4), st.sampled_from([40, 64, 800, 803]), st.integers(1, 40), st.integers(0, 99)
)
def test_the_largest_are_found_among_ties(rows: int, vocab: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores_RV = torch.randint(-9, 9, (rows, vocab), generator=generator) / 1.0
    scores_RV[0, : vocab // 2] = -torch.inf
    ids_RK = _largest(scores_RV, k)
    assert all(len(set(ids)) == k for ids in ids_RK.tolist())
    found_RK = scores_RV.gather(1, ids_RK).sort(-1, descending=True).values
    assert torch.equal(found_RK, torch.topk(scores_RV, k).values)


def test_temperature_0_takes_the_likeliest_after_the_bias() -> None:
    logits_BV = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    params = [SamplingParams(temperature=0), SamplingParams(temperature=0, logit_bias={1: -100})]
    drawn = sample(logits_BV, params, [0.9, 0.9])
    assert drawn.tokens == [1, 2]
    assert drawn.sampled_logprobs == [0, 0]
    raw = logits_BV[0].log_softmax(-1)
    assert drawn.logprobs == pytest.approx([raw[1].item(), raw[2].item()])


def test_a_wide_nucleus_is_found_without_the_first_guess() -> None:
    logits_BV = torch.zeros(2, 5000)
    logits_BV[:, :2500] += 1e-3  # 2,500 tokens a little likelier than the others
    params = [SamplingParams(top_p=0.3), SamplingParams()]
    highest = sample(logits_BV, params, [0.999999, 0.999999]).tokens
    # All 2,500 are equally likely, so all stay; the row without top_p reaches the end.
    assert 2490 < highest[0] < 2500
    assert highest[1] > 4990


def test_extremes_never_give_an_impossible_token() -> None:
    logits_BV = torch.full((1, 100), -15.0)
    logits_BV[0, 40] = 15.0
    for u in (0.0, 1 - 2**-53):
        for params in (
            SamplingParams(temperature=1e-6),
            SamplingParams(top_k=1),
            SamplingParams(top_p=1e-9),
            SamplingParams(min_p=1.0),
        ):
            assert sample(logits_BV, [params], [u]).tokens == [40]
    allowed = SamplingParams(temperature=100.0, logit_bias={7: 100.0, 9: 100.0}, min_p=0.5)
    assert {sample(logits_BV, [allowed], [u / 10]).tokens[0] for u in range(10)} >= {7, 9}


def test_nan_rows_are_marked_and_leave_the_others_alone() -> None:
    logits_BV = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(top_k=5, top_p=0.9, min_p=0.01)] * 3
    alone = sample(logits_BV, params, [0.3, 0.4, 0.5])
    logits_BV[1] = torch.nan
    drawn = sample(logits_BV, params, [0.3, 0.4, 0.5])
    assert math.isnan(drawn.logprobs[1])
    for b in (0, 2):
        assert drawn.tokens[b] == alone.tokens[b]
        assert drawn.sampled_logprobs[b] == alone.sampled_logprobs[b]


def test_uniform_is_uniform_and_each_argument_counts() -> None:
    draws = [uniform(0, 0, position) for position in range(4000)]
    assert min(draws) >= 0
    assert max(draws) < 1
    for bins in (2, 10):
        for i in range(bins):
            share = sum(i / bins <= u < (i + 1) / bins for u in draws) / len(draws)
            assert share == pytest.approx(1 / bins, abs=0.025)
    near = [uniform(s, n, p) for s in (-1, 0, 1, 2**63) for n in (0, 1) for p in (0, 1)]
    assert len(set(near)) == len(near)
    correlated = sum((uniform(0, 0, p) - 0.5) * (uniform(1, 0, p) - 0.5) for p in range(4000))
    assert abs(correlated / 4000) < 0.006
    assert uniform(1, 2, 3) == uniform(1, 2, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a number from 0 to 100, not -0.1"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_k": -1}, "top_k must be a whole number of at least 0"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_p": 1.01}, "top_p must be a number from 0 to 1"),
        ({"min_p": 2}, "min_p"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"seed": 2**64}, "seed must fit into 64 bits"),
        ({"n": 0}, "n must be a whole number of at least 1"),
        ({"n": True}, "n must"),
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1, not 0"),
        ({"stop": "word"}, "tuple of non-empty strings"),
        ({"stop": ("",)}, "tuple of non-empty strings"),
        ({"stop_token_ids": (-1,)}, "token id"),
        ({"logit_bias": {1: 101}}, "logit_bias of token 1 must be a number from -100"),
        ({"logit_bias": {"a": 1}}, "token id"),
        ({"temperature": 0, "top_p": 0.5, "top_k": 3}, "contradicts top_k, top_p"),
        ({"temperature": 0, "min_p": 0.5}, "contradicts min_p"),
    ],
)
def test_bad_parameters_are_named(fields: dict, message: str) -> None:
    with pytest.raises(NanorayError, match=message):
        SamplingParams(**fields)
    with pytest.raises(TypeError):
        SamplingParams(best_of=2)  # type: ignore[call-arg]
