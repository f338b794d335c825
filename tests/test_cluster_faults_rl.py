"""Nodes that are lost while a model practises: each problem counts once, and no bit differs."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_nodes import Disturbed, Nodes, open_nodes, run_on
from pretrain_runs import hashes, weights
from rl_runs import make_guesser, rl_plan, run_alone

from nanoray.checkpoint import Checkpoint
from nanoray.rl.ray_glue import fit

pytestmark = pytest.mark.timeout(600)
STEPS, SAVE_EVERY, LOSE_AT = 12, 3, 4


@pytest.fixture
def nodes(home: Path) -> Iterator[Nodes]:
    with open_nodes() as made:
        yield made


class Runs:
    """A calm run without Ray, and one on the cluster that must be like it."""

    def __init__(self, guesser: dict[str, Any]) -> None:
        flags = guesser | {"num_iterations": STEPS, "questions_per_call": 1}
        self._calm = rl_plan(**flags, run="calm")
        assert run_alone(self._calm)["status"] == "finished"
        self.plan = rl_plan(
            **flags, run="bereft", rollout_actors="2", rollout_gpus=0, save_every=SAVE_EVERY
        )

    def fit(self, disturb: Callable[[], None], kind: type[Disturbed] = Disturbed) -> Disturbed:
        watch = kind(self.plan, LOSE_AT, disturb)
        summary = run_on(self.plan, watch, fit)
        assert (summary["status"], summary["step"]) == ("finished", STEPS)
        return watch

    def status(self) -> dict[str, Any]:
        file = Path(self.plan.run_dir, "rl_status.json")
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"actors": []}
        return found

    def actors_on(self, node: Any) -> list[dict[str, Any]]:
        return [a for a in self.status()["actors"] if a.get("node") == node.node_id[:8]]

    def hold_a_bundle(self, node: Any) -> int:
        """Stop the node's actor and wait until it has been given work: the learner will wait for
        this, and the run does not end meanwhile. Returns the actor's process number.
        """
        (actor,) = wait_for(lambda: self.actors_on(node))
        pid: int = actor["pid"]
        os.kill(pid, signal.SIGSTOP)
        stopped = time.time()
        wait_for(
            lambda: self.status()["time"] > stopped and self.actors_on(node)[0]["state"] == "busy"
        )
        return pid

    def assert_like_calm(self) -> None:
        """Each problem was trained once, with the same answers, to the same weights."""
        assert hashes(self.plan) == hashes(self._calm)
        assert weights(self.plan, STEPS) == weights(self._calm, STEPS)
        with Checkpoint(self.plan.checkpoints_dir, STEPS) as checkpoint:
            ledger = checkpoint.meta["ledger"]
        assert (ledger["next_number"], ledger["open"]) == (4 * STEPS, [])
        assert self.status()["counts"]["trained"] == 4 * STEPS


def wait_for(what: Callable[[], Any], deadline_s: float = 120) -> Any:
    """The first true answer."""
    end = time.monotonic() + deadline_s
    while not (found := what()):
        assert time.monotonic() < end, f"not within {deadline_s:.0f} s"
        time.sleep(0.1)
    return found


@pytest.fixture
def runs(home: Path, corpus: str, tokenizer_dir: str, tmp_path: Path) -> Runs:
    return Runs(make_guesser(corpus, tokenizer_dir, tmp_path))


@pytest.mark.parametrize(
    "end",
    [
        pytest.param("killed", marks=pytest.mark.soak),
        pytest.param("drained", marks=pytest.mark.slow),
        pytest.param("drained too late", marks=pytest.mark.soak),
    ],
)
def test_a_rollout_node_goes(nodes: Nodes, runs: Runs, end: str) -> None:
    """After a notice its actor is replaced before it goes, and may finish what it has; what it
    cannot finish is sampled again elsewhere.
    """
    nodes.add("trainer", 1)
    nodes.add("rollout", 1)
    doomed = nodes.add("rollout", 1)

    def lose_a_node() -> None:
        held = runs.hold_a_bundle(doomed)
        if end != "killed":
            nodes.drain(doomed)
            new = nodes.add("rollout", 1)  # as a cloud would
            wait_for(lambda: any(actor["state"] != "starting" for actor in runs.actors_on(new)))
            (leaving,) = runs.actors_on(doomed)
            assert (leaving["pid"], leaving["leaving"]) == (held, True)
        if end == "drained":
            os.kill(held, signal.SIGCONT)
            wait_for(lambda: not runs.actors_on(doomed))
        nodes.kill(doomed)

    watch = runs.fit(lose_a_node)
    assert watch.group_sizes == [1], "the learner is not disturbed"
    assert watch.steps == list(range(1, STEPS + 1))
    counts = runs.status()["counts"]
    lost = 0 if end == "drained" else 1
    assert counts["redispatched"] == lost
    # The one in its stead may be sent to the dead node, too, before Ray has missed its heartbeats.
    assert counts["actors_lost"] in (lost, 2 * lost)
    assert any("is to go" in event for event in watch.events) == (end != "killed")
    runs.assert_like_calm()


@pytest.mark.soak
def test_the_learners_node_dies(nodes: Nodes, runs: Runs) -> None:
    """The learner goes on from its checkpoint, on another node, with the ledger of that moment;
    what was sampled since is sampled again.
    """
    doomed = nodes.add("trainer", 1)
    nodes.add("rollout", 1)
    rollout = nodes.add("rollout", 1)

    def lose_the_learner() -> None:
        held = runs.hold_a_bundle(rollout)
        nodes.kill(doomed)
        os.kill(held, signal.SIGCONT)
        nodes.add("trainer", 1)

    watch = runs.fit(lose_the_learner)
    assert watch.group_sizes == [1, 1]
    watch.assert_one_start_again()
    assert watch.steps.count(1) == 1, "not from the beginning"
    assert runs.status()["counts"]["actors_lost"] == 0
    assert any(event.startswith("going on at step") for event in watch.events)
    runs.assert_like_calm()


@pytest.mark.soak
def test_the_last_rollout_node_is_waited_for(nodes: Nodes, runs: Runs) -> None:
    """Spot nodes may all be gone for a while: the learner says so, and waits."""
    nodes.add("trainer", 1)
    last = nodes.add("rollout", 2)

    class Watch(Disturbed):
        def __call__(self, record: dict[str, Any]) -> None:
            super().__call__(record)
            if "is left; waiting" in record.get("warning", ""):
                nodes.add("rollout", 2)

    watch = runs.fit(lambda: nodes.kill(last), Watch)
    told = [text for text in watch.warnings if "rollout node" in text]
    assert told == [
        "no rollout node is left; waiting 3600 s at most for one",
        "there is a rollout node again",
    ]
    assert watch.group_sizes == [1], "the learner is not disturbed"
    runs.assert_like_calm()
