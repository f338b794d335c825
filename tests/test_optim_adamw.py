"""Our AdamW against torch's class and against its formula."""

from __future__ import annotations

import pytest
import torch

from nanoray.optim.adamw import adamw_update_


def test_equals_torch_adamw_with_a_scheduled_lr() -> None:
    torch.manual_seed(0)
    ours = torch.randn(33, 7)
    theirs = torch.nn.Parameter(ours.clone())
    lr, betas, decay, eps = 0.01, (0.8, 0.995), 0.1, 1e-10
    reference = torch.optim.AdamW(
        [theirs], lr=lr, betas=betas, weight_decay=decay, eps=eps, fused=False
    )
    m, v, step = torch.zeros_like(ours), torch.zeros_like(ours), torch.zeros(1)
    for k in range(10):
        grad = torch.randn(33, 7)
        multiplier = 1.0 - k / 20
        theirs.grad = grad.clone()
        reference.param_groups[0]["lr"] = lr * multiplier
        reference.step()
        adamw_update_(
            [ours],
            [grad],
            [m],
            [v],
            [step],
            lr=lr * multiplier,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=decay,
            eps=eps,
        )
    torch.testing.assert_close(ours, theirs.data, atol=1e-5, rtol=1e-5)
    assert step.item() == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_formula(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    param = torch.randn(50).to(dtype)
    grad = torch.randn(50).to(dtype)
    m, v, step = torch.zeros_like(param), torch.zeros_like(param), torch.zeros(1)
    lr, beta1, beta2, decay, eps = 0.1, 0.8, 0.9, 0.5, 1e-10
    p, g = param.float(), grad.float()
    new_m, new_v = (1 - beta1) * g, (1 - beta2) * g * g
    p = p * (1 - lr * decay)
    p = p - lr * (new_m / (1 - beta1)) / ((new_v / (1 - beta2)).sqrt() + eps)
    adamw_update_(
        [param],
        [grad],
        [m],
        [v],
        [step],
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=decay,
        eps=eps,
    )
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(param.float(), p, atol=1e-6, rtol=rtol)
    torch.testing.assert_close(m.float(), new_m, atol=1e-6, rtol=rtol)
