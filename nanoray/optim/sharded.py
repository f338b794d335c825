"""The optimiser of a training run: Muon and AdamW, their states sharded over the ranks.

In the manner of ZeRO stage 2 (arXiv 1910.02054): every rank holds all parameters and, during a
step, all its gradients; the optimiser's states and the work of the update are divided. During
the last backward pass of a step, gradients are reduced as soon as their bucket is complete;
after it, each bucket is updated by its owners and gathered while the next one is updated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanoray.optim.buckets import (
    Bucket,
    MuonKernels,
    Ranks,
    ReadState,
    StateShard,
    StepSettings,
)
from nanoray.optim.groups import ParamGroup, Recipe, check_recipe
from nanoray.optim.layout import build_buckets
from nanoray.optim.muon import MUON_FORMS, muon_apply_, muon_direction


@cache
def _compiled_kernels() -> tuple[Any, Any]:
    """Compiled once per process and, being dynamic, for all shapes."""
    return (
        torch.compile(muon_direction, dynamic=True, fullgraph=True),
        torch.compile(muon_apply_, dynamic=True, fullgraph=True),
    )


class MuonAdamW:
    """Muon for the matrices of the blocks and AdamW for the rest (see `nanoray.optim.groups`).

    One step, on every rank::

        for micro_batch in micro_batches:          # a rank may have none
            if micro_batch is the last: optimizer.prepare_last_backward()
            loss.backward()                        # the loss is divided by the global token count
        optimizer.step(*schedule.at(step))

    Gradients are SUMMED over ranks. `step` zeroes them in place: the parameters' `.grad` are
    views of communication buffers and stay allocated, so `zero_grad` is not needed (if somebody
    sets a `.grad` to None or replaces it, it is copied back, which costs time, not
    correctness). Parameters move into buffers, too: construct the optimiser after the model is on
    its device and before it is compiled, and load weights by copying into them.

    All ranks must construct it from the same parameters and call the same methods in the same
    order, and between `prepare_last_backward` and the end of `step` no other collective may be
    issued on the same process group, since some ranks start their reductions earlier than others.
    The same inputs give the same bits; another world size gives other rounding.
    """

    def __init__(
        self,
        named_params: Mapping[str, nn.Parameter],
        groups: Iterable[ParamGroup],
        *,
        recipe: Recipe,
        compute_dtype: torch.dtype,
        process_group: dist.ProcessGroup | None = None,
        compile: bool,
    ) -> None:
        """Build the buckets and zero states.

        Args:
            named_params: name -> parameter; every one must be in exactly one group.
            groups: from `build_groups`.
            recipe: which form of Muon; it should be that of the groups.
            compute_dtype: Polar Express runs in bf16 if this is bf16, else in fp32 (in the
                February recipe always in bf16).
            process_group: the ranks to share with; None means the default group if
                torch.distributed is initialised, else no communication.
            compile: compile Muon's elementwise parts (two functions for all shapes), except on
                a CPU: there the matrix products, which nothing makes faster, are nine tenths of
                a step, and compiling saved 5 % of it for 4-8 s of start-up. AdamW is a fused
                kernel of torch's and never compiled.

        Raises:
            ValueError: parameters and groups do not match, or a Muon matrix is not fp32.
        """
        check_recipe(recipe)
        groups = list(groups)
        _check_groups(named_params, groups)
        ranks = _ranks(process_group)
        low_precision = recipe == "february" or compute_dtype == torch.bfloat16
        on_cpu = all(p.device.type == "cpu" for p in named_params.values())
        direction, apply_ = (
            _compiled_kernels() if compile and not on_cpu else (muon_direction, muon_apply_)
        )
        kernels = MuonKernels(
            form=MUON_FORMS[recipe],
            polar_dtype=torch.bfloat16 if low_precision else torch.float32,
            direction=direction,
            apply_=apply_,
        )
        self._buckets = build_buckets(named_params, groups, ranks, kernels)
        self._next_to_launch = 0
        self._in_last_backward = False
        self._hooks = []
        for bucket in self._buckets:
            bucket.arm()
            if ranks.world_size > 1:
                for member in bucket.members:
                    hook = partial(self._on_grad, bucket, member.name)
                    self._hooks.append(member.param.register_post_accumulate_grad_hook(hook))

    def prepare_last_backward(self) -> None:
        """Call before the last backward of a step: from now on gradients are sent when ready."""
        self._in_last_backward = True

    def _on_grad(self, bucket: Bucket, name: str, _: Tensor) -> None:
        """A gradient is complete: launch the buckets that are ready, in their fixed order."""
        if not self._in_last_backward:
            return
        assert not bucket.launched, "a backward pass after the one announced as the last"
        bucket.waiting_for.discard(name)
        while self._next_to_launch < len(self._buckets):
            if self._buckets[self._next_to_launch].waiting_for:
                return
            self._launch_next()

    def _launch_next(self) -> None:
        self._buckets[self._next_to_launch].start_reduce()
        self._next_to_launch += 1

    @torch.no_grad()
    def step(
        self,
        lr_multiplier: float,
        muon_momentum: float,
        weight_decay_multiplier: float,
        watch: Callable[[Tensor], None] | None = None,
    ) -> None:
        """One update from the summed gradients; afterwards these are zero.

        Args:
            lr_multiplier, muon_momentum, weight_decay_multiplier: see `Schedule.at`.
            watch: shown the summed gradients before they are used, by all ranks together each once.
        """
        settings = StepSettings(lr_multiplier, muon_momentum, weight_decay_multiplier)
        while self._next_to_launch < len(self._buckets):
            self._launch_next()
        for bucket in self._buckets:
            bucket.wait()
            if watch:
                watch(bucket.owned_grad)
            bucket.update(settings)
            bucket.start_gather()
        for bucket in self._buckets:
            bucket.grad_buffer.zero_()  # while the gathers are under way
        for bucket in self._buckets:
            bucket.wait()
            bucket.arm()
        self._next_to_launch = 0
        self._in_last_backward = False

    def state_shards(self) -> list[StateShard]:
        """What this rank owns of the states, by parameter name and row range.

        All ranks' shards together cover every state once; what is replicated comes from rank 0.
        The tensors are views of the live state: copy them before the next step.
        """
        return [shard for bucket in self._buckets for shard in bucket.states()]

    @torch.no_grad()
    def load_state(self, read: ReadState) -> None:
        """Restore the states from a checkpoint of any world size.

        Args:
            read: (param, state, start_row, stop_row) -> these rows of the saved state.

        Raises:
            ValueError: what was read does not fit. Whatever `read` raises passes through.
        """
        for bucket in self._buckets:
            bucket.load(read)


def _ranks(process_group: dist.ProcessGroup | None) -> Ranks:
    """The given group, else the default group, else a single rank."""
    if process_group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return Ranks(None)
        process_group = dist.group.WORLD
    return Ranks(process_group, dist.get_rank(process_group), dist.get_world_size(process_group))


def _check_groups(named_params: Mapping[str, nn.Parameter], groups: list[ParamGroup]) -> None:
    grouped = [name for group in groups for name in group.names]
    if sorted(grouped) != sorted(named_params):
        odd = set(grouped).symmetric_difference(named_params)
        what = f"the groups and the model differ in {sorted(odd)}" if odd else "a name is twice"
        raise ValueError(f"every parameter must be in exactly one group, but {what}")
    for group in groups:
        params = [named_params[name] for name in group.names]
        if group.kind == "muon" and any(p.dtype != torch.float32 for p in params):
            raise ValueError(
                "Muon needs fp32 weights: keep block matrices in fp32 and cast per use"
            )
        if group.kind == "muon" and len({p.shape for p in params}) != 1:
            raise ValueError(f"a Muon group needs matrices of one shape: {group.names}")
