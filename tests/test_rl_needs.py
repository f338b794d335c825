"""Which GPUs reinforcement learning takes, where nobody says."""

from __future__ import annotations

from pathlib import Path

import pytest
from pretrain_runs import run_plan, tiny_plan
from rl_runs import rl_plan

from nanoray import fleet
from nanoray.errors import NanorayError
from nanoray.rl.needs import needs, with_gpus
from nanoray.rl.plan import RlPlan

GIB = 2**30


@pytest.fixture
def plan(home: Path, corpus: str, tokenizer_dir: str) -> RlPlan:
    base = tiny_plan(corpus, tokenizer_dir, "base", num_iterations=1, max_seq_len=128)
    run_plan(base)
    return rl_plan("base", "practice")


def have(gpus: float) -> dict[str, float]:
    return {"CPU": 8.0, "GPU": gpus, "memory": 32.0 * GIB, "object_store_memory": float(GIB)}


@pytest.mark.parametrize(
    ("given", "gpus", "learner", "actor"),
    [
        ({}, 0, 0, 0),
        ({}, 1, 0.5, 0.5),
        ({"rollout_actors": "1:4"}, 1, 0.5, 0.125),
        ({}, 2, 1, 1),
        ({"gpus_per_worker": 0.0}, 1, 0, 1),
        ({"rollout_gpus": 0.25}, 1, 1, 0.25),
    ],
)
def test_gpus(
    plan: RlPlan, given: dict[str, object], gpus: float, learner: float, actor: float
) -> None:
    config = with_gpus(plan.with_config(**given), have(gpus)).config
    assert (config["gpus_per_worker"], config["rollout_gpus"]) == (learner, actor)


def test_a_shortfall_names_what_mends_it(plan: RlPlan) -> None:
    alone = with_gpus(plan, have(1))
    for one in needs(alone):
        fleet.check_resources(one, have(1), "this machine")
    many = with_gpus(plan.with_config(rollout_actors="3"), have(2))
    flags = "--num-workers, --rollout-actors, --gpus-per-worker or --rollout-gpus"
    with pytest.raises(NanorayError, match=f"need 4 GPUs, but .* has 2; lower {flags}"):
        fleet.check_resources(needs(many)[0], have(2), "this machine")
