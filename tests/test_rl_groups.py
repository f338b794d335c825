from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoray.rl.groups import Group, Sample, to_batch

PAD, STOP, OUTPUT_START, OUTPUT_END = 99, 7, 50, 51


def make_sample(
    tokens: list[int], mask: list[int], reward: float = 0.0, version: int = 3
) -> Sample:
    n = len(tokens)
    logprobs = [-0.1 * (i + 1) * m for i, m in enumerate(mask)]
    return Sample(
        tokens=np.array(tokens, dtype=np.int32),
        mask=np.array(mask, dtype=np.uint8),
        logprobs=np.array(logprobs, dtype=np.float32),
        versions=np.full(n, version, dtype=np.int32),
        finish_reason="stop",
        text="",
        reward=reward,
    )


def make_group(number: int, prompt: list[int], *samples: Sample) -> Group:
    return Group(number, np.array(prompt, dtype=np.int32), samples)


def test_the_stop_token_is_trained_and_forced_tokens_are_not() -> None:
    tool = make_sample([10, OUTPUT_START, 11, OUTPUT_END, 12, STOP], [1, 0, 0, 0, 1, 1])
    short = make_sample([20, STOP], [1, 1])
    batch = to_batch([make_group(5, [1, 2, 3], tool), make_group(6, [4], short)], PAD)
    assert batch.ids.tolist() == [
        [1, 2, 3, 10, OUTPUT_START, 11, OUTPUT_END, 12, STOP],
        [4, 20, STOP, PAD, PAD, PAD, PAD, PAD, PAD],
    ]
    targets = batch.ids[:, 1:]
    trained = [row[mask == 1].tolist() for row, mask in zip(targets, batch.target_mask)]
    assert trained == [[10, 12, STOP], [20, STOP]]
    want = [[0, 0, -0.1, 0, 0, 0, -0.5, -0.6], [-0.1, -0.2, 0, 0, 0, 0, 0, 0]]
    np.testing.assert_allclose(batch.behaviour, want, atol=1e-7)
    assert batch.group.tolist() == [0, 1]
    assert batch.lengths.tolist() == [9, 3]


@st.composite
def groups(draw: st.DrawFn) -> list[Group]:
    token = st.integers(0, 60)
    made = []
    for number in range(draw(st.integers(1, 4))):
        prompt = draw(st.lists(token, min_size=1, max_size=9))
        samples = []
        for _ in range(draw(st.integers(1, 3))):
            pairs = draw(st.lists(st.tuples(token, st.integers(0, 1)), min_size=1, max_size=9))
            tokens, mask = map(list, zip(*pairs))
            samples.append(make_sample(tokens, mask))
        made.append(make_group(number, prompt, *samples))
    return made


@settings(max_examples=200, deadline=None)
@given(groups())
def test_batches_hold_what_the_groups_hold(given_groups: list[Group]) -> None:
    batch = to_batch(given_groups, PAD)
    rows = [(g, group, s) for g, group in enumerate(given_groups) for s in group.samples]
    B, L = batch.ids.shape
    assert len(rows) == B
    assert max(len(group.prompt) + len(s.tokens) for _, group, s in rows) == L
    assert batch.ids.dtype == batch.group.dtype == batch.lengths.dtype == np.int64
    assert batch.target_mask.dtype == np.uint8
    assert batch.behaviour.dtype == np.float32
    assert batch.target_mask.shape == batch.behaviour.shape == (B, L - 1)
    for row, (g, group, sample) in enumerate(rows):
        whole = [*group.prompt, *sample.tokens]
        assert batch.group[row] == g
        assert batch.lengths[row] == len(whole)
        assert batch.ids[row].tolist() == whole + [PAD] * (L - len(whole))
        for column in range(L - 1):
            new = column + 1 - len(group.prompt)  # the target's place among the new tokens
            sampled = 0 <= new < len(sample.tokens) and sample.mask[new]
            assert batch.target_mask[row, column] == bool(sampled)
            assert batch.behaviour[row, column] == (sample.logprobs[new] if sampled else 0)
    # Every sampled token is a target exactly once: a prompt's first token is the only one that is
    # predicted from nothing.
    assert batch.target_mask.sum() == sum(int(s.mask.sum()) for _, _, s in rows)


def test_group_properties() -> None:
    old, new = (make_sample([1, 2], [1, 1], reward, v) for reward, v in ((1.0, 4), (0.5, 6)))
    mixed = replace(new, versions=np.array([5, 3], dtype=np.int32))
    group = make_group(0, [1], old, new)
    assert group.rewards.dtype == np.float64
    assert group.rewards.tolist() == [1.0, 0.5]
    assert group.version == 4
    assert make_group(0, [1], old, mixed).version == 3
    assert not group.degenerate
    assert make_group(0, [1], old, old).degenerate
    assert make_group(0, [1], old).degenerate


def test_samples_that_cannot_be_are_refused() -> None:
    sample = make_sample([1, 2], [1, 1])
    for wrong in (
        {"mask": np.ones(3, dtype=np.uint8)},
        {"logprobs": np.zeros(2)},
        {"versions": np.zeros((2, 1), dtype=np.int32)},
        {"reward": float("nan")},
    ):
        with pytest.raises(AssertionError):
            replace(sample, **wrong)
    with pytest.raises(AssertionError):
        make_sample([], [])
    with pytest.raises(AssertionError):
        make_group(0, [], sample)
    with pytest.raises(AssertionError):
        make_group(0, [1])
