"""Reinforcement learning for tests, without Ray: rollouts sampled in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pretrain_runs import run_plan, stop_after
from sft_runs import make_base, sft_plan

from nanoray.config import RlConfig
from nanoray.rl.groups import Group
from nanoray.rl.ledger import Ledger
from nanoray.rl.plan import RlPlan, ledger_rules, make_rl_plan, sampler_settings
from nanoray.rl.reward_worker import open_reward
from nanoray.rl.rewards import Reward
from nanoray.rl.sampler import Sampler
from nanoray.rl.terms import Taken
from nanoray.rl.worker import RlWorker, Rollouts
from nanoray.train.worker import Hooks
from nanoray.train.world import World

TINY_RL = {
    "task": "arithmetic",
    "questions_per_step": 4,
    "num_samples": 4,
    "max_new_tokens": 12,
    "questions_per_call": 2,
    "num_iterations": 3,
    "eval_every": 0,
    "eval_examples": 4,
    "eval_samples": 2,
    "save_every": 0,
    "dtype": "float32",
    "seed": 7,
}


def rl_flags(base: str, run: str | None, **changes: Any) -> list[str]:
    values = TINY_RL | {"from_run": base, "run": run} | changes
    return [f"--{k.replace('_', '-')}={v}" for k, v in values.items() if v is not None]


def rl_plan(base: str, run: str | None, **changes: Any) -> RlPlan:
    """The plan of a tiny run, ready to run; ``changes`` are flags by field name."""
    plan = make_rl_plan(RlConfig.parse(rl_flags(base, run, **changes), "test"))
    plan.prepare()
    return plan


GUESSES = ("5", "6")  # what a guesser answers; the first one is right


def make_guesser(corpus: str, tokenizer_dir: str, folder: Path) -> dict[str, Any]:
    """A chat model that is right about half of the time: flags of a run that practises with it.

    Rewards, and with them gradients, are thus not all zero.
    """
    questions = [f"Question {number}: how many?" for number in range(80)]
    for name, asked in (("train", questions[:64]), ("test", questions[64:])):
        rows = [{"question": question, "answer": f"#### {GUESSES[0]}"} for question in asked]
        _write_lines(folder / "data" / "gsm8k" / f"{name}.jsonl", rows)
    chats = [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": f"#### {guess}"},
            ]
        }
        for question in questions
        for guess in GUESSES
    ]
    _write_lines(folder / "chats.jsonl", chats)
    base = make_base(corpus, tokenizer_dir, "base", max_seq_len=128, total_batch_size=512)
    plan = sft_plan(
        base, str(folder / "chats.jsonl"), "guesser", num_iterations=40, init_lr_frac=1.0
    )
    assert run_plan(plan)["status"] == "finished"
    return {"base": plan.run_dir, "task": "gsm8k", "data_dir": str(folder / "data")}


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class LocalRollouts:
    """One sampler and its rewards in this process; what the pool of actors must equal."""

    def __init__(self, plan: RlPlan, reward: Callable[[int, str], object] | None = None) -> None:
        self._plan = plan
        settings = sampler_settings(plan, num_threads=1)
        pays = reward or open_reward(settings.problems)

        def judge(answers: Sequence[tuple[int, str]]) -> list[Reward]:
            return [Reward(float(pays(*answer))) for answer in answers]  # type: ignore[arg-type]

        self._sampler = Sampler(settings, judge)
        self._ledger = Ledger(ledger_rules(plan))
        self.groups: dict[int, Group] = {}
        self.steps: list[list[Group]] = []

    def begin(self, step: int, ledger: Mapping[str, Any] | None) -> None:
        self._ledger = Ledger(ledger_rules(self._plan), ledger)
        assert self._ledger.step == step

    def publish(self, version: int, weights: NDArray[np.uint8]) -> None:
        self._sampler.load_weights(weights, version)
        self._ledger.publish(version)

    def take(self, step: int, stop_reason: Callable[[], str] = lambda: "") -> Taken:
        while (numbers := self._ledger.take()) is None:
            flight = self._ledger.hand_out(0)
            assert flight is not None
            groups = self._sampler.sample(flight.bundle.numbers)
            kept = self._ledger.done(
                flight.id,
                {group.number: group.version for group in groups},
                {group.number for group in groups if group.degenerate},
            )
            self.groups |= {group.number: group for group in groups if group.number in kept}
        taken = [self.groups[number] for number in numbers]
        self.steps.append(taken)
        return Taken(taken, {})

    def evaluating(self, begins: bool) -> None: ...

    def trained(self, step: int) -> None:
        self._ledger.trained([group.number for group in self.steps[-1]])

    def ledger(self) -> Mapping[str, Any]:
        return self._ledger.to_dict()


def run_alone(
    plan: RlPlan,
    *,
    start_step: int = 0,
    stop_step: int | None = None,
    rollouts: Rollouts | None = None,
    post: Callable[[Mapping[str, Any]], None] = lambda _record: None,
) -> dict[str, Any]:
    """Run a plan in this process, with one sampler and without Ray; its summary."""
    hooks = Hooks(post=post, stop_reason=stop_after(stop_step) if stop_step else lambda: "")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    world = World(0, 1, torch.device("cpu"))
    worker = RlWorker(plan, world, hooks, start_step, rollouts or LocalRollouts(plan))
    try:
        return worker.run()
    finally:
        worker.close()
        torch.set_num_threads(threads)
