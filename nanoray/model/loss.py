"""Head, softcap and cross-entropy in one, by chunks of tokens: the logits never exist whole.

For a training loss the gradients are computed in the forward pass, chunk by chunk, while a
chunk's logits are at hand (the idea of Liger Kernel's fused linear cross-entropy, arXiv
2410.10989); the backward pass only multiplies them by the incoming scalar.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -1  # the target of a position that does not count
# Logits alive at a time. CPU: what stays in the caches (tuned on a 2-core EPYC with 32 MB of
# L3, vocabulary 4,096); GPU: enough rows to fill the matmul units, half a GB in bf16.
_CPU_CHUNK_LOGITS = 2 * 2**20
_GPU_CHUNK_LOGITS = 256 * 2**20
_MIN_CHUNK_ROWS = 256  # fewer rows make the weight gradient's accumulation the bottleneck

HeadStep = Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
TokenLosses = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def pick_chunk(num_rows: int, vocab_size: int, device: torch.device) -> int:
    """Rows per chunk: a power of two by device and vocabulary, not far above num_rows."""
    budget = _CPU_CHUNK_LOGITS if device.type == "cpu" else _GPU_CHUNK_LOGITS
    rows = max(_MIN_CHUNK_ROWS, 1 << (budget // vocab_size).bit_length() - 1)
    return min(rows, 1 << (num_rows - 1).bit_length())


def softcapped_logits(x_ND: Tensor, weight_VD: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(x W^T / softcap) in fp32, [N, V]; the matmul runs in x's dtype."""
    return softcap * torch.tanh((x_ND @ weight_VD.T).float() / softcap)


def head_step(
    x_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, weight_grad_VD: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    """One chunk: (loss sum in fp32, gradient of x); adds to weight_grad_VD in place.

    One pass over the logits: exp() of a logit's distance to the target's cannot overflow, as the
    softcap bounds both, and the softmax's divisor scales the rows of the matmuls' small operands
    instead of the gradient. With r = 1 / (exp(2z/c) + 1) the capped logit is c - 2cr and its
    slope 4r(1 - r); vectorised exp costs half of vectorised tanh.
    """
    z_RV = x_RD @ weight_VD.T
    counted_R1 = (targets_R != IGNORED).unsqueeze(1)
    target_R1 = targets_R.clamp(min=0).unsqueeze(1)
    r_RV = _half_gap(z_RV, softcap)
    r_R1 = _half_gap(z_RV.gather(1, target_R1), softcap)
    exp_RV = torch.exp(2 * softcap * (r_R1 - r_RV))
    total_R1 = exp_RV.sum(1, keepdim=True)
    scaled_dz_RV = (exp_RV * (4 * r_RV * (1 - r_RV))).to(x_RD.dtype)
    # The target's own entry is replaced, in fp32: p - 1 of a rounded p would lose its digits.
    own_R1 = (1 - total_R1) * (4 * r_R1 * (1 - r_R1))
    scaled_dz_RV = scaled_dz_RV.scatter(1, target_R1, own_R1.to(x_RD.dtype))
    scale_R1 = counted_R1 / total_R1
    weight_grad_VD.add_(scaled_dz_RV.T @ (x_RD * scale_R1).to(x_RD.dtype))
    x_grad_RD = ((scaled_dz_RV @ weight_VD) * scale_R1).to(x_RD.dtype)
    return (total_R1.log() * counted_R1).sum(), x_grad_RD


def _half_gap(z: Tensor, softcap: float) -> Tensor:
    """(1 - tanh(z / softcap)) / 2, in fp32."""
    return 1 / (torch.exp(z.float() * (2 / softcap)) + 1)


def token_losses(x_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, softcap: float) -> Tensor:
    """Cross-entropy [R] of each token in fp32; 0 where the target is ignored."""
    logits_RV = softcapped_logits(x_RD, weight_VD, softcap)
    return F.cross_entropy(logits_RV, targets_R, ignore_index=IGNORED, reduction="none")


def chunked_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    vocab_size: int,
    softcap: float,
    chunk: int | None = None,
    reduction: str = "sum",
    step: HeadStep = head_step,
    token_losses: TokenLosses = token_losses,
) -> Tensor:
    """Cross-entropy of softcapped logits, differentiable in x and weight.

    x_ND: hidden states in the compute dtype; weight_VD: the head in fp32 (rows from vocab_size
    on are padding and take no part); targets_N: token ids, -1 is ignored. chunk: rows per
    chunk (None: chosen by device and vocabulary). step, token_losses: compiled forms.
    Returns the fp32 SUM of the losses of all counted tokens, or with reduction="none" the
    losses [N] (0 where ignored; their gradient recomputes each chunk's logits).
    """
    assert reduction in ("sum", "none")
    weight_VD, targets_N = weight_VD[:vocab_size], targets_N.long()
    rows = chunk or pick_chunk(x_ND.size(0), vocab_size, x_ND.device)
    needs_grad = torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad)
    if reduction == "sum" and needs_grad:
        return _ChunkedLossSum.apply(x_ND, weight_VD, targets_N, softcap, rows, step)
    weight_VD = weight_VD.to(x_ND.dtype)
    losses = [
        checkpoint(token_losses, x_RD, weight_VD, targets_R, softcap, use_reentrant=False)
        if needs_grad
        else token_losses(x_RD, weight_VD, targets_R, softcap)
        for x_RD, targets_R in _chunks(x_ND, targets_N, rows)
    ]
    losses_N = torch.cat(losses)[: targets_N.size(0)]
    return losses_N.sum() if reduction == "sum" else losses_N


def _chunks(x_ND: Tensor, targets_N: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Slices of `rows` rows; the last one is filled up, so that one compiled shape serves all."""
    for start in range(0, x_ND.size(0), rows):
        x_RD, targets_R = x_ND[start : start + rows], targets_N[start : start + rows]
        missing = rows - x_RD.size(0)
        if missing:
            x_RD = F.pad(x_RD, (0, 0, 0, missing))
            targets_R = F.pad(targets_R, (0, missing), value=IGNORED)
        yield x_RD, targets_R


class _ChunkedLossSum(torch.autograd.Function):
    """Sum of the token losses; both gradients are ready when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        softcap: float,
        rows: int,
        step: HeadStep,
    ) -> Tensor:
        weight_grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        cast_VD = weight_VD.to(x_ND.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        x_grads = []
        for x_RD, targets_R in _chunks(x_ND, targets_N, rows):
            chunk_loss, x_grad_RD = step(x_RD, cast_VD, targets_R, weight_grad_VD, softcap)
            loss = loss + chunk_loss
            x_grads.append(x_grad_RD)
        x_grad_ND = torch.cat(x_grads)[: x_ND.size(0)]
        ctx.save_for_backward(x_grad_ND, weight_grad_VD.to(weight_VD.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_grad_ND, weight_grad_VD = ctx.saved_tensors
        scale = grads[0]
        x_grad_ND = (x_grad_ND.float() * scale).to(x_grad_ND.dtype)  # the scale stays fp32
        return x_grad_ND, weight_grad_VD * scale, *[None] * 4
