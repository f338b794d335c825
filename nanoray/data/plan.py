"""The plan of a training stream: everything that its rows are a function of."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanoray.data.packing import PackedUnit
from nanoray.data.shards import OnBad, RowGroup, read_row_group
from nanoray.data.units import Unit, list_units, pack_unit, unit_at
from nanoray.errors import NanorayError
from nanoray.tokenizer import Tokenizer

# Ray Data costs some 40 ms a block, so a block holds rows for several steps.
BLOCK_TOKENS = 2**16
MAX_SLAB_STEPS = 32
# The plan covers this many times the tokens that the horizon needs, by a sampled estimate of
# bytes per token: units differ, and what is not needed is never read.
MARGIN = 1.5
SAMPLE_DOCUMENTS = 256


@dataclass(frozen=True)
class Layout:
    """How the rows of the stream become steps: a function of T and B alone.

    A *slab* is ``slab_steps`` consecutive steps. It is made of ``stripes`` blocks, each of which
    holds ``stripe_rows`` rows of every step of the slab: block k of a slab, rows
    ``[i·stripe_rows, (i+1)·stripe_rows)``, belong to the slab's i-th step. Blocks are dealt to
    workers in turn, so a stripe is the smallest piece of a step that one worker trains on.
    """

    sequence_len: int
    stripe_rows: int
    stripes: int
    slab_steps: int

    @property
    def rows_per_step(self) -> int:
        return self.stripe_rows * self.stripes

    @property
    def rows_per_block(self) -> int:
        return self.stripe_rows * self.slab_steps


def layout(rows_per_step: int, sequence_len: int) -> Layout:
    """Stripes have 8 rows, or fewer where 8 workers could not share a step otherwise."""
    rows = 8
    while rows > 1 and (rows_per_step % rows or rows_per_step // rows < 8):
        rows //= 2
    steps = BLOCK_TOKENS // (rows * sequence_len)
    return Layout(sequence_len, rows, rows_per_step // rows, min(max(steps, 1), MAX_SLAB_STEPS))


@dataclass(frozen=True)
class StreamPlan:
    """Attributes:
    units: those of one epoch, in corpus order.
    num_units: of the whole horizon; unit i of the stream is in epoch i // len(units).
    """

    units: tuple[Unit, ...]
    num_units: int
    layout: Layout
    num_steps: int
    seed: int
    on_bad: OnBad

    def unit_indices(self, first: int) -> range:
        return range(first, self.num_units)

    def epoch(self, index: int) -> int:
        return index // len(self.units)

    def pack(self, tokenizer: Tokenizer, index: int) -> PackedUnit:
        """The rows of unit ``index`` of the stream: a pure function of the plan."""
        unit = unit_at(self.units, index, self.seed)
        return pack_unit(unit, tokenizer, self.layout.sequence_len, self.seed, self.on_bad)

    def describe_unit(self, index: int) -> str:
        """Shard and row groups of a unit, for messages."""
        unit = unit_at(self.units, index, self.seed)
        groups: dict[str, list[int]] = {}
        for shard, row_group in unit.row_groups:
            groups.setdefault(shard.rsplit("/", 1)[-1], []).append(row_group)
        return "; ".join(f"{shard} row groups {ids}" for shard, ids in groups.items())


def plan_stream(
    row_groups: Sequence[RowGroup],
    tokenizer: Tokenizer,
    *,
    layout: Layout,
    num_steps: int,
    seed: int,
    on_bad: OnBad,
) -> StreamPlan:
    """Lay out enough units for the horizon and one slab more (the splitter cuts its tail).

    Raises:
        NanorayError: the training shards hold no text, or bad text and ``on_bad`` is "fail".
    """
    units = tuple(list_units(row_groups))
    if not units:
        raise NanorayError("the training shards have no rows; build the corpus again")
    needed_rows = (num_steps + 2 * layout.slab_steps) * layout.rows_per_step
    needed_tokens = needed_rows * (layout.sequence_len + 1)
    needed_bytes = needed_tokens * MARGIN * _bytes_per_token(row_groups[0], tokenizer, on_bad)
    bytes_of = {(g.shard, g.row_group): g.num_bytes for g in row_groups}
    unit_bytes = [sum(bytes_of[key] for key in unit.row_groups) for unit in units]
    # Whole epochs, then the largest units are left out of the count: any order then suffices.
    epochs, rest = divmod(needed_bytes, sum(unit_bytes))
    ascending = itertools.accumulate(sorted(unit_bytes))
    extra = sum(1 for total in ascending if total < rest) + 1
    num_units = int(epochs) * len(units) + min(extra, len(units)) + 2
    return StreamPlan(units, num_units, layout, num_steps, seed, on_bad)


def _bytes_per_token(group: RowGroup, tokenizer: Tokenizer, on_bad: OnBad) -> float:
    texts, _skipped = read_row_group(group.shard, group.row_group, on_bad)
    ids = tokenizer.encode_batch(texts[:SAMPLE_DOCUMENTS])
    num_tokens = sum(len(doc) + 1 for doc in ids)
    num_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts[:SAMPLE_DOCUMENTS])
    return max(1.0, num_bytes / max(1, num_tokens))


def validation_rows(
    row_groups: Sequence[RowGroup],
    tokenizer: Tokenizer,
    *,
    sequence_len: int,
    num_tokens: int,
    on_bad: OnBad,
) -> np.ndarray:
    """The first rows of the validation shard, [n, T+1]: a fixed budget, the same for any worker.

    n is ``num_tokens`` / T rounded up, or all rows of the shard where it holds fewer.

    Raises:
        NanorayError: the shard does not fill one row.
    """
    wanted = -(-num_tokens // sequence_len)
    rows: list[np.ndarray] = []
    for unit in list_units(row_groups):
        rows.append(pack_unit(unit, tokenizer, sequence_len, 0, on_bad).rows)
        if sum(map(len, rows)) >= wanted:
            break
    if not sum(map(len, rows)):
        raise NanorayError(
            f"the validation shard holds too little text for one row of {sequence_len} tokens; "
            f"lower --max-seq-len or build a larger corpus"
        )
    return np.concatenate(rows)[:wanted]
