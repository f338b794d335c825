"""What rollouts hand to the learner: groups of samples of one prompt, and batches of them.

Plain numpy: groups travel between processes, and whoever only passes them on needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Sample:
    """One completion of a prompt, as it was sampled; n >= 1 new tokens.

    Attributes:
        tokens: int32 [n], the new ids in order, forced ones and the stop token included.
        mask: uint8 [n], 1 where the model sampled the token, 0 where it was forced (what a tool
            put out, with its marks).
        logprobs: float32 [n], of the distribution that was really sampled from, after
            temperature and top-k; 0 for forced tokens.
        versions: int32 [n], of the weights that gave each token.
        finish_reason: ``stop`` or ``length``.
        text: what the reward judged.
        reward: a finite number.
        problem, detail: empty, or what happened to the reward, see `rewards.Reward`.
    """

    tokens: NDArray[np.int32]
    mask: NDArray[np.uint8]
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    finish_reason: str
    text: str
    reward: float
    problem: str = ""
    detail: str = ""

    def __post_init__(self) -> None:
        n = len(self.tokens)
        assert n, "a sample has at least one token"
        for array, dtype in (
            (self.tokens, np.int32),
            (self.mask, np.uint8),
            (self.logprobs, np.float32),
            (self.versions, np.int32),
        ):
            assert array.shape == (n,), f"expected one value a token ({n}), got {array.shape}"
            assert array.dtype == dtype, f"expected {dtype}, got {array.dtype}"
        assert np.isfinite(self.reward), "a reward is a finite number"


@dataclass(frozen=True, eq=False)
class Group:
    """One prompt and its N samples.

    Attributes:
        number: the prompt's place in the endless order of prompts.
        prompt: int32 [p], p >= 1.
    """

    number: int
    prompt: NDArray[np.int32]
    samples: tuple[Sample, ...]

    def __post_init__(self) -> None:
        assert len(self.prompt), "a prompt has at least one token"
        assert self.prompt.dtype == np.int32, f"expected int32, got {self.prompt.dtype}"
        assert self.samples, "a group has at least one sample"

    @property
    def rewards(self) -> NDArray[np.float64]:
        """[N]"""
        return np.array([sample.reward for sample in self.samples], dtype=np.float64)

    @property
    def version(self) -> int:
        """Of the oldest weights that took part in sampling it."""
        return min(int(sample.versions.min()) for sample in self.samples)

    @property
    def degenerate(self) -> bool:
        """Whether all rewards are equal: the group has no advantage to learn from."""
        rewards = self.rewards
        return bool((rewards == rewards[0]).all())


@dataclass(frozen=True, eq=False)
class Batch:
    """B samples, right-padded to the longest; L = longest prompt + completion.

    Column j of the arrays [B, L-1] belongs to the *target* ids[:, j+1], which the logits of
    position j predict.

    Attributes:
        ids: int64 [B, L].
        target_mask: uint8 [B, L-1], 1 where the target is a token that the model sampled (the
            stop token too), 0 for the prompt, forced tokens and padding.
        behaviour: float32 [B, L-1], the sampler's log-probability of the target; 0 where the mask
            is 0.
        group: int64 [B], which of the given groups a row belongs to.
        lengths: int64 [B], of prompt and completion together.
    """

    ids: NDArray[np.int64]
    target_mask: NDArray[np.uint8]
    behaviour: NDArray[np.float32]
    group: NDArray[np.int64]
    lengths: NDArray[np.int64]


def to_batch(groups: Sequence[Group], pad_id: int) -> Batch:
    """The samples of the groups, group by group, as rows of one batch."""
    rows = [(g, group.prompt, s) for g, group in enumerate(groups) for s in group.samples]
    assert rows, "a batch has at least one group"
    lengths = np.array([len(prompt) + len(s.tokens) for _, prompt, s in rows], dtype=np.int64)
    B, L = len(rows), int(lengths.max())
    ids = np.full((B, L), pad_id, dtype=np.int64)
    target_mask = np.zeros((B, L - 1), dtype=np.uint8)
    behaviour = np.zeros((B, L - 1), dtype=np.float32)
    for row, (_, prompt, sample) in enumerate(rows):
        p, end = len(prompt), int(lengths[row])
        ids[row, :p] = prompt
        ids[row, p:end] = sample.tokens
        target_mask[row, p - 1 : end - 1] = sample.mask
        behaviour[row, p - 1 : end - 1] = np.where(sample.mask, sample.logprobs, 0)
    group = np.array([g for g, _, _ in rows], dtype=np.int64)
    return Batch(ids, target_mask, behaviour, group, lengths)
