"""Scoring of token spans: how likely a model finds them, and whether it would say them.

`CachedScorer` runs our own GPT: the tokens that a question's rows share are computed once, and
the rows' own tokens are run over that prefix one option after another, in the same cache slot,
for many questions at a time. Logits exist for scored positions only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nanoray.engine.cached import CachedModel, KVCache
from nanoray.errors import NanorayError
from nanoray.evals.core_render import Question, TextEncoder
from nanoray.model.gpt import GPT
from nanoray.model.loss import pick_chunk

DAMAGED = (
    "the model gives NaN or infinite logits; its weights are damaged: evaluate another checkpoint"
)
_CHUNK = 256  # tokens of one row per forward pass: windows and the causal half save the rest
# Positions that the cache holds at most; on a CPU 64 MB for width 256, 4 layers, fp32. More than
# this share of what a GPU has left it never takes: at depth 20 all of them are 27 GB.
_CPU_CACHE_TOKENS = 8 * 2**10
_GPU_CACHE_TOKENS = 256 * 2**10
_GPU_SHARE = 0.25


@dataclass(frozen=True)
class SpanScore:
    """What a model thinks of the scored span of one row.

    Attributes:
        loss: mean cross-entropy of its tokens in nats; NaN for a span without tokens.
        gap: the least, over its tokens, of the token's logit minus the best other one's.
        greedy: whether every token is the likeliest (of equals, the lowest id).
    """

    loss: float
    gap: float
    greedy: bool


EMPTY_SPAN = SpanScore(math.nan, -math.inf, False)


class LanguageModel(TextEncoder, Protocol):
    """A model with its tokenizer, as far as CORE needs them.

    max_len: the longest row in tokens that it can read.
    """

    @property
    def max_len(self) -> int: ...

    def score(self, questions: Sequence[Question]) -> list[list[SpanScore]]:
        """Scores of every row of every question; they do not depend on what is asked together."""
        ...


class CachedScorer:
    """Our GPT and its tokenizer as a `LanguageModel`; runs where the model is, in its dtype."""

    def __init__(self, model: GPT, tokenizer: TextEncoder) -> None:
        self.model = CachedModel(model)
        self.max_len = model.config.rotary_len
        self.bos_id, self.encode = tokenizer.bos_id, tokenizer.encode

    def score(self, questions: Sequence[Question]) -> list[list[SpanScore]]:
        scores: list[list[SpanScore]] = [[] for _ in questions]
        for cache_len, order in self._by_length(questions).items():
            slots = min(len(order), max(1, self._cache_tokens() // cache_len))
            cache = KVCache(self.model, slots, cache_len)
            for first in range(0, len(order), slots):
                batch = order[first : first + slots]
                self._score_batch(cache, [questions[i] for i in batch], [scores[i] for i in batch])
        return scores

    def _cache_tokens(self) -> int:
        """Positions for the next cache: it may stand beside a training run's optimiser."""
        model, config = self.model, self.model.config
        if model.device.type == "cpu":
            return _CPU_CACHE_TOKENS
        position = 2 * config.n_layer * config.n_kv_head * config.head_dim
        position_bytes = position * model.compute_dtype.itemsize
        return min(_GPU_CACHE_TOKENS, int(_GPU_SHARE * free_bytes(model.device)) // position_bytes)

    def _by_length(self, questions: Sequence[Question]) -> dict[int, list[int]]:
        """Questions by the cache length that they need (a power of two), alike ones together."""
        order = sorted(
            range(len(questions)),
            key=lambda i: (questions[i].num_shared, max(map(len, questions[i].rows))),
        )
        groups: dict[int, list[int]] = {}
        for i in order:
            longest = max(map(len, questions[i].rows))
            cache_len = min(1 << (longest - 1).bit_length(), self.max_len)
            groups.setdefault(cache_len, []).append(i)
        return groups

    def _score_batch(
        self, cache: KVCache, questions: list[Question], scores: list[list[SpanScore]]
    ) -> None:
        """Question i runs in slot i; its rows' scores are appended to scores[i]."""
        shared = [question.num_shared for question in questions]
        prefixes = [
            _Piece(slot, question.rows[0][:num_shared], 0, -1, num_scored=0)
            for slot, (question, num_shared) in enumerate(zip(questions, shared))
        ]
        self._run(cache, [piece for piece in prefixes if piece.tokens])
        for option in range(max(len(question.rows) for question in questions)):
            # An option overwrites what the one before it left behind the shared tokens.
            pieces = []
            for slot, (question, num_shared) in enumerate(zip(questions, shared)):
                if option < len(question.rows):
                    row, start = question.rows[option], question.starts[option]
                    if start == len(row):
                        scores[slot].append(EMPTY_SPAN)
                        continue
                    previous = row[num_shared - 1] if num_shared else -1
                    own = row[num_shared:]
                    pieces.append(_Piece(slot, own, num_shared, previous, len(row) - start))
            for piece, score in zip(pieces, self._run(cache, pieces)):
                scores[piece.slot].append(score)

    def _run(self, cache: KVCache, pieces: list[_Piece]) -> list[SpanScore]:
        """Extend the pieces' slots chunk by chunk and score their spans."""
        scores: list[list[TokenScore]] = [[] for _ in pieces]
        longest = max((piece.num_fed for piece in pieces), default=0)
        unscored = not any(piece.num_scored for piece in pieces)
        for offset in range(0, longest, _CHUNK):
            active = [i for i, piece in enumerate(pieces) if piece.num_fed > offset]
            chunks = [
                pieces[i].tokens[offset : min(offset + _CHUNK, pieces[i].num_fed)] for i in active
            ]
            hidden_BTD = self.model.forward(
                cache,
                [pieces[i].slot for i in active],
                [pieces[i].position + offset for i in active],
                padded(chunks, 0),
                [len(chunk) for chunk in chunks],
                [pieces[i].tokens[offset - 1] if offset else pieces[i].previous for i in active],
                last_only=unscored,
            )
            # Of every token that is scored: the row and position that predict it, and its piece.
            scored = [
                (b, j - offset, pieces[i].tokens[j + 1], i)
                for b, (i, chunk) in enumerate(zip(active, chunks))
                for j in pieces[i].predictors(offset, offset + len(chunk))
            ]
            rows = pick_chunk(max(1, len(scored)), self.model.vocab_size, self.model.device)
            for first in range(0, len(scored), rows):
                b_N, j_N, targets_N, owners = zip(*scored[first : first + rows])
                logits_NV = self.model.logits(hidden_BTD[list(b_N), list(j_N)])
                for i, score in zip(owners, token_scores(logits_NV, targets_N)):
                    scores[i].append(score)
        return [pool(piece_scores) for piece_scores in scores]


@dataclass(frozen=True)
class _Piece:
    """Tokens that extend a slot from `position` on; the last num_scored of them are scored.

    The last token of a scored piece is only a target, so it is not fed. previous: the token
    before the piece, or -1.
    """

    slot: int
    tokens: list[int]
    position: int
    previous: int
    num_scored: int

    @property
    def num_fed(self) -> int:
        return len(self.tokens) - (self.num_scored > 0)

    def predictors(self, first: int, end: int) -> range:
        """Which of the tokens first..end - 1 predict a scored one."""
        last = len(self.tokens) - 1
        return range(max(first, last - self.num_scored), min(end, last))


class TokenScore(NamedTuple):
    """The SpanScore of a single token."""

    loss: float
    gap: float
    greedy: bool


def token_scores(logits_NV: Tensor, targets_N: Sequence[int]) -> list[TokenScore]:
    """Scores of targets under fp32 logits. Raises NanorayError where the logits are NaN."""
    targets_N1 = torch.tensor(targets_N, device=logits_NV.device).unsqueeze(1)
    own_N1 = logits_NV.gather(1, targets_N1)
    loss_N = logits_NV.logsumexp(1) - own_N1.squeeze(1)
    if not bool(loss_N.isfinite().all()):
        raise NanorayError(DAMAGED)
    best_N1, best_id_N1 = logits_NV.scatter(1, targets_N1, -math.inf).max(1, keepdim=True)
    greedy_N1 = (own_N1 > best_N1) | ((own_N1 == best_N1) & (targets_N1 < best_id_N1))
    columns = (loss_N, (own_N1 - best_N1).squeeze(1), greedy_N1.squeeze(1))
    return [TokenScore(*values) for values in zip(*(column.tolist() for column in columns))]


def pool(scores: Sequence[TokenScore]) -> SpanScore:
    """The score of a span from its tokens'."""
    if not scores:
        return EMPTY_SPAN
    losses, gaps, greedy = zip(*scores)
    return SpanScore(math.fsum(losses) / len(losses), min(gaps), all(greedy))


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that this process could still take, what torch holds in reserve included."""
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def padded(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    """The rows as one int64 tensor [B, T], filled up on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows])
