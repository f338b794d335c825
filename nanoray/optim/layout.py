"""The layout of a model in buckets: which parameters share one, and their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nanoray.optim.buckets import (
    Bucket,
    Member,
    MuonBucket,
    MuonKernels,
    Ranks,
    SmallBucket,
    TableBucket,
)
from nanoray.optim.groups import ParamGroup, backward_order

SMALL_NUMEL = 1024
"""AdamW tensors below this many elements are updated by every rank."""
MUON_BUCKET_BYTES = {"cuda": 25 * 2**20}
"""Least size of a Muon bucket, so that a collective is worth its latency (DDP's value)."""
MUON_BUCKET_BYTES_DEFAULT = 2**20
"""On CPUs the models are small, and gloo reaches its bandwidth at about this size."""


def build_buckets(
    params: Mapping[str, nn.Parameter],
    groups: list[ParamGroup],
    ranks: Ranks,
    kernels: MuonKernels,
) -> list[Bucket]:
    """All buckets, in the order in which a backward pass completes them."""
    buckets: list[Bucket] = []
    small: dict[torch.dtype, dict[str, nn.Parameter]] = {}
    for group in groups:
        if group.kind == "muon":
            names = backward_order(group.names)
            size = _muon_bucket_size(params[names[0]], len(names), ranks.world_size)
            buckets += [
                _make_muon_bucket(params, names[start : start + size], group, ranks, kernels)
                for start in range(0, len(names), size)
            ]
            continue
        for name in group.names:
            param = params[name]
            if param.numel() < SMALL_NUMEL:
                small.setdefault(param.dtype, {})[name] = param
            else:
                buckets.append(_make_table_bucket(name, param, group, ranks))
    buckets += [_make_small_bucket(members, groups, ranks) for members in small.values()]
    place = {name: i for i, name in enumerate(backward_order(list(params)))}
    return sorted(buckets, key=lambda bucket: max(place[m.name] for m in bucket.members))


def _muon_bucket_size(param: nn.Parameter, num_matrices: int, world_size: int) -> int:
    """Matrices per bucket: a multiple of the world size, as few as make a worthwhile message.

    A single rank sends nothing, and stacks all of them.
    """
    if world_size == 1:
        return num_matrices
    least_bytes = MUON_BUCKET_BYTES.get(param.device.type, MUON_BUCKET_BYTES_DEFAULT)
    round_bytes = param.numel() * param.element_size() * world_size
    return world_size * max(1, -(-least_bytes // round_bytes))


def _make_muon_bucket(
    params: Mapping[str, nn.Parameter],
    names: Sequence[str],
    group: ParamGroup,
    ranks: Ranks,
    kernels: MuonKernels,
) -> MuonBucket:
    """A bucket of the named matrices, which move into its buffer."""
    num_padded = _round_up(len(names), ranks.world_size)
    first = params[names[0]]
    param_buffer = first.new_zeros(num_padded, *first.shape, requires_grad=False)
    grad_buffer = torch.zeros_like(param_buffer)
    members = [
        _move(name, params[name], param_buffer[slot], grad_buffer[slot])
        for slot, name in enumerate(names)
    ]
    return MuonBucket(members, ranks, grad_buffer, group, param_buffer, len(names), kernels)


def _make_table_bucket(
    name: str, param: nn.Parameter, group: ParamGroup, ranks: Ranks
) -> TableBucket:
    """A bucket of one big tensor, which moves into a padded buffer where its rows need it."""
    num_rows = param.shape[0]
    num_padded = _round_up(num_rows, ranks.world_size)
    if num_padded == num_rows and param.is_contiguous():
        param_buffer = param.data
    else:
        param_buffer = param.data.new_zeros(num_padded, *param.shape[1:])
    grad_buffer = torch.zeros_like(param_buffer)
    member = _move(name, param, param_buffer[:num_rows], grad_buffer[:num_rows])
    return TableBucket([member], ranks, grad_buffer, group, param_buffer, num_rows)


def _make_small_bucket(
    params: Mapping[str, nn.Parameter], groups: list[ParamGroup], ranks: Ranks
) -> SmallBucket:
    """One bucket for the given small tensors, all of one dtype; the parameters stay in place."""
    first = next(iter(params.values()))
    sizes = [param.numel() for param in params.values()]
    grad_buffer = first.data.new_zeros(sum(sizes))
    members = []
    for (name, param), grad in zip(params.items(), grad_buffer.split(sizes), strict=True):
        members.append(Member(name, param, grad.view(param.shape)))
        param.grad = members[-1].grad
    used = [group for group in groups if any(name in params for name in group.names)]
    return SmallBucket(members, ranks, grad_buffer, used)


def _move(name: str, param: nn.Parameter, place: Tensor, grad: Tensor) -> Member:
    """Make `place` the parameter's storage and `grad` its gradient."""
    if place.data_ptr() != param.data_ptr():
        place.copy_(param.data)
        param.data = place
    param.grad = grad
    return Member(name, param, grad)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
