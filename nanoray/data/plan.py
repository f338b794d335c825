"""The plan of a training stream: everything that its rows are a function of."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nanoray.data.packing import PackedUnit, permutation
from nanoray.data.shards import OnBad, RowGroup, read_row_group
from nanoray.data.units import Unit, empty_unit_skips, list_units, pack_unit, unit_at
from nanoray.errors import NanorayError
from nanoray.tokenizer import Tokenizer

# Ray Data costs some 40 ms a block, so a block holds rows for several steps.
BLOCK_TOKENS = 2**16
MAX_SLAB_STEPS = 32
# The plan covers this many times the rows that the horizon needs, by a sampled estimate, and some
# units more: a stream must not end early, and a unit that is not needed is never read.
MARGIN = 2.0
SPARE_UNITS = 64
# The sample: this many row groups from all over the corpus, as many documents of each, and the
# beginning of each of them.
SAMPLE_GROUPS = 8
SAMPLE_DOCUMENTS = 64
SAMPLE_CHARS = 10_000


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

    def step_order(self, positions: np.ndarray) -> np.ndarray:
        """Positions of rows in the stream -> in which place they are trained on; int64 [n]."""
        slab, position = np.divmod(positions, self.slab_steps * self.rows_per_step)
        stripe, position = np.divmod(position, self.rows_per_block)
        step, row = np.divmod(position, self.stripe_rows)
        step += slab * self.slab_steps
        return step * self.rows_per_step + stripe * self.stripe_rows + row


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

    def epoch(self, index: int, _row: int) -> int:
        return index // len(self.units)

    def pack(self, tokenizer: Tokenizer, index: int) -> PackedUnit:
        """The rows of unit ``index`` of the stream: a pure function of the plan.

        Unusable documents of units just before it that gave no row are told here.
        """
        unit = unit_at(self.units, index, self.seed)
        packed = pack_unit(unit, tokenizer, self.layout.sequence_len, self.seed, self.on_bad)
        if not len(packed.rows):
            return packed
        skipped = packed.documents_skipped + self._skipped_before(tokenizer, index)
        return replace(packed, documents_skipped=skipped)

    def _skipped_before(self, tokenizer: Tokenizer, index: int) -> int:
        """Unusable documents of the units just before unit ``index`` that give no row at all."""
        skipped = 0
        while index > 0 and self.on_bad == "skip":  # "fail" leaves nothing out
            index -= 1
            unit = unit_at(self.units, index, self.seed)
            found = empty_unit_skips(unit, tokenizer, self.layout.sequence_len)
            if found is None:
                break
            skipped += found
        return skipped

    def describe_unit(self, index: int, _rows: np.ndarray | None = None) -> str:
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
        NanorayError: the training shards hold no text, too little for one row, or bad text and
            ``on_bad`` is "fail".
    """
    units = tuple(list_units(row_groups))
    if not units:
        raise NanorayError("the training shards have no rows; build the corpus again")
    density = _tokens_per_byte(row_groups, tokenizer, on_bad)
    bytes_of = {(g.shard, g.row_group): g.num_bytes for g in row_groups}
    unit_rows = []
    for unit in units:
        rows = sum(bytes_of[key] for key in unit.row_groups) * density / (layout.sequence_len + 1)
        # What does not fill its last row is lost; the eighth, because this is an estimate.
        unit_rows.append(max(rows - 1, rows / 8))
    if max(unit_rows) < 1:  # too few to estimate: a stream of empty units would never end
        T = layout.sequence_len
        unit_rows = [len(pack_unit(unit, tokenizer, T, seed, on_bad).rows) for unit in units]
    if not any(unit_rows):
        raise NanorayError(
            f"the training shards hold too little text for one row of {layout.sequence_len} "
            f"tokens; lower --max-seq-len or build a larger corpus"
        )
    needed_rows = MARGIN * (num_steps + 2 * layout.slab_steps) * layout.rows_per_step
    # Whole epochs, then the largest units are left out of the count: any order then suffices.
    epochs, rest = divmod(needed_rows, sum(unit_rows))
    ascending = itertools.accumulate(sorted(unit_rows))
    extra = sum(1 for total in ascending if total < rest) + 1
    num_units = int(epochs) * len(units) + min(extra, len(units)) + SPARE_UNITS
    return StreamPlan(units, num_units, layout, num_steps, seed, on_bad)


def _tokens_per_byte(row_groups: Sequence[RowGroup], tokenizer: Tokenizer, on_bad: OnBad) -> float:
    """Tokens, BOS counted, that a byte of the corpus's row groups gives, unusable ones counted.

    Row groups are drawn until enough of them hold text, so that it is known how rare these are.
    """
    num_tokens = num_bytes = 0.0
    usable = 0
    for index in permutation(len(row_groups), 0):
        group = row_groups[index]
        texts, _skipped = read_row_group(group.shard, group.row_group, on_bad)
        num_bytes += group.num_bytes
        if texts:
            sample = texts[:: -(-len(texts) // SAMPLE_DOCUMENTS)]
            sample = [text[:SAMPLE_CHARS] for text in sample]
            tokens = sum(map(len, tokenizer.encode_batch(sample)))
            share = sum(map(len, sample)) / sum(map(len, texts))
            num_tokens += tokens / share + len(texts)
            usable += 1
        if usable == SAMPLE_GROUPS:
            break
    return num_tokens / max(1.0, num_bytes)


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
