"""The stream of supervised fine-tuning: whole conversations side by side in rows of T+1 ids.

Conversations are measured once, before training: then it is known which go together into a row,
and how many rows an epoch has. A conversation longer than a row is truncated, and one that keeps
nothing to train on is left out; both are counted. What is free at the end of a row is padding, no
target. So a row always has a target, and none waits for room.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from nanoray.data.packing import PackedUnit, PiecePool, permutation
from nanoray.data.plan import Layout, layout
from nanoray.errors import NanorayError
from nanoray.tokenizer import Conversation, Tokenizer

TrainOn = Literal["assistant", "all"]

# Conversations that are packed as one: enough that rows fill up, few enough that a row's mixture
# is that of its time.
GROUP_SIZE = 4096
# A packing task renders some 2 million ids a second.
UNIT_TOKENS = 2**17
NUM_NAMED = 4  # conversations of a unit, in messages


def render(
    conversation: Conversation, tokenizer: Tokenizer, capacity: int, train_on: TrainOn
) -> tuple[list[int], list[int], int]:
    """Ids and targets (1 where an id is one) within ``capacity``, and how many ids there were.

    Raises:
        NanorayError: the conversation breaks the form.
    """
    ids, trained = tokenizer.render_conversation(conversation)
    if train_on == "all":
        trained = [0] + [1] * (len(ids) - 1)
    return ids[:capacity], trained[:capacity], len(ids)


@dataclass(frozen=True)
class Measured:
    """What there is to pack.

    Attributes:
        lengths: int32 [n], ids of each conversation within a row; 0: left out.
        tokens: of all conversations, before any cut.
        truncated: conversations that were cut.
        tokens_cut: of these, and of those left out.
        fingerprint: hex, of everything that is packed.
    """

    lengths: np.ndarray
    tokens: int
    truncated: int
    tokens_cut: int
    fingerprint: str

    @property
    def left_out(self) -> int:
        """Conversations with nothing to train on."""
        return int((self.lengths == 0).sum())


def lengths_file(lengths: np.ndarray) -> bytes:
    """`Measured.lengths` as a file."""
    file = io.BytesIO()
    np.save(file, lengths, allow_pickle=False)
    return file.getvalue()


def load_lengths(content: bytes) -> np.ndarray:
    """The inverse of `lengths_file`."""
    lengths: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    return lengths


def measure(
    conversations: Callable[[int], Conversation],
    num_conversations: int,
    tokenizer: Tokenizer,
    sequence_len: int,
    train_on: TrainOn,
    progress: Callable[[int, int], None] = lambda _conversations, _tokens: None,
    num_tokens: int | None = None,
) -> Measured:
    """Render every conversation once, for its length.

    Args:
        num_tokens: the first conversations that have so many within rows are enough (None: all).
        progress: told of conversations and tokens so far, now and then.

    Raises:
        NanorayError: a conversation breaks the form, or none has anything to train on.
    """
    capacity = sequence_len + 1
    lengths = np.zeros(num_conversations, np.int32)
    digest = hashlib.sha256(f"{train_on} {capacity} {tokenizer.fingerprint}".encode())
    tokens = truncated = tokens_cut = 0
    for i in range(num_conversations):
        ids, trained, full_length = render(conversations(i), tokenizer, capacity, train_on)
        tokens += full_length
        if any(trained):
            lengths[i] = len(ids)
            truncated += full_length > capacity
            digest.update(np.array(ids, np.uint32).tobytes() + bytes(trained))
        tokens_cut += full_length - int(lengths[i])
        if num_tokens is not None and tokens - tokens_cut >= num_tokens:
            lengths = lengths[: i + 1]
            break
        if i % 1000 == 999:
            progress(i + 1, tokens)
    if not lengths.any():
        raise NanorayError(
            f"none of the {len(lengths):,} conversations has anything to train on within "
            f"{sequence_len} tokens; raise --max-seq-len or take other data"
        )
    return Measured(lengths, tokens, truncated, tokens_cut, digest.hexdigest()[:32])


def pack(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Which conversations share a row: their numbers, row by row (best fit, longest first).

    Args:
        lengths: [n], at most ``capacity``; 0 is in no row.
    """
    rows = []
    used = np.flatnonzero(lengths)
    for start in range(0, len(used), GROUP_SIZE):
        group = used[start : start + GROUP_SIZE]
        pool = PiecePool(capacity)
        for number, length in zip(group.tolist(), lengths[group].tolist()):
            pool.add(number, length - 1)  # a piece's size counts one for BOS
        while pool.total:
            rows.append(np.fromiter(_row(pool), np.int64))
    return rows


def _row(pool: PiecePool) -> Iterator[int]:
    room = pool.longest_within(pool.capacity)
    yield pool.pop(room)
    room = pool.capacity - room
    while room and (size := pool.exact(room) or pool.longest_within(room)):
        yield pool.pop(size)
        room -= size


