"""Units of work of the stream: fixed handfuls of parquet row groups, in an endless order.

Unit ``i`` of the stream is at position ``i % num_units`` of epoch ``i // num_units``; each epoch
is its own permutation, so every row group is read exactly once an epoch. All of it is a pure
function of the corpus and the seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from nanoray.data.packing import PackedUnit, permutation, tokenize_and_pack
from nanoray.data.shards import OnBad, RowGroup, read_row_group

if TYPE_CHECKING:
    from nanoray.tokenizer import Tokenizer

# A unit of about 4 MB is a second of tokenizing: coarse enough that packing crops next to
# nothing, fine enough that many tasks share a small corpus and that memory stays small.
TARGET_DOCUMENTS = 4096
TARGET_BYTES = 4 << 20


@dataclass(frozen=True)
class Unit:
    """What one packing task reads."""

    index: int
    """Position among the units of the corpus."""
    epoch: int
    row_groups: tuple[tuple[str, int], ...]
    """(URI of the shard, index of the row group), in corpus order."""


def list_units(
    row_groups: Iterable[RowGroup],
    target_documents: int = TARGET_DOCUMENTS,
    target_bytes: int = TARGET_BYTES,
) -> list[Unit]:
    """Group consecutive row groups into the units of epoch 0, in corpus order.

    A unit has at most ``target_documents`` documents and ``target_bytes`` bytes, unless its only
    row group alone has more. Row groups without rows are left out.
    """
    units: list[Unit] = []
    members: list[tuple[str, int]] = []
    documents = num_bytes = 0
    for group in row_groups:
        if not group.num_rows:
            continue
        documents += group.num_rows
        num_bytes += group.num_bytes
        if members and (documents > target_documents or num_bytes > target_bytes):
            units.append(Unit(len(units), 0, tuple(members)))
            members = []
            documents, num_bytes = group.num_rows, group.num_bytes
        members.append((group.shard, group.row_group))
    if members:
        units.append(Unit(len(units), 0, tuple(members)))
    return units


@lru_cache(maxsize=8)
def epoch_order(num_units: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the units in one epoch: a permutation of range(num_units), int64, read-only."""
    order = permutation(num_units, (seed, epoch))
    order.flags.writeable = False
    return order


def unit_at(units: Sequence[Unit], index: int, seed: int) -> Unit:
    """Unit ``index`` >= 0 of the endless stream over ``units`` (those of `list_units`)."""
    epoch, position = divmod(index, len(units))
    return replace(units[epoch_order(len(units), seed, epoch)[position]], epoch=epoch)


def pack_unit(unit: Unit, tokenizer: Tokenizer, T: int, seed: int, on_bad: OnBad) -> PackedUnit:
    """Read, tokenize and pack one unit: rows [n, T+1], a function of these arguments alone.

    Raises:
        NanorayError: a document is unusable and ``on_bad`` is "fail"; names shard and row group.
    """
    texts: list[str] = []
    skipped = 0
    for shard, row_group in unit.row_groups:
        valid, bad = read_row_group(shard, row_group, on_bad)
        texts += valid
        skipped += sum(bad.values())
    packed = tokenize_and_pack(texts, tokenizer, T, (seed, unit.epoch))
    return replace(packed, documents_skipped=skipped)


def empty_unit_skips(unit: Unit, tokenizer: Tokenizer, T: int) -> int | None:
    """How many documents were unusable in a unit that packs to no row; None if it has rows.

    It has rows as soon as its tokens, with a BOS each document, are more than one row's inputs
    (`nanoray.data.packing`), so no more than that is tokenized.
    """
    num_tokens = skipped = 0
    for shard, row_group in unit.row_groups:
        valid, bad = read_row_group(shard, row_group, "skip")
        skipped += sum(bad.values())
        for text in valid:
            num_tokens += len(tokenizer.encode(text)) + 1
            if num_tokens > T:
                return None
    return skipped
