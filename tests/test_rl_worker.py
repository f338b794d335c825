"""The learner: what it scores, what it trains on, and that it goes on exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gloo import run_gloo
from pretrain_runs import GradientRecorder, noisy, run_plan, tiny_plan, weights
from rl_runs import LocalRollouts, make_guesser, rl_plan, run_alone

from nanoray.checkpoint import Checkpoint, list_steps
from nanoray.errors import NanorayError
from nanoray.rl import flat
from nanoray.rl.groups import Group, Sample, to_batch
from nanoray.rl.plan import RlPlan
from nanoray.rl.terms import Taken
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
    batch = to_batch(worker._rollouts.take(0).groups, 0)
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
    assert {"before/pass@1", "before/pass@2", "after/pass@1"} <= summary["metrics"].keys()
    lines = Path(plan.run_dir, "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    wanted = {"reward", "entropy", "clip_fraction", "ratio_mean", "ess", "mismatch_kl", "staleness",
              "response_length", "solved_none", "wait_for_batch_s", "broadcast_s",
              "grad_norm"}  # fmt: skip
    assert all(wanted <= record.keys() for record in steps)
    assert all(record["staleness_max"] == 0 for record in steps)
    assert all(abs(record["ratio_mean"] - 1) < 1e-3 for record in steps)
    trained = [group.number for step in worker._rollouts.steps for group in step]
    assert trained == list(range(12)), "each problem once, in order"
    *_, last = Path(plan.run_dir, "samples.md").read_text().split("Held out, as evaluated last:")
    assert last.count(" of 2 right)") > 1


def test_stopped_and_resumed_it_is_bitwise_the_same(
    home: Path, corpus: str, tokenizer_dir: str, tmp_path: Path
) -> None:
    guesser = make_guesser(corpus, tokenizer_dir, tmp_path)
    whole = rl_plan(**guesser, run="whole", num_iterations=4)
    worker = make(whole)
    worker.run()
    worker.close()
    cut = rl_plan(**guesser, run="cut", num_iterations=4)
    asked = iter(["", "told to"])
    worker = make(cut, hooks=Hooks(stop_reason=lambda: next(asked)))
    assert worker.run()["status"] == "stopped"
    worker.close()
    worker = make(cut, start_step=2)
    assert worker.run()["status"] == "finished"
    worker.close()
    assert weights(whole, 4) == weights(cut, 4)
    with Checkpoint.at(whole.base) as base:
        before = base.model_state()
    with Checkpoint(whole.checkpoints_dir, 4) as last:
        after = last.model_state()
    matrices = [name for name in before if ".h." in name]  # these do not decay by themselves
    assert any((before[name] != after[name]).any() for name in matrices), "there was a gradient"


class ToldToStop(LocalRollouts):
    """Waits for groups at a step, in vain, until the learner is told to stop."""

    def __init__(self, plan: RlPlan, at_step: int) -> None:
        super().__init__(plan)
        self._at_step = at_step

    def take(self, step: int, stop_reason: Callable[[], str] = lambda: "") -> Taken:
        if step < self._at_step:
            return super().take(step)
        assert stop_reason() == "SIGTERM"
        return Taken((), {})


@pytest.mark.parametrize("at_step", [0, 2, 3])
def test_stopped_while_it_waits_it_saves_what_it_has(
    home: Path, corpus: str, tokenizer_dir: str, tmp_path: Path, at_step: int
) -> None:
    guesser = make_guesser(corpus, tokenizer_dir, tmp_path)
    shape = {"num_iterations": 4, "save_every": 2}
    whole, cut = (rl_plan(**guesser, run=run, **shape) for run in ("whole", "cut"))
    assert run_alone(whole)["status"] == "finished"
    reasons = iter([""] * at_step)
    hooks = Hooks(stop_reason=lambda: next(reasons, "SIGTERM"))
    world = World(0, 1, torch.device("cpu"))
    worker = RlWorker(cut, world, hooks, 0, ToldToStop(cut, at_step))
    summary = worker.run()
    worker.close()
    assert (summary["status"], summary["step"]) == ("stopped", at_step)
    assert summary["stop_reason"] == "SIGTERM"
    assert list_steps(cut.checkpoints_dir) == {0: [], 2: [2], 3: [2, 3]}[at_step]
    assert run_alone(cut, start_step=at_step)["status"] == "finished"
    assert weights(whole, 4) == weights(cut, 4)


def learner_gradients(
    rank: int, size: int, plan: RlPlan, groups: list[Group], micro_rows: int
) -> dict[str, np.ndarray]:
    """The gradients of one step on given groups, over all workers; weights made noisy."""
    torch.set_num_threads(1)
    world = World(rank, size, torch.device("cpu"))
    small = plan.with_config(device_batch_size=micro_rows)
    worker = RlWorker(small, world, Hooks(), 0, LocalRollouts(plan))
    try:
        noisy(worker.model)
        recorder = GradientRecorder(dict(worker.model.named_parameters()))
        worker.learner._optimizer = recorder  # type: ignore[assignment]
        loss, figures, _times = worker.learner(groups, 1.0, 0.95, 0.0)
    finally:
        worker.close()
    return recorder.grads | {"loss": np.array(loss), "entropy": np.array(figures["entropy"])}


def gradient_norm(rank: int, size: int, plan: RlPlan, groups: list[Group]) -> float:
    """As a step logs it; weights made noisy."""
    torch.set_num_threads(1)
    world = World(rank, size, torch.device("cpu"))
    worker = RlWorker(plan, world, Hooks(), 0, LocalRollouts(plan))
    try:
        noisy(worker.model)
        return worker.learner(groups, 1.0, 0.95, 0.0)[1]["grad_norm"]
    finally:
        worker.close()


@pytest.mark.slow
def test_the_gradients_norm_is_that_of_all_workers_together(base: str) -> None:
    plan = rl_plan(base, "norm", max_staleness=1)
    groups = made_up_groups()
    grads = learner_gradients(0, 1, plan, groups, plan.config["device_batch_size"])
    squares = sum(float((grads[n] ** 2).sum()) for n in grads if n not in ("loss", "entropy"))
    norms = [gradient_norm(0, 1, plan, groups), *run_gloo(gradient_norm, 2, plan, groups)]
    assert norms == pytest.approx([squares**0.5] * 3, rel=1e-4)
    assert norms[0] > 1e-3


def made_up_groups(num_groups: int = 3, num_samples: int = 4) -> list[Group]:
    """Answers of 1 to 20 tokens, some forced, with rewards of 0 and 1."""
    rng = np.random.default_rng(0)
    groups = []
    for number in range(num_groups):
        samples = []
        for _ in range(num_samples):
            n = int(rng.integers(1, 21))
            mask = (rng.random(n) < 0.8).astype(np.uint8)
            mask[-1] = 1
            samples.append(
                Sample(
                    tokens=rng.integers(0, 300, n).astype(np.int32),
                    mask=mask,
                    logprobs=(-rng.random(n) * mask).astype(np.float32),
                    versions=np.zeros(n, np.int32),
                    finish_reason="stop",
                    text="",
                    reward=float(rng.integers(0, 2)),
                )
            )
        prompt = rng.integers(0, 300, int(rng.integers(3, 30))).astype(np.int32)
        groups.append(Group(number, prompt, tuple(samples)))
    return groups


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["reinforce", "grpo", "gspo"])
def test_gradients_do_not_depend_on_micro_batches_or_workers(base: str, algorithm: str) -> None:
    plan = rl_plan(base, "gradients", algorithm=algorithm, max_staleness=1)
    groups = made_up_groups()
    wanted = learner_gradients(0, 1, plan, groups, 12)
    assert any(np.abs(grad).max() > 1e-4 for grad in wanted.values())
    others = [learner_gradients(0, 1, plan, groups, rows) for rows in (1, 2, 8)]
    others += run_gloo(learner_gradients, 2, plan, groups, 2)
    for found in others:
        for name, grad in wanted.items():
            scale = max(1e-3, np.abs(grad).max())
            assert np.abs(found[name] - grad).max() < 1e-5 * scale, name


def test_forced_tokens_and_prompts_are_not_trained(base: str) -> None:
    """Whatever stands in their logits' place, they have no part in the loss."""
    plan = rl_plan(base, "forced")
    worker = make(plan)
    noisy(worker.model)
    groups = made_up_groups(1, 2)
    batch = to_batch(groups, 0)
    ids = torch.from_numpy(batch.ids)
    mask = torch.from_numpy(batch.target_mask)
    logprobs, _entropy = worker.learner.score(worker.model, ids, mask)
    assert (logprobs[mask == 0] == 0).all()
    assert (logprobs[mask == 1] < 0).all()
    lengths = [len(s.tokens) for s in groups[0].samples]
    stops = [len(groups[0].prompt) + n - 2 for n in lengths]
    assert all(mask[row, stop] == 1 for row, stop in enumerate(stops)), "the last token is trained"
    worker.close()


