"""From packed units to the blocks of the stream, and from blocks to the rows of a step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nanoray.data.packing import PackedUnit
from nanoray.data.plan import Layout
from nanoray.errors import NanorayError
from nanoray.tokenizer import Tokenizer

Block = dict[str, np.ndarray]
# Counts that a unit reports on its first row.
COUNT_COLUMNS = ("documents", "tokens_in", "tokens_cropped", "documents_skipped")


class Stream(Protocol):
    """Rows without end, in numbered units: a pure function of what the stream was planned with."""

    @property
    def layout(self) -> Layout: ...

    @property
    def num_steps(self) -> int: ...

    def unit_indices(self, first: int) -> range:
        """Units from ``first`` to one slab past the horizon, at least."""
        ...

    def pack(self, tokenizer: Tokenizer, index: int) -> PackedUnit:
        """The rows of unit ``index``."""
        ...

    def epoch(self, index: int, row: int) -> int:
        """How often everything has been read before row ``row`` of unit ``index``."""
        ...

    def describe_unit(self, index: int, rows: np.ndarray) -> str:
        """Where these rows of a unit come from (at least: the unit), for messages."""
        ...


@dataclass(frozen=True)
class Cursor:
    """The next row to train on: row ``row`` of unit ``unit``."""

    unit: int = 0
    row: int = 0


def unit_block(plan: Stream, tokenizer: Tokenizer, index: int, skip_rows: int) -> Block:
    """The rows of one unit, ready to be cut into blocks.

    Returns:
        ``ids`` [n, T+1] uint16 or uint32, where not every id is a target ``trained`` [n, T+1]
        uint8, ``unit`` and ``row`` [n] int64 (where each row comes from), and the `COUNT_COLUMNS`
        [n] int64, zero but on row 0.
    """
    packed = plan.pack(tokenizer, index)
    n = len(packed.rows)
    block: Block = {
        "ids": packed.rows,
        "unit": np.full(n, index, np.int64),
        "row": np.arange(n, dtype=np.int64),
    }
    if packed.trained is not None:
        block["trained"] = packed.trained
    for name in COUNT_COLUMNS:
        block[name] = np.zeros(n, np.int64)
        if n:
            block[name][0] = getattr(packed, name)
    return {name: column[skip_rows:] for name, column in block.items()}


def local_blocks(
    plan: Stream, tokenizer: Tokenizer, cursor: Cursor, rank: int = 0, world_size: int = 1
) -> Iterator[Block]:
    """The blocks of one worker, made in this process: what the Ray stream must equal."""
    rest: Block | None = None
    number = 0
    for index in plan.unit_indices(cursor.unit):
        skip = cursor.row if index == cursor.unit else 0
        new = unit_block(plan, tokenizer, index, skip)
        rest = new if rest is None else {k: np.concatenate([rest[k], new[k]]) for k in new}
        start = 0
        while len(rest["ids"]) - start >= plan.layout.rows_per_block:
            stop = start + plan.layout.rows_per_block
            if number % world_size == rank:
                yield {name: column[start:stop] for name, column in rest.items()}
            number += 1
            start = stop
        rest = {name: column[start:] for name, column in rest.items()}


def started(blocks: Iterator[Block]) -> Iterator[Block]:
    """The same blocks; the first is fetched from now on, while the caller does other things."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="first-block")
    first = pool.submit(next, blocks, None)
    pool.shutdown(wait=False)

    def all_blocks() -> Iterator[Block]:
        block = first.result()
        if block is not None:
            yield block
            yield from blocks

    return all_blocks()


@dataclass(frozen=True)
class StepRows:
    """One worker's share of one step.

    Attributes:
        ids: [n, T+1]; n may be 0.
        trained: [n, T+1] uint8, 1 where an id counts as a target; None: all do.
        positions: [n] of each row within the step, the same for any number of workers.
        units, rows: [n] int64, the unit that each row comes from and its number there.
        counts: `COUNT_COLUMNS` summed over the units that begin here.
        slab: the first row of the slab, known to the worker of its first block.
        slab_first_step: the step that the slab begins with.
    """

    ids: np.ndarray
    trained: np.ndarray | None
    positions: np.ndarray
    units: np.ndarray
    rows: np.ndarray
    counts: dict[str, int]
    slab: Cursor | None
    slab_first_step: int

    @property
    def num_targets(self) -> int:
        if self.trained is None:
            return self.ids[:, 1:].size
        return int(self.trained[:, 1:].sum())

    def hash(self) -> int:
        """Order-free 64-bit hash; the sum over workers identifies the step's batch."""
        total = 0
        for i, (position, row) in enumerate(zip(self.positions, self.ids)):
            digest = hashlib.blake2b(row.tobytes(), digest_size=8)
            if self.trained is not None:
                digest.update(self.trained[i].tobytes())
            digest.update(int(position).to_bytes(4, "little"))
            total += int.from_bytes(digest.digest(), "little")
        return total % 2**64


def step_rows(
    blocks: Iterator[Block],
    plan: Stream,
    rank: int,
    world_size: int,
    *,
    first_step: int = 0,
    slab_first_step: int = 0,
) -> Iterator[StepRows]:
    """This worker's rows of every step from ``first_step`` to the horizon.

    Args:
        blocks: the worker's blocks, beginning with the slab of step ``slab_first_step``: the
            stream's block k is that of worker k mod ``world_size``.

    Raises:
        NanorayError: the blocks end before the horizon.
    """
    layout = plan.layout
    number = 0  # of the slab's first block in the stream
    for slab_step in range(slab_first_step, plan.num_steps, layout.slab_steps):
        stripes = [k for k in range(layout.stripes) if (number + k) % world_size == rank]
        number += layout.stripes
        taken = []
        for _ in stripes:
            block = next(blocks, None)
            if block is None or len(block["ids"]) != layout.rows_per_block:
                raise NanorayError(
                    f"the training stream ended at step {slab_step} of {plan.num_steps}: the "
                    f"corpus packs into fewer rows than estimated; begin another --run with fewer "
                    f"steps or a larger corpus"
                )
            taken.append(block)
        for i in range(max(0, first_step - slab_step), layout.slab_steps):
            if slab_step + i < plan.num_steps:
                yield _rows_of_step(taken, stripes, i, slab_step, layout)


def _rows_of_step(
    blocks: list[Block], stripes: list[int], i: int, slab_step: int, layout: Layout
) -> StepRows:
    """The rows of a slab's i-th step in a worker's blocks of that slab."""
    b = layout.stripe_rows
    if not blocks:
        empty = np.zeros((0, layout.sequence_len + 1), np.uint16)
        counts = dict.fromkeys(COUNT_COLUMNS, 0)
        none = np.zeros(0, np.int64)
        return StepRows(empty, None, none, none, none, counts, None, slab_step)

    def column(name: str) -> np.ndarray:
        return np.concatenate([block[name][i * b : (i + 1) * b] for block in blocks])

    first = blocks[0]
    cursor = Cursor(int(first["unit"][0]), int(first["row"][0]))
    return StepRows(
        ids=column("ids"),
        trained=column("trained") if "trained" in first else None,
        positions=np.concatenate([k * b + np.arange(b) for k in stripes]),
        units=column("unit"),
        rows=column("row"),
        counts={name: int(column(name).sum()) for name in COUNT_COLUMNS},
        slab=cursor if stripes[0] == 0 else None,
        slab_first_step=slab_step,
    )
