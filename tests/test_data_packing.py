"""Packing: rows of T+1, BOS first, every token used once or counted as cropped."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoray.data.packing import (
    MIN_TAIL,
    PackedUnit,
    pack_documents,
    permutation,
    tokenize_and_pack,
)
from nanoray.data.shards import RowGroup
from nanoray.data.units import Unit, epoch_order, list_units, pack_unit, unit_at
from nanoray.errors import NanorayError
from nanoray.tokenizer import ByteTokenizer, train_tokenizer

PRETRAIN = Path(__file__).parents[1].parent / "shared" / "data" / "pretrain"
BOS = 0


def documents_of(lengths: list[int]) -> list[np.ndarray]:
    """Documents in which every token has an id of its own (never BOS)."""
    ends = np.cumsum([1, *lengths])
    return [np.arange(a, b, dtype=np.uint32) for a, b in pairwise(ends)]


def pack(lengths: list[int], T: int, seed: int = 0) -> PackedUnit:
    return pack_documents(documents_of(lengths), T, BOS, seed, np.uint32)


def check(packed: PackedUnit, lengths: list[int], T: int) -> None:
    """All that a packing must hold, whatever the lengths."""
    rows = packed.rows
    assert rows.shape[1] == T + 1
    assert rows.dtype == np.uint32
    assert (rows[:, 0] == BOS).all()
    used = rows[rows != BOS]
    assert np.diff(np.sort(used)).all(), "a token twice"
    assert packed.documents == len(lengths)
    assert packed.tokens_in == sum(lengths)
    assert packed.tokens_cropped == sum(lengths) - len(used)
    assert packed.pieces == (rows == BOS).sum()
    here, then = rows[:, :-1], rows[:, 1:]
    within = (here != BOS) & (then != BOS)
    # Within a piece the text goes on without a gap and never into the next document.
    assert (then[within] == here[within] + 1).all()
    assert not np.isin(then[within], np.cumsum([1, *lengths])[:-1]).any()
    # What is left over after the last row is less than a row; cuts lose less than a tail each.
    min_tail = max(1, min(MIN_TAIL, T // 8))
    cuts = len(rows) + sum(length > T for length in lengths)
    assert packed.tokens_cropped <= T + cuts * (min_tail - 1)


LENGTHS = st.one_of(
    st.lists(st.integers(0, 40), max_size=60),
    st.lists(st.sampled_from([0, 1, 2, 7, 8, 9, 63, 64, 65, 128, 129, 1000]), max_size=60),
    st.lists(st.integers(50, 70), max_size=40),
    st.lists(st.integers(0, 3000), max_size=10),
)


@settings(max_examples=300, deadline=None)
@given(lengths=LENGTHS, T=st.sampled_from([1, 2, 8, 13, 64, 128, 513]), seed=st.integers(0, 2**63))
def test_any_documents_are_packed_exactly(lengths: list[int], T: int, seed: int) -> None:
    packed = pack(lengths, T, seed)
    check(packed, lengths, T)
    again = pack(lengths, T, seed)
    assert (again.rows == packed.rows).all()


@pytest.mark.parametrize(
    ("lengths", "T"),
    [
        ([], 16),
        ([0, 0, 0], 16),
        ([5], 16),  # too little for a row
        ([16], 16),
        ([17], 16),
        ([100_000], 16),  # one giant document
        ([1] * 1000, 16),
        ([9] * 100, 16),  # no two fit
        ([15] * 64, 16),  # every gap is BOS alone
        ([700] * 50, 512),
        (list(range(2000)), 512),
    ],
)
def test_extreme_documents(lengths: list[int], T: int) -> None:
    check(pack(lengths, T), lengths, T)


def test_exact_pairs_lose_nothing() -> None:
    # With BOS: 10+7, 9+8, 11+6, 17; no other grouping fills four rows of 17.
    packed = pack([9, 6, 8, 7, 10, 5, 16], 16)
    assert len(packed.rows) == 4
    assert packed.tokens_cropped == 0
    assert packed.pieces == 7


def test_seed_orders_rows_and_changes_nothing_else() -> None:
    lengths = np.random.default_rng(0).integers(1, 600, 300).tolist()
    one, two = pack(lengths, 128, 1), pack(lengths, 128, 2)
    assert (one.rows != two.rows).any()
    assert sorted(map(bytes, one.rows)) == sorted(map(bytes, two.rows))


def test_rows_are_not_sorted_by_document_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 2000).tolist()
    rows = pack(lengths, 128).rows
    pieces_per_row = (rows == BOS).sum(axis=1)
    half = len(rows) // 2
    assert abs(pieces_per_row[:half].mean() - pieces_per_row[half:].mean()) < 0.5


def test_bad_length_is_refused() -> None:
    with pytest.raises(ValueError, match="T >= 1"):
        pack([3], 0)


def test_permutation_never_changes() -> None:
    # Golden: the order of the training data must survive upgrades of numpy.
    assert permutation(8, 42).tolist() == [4, 1, 3, 6, 0, 7, 2, 5]
    assert permutation(5, (7, 3)).tolist() == [2, 4, 3, 1, 0]
    assert sorted(permutation(1000, 1).tolist()) == list(range(1000))


@pytest.mark.skipif(not PRETRAIN.is_dir(), reason=f"no {PRETRAIN}")
@pytest.mark.parametrize(("T", "limit"), [(512, 0.02), (2048, 0.01)])
def test_english_is_hardly_cropped(T: int, limit: float) -> None:
    texts = pq.read_table(PRETRAIN / "shard_00000.parquet").column("text").to_pylist()
    tokenizer = train_tokenizer(texts, 4096, max_chars=500_000)
    packed = tokenize_and_pack(texts[:1024], tokenizer, T, 0)
    assert packed.rows.dtype == np.uint16
    assert packed.tokens_cropped < limit * packed.tokens_in
    assert (packed.rows[:, 0] == tokenizer.bos_id).all()


# --- units -----------------------------------------------------------------------------------


def groups_of(rows: list[int], num_bytes: int = 1 << 20) -> list[RowGroup]:
    return [RowGroup(f"s{i // 3}", i % 3, n, num_bytes) for i, n in enumerate(rows)]


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.integers(0, 5000), max_size=50),
    target_documents=st.integers(1, 8000),
    target_bytes=st.integers(1, 8 << 20),
)
def test_units_hold_each_row_group_once(
    rows: list[int], target_documents: int, target_bytes: int
) -> None:
    groups = groups_of(rows)
    units = list_units(groups, target_documents, target_bytes)
    assert [unit.index for unit in units] == list(range(len(units)))
    members = [member for unit in units for member in unit.row_groups]
    assert members == [(g.shard, g.row_group) for g in groups if g.num_rows]
    documents = {(g.shard, g.row_group): g.num_rows for g in groups}
    for unit in units:
        fits = sum(documents[member] for member in unit.row_groups) <= target_documents
        assert len(unit.row_groups) == 1 or fits
        assert len(unit.row_groups) == 1 or len(unit.row_groups) << 20 <= target_bytes


def test_stream_of_units_visits_every_unit_once_an_epoch() -> None:
    units = list_units(groups_of([1000] * 30), target_documents=1000)
    stream = [unit_at(units, index, seed=5) for index in range(90)]
    for epoch in range(3):
        part = stream[30 * epoch : 30 * epoch + 30]
        assert {unit.epoch for unit in part} == {epoch}
        assert sorted(unit.index for unit in part) == list(range(30))
    orders = [tuple(u.index for u in stream[i : i + 30]) for i in (0, 30, 60)]
    assert len(set(orders)) == 3
    assert stream == [unit_at(units, index, seed=5) for index in range(90)]
    assert stream != [unit_at(units, index, seed=6) for index in range(90)]
    assert not epoch_order(30, 5, 0).flags.writeable


def write_shard(path: Path, texts: list[str | None]) -> str:
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=50)
    return str(path)


def test_pack_unit_is_a_function_of_content_seed_and_epoch(tmp_path: Path) -> None:
    texts = [f"document {i} " * (i % 17 + 1) for i in range(100)]
    one = write_shard(tmp_path / "shard_00000.parquet", texts)
    other = write_shard(tmp_path / "shard_00001.parquet", texts)
    tokenizer = ByteTokenizer()

    def rows(shard: str, index: int = 0, epoch: int = 0, seed: int = 3) -> np.ndarray:
        unit = Unit(index, epoch, ((shard, 0), (shard, 1)))
        return pack_unit(unit, tokenizer, 64, seed, "fail").rows

    assert (rows(one) == rows(other, index=9)).all()
    assert (rows(one) != rows(one, epoch=1)).any()
    assert (rows(one) != rows(one, seed=4)).any()


def test_pack_unit_counts_or_refuses_bad_documents(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "shard_00000.parquet", ["text " * 50, None, "", "more " * 50])
    unit = Unit(0, 0, ((shard, 0),))
    packed = pack_unit(unit, ByteTokenizer(), 64, 0, "skip")
    assert (packed.documents, packed.documents_skipped) == (2, 2)
    with pytest.raises(NanorayError, match=r"shard_00000\.parquet.*row group 0"):
        pack_unit(unit, ByteTokenizer(), 64, 0, "fail")


def test_packing_tasks_import_no_torch_and_no_ray() -> None:
    code = (
        "import sys, nanoray.data.units, nanoray.data.packing, nanoray.tokenizer;"
        "print([m for m in ('torch', 'ray', 'pydantic', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