def test_a_kl_term_holds_the_policy_near_its_start(base: str) -> None:
    plans = [rl_plan(base, f"kl{coef}", kl_coef=coef, num_iterations=2) for coef in (0.0, 100.0)]
    records = []
    for plan in plans:
        worker = make(plan)
        worker.run()
        worker.close()
        lines = Path(plan.run_dir, "metrics.jsonl").read_text().splitlines()
        records.append([r for r in map(json.loads, lines) if "loss" in r])
    assert [record["kl"] for record in records[0]] == [0.0, 0.0]
    assert records[1][0]["kl"] == pytest.approx(0, abs=1e-6), "it begins at the reference"
    assert records[1][1]["kl"] > 0
    assert records[0][0]["batch_hash"] == records[1][0]["batch_hash"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"task": "arc-easy", "data_dir": "DATA"}, "not answered in free text"),
        ({"task": "identity"}, "not answered in free text"),
        ({"task": "gsm9k"}, "there is no task 'gsm9k'"),
        ({"num_iterations": None, "num_epochs": 0.00001}, "are not one step"),
        ({"from_run": "nobody"}, "there is no run nobody"),
        ({"run": "base"}, "is the base run itself"),
        ({"num_samples": 1}, "num-samples"),
        ({"rollout_actors": "3:1"}, "MIN <= MAX"),
    ],
)
def test_a_mistake_is_one_sentence(
    base: str, shared_data: Path, flags: dict[str, object], says: str
) -> None:
    flags = {k: str(shared_data) if v == "DATA" else v for k, v in flags.items()}
    with pytest.raises(NanorayError, match=says) as raised:
        rl_plan(base, str(flags.pop("run", "wrong")), **flags)
    assert "\n" not in str(raised.value)
