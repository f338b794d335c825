"""Buckets: what is reduced, updated and gathered as one, and which rank owns what of it.

A bucket holds the gradients of some parameters in one buffer, of which the parameters' `.grad`
are views; a sharded bucket also holds the parameters in one buffer. The first dimension of
these buffers is counted in *slots* (matrices of a Muon stack, rows of an AdamW table) and padded
to world_size * slots_per_rank, and rank r owns slots [r * slots_per_rank, ...). So gradients are
reduce-scattered and parameters all-gathered in place, without a copy on any world size.

| bucket | holds | slot | communication |
| --- | --- | --- | --- |
| MuonBucket | matrices of one shape | a matrix | reduce-scatter, all-gather |
| TableBucket | one big AdamW tensor | a row | reduce-scatter, all-gather |
| SmallBucket | all small AdamW tensors of one dtype | - | all-reduce, updated everywhere |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanoray.optim.adamw import adamw_update_
from nanoray.optim.groups import ParamGroup
from nanoray.optim.muon import (
    MuonForm,
    muon_apply_,
    muon_direction,
    polar_express,
    second_moment_shape,
)

# torch 2.13 renamed these two, and 2.11 has only the old names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class StateShard:
    """Rows [start_row, stop_row) of one parameter's optimiser state, which this rank owns."""

    param: str
    state: str
    """momentum, second_moment (Muon); exp_avg, exp_avg_sq, step (AdamW)."""
    start_row: int
    stop_row: int
    num_rows: int
    """Rows of the whole state. NorMuon's second moment of a wide matrix is [1, cols]: one row;
    `step` has shape [1]."""
    tensor: Tensor
    """A view of the live state: copy it before the next step."""


ReadState = Callable[[str, str, int, int], Tensor]
"""(param, state, start_row, stop_row) -> these rows of a saved state, of any dtype, on the CPU."""


@dataclass(frozen=True)
class Ranks:
    """Who communicates. Without a group there is one rank and nothing to say."""

    group: dist.ProcessGroup | None
    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class StepSettings:
    """What the schedule says about one step."""

    lr_multiplier: float
    muon_momentum: float
    weight_decay_multiplier: float


@dataclass(frozen=True)
class MuonKernels:
    """How Muon is computed: its form, the dtype of Polar Express, compiled or eager."""

    form: MuonForm
    polar_dtype: torch.dtype
    direction: Callable[..., Tensor] = muon_direction
    apply_: Callable[..., None] = muon_apply_


@dataclass
class Member:
    """A parameter of a bucket, and the part of the bucket's buffer that is its gradient."""

    name: str
    param: nn.Parameter
    grad: Tensor


