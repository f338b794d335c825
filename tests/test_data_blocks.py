"""The stream as a pure function: layout, plan, blocks, and the rows of a step."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoray.data.blocks import Cursor, StepRows, local_blocks, started, step_rows
from nanoray.data.plan import Layout, StreamPlan, layout, plan_stream, validation_rows
from nanoray.data.shards import list_shards, row_groups, split_shards
from nanoray.data.units import list_units
from nanoray.errors import NanorayError
from nanoray.tokenizer import Tokenizer, load_tokenizer

T = 32


@pytest.fixture(scope="module", autouse=True)
def _small_units() -> Iterator[None]:
    """Units of two row groups, so that the little corpus has a dozen of them."""
    with mock.patch("nanoray.data.plan.list_units", partial(list_units, target_documents=100)):
        yield


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: str) -> Tokenizer:
    return load_tokenizer(tokenizer_dir)


def make_plan(corpus: str, tokenizer: Tokenizer, num_steps: int = 50, seed: int = 1) -> StreamPlan:
    train, _validation = split_shards(list_shards(corpus))
    return plan_stream(
        row_groups(train),
        tokenizer,
        layout=layout(16, T),
        num_steps=num_steps,
        seed=seed,
        on_bad="fail",
    )


def rows_of(plan: StreamPlan, tokenizer: Tokenizer, world_size: int) -> list[list[StepRows]]:
    """[rank][step] of a whole run."""
    return [
        list(
            step_rows(
                local_blocks(plan, tokenizer, Cursor(), rank, world_size), plan, rank, world_size
            )
        )
        for rank in range(world_size)
    ]


def step_hashes(ranks: list[list[StepRows]]) -> list[int]:
    return [sum(rows.hash() for rows in shares) % 2**64 for shares in zip(*ranks)]


@given(st.integers(1, 4096), st.sampled_from([8, 512, 2048, 65536]))
def test_layout_covers_a_step_exactly(rows_per_step: int, sequence_len: int) -> None:
    made = layout(rows_per_step, sequence_len)
    assert made.rows_per_step == rows_per_step
    assert 1 <= made.stripe_rows <= 8
    assert 1 <= made.slab_steps <= 32
    if made.stripe_rows > 1:
        assert made.stripes >= 8, "eight workers can share a step"


def test_rows_do_not_depend_on_the_number_of_workers(corpus: str, tokenizer: Tokenizer) -> None:
    plan = make_plan(corpus, tokenizer)
    alone = rows_of(plan, tokenizer, 1)
    assert len(alone[0]) == plan.num_steps
    for world_size in (2, 3, 4, 11):
        ranks = rows_of(plan, tokenizer, world_size)
        assert step_hashes(ranks) == step_hashes(alone)
        step = np.empty((plan.layout.rows_per_step, T + 1), np.uint16)
        for share in (ranks[rank][7] for rank in range(world_size)):
            step[share.positions] = share.ids
        np.testing.assert_array_equal(step, alone[0][7].ids[np.argsort(alone[0][7].positions)])
    # More workers than stripes: some train on nothing.
    assert any(len(rows.ids) == 0 for shares in rows_of(plan, tokenizer, 11) for rows in shares)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_restart_goes_on_with_the_same_rows(
    corpus: str, tokenizer: Tokenizer, world_size: int
) -> None:
    plan = make_plan(corpus, tokenizer, num_steps=70)
    whole = step_hashes(rows_of(plan, tokenizer, 1))
    alone = rows_of(plan, tokenizer, 1)[0]
    for done in (1, 31, 32, 33, 64):  # slabs have 32 steps
        last = alone[done - 1]
        assert last.slab is not None
        ranks = [
            list(
                step_rows(
                    local_blocks(plan, tokenizer, last.slab, rank, world_size),
                    plan,
                    rank,
                    world_size,
                    first_step=done,
                    slab_first_step=last.slab_first_step,
                )
            )
            for rank in range(world_size)
        ]
        assert step_hashes(ranks) == whole[done:]


def test_no_document_twice_in_an_epoch(corpus: str, tokenizer: Tokenizer) -> None:
    plan = make_plan(corpus, tokenizer, num_steps=10_000)
    units = [plan.pack(tokenizer, index) for index in range(len(plan.units))]
    assert sum(unit.documents for unit in units) == 1200
    text = "\n".join(tokenizer.decode(row.tolist()) for unit in units for row in unit.rows)
    # Every document begins with its number within its shard: three shards, so at most thrice.
    begun = Counter(part.split(".")[0] for part in text.split("<|bos|>Story ")[1:])
    assert max(begun.values()) <= 3
    assert sum(begun.values()) >= 1150, "nearly every document's beginning is there"


def test_epochs_differ_in_order_but_not_in_documents(corpus: str, tokenizer: Tokenizer) -> None:
    plan = make_plan(corpus, tokenizer, num_steps=10_000)
    n = len(plan.units)
    assert plan.num_units > n > 10
    first = {plan.describe_unit(i) for i in range(n)}
    second = {plan.describe_unit(i) for i in range(n, 2 * n)}
    assert first == second
    assert [plan.epoch(i, 0) for i in (0, n - 1, n)] == [0, 0, 1]


def test_the_seed_changes_the_order(corpus: str, tokenizer: Tokenizer) -> None:
    one = step_hashes(rows_of(make_plan(corpus, tokenizer, seed=1), tokenizer, 1))
    again = step_hashes(rows_of(make_plan(corpus, tokenizer, seed=1), tokenizer, 1))
    two = step_hashes(rows_of(make_plan(corpus, tokenizer, seed=2), tokenizer, 1))
    assert one == again != two


def test_the_horizon_does_not_change_the_rows(corpus: str, tokenizer: Tokenizer) -> None:
    short = step_hashes(rows_of(make_plan(corpus, tokenizer, num_steps=20), tokenizer, 1))
    long = step_hashes(rows_of(make_plan(corpus, tokenizer, num_steps=60), tokenizer, 1))
    assert long[:20] == short


@settings(max_examples=10, deadline=None)
@given(num_steps=st.integers(1, 400))
def test_the_plan_reaches_the_horizon(corpus: str, tokenizer: Tokenizer, num_steps: int) -> None:
    plan = make_plan(corpus, tokenizer, num_steps)
    rows = sum(len(plan.pack(tokenizer, i % len(plan.units)).rows) for i in range(plan.num_units))
    slabs = -(-num_steps // plan.layout.slab_steps)
    assert rows >= slabs * plan.layout.slab_steps * plan.layout.rows_per_step


def test_a_stream_that_ends_early_says_so(corpus: str, tokenizer: Tokenizer) -> None:
    plan = make_plan(corpus, tokenizer, num_steps=64)
    blocks = iter(list(local_blocks(plan, tokenizer, Cursor()))[: plan.layout.stripes])
    with pytest.raises(NanorayError, match="ended at step 32 of 64"):
        list(step_rows(blocks, plan, 0, 1))


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_row_tells_its_unit_and_number(
    corpus: str, tokenizer: Tokenizer, world_size: int
) -> None:
    plan = make_plan(corpus, tokenizer, num_steps=5)
    for shares in rows_of(plan, tokenizer, world_size):
        for share in shares:
            for ids, unit, row in zip(share.ids, share.units, share.rows, strict=True):
                packed = plan.pack(tokenizer, int(unit)).rows
                np.testing.assert_array_equal(ids, packed[row])


def test_counts_are_those_of_the_units_that_begin(corpus: str, tokenizer: Tokenizer) -> None:
    plan = make_plan(corpus, tokenizer)
    units = [plan.pack(tokenizer, index) for index in range(2)]
    rows_of_units = sum(len(unit.rows) for unit in units)
    blocks = local_blocks(plan, tokenizer, Cursor())
    seen = rows = 0
    while rows < rows_of_units:
        block = next(blocks)
        seen += int(block["documents"][: rows_of_units - rows].sum())
        rows += len(block["ids"])
    assert seen == sum(unit.documents for unit in units)


def test_validation_rows_are_a_fixed_budget(corpus: str, tokenizer: Tokenizer) -> None:
    _train, validation = split_shards(list_shards(corpus))
    groups = row_groups(validation)

    def rows(num_tokens: int) -> np.ndarray:
        return validation_rows(
            groups, tokenizer, sequence_len=T, num_tokens=num_tokens, on_bad="fail"
        )

    assert rows(1000).shape == (32, T + 1)
    np.testing.assert_array_equal(rows(1000), rows(100_000_000)[:32])
    with pytest.raises(NanorayError, match="validation shard holds too little text"):
        validation_rows(groups, tokenizer, sequence_len=50_000, num_tokens=10, on_bad="fail")


def test_block_and_slab_sizes() -> None:
    assert layout(32, 512) == Layout(512, 4, 8, 32)
    assert layout(256, 2048) == Layout(2048, 8, 32, 4)
    assert layout(1, 8) == Layout(8, 1, 1, 32)


def test_started_fetches_the_first_block_at_once_and_hands_errors_on() -> None:
    fetching = threading.Event()

    def blocks() -> Iterator[dict[str, np.ndarray]]:
        fetching.set()
        yield {"ids": np.zeros(1)}
        yield {"ids": np.ones(1)}
        raise NanorayError("bad shard")

    got = started(blocks())
    assert fetching.wait(10)  # before anybody asked
    assert [int(next(got)["ids"][0]) for _ in range(2)] == [0, 1]
    with pytest.raises(NanorayError, match="bad shard"):
        next(got)
    assert list(started(iter([]))) == []
