"""AdamW (arXiv 1711.05101), by torch's fused kernel.

On a CPU torch's kernel is as fast as an inductor-compiled update and costs no compilation; on
CUDA and MPS it is one launch for a list of tensors. Arithmetic is fp32 whatever the storage.
"""

from __future__ import annotations

from torch import Tensor
from torch.optim.adamw import adamw


def adamw_update_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
) -> None:
    """One AdamW step on tensors that share their hyperparameters, in place.

    p <- p (1 - lr wd); m, v <- moments by lerp; p <- p - lr (m / bias1) / (sqrt(v / bias2) + eps).
    The decay is multiplied by the scheduled lr and has no schedule of its own.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: tensors of equal shapes and one dtype per index.
        steps: fp32 0-d tensors on the parameters' device: steps done so far, counted up here.
    """
    adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        fused=True,
        amsgrad=False,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
