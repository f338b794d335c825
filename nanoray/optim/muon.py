"""Muon: momentum, orthogonalised. Pure functions on stacks of matrices of one shape.

The update of one matrix G, in the July form (the February form leaves out steps 2 and 4):

1. Nesterov momentum;
2. row equilibration: every row gets the RMS row norm (arXiv 2603.28254);
3. division by a little more than the Frobenius norm, then five Polar Express steps towards
   the nearest semi-orthogonal matrix (arXiv 2505.16932);
4. the Frobenius norm is set to sqrt(min(m, n)), a semi-orthogonal matrix's (arXiv 2602.21545);
5. NorMuon: a running second moment per index of the longer axis evens out its rows or
   columns without changing the norm of the whole (arXiv 2510.05491);
6. cautious weight decay: only where the update already shrinks the weight.

The recipe is nanochat's. Only step 3 is matrix products, and these run eagerly as fused
multiply-adds (`baddbmm`), which is faster than compiling them; what stands before and after is
elementwise work and small reductions, in `muon_direction` and `muon_apply_`, which a caller
may compile once for all shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Amsel, Persson, Musco, Gower, arXiv 2505.16932: 5 steps, safety factor 2e-2, cushion 2.
POLAR_EXPRESS_COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


@dataclass(frozen=True)
class MuonForm:
    """What distinguishes the July from the February update."""

    equilibrate_rows: bool
    reset_norm: bool
    norm_divisor: float
    """X is divided by norm_divisor * ||X||_F + 1e-6 before Polar Express."""
    bf16_hyperparameters: bool
    """Round lr, weight decay, their product and beta2 to bf16, as February's code did."""


MUON_FORMS = {
    "july": MuonForm(True, True, 1.01, False),
    "february": MuonForm(False, False, 1.02, True),
}


def second_moment_shape(num_rows: int, num_cols: int) -> tuple[int, int]:
    """Shape of NorMuon's second moment of one matrix: one entry per index of the longer axis."""
    return (num_rows, 1) if num_rows >= num_cols else (1, num_cols)


def muon_direction(
    grad_KMN: Tensor,
    momentum_KMN: Tensor,
    momentum: Tensor,
    form: MuonForm,
    polar_dtype: torch.dtype,
) -> Tensor:
    """Steps 1, 2 and the division of 3: the normalised direction that Polar Express starts from.

    Updates the momentum buffer in place. All norms are taken in fp32, so the bf16 form is
    rounded once.

    Args:
        grad_KMN: gradients of K matrices, fp32.
        momentum_KMN: momentum buffers, fp32, updated in place.
        momentum: 0-d fp32 tensor (a tensor, so that nothing recompiles when it changes).
        form: July or February.
        polar_dtype: dtype of the result.
    """
    # Both lerps share a term, and need no more than a product with a CPU scalar on any device.
    fresh_KMN = grad_KMN * (1 - momentum)
    momentum_KMN.mul_(momentum).add_(fresh_KMN)
    x_KMN = (momentum_KMN * momentum).add_(fresh_KMN)
    row_norm_KM1 = torch.linalg.vector_norm(x_KMN, dim=-1, keepdim=True)
    norm_K11 = torch.linalg.vector_norm(row_norm_KM1, dim=-2, keepdim=True)
    scale = torch.ones_like(norm_K11)
    if form.equilibrate_rows:
        rms_row_norm_K11 = norm_K11 / grad_KMN.shape[-2] ** 0.5
        scale = rms_row_norm_K11 / row_norm_KM1.clamp_min(1e-6)
        # The norm of the result follows from the row norms: no further pass over x.
        norm_K11 = torch.linalg.vector_norm(row_norm_KM1 * scale, dim=-2, keepdim=True)
    return x_KMN.mul_(scale / (form.norm_divisor * norm_K11 + 1e-6)).to(polar_dtype)


def polar_express(x_KMN: Tensor) -> Tensor:
    """Five Polar Express steps: singular values in (0, 1] move to about 1.

    Each step is X <- aX + (bA + cA^2)X with A = XX^T (from the other side for tall matrices,
    so that A is as small as can be). The input is left alone.
    """
    tall = x_KMN.shape[-2] > x_KMN.shape[-1]
    for a, b, c in POLAR_EXPRESS_COEFFICIENTS:
        gram = torch.bmm(x_KMN.mT, x_KMN) if tall else torch.bmm(x_KMN, x_KMN.mT)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        left, right = (x_KMN, poly) if tall else (poly, x_KMN)
        x_KMN = torch.baddbmm(x_KMN, left, right, beta=a)
    return x_KMN


def muon_apply_(
    param_KMN: Tensor,
    polar_KMN: Tensor,
    second_moment: Tensor,
    lr: Tensor,
    lr_times_decay: Tensor,
    beta2: Tensor,
    form: MuonForm,
) -> None:
    """Steps 4-6: norm reset, NorMuon and the cautious update, in fp32, in place.

    Args:
        param_KMN: K matrices, fp32, updated in place.
        polar_KMN: what `polar_express` returned; may be overwritten.
        second_moment: fp32 [K, M, 1] if M >= N else [K, 1, N], updated in place; it has no
            bias correction, and the update uses its new value.
        lr: 0-d, the learning rate, already scaled by the shape.
        lr_times_decay: 0-d, lr times the weight decay.
        beta2: 0-d, the second moment's decay.
        form: July or February.
    """
    num_rows, num_cols = polar_KMN.shape[-2:]
    mean_dim, mean_size = (-1, num_cols) if num_rows >= num_cols else (-2, num_rows)
    x_KMN = polar_KMN.float()
    mean_sq = x_KMN.square().sum(dim=mean_dim, keepdim=True) / mean_size
    norm_sq_K11 = mean_sq.sum(dim=(-2, -1), keepdim=True) * mean_size
    reset_K11 = torch.ones_like(norm_sq_K11)
    if form.reset_norm:
        reset_K11 = min(num_rows, num_cols) ** 0.5 / norm_sq_K11.sqrt().clamp_min(1e-6)
        mean_sq = mean_sq * reset_K11.square()
        norm_sq_K11 = norm_sq_K11 * reset_K11.square()
    second_moment.add_((mean_sq - second_moment) * (1 - beta2))
    scale = second_moment.clamp_min(1e-10).rsqrt()
    new_norm_sq_K11 = (mean_sq * scale.square()).sum(dim=(-2, -1), keepdim=True) * mean_size
    keep_norm_K11 = norm_sq_K11.sqrt() / new_norm_sq_K11.sqrt().clamp_min(1e-10)
    x_KMN.mul_(reset_K11 * scale * keep_norm_K11 * lr)
    shrinks_KMN = (x_KMN * param_KMN).ge_(0)  # as 1.0 and 0.0
    param_KMN.mul_(shrinks_KMN.mul_(-lr_times_decay).add_(1)).sub_(x_KMN)
