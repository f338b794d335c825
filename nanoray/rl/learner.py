"""The learner's step: score what was sampled, and follow the algorithm's loss. Plain torch."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanoray.model.gpt import GPT, SOFTCAP
from nanoray.model.loss import softcapped_logits
from nanoray.optim.sharded import MuonAdamW
from nanoray.rl.algorithms import Algorithm
from nanoray.rl.groups import Batch, Group, to_batch
from nanoray.rl.objective import Metrics, Totals, advantages, policy_loss, score
from nanoray.train.step import StepTimes
from nanoray.train.world import World


@dataclass(frozen=True)
class Scoring:
    """How answers were sampled, which their log-probabilities depend on.

    Attributes:
        on_policy: always with the learner's own weights.
    """

    temperature: float
    top_k: int
    max_new_tokens: int
    on_policy: bool


class Learner:
    """Turns groups into one optimiser step.

    The loss is a sum over all sampled tokens of the step with weights that are known before, so it
    does not matter how answers are cut into micro-batches or dealt to workers.

    Args:
        reference: the model to stay close to, with ``kl_coef``.
        micro_rows: answers of a micro-batch.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: MuonAdamW,
        world: World,
        algorithm: Algorithm,
        scoring: Scoring,
        *,
        micro_rows: int,
        pad_id: int,
        reference: GPT | None = None,
        kl_coef: float = 0.0,
    ) -> None:
        self._model, self._optimizer, self._world = model, optimizer, world
        self._algorithm, self._scoring = algorithm, scoring
        self._micro_rows, self._pad_id = micro_rows, pad_id
        self._reference, self._kl_coef = reference, kl_coef

    def __call__(
        self,
        groups: Sequence[Group],
        lr_multiplier: float,
        muon_momentum: float,
        weight_decay_multiplier: float,
    ) -> tuple[float, dict[str, float], StepTimes]:
        """Train on all groups of a step; each worker is given all, and takes its share.

        Returns:
            The step's loss over all workers, the figures of `Metrics` with the gradient's norm,
            and the times.
        """
        start = time.perf_counter()
        world, device = self._world, self._world.device
        parts = self._micro_batches(groups)
        totals = Totals(
            tokens=sum(int(s.mask.sum()) for group in groups for s in group.samples),
            samples=sum(len(group.samples) for group in groups),
            max_new_tokens=self._scoring.max_new_tokens,
        )
        loss_sum = torch.zeros((), dtype=torch.float64)
        metrics: Metrics | None = None
        for number, (batch, advantage_B) in enumerate(parts):
            if number == len(parts) - 1:
                self._optimizer.prepare_last_backward()
            loss, found = self._loss(batch, advantage_B, totals)
            loss.backward()
            loss_sum += loss.detach().cpu().double()
            metrics = found if metrics is None else metrics + found
        if device.type == "cuda":
            torch.cuda.synchronize()
        middle = time.perf_counter()
        squares: list[Tensor] = []
        self._optimizer.step(
            lr_multiplier,
            muon_momentum,
            weight_decay_multiplier,
            lambda grad: squares.append(grad.float().square().sum()),
        )
        figures = self._merged(metrics)
        figures["grad_norm"] = math.sqrt(world.sum_float(sum(squares, torch.zeros(())).cpu()))
        loss_of_all = world.sum_float(loss_sum)
        return loss_of_all, figures, StepTimes(middle - start, time.perf_counter() - middle)

    def _merged(self, metrics: Metrics | None) -> dict[str, float]:
        """The figures over all workers."""
        found = [part for part in self._world.gather(metrics) if part is not None]
        total = found[0]
        for part in found[1:]:
            total = total + part
        return total.figures()

    def _micro_batches(self, groups: Sequence[Group]) -> list[tuple[Batch, Tensor]]:
        """This worker's answers, neighbours in length together, with their advantages [B]."""
        rewards_GN = torch.from_numpy(np.stack([group.rewards for group in groups]))
        advantages_GN = advantages(self._algorithm, rewards_GN).float()
        rows = [
            (group, number, advantages_GN[g, number])
            for g, group in enumerate(groups)
            for number in range(len(group.samples))
        ]
        mine = rows[self._world.rank :: self._world.size]
        mine.sort(key=lambda row: len(row[0].prompt) + len(row[0].samples[row[1]].tokens))
        parts = []
        for first in range(0, len(mine), self._micro_rows):
            chunk = mine[first : first + self._micro_rows]
            singles = [
                Group(group.number, group.prompt, (group.samples[n],)) for group, n, _ in chunk
            ]
            advantages_B = torch.stack([advantage for *_, advantage in chunk])
            parts.append((to_batch(singles, self._pad_id), advantages_B))
        return parts

    def _loss(self, batch: Batch, advantages_B: Tensor, totals: Totals) -> tuple[Tensor, Metrics]:
        device = self._world.device
        ids_BL = torch.from_numpy(batch.ids).to(device)
        mask_BT = torch.from_numpy(batch.target_mask).to(device)
        logprobs_BT, entropy_BT = self.score(self._model, ids_BL, mask_BT)
        reference_BT = None
        if self._reference is not None:
            with torch.no_grad():
                reference_BT, _ = self.score(self._reference, ids_BL, mask_BT)
        return policy_loss(
            self._algorithm,
            logprobs_BT,
            torch.from_numpy(batch.behaviour).to(device),
            advantages_B.to(device),
            mask_BT,
            totals,
            on_policy=self._scoring.on_policy,
            entropy_BT=entropy_BT,
            reference_BT=reference_BT,
            kl_coef=self._kl_coef,
        )

    def score(self, model: GPT, ids_BL: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the targets ids[:, 1:], fp32 [B, L-1].

        Of the distribution that is sampled from (temperature, top-k); 0 where the mask is 0: there
        no logits are computed.
        """
        hidden_BTD = model.hidden(ids_BL[:, :-1])
        sampled_BT = mask_BT.bool()
        head_VD = model.lm_head.weight[: model.config.vocab_size].to(model.compute_dtype)
        logits_NV = softcapped_logits(hidden_BTD[sampled_BT], head_VD, SOFTCAP)
        targets_N = ids_BL[:, 1:][sampled_BT]
        scoring = self._scoring
        logprobs_N, entropy_N = score(logits_NV, targets_N, scoring.temperature, scoring.top_k)
        zeros_BT = torch.zeros(mask_BT.shape, dtype=torch.float32, device=ids_BL.device)
        return (
            zeros_BT.masked_scatter(sampled_BT, logprobs_N),
            zeros_BT.masked_scatter(sampled_BT, entropy_N),
        )


def batch_hash(groups: Sequence[Group]) -> int:
    """64 bits that identify the answers of a step, in any order of the groups."""
    total = 0
    for group in groups:
        digest = hashlib.blake2b(group.number.to_bytes(8, "little"), digest_size=8)
        for sample in group.samples:
            digest.update(sample.tokens.astype(np.int32).tobytes())
            digest.update(np.float64(sample.reward).tobytes())
        total += int.from_bytes(digest.digest(), "little")
    return total % 2**64
