"""The plan of a stream over hostile corpora: it reaches its horizon, and counts what it skips."""

from __future__ import annotations

import random
import string
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_texts

from nanoray.data import units
from nanoray.data.blocks import Cursor, local_blocks, step_rows, unit_block
from nanoray.data.plan import StreamPlan, layout, plan_stream
from nanoray.data.shards import OnBad, row_groups
from nanoray.errors import NanorayError
from nanoray.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

T = 32
Texts = list[str | None]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: str) -> Tokenizer:
    return load_tokenizer(tokenizer_dir)


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of one row group of 50 documents."""
    monkeypatch.setattr(units.list_units, "__defaults__", (50, units.TARGET_BYTES))


def write(folder: Path, shards: list[Texts], extra: bool = False) -> list[str]:
    uris = []
    for i, texts in enumerate(shards):
        columns = {"text": pa.array(texts, pa.string())}
        if extra:
            rng = random.Random(i)
            columns["url"] = pa.array([rng.randbytes(3000).hex() for _ in texts])
        uris.append(str(folder / f"shard_{i:05d}.parquet"))
        pq.write_table(pa.table(columns), uris[-1], row_group_size=50, compression="none")
    return uris


def make_plan(
    uris: list[str], tokenizer: Tokenizer, num_steps: int, on_bad: OnBad = "skip"
) -> StreamPlan:
    return plan_stream(
        row_groups(uris, on_bad),
        tokenizer,
        layout=layout(16, T),
        num_steps=num_steps,
        seed=3,
        on_bad=on_bad,
    )


def noise(num_documents: int) -> Texts:
    """Text of about one byte a token."""
    rng = random.Random(0)
    letters = string.ascii_letters + string.digits
    return ["".join(rng.choices(letters, k=600)) for _ in range(num_documents)]


def stories(num_documents: int) -> Texts:
    return list(make_texts(num_documents))


NULLS: Texts = [None] * 200
HOSTILE: dict[str, tuple[list[Texts], bool]] = {
    "tiny tokens first": ([noise(200), stories(400), stories(400)], False),
    "tiny tokens last": ([stories(400), stories(400), noise(200)], False),
    "blank first": ([[" " * 900] * 200, stories(400)], False),
    "mostly blank": ([[" " * 900] * 1000, stories(100)], False),
    "nulls first": ([NULLS, stories(400), NULLS], False),
    "another column": ([stories(400), stories(400)], True),
}


@pytest.mark.parametrize("num_steps", [1, 300, 5000])
@pytest.mark.parametrize("name", HOSTILE)
def test_the_plan_of_a_hostile_corpus_reaches_its_horizon(
    tmp_path: Path, tokenizer: Tokenizer, name: str, num_steps: int
) -> None:
    shards, extra = HOSTILE[name]
    plan = make_plan(write(tmp_path, shards, extra), tokenizer, num_steps)
    packed = [unit_rows(plan, tokenizer, unit) for unit in plan.units]
    rows = sum(
        packed[units.unit_at(plan.units, index, plan.seed).index] for index in range(plan.num_units)
    )
    # The splitter may cut the tail, so a slab more than is trained on must be there.
    needed = (num_steps + 2 * plan.layout.slab_steps) * plan.layout.rows_per_step
    assert needed <= rows
    assert rows <= 20 * needed + 100 * max(packed), "nor endless"


def unit_rows(plan: StreamPlan, tokenizer: Tokenizer, unit: units.Unit) -> int:
    return len(units.pack_unit(unit, tokenizer, T, plan.seed, plan.on_bad).rows)


def test_bytes_are_those_of_the_text_alone(tmp_path: Path) -> None:
    for name in ("alone", "beside"):
        (tmp_path / name).mkdir()
    alone = row_groups(write(tmp_path / "alone", [stories(100)]))
    beside = row_groups(write(tmp_path / "beside", [stories(100)], extra=True))
    assert [g.num_bytes for g in alone] == [g.num_bytes for g in beside]


def test_too_little_text_for_a_row_is_said_when_planning(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    with pytest.raises(NanorayError, match="too little text for one row of 32 tokens"):
        make_plan(write(tmp_path, [["tiny"], ["text"]]), tokenizer, 10)
    with pytest.raises(NanorayError, match="too little text for one row of 32 tokens"):
        make_plan(write(tmp_path, [NULLS, NULLS]), tokenizer, 10)


@pytest.mark.parametrize("num_letters", [24, 30, 31, 32, 33, 63, 64, 65])
def test_about_one_row_is_counted_not_estimated(tmp_path: Path, num_letters: int) -> None:
    """An estimate said "one row" of a unit without any: a stream of 300,000 empty units."""
    uris = write(tmp_path, [["x" * num_letters]])
    num_rows = num_letters // T  # of BOS and T tokens
    if not num_rows:
        with pytest.raises(NanorayError, match="too little text for one row of 32 tokens"):
            make_plan(uris, ByteTokenizer(), 1000)
        return
    plan = make_plan(uris, ByteTokenizer(), 1000)
    needed = (1000 + 2 * plan.layout.slab_steps) * plan.layout.rows_per_step
    assert needed <= plan.num_units * num_rows <= 4.1 * needed


def test_what_a_unit_without_rows_skipped_is_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    bad: Texts = [None] * 99 + ["tiny"]
    mixed = [text if i % 7 else None for i, text in enumerate(stories(200))]
    plan = make_plan(write(tmp_path, [bad, mixed, bad, bad]), tokenizer, 60)
    indices = range(2 * len(plan.units))  # two epochs
    packed = [
        units.pack_unit(
            units.unit_at(plan.units, index, plan.seed), tokenizer, T, plan.seed, "skip"
        )
        for index in indices
    ]
    assert sum(len(unit.rows) == 0 for unit in packed) == 12
    last = max(index for index in indices if len(packed[index].rows))
    expected = sum(unit.documents_skipped for unit in packed[: last + 1])
    blocks = [unit_block(plan, tokenizer, index, 0) for index in indices]
    assert sum(int(block["documents_skipped"].sum()) for block in blocks) == expected > 400
    # A restart within a unit does not count again; one at its first row does, as it was cut.
    assert not unit_block(plan, tokenizer, last, 1)["documents_skipped"].any()
    # What workers report of a run is the same for any number of them.
    totals = []
    for world_size in (1, 3):
        ranks = (
            step_rows(local_blocks(plan, tokenizer, Cursor(), r, world_size), plan, r, world_size)
            for r in range(world_size)
        )
        totals.append(sum(rows.counts["documents_skipped"] for rank in ranks for rows in rank))
    assert totals[0] == totals[1] > 0


def test_failing_looks_at_no_other_unit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    plan = make_plan(write(tmp_path, [stories(200)]), tokenizer, 10, on_bad="fail")
    assert plan._skipped_before(tokenizer, 3) == 0
