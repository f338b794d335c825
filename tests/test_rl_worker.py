"""The learner: what it scores, what it trains on, and that it goes on exactly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pretrain_runs import noisy, run_plan, tiny_plan
from rl_runs import LocalRollouts, rl_plan

from nanoray.checkpoint import Checkpoint
from nanoray.rl import flat
from nanoray.rl.groups import to_batch
from nanoray.rl.plan import RlPlan
from nanoray.rl.worker import RlWorker
from nanoray.train.worker import Hooks
from nanoray.train.world import World

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def base(home: Path, corpus: str, tokenizer_dir: str) -> str:
    plan = tiny_plan(corpus, tokenizer_dir, "base", num_iterations=2, max_seq_len=128)
    assert run_plan(plan)["status"] == "finished"
    return "base"


def make(plan: RlPlan, start_step: int = 0, hooks: Hooks | None = None) -> RlWorker:
    torch.set_num_threads(1)
    return RlWorker(plan, ALONE, hooks or Hooks(), start_step, LocalRollouts(plan))


@pytest.mark.parametrize("top_k", [0, 5])
def test_engine_and_learner_agree_on_what_was_sampled(base: str, top_k: int) -> None:
    plan = rl_plan(base, "scored", top_k=top_k, temperature=0.8)
    worker = make(plan)
    noisy(worker.model)
    worker._rollouts.begin(0, None)
    worker._rollouts.publish(0, flat.pack(worker.model.state_dict()))
    groups, _figures = worker._rollouts.take(0)
    batch = to_batch(groups, 0)
    ids, mask = torch.from_numpy(batch.ids), torch.from_numpy(batch.target_mask)
    with torch.no_grad():
        scored, entropy = worker.learner.score(worker.model, ids, mask)
    assert mask.sum() > 50
    assert np.abs(scored.numpy() - batch.behaviour).max() < 1e-4
    assert (entropy[mask.bool()] > 0).all()
    worker.close()


def test_a_run_to_its_end_and_what_it_leaves(base: str) -> None:
    plan = rl_plan(base, "whole", save_every=2)
    worker = make(plan)
    summary = worker.run()
    worker.close()
    assert (summary["stage"], summary["status"], summary["step"]) == ("rl", "finished", 3)
    assert {"pass@1 before", "pass@2 before", "pass@1 after"} <= summary["metrics"].keys()
    lines = Path(plan.run_dir, "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    wanted = {"reward", "entropy", "clip_fraction", "ratio_mean", "ess", "mismatch_kl", "staleness",
              "response_length", "solved_none", "wait_for_batch_s", "broadcast_s"}  # fmt: skip
    assert all(wanted <= record.keys() for record in steps)
    assert all(record["staleness_max"] == 0 for record in steps)
    assert all(abs(record["ratio_mean"] - 1) < 1e-3 for record in steps)
    trained = [group.number for step in worker._rollouts.steps for group in step]
    assert trained == list(range(12)), "each problem once, in order"


def test_stopped_and_resumed_it_is_bitwise_the_same(base: str) -> None:
    whole = rl_plan(base, "whole", num_iterations=4)
    worker = make(whole)
    worker.run()
    worker.close()
    cut = rl_plan(base, "cut", num_iterations=4)
    asked = iter(["", "told to"])
    worker = make(cut, hooks=Hooks(stop_reason=lambda: next(asked)))
    assert worker.run()["status"] == "stopped"
    worker.close()
    worker = make(cut, start_step=2)
    assert worker.run()["status"] == "finished"
    worker.close()
    weights = [
        Checkpoint(plan.checkpoints_dir, 4).file("meta.json")
        and Path(plan.checkpoints_dir, "step_000004", "model.safetensors").read_bytes()
        for plan in (whole, cut)
    ]
    assert weights[0] == weights[1]