@dataclass
class Bucket:
    """The communication of a bucket; the three kinds below add ownership and the update."""

    members: list[Member]
    ranks: Ranks
    grad_buffer: Tensor
    launched: bool = field(default=False, init=False)
    waiting_for: set[str] = field(default_factory=set, init=False)
    _work: Any = field(default=None, init=False)

    def arm(self) -> None:
        """Begin a step: no gradient is there yet."""
        self.launched = False
        self.waiting_for = {member.name for member in self.members}

    def start_reduce(self) -> None:
        """Sum the gradients over the ranks, asynchronously."""
        self.launched = True
        for member in self.members:
            if member.param.grad is not member.grad:  # somebody has set it to None or replaced it
                if member.param.grad is None:
                    member.grad.zero_()
                else:
                    member.grad.copy_(member.param.grad)
                member.param.grad = member.grad
        if self.ranks.world_size > 1:
            self._work = self._communicate_grads()

    def start_gather(self) -> None:
        """Send the owned parameters to all ranks, asynchronously."""
        if self.ranks.world_size > 1:
            self._work = self._communicate_params()

    def wait(self) -> None:
        """Wait for what was started last (on CUDA: make the stream wait)."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def _communicate_grads(self) -> Any:
        raise NotImplementedError

    def _communicate_params(self) -> Any:
        raise NotImplementedError

    @property
    def owned_grad(self) -> Tensor:
        """The reduced gradients that this rank accounts for; all ranks together: each once."""
        raise NotImplementedError

    def update(self, settings: StepSettings) -> None:
        """Update the owned parameters and states from the reduced gradients."""
        raise NotImplementedError

    def states(self) -> Iterator[StateShard]:
        """What this rank owns of the states."""
        raise NotImplementedError

    def load(self, read: ReadState) -> None:
        """Fill the states that this rank holds (replicated ones included)."""
        for shard in self._held_states():
            saved = read(shard.param, shard.state, shard.start_row, shard.stop_row)
            if saved.shape != shard.tensor.shape:
                raise ValueError(
                    f"the saved {shard.state} of {shard.param} has shape {tuple(saved.shape)} "
                    f"in rows {shard.start_row} to {shard.stop_row}, but the model needs "
                    f"{tuple(shard.tensor.shape)}: use a checkpoint of the same architecture"
                )
            shard.tensor.copy_(saved)

    def _held_states(self) -> Iterator[StateShard]:
        return self.states()


@dataclass
class ShardedBucket(Bucket):
    """A bucket of which every rank owns `slots_per_rank` slots (the last ones may be padding)."""

    group: ParamGroup
    param_buffer: Tensor
    num_slots: int

    @property
    def slots_per_rank(self) -> int:
        return self.param_buffer.shape[0] // self.ranks.world_size

    @property
    def owned(self) -> slice:
        """The real slots of this rank, as a slice of the buffers."""
        start = min(self.ranks.rank * self.slots_per_rank, self.num_slots)
        return slice(start, min(start + self.slots_per_rank, self.num_slots))

    @property
    def owned_grad(self) -> Tensor:
        return self.grad_buffer[self.owned]

    def _shard(self, buffer: Tensor) -> Tensor:
        """This rank's slots, padding included."""
        start = self.ranks.rank * self.slots_per_rank
        return buffer[start : start + self.slots_per_rank]

    def _communicate_grads(self) -> Any:
        # In place, as NCCL allows where the output is the rank's own part of the input.
        return _reduce_scatter(
            self._shard(self.grad_buffer),
            self.grad_buffer,
            group=self.ranks.group,
            async_op=True,
        )

    def _communicate_params(self) -> Any:
        return _all_gather(
            self.param_buffer,
            self._shard(self.param_buffer),
            group=self.ranks.group,
            async_op=True,
        )


@dataclass
class MuonBucket(ShardedBucket):
    """Matrices of one shape, stacked; a matrix belongs to one rank."""

    kernels: MuonKernels
    momentum: Tensor = field(init=False)
    second_moment: Tensor = field(init=False)

    def __post_init__(self) -> None:
        num_rows, num_cols = self.param_buffer.shape[1:]
        num_owned = self.owned.stop - self.owned.start
        self.momentum = self.param_buffer.new_zeros(num_owned, num_rows, num_cols)
        self.second_moment = self.param_buffer.new_zeros(
            num_owned, *second_moment_shape(num_rows, num_cols)
        )

    def update(self, settings: StepSettings) -> None:
        if self.momentum.shape[0] == 0:
            return
        form = self.kernels.form
        lr = self.group.lr * settings.lr_multiplier
        decay = self.group.weight_decay * settings.weight_decay_multiplier
        beta2 = self.group.beta2
        if form.bf16_hyperparameters:
            lr, decay, beta2 = (_round_bf16(value) for value in (lr, decay, beta2))
        lr_times_decay = _round_bf16(lr * decay) if form.bf16_hyperparameters else lr * decay
        x = self.kernels.direction(
            self.grad_buffer[self.owned],
            self.momentum,
            torch.tensor(settings.muon_momentum),
            form,
            self.kernels.polar_dtype,
        )
        self.kernels.apply_(
            self.param_buffer[self.owned],
            polar_express(x),
            self.second_moment,
            torch.tensor(lr),
            torch.tensor(lr_times_decay),
            torch.tensor(beta2),
            form,
        )

    def states(self) -> Iterator[StateShard]:
        for index, member in enumerate(self.members[self.owned]):
            for state, stack in (
                ("momentum", self.momentum),
                ("second_moment", self.second_moment),
            ):
                rows = stack.shape[1]
                yield StateShard(member.name, state, 0, rows, rows, stack[index])


