"""The training stream on Ray Data: units are packed in Ray tasks, blocks arrive in order.

What makes it a pure function (measured on Ray 2.60): execution order is preserved, blocks are cut
strictly, and `streaming_split` hands block k to worker k mod W. One dataset spans the whole
horizon, because every new execution costs seconds. The tasks import no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import ray.data

from nanoray.data.blocks import Block, Cursor, Stream, unit_block
from nanoray.errors import NanorayError
from nanoray.tokenizer import Tokenizer, load_tokenizer

MAX_TASKS = 4096


@lru_cache(maxsize=2)
def _cached_tokenizer(uri: str, fingerprint: str) -> Tokenizer:
    """Processes come and go during a run; all must cut its text alike."""
    tokenizer = load_tokenizer(uri)
    if tokenizer.fingerprint != fingerprint:
        raise NanorayError(
            f"the tokenizer in {uri} has changed under the run; put it back and run the same "
            f"command again"
        )
    return tokenizer


def training_dataset(
    plan: Stream,
    cursor: Cursor,
    tokenizer: str,
    concurrency: int | None = None,
    label_selector: Mapping[str, str] | None = None,
) -> ray.data.Dataset:
    """All rows from ``cursor`` to one slab past the horizon, in blocks of ``rows_per_block``.

    Args:
        tokenizer: its folder or URI, which every node that packs must see.
        concurrency: packing tasks at once (None: as many as there are CPUs free).
        label_selector: of the nodes that pack (None or empty: all).
    """
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # a NanorayError stays one
    indices = plan.unit_indices(cursor.unit)

    fingerprint = load_tokenizer(tokenizer).fingerprint

    # A long horizon is told in as many tasks at most: each costs a millisecond at every start.
    stride = -(-len(indices) // MAX_TASKS)

    def pack(batch: dict[str, np.ndarray]) -> Iterator[Block]:
        (first,) = batch["item"]
        for index in range(first, min(first + stride, indices.stop)):
            skip = cursor.row if index == cursor.unit else 0
            yield unit_block(plan, _cached_tokenizer(tokenizer, fingerprint), index, skip)

    pack.__name__ = "tokenize_and_pack"
    firsts = list(indices[::stride])
    units = ray.data.from_items(firsts, override_num_blocks=len(firsts))
    options: dict[str, Any] = {"label_selector": dict(label_selector)} if label_selector else {}
    packed = units.map_batches(
        pack,
        batch_size=1,
        batch_format="numpy",
        num_cpus=1,
        compute=ray.data.TaskPoolStrategy(size=concurrency),
        **options,
    )
    return packed.repartition(target_num_rows_per_block=plan.layout.rows_per_block, strict=True)


def worker_blocks(
    shard: Any, plan: Stream, cursor: Cursor, rank: int, world_size: int
) -> Iterator[Block]:
    """The blocks of this worker's shard (a `ray.data.DataIterator`), as numpy.

    Raises:
        NanorayError: what a packing task says of bad data.
    """
    size = plan.layout.rows_per_block
    batches = shard.iter_batches(
        batch_size=size,
        batch_format="numpy",
        prefetch_batches=2 * plan.layout.stripes,
        drop_last=True,
    )
    expected = (cursor.unit, cursor.row + rank * size)
    for block in _own_errors(batches):
        unit, row = int(block["unit"][0]), int(block["row"][0])
        # Within a unit it is known which row comes next: Ray must not have dealt otherwise.
        assert unit > expected[0] or (unit, row) == expected, (
            f"worker {rank} of {world_size} got row {row} of unit {unit}, not {expected}"
        )
        expected = (unit, row + world_size * size)
        # A block may end in a later unit than it begins in.
        if block["unit"][-1] != unit:
            tail = int(block["row"][-1]) + 1 + (world_size - 1) * size
            expected = (int(block["unit"][-1]), tail)
        yield block


def _own_errors(batches: Iterable[Block]) -> Iterator[Block]:
    """Raise what a packing task says of bad data as it said it, without Ray's wrapping."""
    try:
        yield from batches
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, NanorayError):
            raise NanorayError(str(error.cause).splitlines()[0]) from error
        raise