# Ray Data unpickles the stream anew for every packing task: what a process has worked out stays.
@lru_cache(maxsize=2)
def _packed(lengths: bytes, capacity: int) -> list[np.ndarray]:
    return pack(np.frombuffer(lengths, np.int32), capacity)


@lru_cache(maxsize=8)
def _order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return permutation(num_rows, (seed, epoch))


@dataclass(frozen=True)
class ConversationStream:
    """A `Stream` of rows of conversations; the same rows come in another order every epoch.

    Attributes:
        conversations: number -> conversation; travels to packing tasks.
        lengths: see `Measured`.
        num_steps: of the horizon.
    """

    conversations: Callable[[int], Conversation]
    lengths: np.ndarray
    layout: Layout
    num_steps: int
    train_on: TrainOn
    seed: int

    @property
    def rows(self) -> list[np.ndarray]:
        """The conversations of every row."""
        return _packed(self.lengths.tobytes(), self.layout.sequence_len + 1)

    @property
    def _unit_rows(self) -> int:
        return max(1, UNIT_TOKENS // self.layout.sequence_len)

    def unit_indices(self, first: int) -> range:
        needed = (self.num_steps + 2 * self.layout.slab_steps) * self.layout.rows_per_step
        return range(first, -(-needed // self._unit_rows))

    def _places(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and place in it of a unit's rows: steps take the rows of the epochs in order.

        The stream itself has them slab by slab in the order of blocks, each of which holds rows of
        many steps. So whatever the horizon is, no row comes a second time before all have come.
        """
        start = index * self._unit_rows
        numbers = self.layout.step_order(np.arange(start, start + self._unit_rows))
        epochs, places = np.divmod(numbers, len(self.rows))
        return epochs, places

    def epoch(self, index: int, row: int) -> int:
        return int(self._places(index)[0][row])

    def _unit(self, index: int) -> list[np.ndarray]:
        rows = self.rows
        return [
            rows[_order(len(rows), self.seed, epoch)[place]]
            for epoch, place in zip(*(column.tolist() for column in self._places(index)))
        ]

    def describe_unit(self, index: int, rows: np.ndarray) -> str:
        """Numbers of the rows' conversations in the mixture, and how the first ones begin."""
        unit = self._unit(index)
        numbers = np.concatenate([unit[row] for row in rows]).tolist()
        named = []
        for number in numbers[:NUM_NAMED]:
            first = self.conversations(number)["messages"][0]["content"]
            named.append(f"{number} ({first[:40]!r}…)")
        more = f" and {len(numbers) - NUM_NAMED} more" if len(numbers) > NUM_NAMED else ""
        return f"conversations {', '.join(named)}{more} of the mixture"

    def pack(self, tokenizer: Tokenizer, index: int) -> PackedUnit:
        return fill(self, self._unit(index), tokenizer)


def fill(stream: ConversationStream, rows: list[np.ndarray], tokenizer: Tokenizer) -> PackedUnit:
    """The ids of some rows of a stream; tokens are counted as rendered, BOS with them.

    Raises:
        NanorayError: a conversation is not as long as when it was measured.
    """
    capacity = stream.layout.sequence_len + 1
    ids = np.full((len(rows), capacity), tokenizer.bos_id, tokenizer.token_dtype)
    trained = np.zeros((len(rows), capacity), np.uint8)
    tokens_in = pieces = 0
    for row, members in enumerate(rows):
        end = 0
        for number in members.tolist():
            conversation = stream.conversations(number)
            part, targets, length = render(conversation, tokenizer, capacity, stream.train_on)
            if len(part) != stream.lengths[number]:
                raise NanorayError(
                    f"conversation {number} of the mixture has {len(part)} tokens, but had "
                    f"{stream.lengths[number]} when the run began: the data has changed; restore "
                    f"it, or take another --run"
                )
            ids[row, end : end + len(part)] = part
            trained[row, end : end + len(part)] = targets
            end += len(part)
            tokens_in += length
        pieces += len(members)
    kept = sum(int(stream.lengths[members].sum()) for members in rows)
    return PackedUnit(ids, pieces, tokens_in, tokens_in - kept, pieces, trained=trained)


def held_out_rows(
    conversations: Callable[[int], Conversation],
    num_conversations: int,
    tokenizer: Tokenizer,
    *,
    sequence_len: int,
    num_tokens: int,
    train_on: TrainOn,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows [n, T+1] of the first conversations, some ``num_tokens`` of them, and their targets.

    Raises:
        NanorayError: a conversation breaks the form, or none has anything to train on.
    """
    measured = measure(
        conversations, num_conversations, tokenizer, sequence_len, train_on, num_tokens=num_tokens
    )
    stream = ConversationStream(
        conversations, measured.lengths, layout(1, sequence_len), 1, train_on, 0
    )
    packed = fill(stream, stream.rows, tokenizer)
    assert packed.trained is not None
    return packed.rows, packed.trained
