"""The stream on Ray Data equals the one made in this process, for any number of consumers."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import ray

from nanoray.data.blocks import Cursor, local_blocks, step_rows
from nanoray.data.plan import StreamPlan, layout, plan_stream
from nanoray.data.shards import list_shards, row_groups, split_shards
from nanoray.data.stream import training_dataset, worker_blocks
from nanoray.data.units import list_units
from nanoray.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow
T = 32


@ray.remote(num_cpus=0)
def consume(shard: Any, plan: StreamPlan, cursor: Cursor, rank: int, size: int) -> list[int]:
    """Batch hashes of one worker's shares, read at an uneven pace."""
    hashes = []
    rng = random.Random(rank)
    for rows in step_rows(worker_blocks(shard, plan, cursor, rank, size), plan, rank, size):
        hashes.append(rows.hash())
        time.sleep(rng.random() * 0.002)
    return hashes


@pytest.mark.parametrize(("world_size", "max_tasks"), [(1, 4096), (2, 4096), (3, 7), (4, 4096)])
def test_the_ray_stream_equals_the_local_one(
    ray_session: None, corpus: str, tokenizer_dir: str, world_size: int, max_tasks: int
) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    train, _validation = split_shards(list_shards(corpus))
    with mock.patch("nanoray.data.plan.list_units", partial(list_units, target_documents=100)):
        plan = plan_stream(
            row_groups(train),
            tokenizer,
            layout=layout(16, T),
            num_steps=80,
            seed=1,
            on_bad="fail",
        )
    cursor = Cursor(1, 5) if world_size == 3 else Cursor()
    local = local_blocks(plan, tokenizer, cursor)
    expected = [rows.hash() for rows in step_rows(local, plan, 0, 1)]
    assert len(plan.unit_indices(cursor.unit)) > 20
    with mock.patch("nanoray.data.stream.MAX_TASKS", max_tasks):
        dataset = training_dataset(plan, cursor, tokenizer_dir, concurrency=2)
    shards = dataset.streaming_split(world_size, equal=True)
    parts: Iterator[list[int]] = ray.get(
        [consume.remote(s, plan, cursor, r, world_size) for r, s in enumerate(shards)],
        timeout=120,
    )
    assert [sum(step) % 2**64 for step in zip(*parts)] == expected
