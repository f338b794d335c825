"""Nodes that die while a model is trained: nothing is lost, nothing comes twice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cluster_nodes import Disturbed, Nodes, open_nodes, run_on
from pretrain_runs import hashes, losses, run_plan, tiny_plan, weights
from sft_runs import make_base, sft_plan, write_conversations

from nanoray.checkpoint import list_steps
from nanoray.errors import NanorayError
from nanoray.train.run_plan import RunPlan

pytestmark = pytest.mark.timeout(600)
STEPS, SAVE_EVERY, KILL_AT = 120, 10, 25
LONG = 1200  # what is packed ahead does not last to the end

MakePlan = Callable[..., RunPlan]
Planner = Callable[[str], MakePlan]


@pytest.fixture
def nodes(home: Path) -> Iterator[Nodes]:
    with open_nodes() as made:
        made.add("data", 2)
        yield made


@pytest.fixture
def planner(home: Path, corpus: str, tokenizer_dir: str, tmp_path: Path) -> Planner:
    """Makes plans of a stage, by the run's name and flags."""

    def of(stage: str) -> MakePlan:
        if stage == "pretrain":
            return partial(tiny_plan, corpus, tokenizer_dir, num_iterations=STEPS)
        base = make_base(corpus, tokenizer_dir, "base")
        chats = write_conversations(tmp_path / "chats.jsonl", 300, (1, 12))
        return partial(sft_plan, base, chats, validation=chats, num_iterations=STEPS)

    return of


@pytest.mark.parametrize(
    ("stage", "workers"),
    [
        pytest.param("pretrain", "1:2", marks=pytest.mark.slow),
        pytest.param("pretrain", "2", marks=pytest.mark.soak),
        pytest.param("sft", "1:2", marks=pytest.mark.soak),
        pytest.param("sft", "2", marks=pytest.mark.soak),
    ],
)
def test_a_trainer_node_dies(nodes: Nodes, planner: Planner, stage: str, workers: str) -> None:
    """Elastic training goes on with what is left; a fixed number waits for the node's return."""
    make_plan, fixed = planner(stage), workers == "2"
    calm = make_plan("calm", num_workers="2" if fixed else "1")
    wanted = run_plan(calm, 2 if fixed else 1)
    nodes.add("trainer", 1)
    doomed = nodes.add("trainer", 1)
    plan = make_plan("bereft", num_workers=workers, save_every=SAVE_EVERY)

    def lose_a_node() -> None:
        nodes.kill(doomed)
        if fixed:
            nodes.add("trainer", 1)

    watch = Disturbed(plan, KILL_AT, lose_a_node)
    summary = run_on(plan, watch)
    assert summary["status"] == "finished"
    assert watch.group_sizes == ([2, 2] if fixed else [2, 1])
    watch.assert_one_start_again()
    assert hashes(plan) == hashes(calm)
    if fixed:
        assert losses(plan) == losses(calm)
        assert weights(plan, STEPS) == weights(calm, STEPS)
    assert summary["val_bpb"] == pytest.approx(wanted["val_bpb"], rel=0 if fixed else 0.005)


@pytest.mark.soak
def test_a_data_node_dies(nodes: Nodes, planner: Planner) -> None:
    """What it had packed is packed again by the one that is left; the learner may not notice."""
    make_plan = planner("pretrain")
    calm = make_plan("calm")
    run_plan(calm)
    nodes.add("trainer", 1)
    doomed = nodes.add("data", 2)
    plan = make_plan("bereft", save_every=SAVE_EVERY)
    watch = Disturbed(plan, KILL_AT, lambda: nodes.kill(doomed))
    assert run_on(plan, watch)["status"] == "finished"
    watch.assert_one_start_again()
    assert hashes(plan) == hashes(calm)
    assert losses(plan) == losses(calm)
    assert weights(plan, STEPS) == weights(calm, STEPS)


@pytest.mark.soak
@pytest.mark.parametrize(("role", "deadline_s"), [("trainer", 600), ("data", 3600)])
def test_the_last_node_of_a_role_is_waited_for(
    home: Path, planner: Planner, role: Any, deadline_s: int
) -> None:
    """Training does not move to nodes of other roles, says what it waits for, and goes on."""
    make_plan = partial(planner("pretrain"), num_iterations=LONG)
    calm = make_plan("calm")
    run_plan(calm)
    with open_nodes() as nodes:
        last = {name: nodes.add(name, 2) for name in ("trainer", "data")}[role]
        nodes.add("rollout", 4)
        plan = make_plan("bereft", num_workers="1:2", save_every=SAVE_EVERY)

        class Watch(Disturbed):
            def __call__(self, record: dict[str, Any]) -> None:
                super().__call__(record)
                if "is left; waiting" in record.get("warning", ""):
                    nodes.add(role, 2)

        watch = Watch(plan, KILL_AT, lambda: nodes.kill(last))
        assert run_on(plan, watch)["status"] == "finished"
    told = [text for text in watch.warnings if f"{role} node" in text]
    assert told == [
        f"no {role} node is left; waiting {deadline_s} s at most for one",
        f"there is a {role} node again",
    ]
    watch.assert_one_start_again()
    assert hashes(plan) == hashes(calm)


@pytest.mark.soak
def test_a_stop_is_heard_where_there_are_no_workers(home: Path, planner: Planner) -> None:
    """Not only when the node that a run waits for has come, or after ten minutes."""
    with open_nodes() as nodes:
        last = nodes.add("trainer", 1)
        nodes.add("data", 1)
        plan = planner("pretrain")("stopped", num_iterations=LONG, save_every=SAVE_EVERY)
        told: list[float] = []

        class Watch(Disturbed):
            def __call__(self, record: dict[str, Any]) -> None:
                super().__call__(record)
                if "is left; waiting" in record.get("warning", ""):
                    told.append(time.monotonic())
                    os.kill(os.getpid(), signal.SIGTERM)

        watch = Watch(plan, KILL_AT, lambda: nodes.kill(last))
        with pytest.raises(NanorayError, match="told to stop while it had no workers"):
            run_on(plan, watch)
        assert time.monotonic() - told[0] < 90
    assert list_steps(plan.checkpoints_dir)[-1] >= watch.saved_before
    assert run_plan(plan)["status"] == "finished"
