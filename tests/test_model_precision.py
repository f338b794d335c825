"""Devices and dtypes, and fp8's numbers by torch's own emulation on a CPU."""

from __future__ import annotations

import pytest
import torch

from nanoray.errors import NanorayError
from nanoray.model.config import GPTConfig
from nanoray.model.fp8 import Fp8Linear, convert_linears, convert_to_fp8, quantize
from nanoray.model.gpt import GPT, Linear
from nanoray.model.precision import has_fast_bf16, peak_flops, pick_compute_dtype, pick_device

CPU = torch.device("cpu")


def test_compute_dtype() -> None:
    expected = torch.bfloat16 if has_fast_bf16(CPU) else torch.float32
    assert pick_compute_dtype(CPU) == expected
    assert pick_compute_dtype(CPU, "float32") == torch.float32
    assert pick_compute_dtype(torch.device("mps")) == torch.float32
    with pytest.raises(NanorayError, match="float16"):
        pick_compute_dtype(CPU, "float16")
    assert pick_device().type in ("cuda", "mps", "cpu")


def test_peak_of_a_cpu_is_measured_once() -> None:
    peak = peak_flops(CPU, torch.float32)
    assert 1e9 < peak < 1e14
    assert peak_flops(CPU, torch.float32) == peak


def test_fp8_elsewhere_than_on_hopper_is_refused() -> None:
    shape = {"sequence_len": 64, "vocab_size": 64, "n_layer": 1, "n_head": 2, "n_kv_head": 2}
    model = GPT(GPTConfig(**shape, n_embd=32))
    with pytest.raises(NanorayError, match="Hopper"):
        convert_to_fp8(model)


def test_quantize_uses_the_whole_range() -> None:
    x = torch.randn(64) * 1e-3
    x8, scale = quantize(x, torch.float8_e4m3fn)
    assert x8.float().abs().max() == 448
    torch.testing.assert_close(x8.float() * scale, x, rtol=0.07, atol=1e-5)


def test_fp8_linear_is_near_the_exact_one() -> None:
    torch.manual_seed(0)
    module = torch.nn.ModuleList([Linear(64, 96), Linear(12, 4)])
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    convert_linears(module)
    linear = module[0]
    assert type(linear) is Fp8Linear
    assert type(module[1]) is Linear  # too narrow
    x = torch.randn(2, 16, 64).bfloat16().requires_grad_()
    grad = torch.randn(2, 16, 96).bfloat16()
    out = linear(x)
    out.backward(grad)
    expected = x.float() @ linear.weight.T
    grad_x = grad.float() @ linear.weight
    grad_weight = grad.float().flatten(0, 1).T @ x.float().flatten(0, 1)
    # e4m3 keeps 3 bits of mantissa, e5m2 (gradients) 2.
    for ours, exact, off in (
        (out, expected, 0.06),
        (x.grad, grad_x, 0.1),
        (linear.weight.grad, grad_weight, 0.1),
    ):
        assert (ours.float() - exact).norm() < off * exact.norm()
    odd = linear(x[:1, :5])
    torch.testing.assert_close(odd.float(), expected[:1, :5], rtol=0.02, atol=0.1)
