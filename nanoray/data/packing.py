"""Documents to rows of T+1 ids: no padding, every piece begins with BOS, almost nothing cropped.

The reference (nanochat's loader) streams: it knows 1,000 documents at a time, searches them in
a list, and throws 35 % of the tokens away at T = 2048. A unit of the stream is packed as a
whole, so here all lengths are known at once, and the search is arithmetic on a bitmap of them:

1. A document of more than T tokens gives full rows; its rest joins the other documents.
2. A row takes the longest piece that is left. Its gap is closed by one piece that fits exactly,
   or by two that do together, else filled with the longest piece that fits - as long as that
   leaves either nothing or a gap worth filling.
3. Where nothing fits, the shortest piece that is too long is cut. What is cut off comes back
   as a piece of its own if it is at least `MIN_TAIL` tokens long, else it is lost.

Does a tail that begins in mid-document hurt? Measured once at T = 512, where it occurs most (a
4-layer model of width 128, vocabulary 4,096, 300 steps of 4,096 tokens, AdamW; bits per byte
with tails minus without, where 52 % of the tokens were cropped). On fresh text: validation rows
with tails +.000 and +.011 (two seeds), rows of document beginnings only +.013 and +.026. On 700
documents repeated (one seed), where cropping costs epochs: -.012 and .000. So a small price
while text is endless, a gain where it is not; at T = 2048 there are ten times fewer tails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nanoray.tokenizer import Tokenizer

MIN_TAIL = 64
"""Shortest piece, in tokens, that a cut may leave (T/8 if that is less)."""


@dataclass(frozen=True)
class PackedUnit:
    """The rows of a unit, and what became of its documents.

    Attributes:
        rows: [n, T+1] uint16 or uint32; each begins with BOS.
        documents: those that went in.
        tokens_in: their tokens, BOS not counted.
        tokens_cropped: how many of them are in no row; the rest is there exactly once.
        pieces: BOS tokens in the rows, so ``rows.size == tokens_in - tokens_cropped + pieces``.
        documents_skipped: unusable documents that never went in.
        trained: [n, T+1] uint8, 1 where an id counts as a target; None: all do.
    """

    rows: np.ndarray
    documents: int
    tokens_in: int
    tokens_cropped: int
    pieces: int
    documents_skipped: int = 0
    trained: np.ndarray | None = None


def tokenize_and_pack(
    texts: Sequence[str], tokenizer: Tokenizer, T: int, seed: int | Sequence[int]
) -> PackedUnit:
    """Encode the documents and pack them; see `pack_documents`."""
    documents = tokenizer.encode_batch(texts)
    return pack_documents(documents, T, tokenizer.bos_id, seed, tokenizer.token_dtype)


def pack_documents(
    documents: Sequence[np.ndarray],
    T: int,
    bos_id: int,
    seed: int | Sequence[int],
    dtype: npt.DTypeLike = np.uint16,
) -> PackedUnit:
    """Pack token ids into rows of T+1: a pure function of its arguments.

    Args:
        documents: token ids of each document, 1-D, without BOS.
        T: inputs of a row; the row holds one id more, the last target.
        seed: of the order of the rows; what is in a row does not depend on it.
        dtype: of the rows; holds every id.

    Raises:
        ValueError: T is below 1.
    """
    if T < 1:
        raise ValueError(f"rows of T+1 ids need T >= 1, not {T}")
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    tokens_in = int(lengths.sum())
    # One flat array: a piece is then just where it starts and how long it is.
    flat = np.concatenate([np.empty(0, dtype), *documents], dtype=dtype, casting="unsafe")
    placed, num_rows = _place(lengths.tolist(), T)

    rows = np.empty((num_rows, T + 1), dtype)
    out = rows.reshape(-1)
    end = 0
    for start, num_tokens in placed:
        out[end] = bos_id
        out[end + 1 : end + 1 + num_tokens] = flat[start : start + num_tokens]
        end += 1 + num_tokens
    assert end == out.size

    return PackedUnit(
        rows=rows[permutation(num_rows, seed)],
        documents=len(documents),
        tokens_in=tokens_in,
        tokens_cropped=tokens_in - (out.size - len(placed)),
        pieces=len(placed),
    )


def permutation(n: int, seed: int | Sequence[int]) -> np.ndarray:
    """A permutation of range(n), int64 [n], that no numpy version changes.

    numpy guarantees the raw stream of PCG64, but not what `Generator.permutation` makes of it.
    """
    keys = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(n)
    return np.argsort(keys, kind="stable")


class PiecePool:
    """Pieces that wait for a row, found by their size (tokens + 1 for BOS, at most `capacity`).

    Bit s of `sizes` is set while a piece of size s is there, bit capacity-s of `mirrored`
    likewise: "the longest that fits", "the shortest that does not", and "two that fit exactly"
    are then a few operations on machine words, however many pieces there are.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.sizes = 0
        self.mirrored = 0
        self.total = 0
        self._starts: list[list[int]] = [[] for _ in range(capacity + 1)]

    def add(self, start: int, num_tokens: int) -> None:
        size = num_tokens + 1
        if not self._starts[size]:
            self._flip(size)
        self._starts[size].append(start)
        self.total += size

    def pop(self, size: int) -> int:
        """Take out a piece of this size; returns where it starts."""
        start = self._starts[size].pop()
        if not self._starts[size]:
            self._flip(size)
        self.total -= size
        return start

    def _flip(self, size: int) -> None:
        self.sizes ^= 1 << size
        self.mirrored ^= 1 << (self.capacity - size)

    def longest_within(self, room: int) -> int:
        """The largest size <= room, 0 if there is none."""
        return max(0, (self.sizes & ((2 << room) - 1)).bit_length() - 1)

    def shortest_beyond(self, room: int) -> int:
        """The smallest size > room, 0 if there is none."""
        longer = self.sizes >> (room + 1)
        return (longer & -longer).bit_length() + room if longer else 0

    def exact(self, room: int) -> int:
        """A size that fills the room by itself or with one other piece, 0 if there is none."""
        if self.sizes >> room & 1:
            return room
        # Bit s of the shifted mirror says whether there is a piece of size room - s.
        pairs = self.sizes & (self.mirrored >> (self.capacity - room)) & ((1 << room) - 1)
        larger = max(0, pairs.bit_length() - 1)
        needs_two = 2 * larger == room
        return 0 if needs_two and len(self._starts[larger]) < 2 else larger