@dataclass
class TableBucket(ShardedBucket):
    """One big AdamW tensor, split by rows."""

    exp_avg: Tensor = field(init=False)
    exp_avg_sq: Tensor = field(init=False)
    step: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.exp_avg = torch.zeros_like(self.param_buffer[self.owned])
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self.step = torch.zeros(1, device=self.param_buffer.device)

    def update(self, settings: StepSettings) -> None:
        _adamw_update(
            self.group,
            settings,
            [self.param_buffer[self.owned]],
            [self.grad_buffer[self.owned]],
            [self.exp_avg],
            [self.exp_avg_sq],
            [self.step],
        )

    def states(self) -> Iterator[StateShard]:
        yield from self._table_states()
        if self.ranks.rank == 0:
            yield from self._step_state()

    def _held_states(self) -> Iterator[StateShard]:
        yield from self._table_states()
        yield from self._step_state()

    def _table_states(self) -> Iterator[StateShard]:
        name, rows = self.members[0].name, self.owned
        if rows.start < rows.stop:
            for state, tensor in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
                yield StateShard(name, state, rows.start, rows.stop, self.num_slots, tensor)

    def _step_state(self) -> Iterator[StateShard]:
        yield StateShard(self.members[0].name, "step", 0, 1, 1, self.step)


@dataclass
class SmallBucket(Bucket):
    """Small AdamW tensors of several groups: cheaper to update everywhere than to split."""

    groups: list[ParamGroup]
    exp_avgs: dict[str, Tensor] = field(init=False)
    exp_avg_sqs: dict[str, Tensor] = field(init=False)
    steps: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.exp_avgs = {m.name: torch.zeros_like(m.grad) for m in self.members}
        self.exp_avg_sqs = {m.name: torch.zeros_like(m.grad) for m in self.members}
        device = self.grad_buffer.device
        self.steps = {m.name: torch.zeros(1, device=device) for m in self.members}

    @property
    def owned_grad(self) -> Tensor:
        return self.grad_buffer if self.ranks.rank == 0 else self.grad_buffer[:0]

    def _communicate_grads(self) -> Any:
        return dist.all_reduce(self.grad_buffer, group=self.ranks.group, async_op=True)

    def _communicate_params(self) -> Any:
        return None  # every rank has computed the same update

    def update(self, settings: StepSettings) -> None:
        members = {member.name: member for member in self.members}
        for group in self.groups:
            names = [name for name in group.names if name in members]
            _adamw_update(
                group,
                settings,
                [members[name].param.data for name in names],
                [members[name].grad for name in names],
                [self.exp_avgs[name] for name in names],
                [self.exp_avg_sqs[name] for name in names],
                [self.steps[name] for name in names],
            )

    def states(self) -> Iterator[StateShard]:
        return self._held_states() if self.ranks.rank == 0 else iter(())

    def _held_states(self) -> Iterator[StateShard]:
        for name in self.exp_avgs:
            for state, tensor in (
                ("exp_avg", self.exp_avgs[name]),
                ("exp_avg_sq", self.exp_avg_sqs[name]),
                ("step", self.steps[name]),
            ):
                rows = tensor.shape[0]
                yield StateShard(name, state, 0, rows, rows, tensor)


def _adamw_update(
    group: ParamGroup,
    settings: StepSettings,
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
) -> None:
    adamw_update_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        lr=group.lr * settings.lr_multiplier,
        beta1=group.beta1,
        beta2=group.beta2,
        weight_decay=group.weight_decay,
        eps=group.eps,
    )


def _round_bf16(value: float) -> float:
    return torch.tensor(value, dtype=torch.bfloat16).item()
