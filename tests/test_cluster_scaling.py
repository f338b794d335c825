"""docs/scaling.md: its tables are current, and its bytes are those that workers really send."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import run_gloo
from pretrain_runs import blocks_of, noisy, tiny_plan

from nanoray.data.blocks import Cursor, local_blocks, step_rows
from nanoray.optim import buckets
from nanoray.train.run_plan import RunPlan
from nanoray.train.stages import make_worker
from nanoray.train.worker import Hooks
from nanoray.train.world import World

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    """``cluster/scaling.py``, a script, as a module."""
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "cluster" / "scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_document_is_current(scaling: ModuleType) -> None:
    document = scaling.DOCUMENT.read_text()
    assert document == scaling.with_tables(document), "run python cluster/scaling.py --write"


def count_bytes(rank: int, size: int, plan: RunPlan) -> dict[str, int]:
    """Bytes that one real step hands to each kind of collective, on this rank."""
    torch.set_num_threads(1)
    sent = {"reduce_scatter": 0, "all_gather": 0, "all_reduce": 0, "other": 0}
    scatter, gather, reduce = buckets._reduce_scatter, buckets._all_gather, dist.all_reduce

    def counting_scatter(output: torch.Tensor, source: torch.Tensor, **rest: Any) -> Any:
        sent["reduce_scatter"] += source.nbytes
        return scatter(output, source, **rest)

    def counting_gather(output: torch.Tensor, source: torch.Tensor, **rest: Any) -> Any:
        sent["all_gather"] += output.nbytes
        return gather(output, source, **rest)

    def counting_reduce(tensor: torch.Tensor, *words: Any, **rest: Any) -> Any:
        # The loop's own sums (loss, target tokens, hashes) are 64 bits wide.
        kind = "other" if tensor.dtype in (torch.float64, torch.int64) else "all_reduce"
        sent[kind] += tensor.nbytes
        return reduce(tensor, *words, **rest)

    worker = make_worker(
        plan, World(rank, size, torch.device("cpu")), blocks_of(rank, size), Hooks()
    )
    try:
        noisy(worker.model)
        blocks = local_blocks(worker.stream, worker.tokenizer, Cursor(), rank, size)
        rows = next(step_rows(blocks, worker.stream, rank, size))
        num_targets = worker._num_targets(rows)
        buckets._reduce_scatter, buckets._all_gather = counting_scatter, counting_gather
        dist.all_reduce = counting_reduce
        worker.step(rows.ids, num_targets, 1.0, 0.9, 0.0, rows.trained)
    finally:
        buckets._reduce_scatter, buckets._all_gather = scatter, gather
        dist.all_reduce = reduce
        worker.close()
    return sent


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_step_sends_the_bytes_that_are_computed(
    size: int, scaling: ModuleType, home: Path, corpus: str, tokenizer_dir: str
) -> None:
    # Three layers: a number of matrices that 2 and 4 do not divide.
    plan = tiny_plan(corpus, tokenizer_dir, f"r{size}", depth=3)
    counted = run_gloo(count_bytes, size, plan)
    made = scaling.buckets_of(plan.model_config, size, torch.float32)
    scattered, gathered, reduced = scaling.step_payload_bytes(made)
    assert len({tuple(sent.items()) for sent in counted}) == 1, "all ranks alike"
    if size == 1:
        assert sum(counted[0].values()) - counted[0]["other"] == 0
        assert scaling.ring_bytes((scattered, gathered, reduced), 1) == 0
        return
    assert counted[0]["reduce_scatter"] == scattered > 0
    assert counted[0]["all_gather"] == gathered > 0
    assert counted[0]["all_reduce"] == reduced > 0
    assert counted[0]["other"] < 1000


def test_padding_grows_with_the_workers_and_a_single_one_sends_nothing(
    scaling: ModuleType,
) -> None:
    dial = scaling.Dial.at(4)
    padding = [scaling.Estimate.on_gpus(dial, size).padding for size in (1, 2, 8, 64)]
    assert padding[0] == 1
    assert padding == sorted(padding)
    assert scaling.Estimate.on_gpus(dial, 1).communication_s == 0
    assert scaling.Estimate.on_gpus(dial, 10_000).busy_workers <= dial.rows_per_step