def _place(lengths: list[int], T: int) -> tuple[list[tuple[int, int]], int]:
    """Which tokens follow each other in the rows: [(start in the flat tokens, number), ...].

    Returns the pieces, row after row, and the number of rows that they fill exactly.
    """
    pool = PiecePool(T + 1)
    min_tail = max(1, min(MIN_TAIL, T // 8))
    placed: list[tuple[int, int]] = []
    start = 0
    for length in lengths:
        end = start + length
        whole = length <= T
        while end - start >= T:
            placed.append((start, T))
            start += T
        if end - start >= (1 if whole else min_tail):
            pool.add(start, end - start)
        start = end
    num_rows = len(placed)
    while pool.total > T:
        _fill_row(pool, placed, min_tail)
        num_rows += 1
    return placed, num_rows


def _fill_row(pool: PiecePool, placed: list[tuple[int, int]], min_tail: int) -> None:
    """Take pieces of exactly T+1 ids out of the pool, which holds at least as many."""
    room = pool.capacity
    while room:
        if room == 1:  # the last target: BOS says that the document before it is over
            placed.append((0, 0))
            return
        size = pool.exact(room)
        if not size:
            size = pool.longest_within(room)
            too_long = pool.shortest_beyond(room)
            # A gap that no piece fills well would cost a cut as well, and leave a sliver.
            if too_long and (not size or room - size < min_tail):
                start = pool.pop(too_long)
                placed.append((start, room - 1))
                if too_long - room >= min_tail:
                    pool.add(start + room - 1, too_long - room)
                return
        assert size, "the pool holds enough for the row"
        placed.append((pool.pop(size), size - 1))
        room -= size
