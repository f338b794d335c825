"""Reinforcement learning as one learner worker sees it: plain torch, no Ray.

Groups come from `Rollouts`, whoever samples them; after every step the new weights go back there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nanoray.checkpoint import Checkpoint, list_steps
from nanoray.metrics import Record
from nanoray.model.gpt import GPT
from nanoray.optim.schedule import Schedule
from nanoray.rl import flat
from nanoray.rl.algorithms import ALGORITHMS
from nanoray.rl.groups import Group
from nanoray.rl.learner import Learner, Scoring, batch_hash
from nanoray.rl.plan import RlPlan
from nanoray.rl.terms import Taken
from nanoray.train.chat_evals import ask_together, chat_samples, held_out_samples
from nanoray.train.worker import TOLD_ELSEWHERE, Hooks, StepOutcome, TrainWorker
from nanoray.train.world import World

_MOMENTUM = 0.95  # Muon's, throughout


class Rollouts(Protocol):
    """Where groups come from. All but `take` is asked by the first worker only."""

    def begin(self, step: int, ledger: Mapping[str, Any] | None) -> None:
        """Forget what is under way; go on with ``step``, and the ledger of its checkpoint."""
        ...

    def publish(self, version: int, weights: NDArray[np.uint8]) -> None:
        """Sample with these weights (`flat.pack`) from now on; does not wait for anybody."""
        ...

    def take(self, step: int, stop_reason: Callable[[], str]) -> Taken:
        """The groups of a step; waits for them. The same answer for every worker.

        Args:
            stop_reason: asked meanwhile; where there is one, the answer may be no groups.

        Raises:
            NanorayError: they cannot be had.
        """
        ...

    def evaluating(self, begins: bool) -> None:
        """An evaluation begins, or ends."""
        ...

    def trained(self, step: int) -> None:
        """The groups of ``step`` are in the weights."""
        ...

    def ledger(self) -> Mapping[str, Any]:
        """What a checkpoint keeps: the state after the last trained step."""
        ...


class RlWorker(TrainWorker):
    """A `TrainWorker` whose steps are groups of samples.

    Args:
        rollouts: gives them.
    """

    plan: RlPlan

    def __init__(
        self, plan: RlPlan, world: World, hooks: Hooks, start_step: int, rollouts: Rollouts
    ) -> None:
        self._ledger: Mapping[str, Any] | None = None
        self._held_out = ""  # of the last evaluation, if this start has made one
        super().__init__(plan, world, hooks, start_step)
        self._rollouts = rollouts
        config = self.config
        self.learner = Learner(
            self.model,
            self.optimizer,
            world,
            ALGORITHMS[config["algorithm"]],
            Scoring(
                temperature=config["temperature"],
                top_k=config["top_k"],
                max_new_tokens=config["max_new_tokens"],
                on_policy=config["max_staleness"] == 0,
            ),
            micro_rows=config["device_batch_size"],
            pad_id=self.tokenizer.bos_id,
            reference=self._reference() if config["kl_coef"] else None,
            kl_coef=config["kl_coef"],
        )
        self._taken = Taken((), {})
        self._wait_s = 0.0  # for it

    def _begin(self) -> None:
        with Checkpoint.at(self.plan.base) as base:
            self.model.load_state_dict(base.model_state())

    def _reference(self) -> GPT:
        model = GPT(self.plan.model_config, compute_dtype=self.dtype).place(self.world.device)
        (step,) = list_steps(self.plan.reference_dir)
        with Checkpoint(self.plan.reference_dir, step) as reference:
            model.load_state_dict(reference.model_state())
        return model.requires_grad_(False)

    def _make_schedule(self) -> Schedule:
        return Schedule(
            num_iterations=self.plan.num_iterations,
            warmup_steps=0,
            warmdown_ratio=1.0,  # linear to zero from the first step
            final_lr_frac=0.0,
            recipe=self.config["recipe"],
        )

    def run(self) -> dict[str, Any]:
        progress = self.progress
        if self.world.is_first:
            self._rollouts.begin(progress.step, self._ledger)
            self._publish(progress.step)
        if progress.step == 0:
            self._evaluate_now("before")
        return super().run()

    def _publish(self, version: int) -> float:
        """Hand out the weights as they are; returns how long that took, in seconds."""
        start = time.perf_counter()
        self._rollouts.publish(version, flat.pack(self.model.state_dict()))
        return time.perf_counter() - start

    def _await_batch(self) -> str:
        start = time.perf_counter()
        told = self.hooks.stop_reason if self.world.is_first else lambda: ""
        self._taken = self._rollouts.take(self.progress.step, told)
        self._wait_s = time.perf_counter() - start
        return "" if self._taken.groups else told() or TOLD_ELSEWHERE

    def _step(self, lr_multiplier: float, _momentum: float, decay: float) -> StepOutcome:
        start = time.perf_counter()
        step, groups = self.progress.step, self._taken.groups
        loss, figures, times = self.learner(groups, lr_multiplier, _MOMENTUM, decay)
        broadcast_s = 0.0
        if self.world.is_first:
            self._rollouts.trained(step)
            broadcast_s = self._publish(step + 1)
        tokens = sum(len(g.prompt) + len(s.tokens) for g in groups for s in g.samples)
        record = {
            "wait_for_batch_s": self._wait_s,
            "forward_backward_s": times.forward_backward_s,
            "optimizer_s": times.optimizer_s,
            "broadcast_s": broadcast_s,
            "learner_tokens_per_s": tokens / (time.perf_counter() - start),
            "epoch": max(group.number for group in groups) // self.plan.num_questions,
            **_describe(groups, step),
            **figures,
            **self._taken.figures,
        }
        own_hash = batch_hash(groups) if self.world.is_first else 0
        return StepOutcome(loss, tokens, {}, own_hash, record)

    def _whence(self, batch_hash: int) -> str:
        numbers = ", ".join(str(group.number) for group in self._taken.groups)
        return f"the answers of batch {batch_hash % 2**64:016x} are to problems number {numbers}"

    def _position(self) -> Record:
        return {"ledger": dict(self._rollouts.ledger())} if self.world.is_first else {}

    def _go_on_from(self, meta: Record) -> None:
        self._ledger = meta["ledger"]

    def _evaluate(self, last: bool) -> dict[str, Any]:
        every = self.config["eval_every"]
        if not (last or (every and self.progress.step % every == 0)):
            return {}
        return self._evaluate_now("after")

    def _evaluate_now(self, when: str) -> dict[str, Any]:
        start = time.perf_counter()
        if self.world.is_first:
            self._rollouts.evaluating(True)
        report = ask_together(self.plan.eval_suite, self.model, self.tokenizer, self.world)
        if self.world.is_first:
            self._rollouts.evaluating(False)
        self.world.gather(None)  # before any worker takes the next groups
        self._held_out = held_out_samples(report)
        metrics = report.metrics
        pass_at = {"pass@1": metrics[f"chat/{self.config['task']}"]} | {
            name.rsplit("/", 1)[1]: value for name, value in metrics.items() if "/pass@" in name
        }
        self.progress.evals |= {f"{when}/{name}": value for name, value in pass_at.items()}
        if self.log:
            seconds = {"eval_s": time.perf_counter() - start}
            self.log.log({"step": self.progress.step, **pass_at, **seconds})
        return dict(pass_at)

    def _sample_text(self) -> str:
        fixed = chat_samples(self.model, self.tokenizer, self.progress.step)
        held_out = f"\nHeld out, as evaluated last:\n\n{self._held_out}"
        return fixed + held_out if self._held_out else fixed

    def _own_metrics(self) -> dict[str, Any]:
        return dict(self.progress.evals)


def _describe(groups: Sequence[Group], step: int) -> dict[str, float]:
    """Rewards, lengths and staleness of a step's answers."""
    rewards = np.array([group.rewards for group in groups])
    lengths = np.array([len(s.tokens) for group in groups for s in group.samples])
    reasons = [s.finish_reason for group in groups for s in group.samples]
    staleness = np.array([step - group.version for group in groups])
    best, worst = rewards.max(1), rewards.min(1)
    solved_all, solved_none = float((worst == 1).mean()), float((best == 0).mean())
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "solved_all": solved_all,
        "solved_none": solved_none,
        "solved_some": 1 - solved_all - solved_none,
        "reward_problems": sum(bool(s.problem) for group in groups for s in group.samples),
        "response_length": float(lengths.mean()),
        "response_length_max": float(lengths.max()),
        "response_clipped": float(np.mean([reason == "length" for reason in reasons])),
        "staleness": float(staleness.mean()),
        "staleness_max": float(staleness.max()),
    }
