"""Muon's functions against a naive reference, and what Polar Express promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nanoray.optim.muon import (
    MUON_FORMS,
    POLAR_EXPRESS_COEFFICIENTS,
    muon_apply_,
    muon_direction,
    polar_express,
    second_moment_shape,
)

SHAPES = [(6, 10), (10, 6), (8, 8), (1, 5), (5, 1), (2, 12)]


def naive_muon(
    param: Tensor,
    grad: Tensor,
    buffer: Tensor,
    second: Tensor,
    mu: float,
    lr: float,
    decay: float,
    beta2: float,
    *,
    july: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One matrix, one step, in the words of recipe.md: new parameter, buffer, second moment."""
    m, n = param.shape
    buffer = buffer + (grad - buffer) * (1 - mu)
    g = grad + (buffer - grad) * mu
    if july:
        rms_row_norm = g.norm() / m**0.5
        g = torch.stack([row * (rms_row_norm / max(row.norm().item(), 1e-6)) for row in g])
    x = g / ((1.01 if july else 1.02) * g.norm() + 1e-6)
    for a, b, c in POLAR_EXPRESS_COEFFICIENTS:
        if m > n:
            gram = x.T @ x
            x = a * x + x @ (b * gram + c * gram @ gram)
        else:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
    if july:
        x = x * (min(m, n) ** 0.5 / x.norm())
    dim = 1 if m >= n else 0
    second = beta2 * second + (1 - beta2) * (x * x).mean(dim=dim, keepdim=True)
    even = x / second.clamp_min(1e-10).sqrt()
    even = even * (x.norm() / even.norm())
    mask = (even * param >= 0).to(param.dtype)
    return param - lr * (even + decay * param * mask), buffer, second


@pytest.mark.parametrize("recipe", ["july", "february"])
@pytest.mark.parametrize("shape", SHAPES)
def test_stack_equals_naive_reference(recipe: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    num_matrices, mu, lr, decay, beta2 = 3, 0.9, 0.05, 0.4, 0.9
    form = MUON_FORMS[recipe]
    param = torch.randn(num_matrices, *shape)
    buffer = torch.zeros_like(param)
    second = torch.zeros(num_matrices, *second_moment_shape(*shape))
    expected = [(param[i], buffer[i], second[i]) for i in range(num_matrices)]
    param, buffer, second = param.clone(), buffer.clone(), second.clone()
    for _ in range(3):
        grad = torch.randn(num_matrices, *shape)
        expected = [
            naive_muon(p, grad[i], b, s, mu, lr, decay, beta2, july=recipe == "july")
            for i, (p, b, s) in enumerate(expected)
        ]
        x = muon_direction(grad, buffer, torch.tensor(mu), form, torch.float32)
        muon_apply_(
            param,
            polar_express(x),
            second,
            torch.tensor(lr),
            torch.tensor(lr * decay),
            torch.tensor(beta2),
            form,
        )
    for i, (p, b, s) in enumerate(expected):
        torch.testing.assert_close(param[i], p, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(buffer[i], b, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(second[i], s, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 128), (128, 64)])
@pytest.mark.parametrize("recipe", ["july", "february"])
def test_singular_values_come_near_one(
    recipe: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    grad = torch.randn(4, *shape)
    x = muon_direction(grad, torch.zeros_like(grad), torch.tensor(0.9), MUON_FORMS[recipe], dtype)
    values = torch.linalg.svdvals(polar_express(x).float())
    assert values.min() >= 0.80
    assert values.max() <= 1.16


@pytest.mark.parametrize("recipe", ["july", "february"])
def test_zero_gradients_stay_finite(recipe: str) -> None:
    form = MUON_FORMS[recipe]
    param = torch.randn(2, 4, 6)
    param[1] = 0.0
    grad = torch.zeros(2, 4, 6)
    grad[0, 0] = 1.0  # and rows of zeros
    before, buffer = param.clone(), torch.zeros_like(param)
    second = torch.zeros(2, 1, 6)
    x = muon_direction(grad, buffer, torch.tensor(0.9), form, torch.float32)
    ones = torch.tensor(0.1)
    muon_apply_(param, polar_express(x), second, ones, ones, ones, form)
    assert torch.isfinite(param).all()
    assert torch.isfinite(second).all()
    assert not torch.equal(param[0], before[0])
    assert torch.equal(param[1], before[1])


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    form = MUON_FORMS["july"]
    direction = torch.compile(muon_direction, dynamic=True, fullgraph=True)
    apply_ = torch.compile(muon_apply_, dynamic=True, fullgraph=True)
    torch.manual_seed(2)
    for shape in [(3, 8, 12)]:
        params = [torch.randn(shape)] * 2
        params = [p.clone() for p in params]
        grad = torch.randn(shape)
        buffers = [torch.zeros(shape) for _ in range(2)]
        seconds = [torch.zeros(shape[0], *second_moment_shape(*shape[1:])) for _ in range(2)]
        for i, (first, last) in enumerate([(muon_direction, muon_apply_), (direction, apply_)]):
            x = first(grad, buffers[i], torch.tensor(0.9), form, torch.float32)
            scalars = (torch.tensor(0.02), torch.tensor(0.01), torch.tensor(0.9))
            last(params[i], polar_express(x), seconds[i], *scalars, form)
        torch.testing.assert_close(params[0], params[1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(buffers[0], buffers[1], atol=1e-6, rtol=1e-5)
