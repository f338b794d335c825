"""Every form of attention equals the naive one: windows, grouped heads, any length."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanoray.model.attention import (
    attention,
    blocked_attention,
    sdpa_attention,
    windowed_flex_attention,
)


def naive_attention(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, window: int) -> Tensor:
    """By the definition, a token and a head at a time."""
    B, T, H, D = q_BTHD.shape
    group = H // k_BTKD.size(2)
    out = torch.zeros_like(q_BTHD)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = slice(max(0, t - window), t + 1)
                scores = k_BTKD[b, seen, h // group] @ q_BTHD[b, t, h] / D**0.5
                out[b, t, h] = scores.softmax(0) @ v_BTKD[b, seen, h // group]
    return out


def qkv(B: int, T: int, H: int, K: int, D: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, T, heads, D, generator=generator) for heads in (H, K, K))
    return [F.rms_norm(q, (D,)) * 1.2, F.rms_norm(k, (D,)) * 1.2, v]


@settings(max_examples=25, deadline=None)
@given(
    T=st.integers(1, 300),
    window=st.integers(1, 320),
    K=st.integers(1, 2),
    G=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_blocked_equals_sdpa(T: int, window: int, K: int, G: int, seed: int) -> None:
    q, k, v = qkv(2, T, K * G, K, 8, seed)
    expected = sdpa_attention(q, k, v, window)
    torch.testing.assert_close(blocked_attention(q, k, v, window), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("T", "window"), [(1, 1), (37, 5), (140, 139), (150, 40), (140, 500)])
@pytest.mark.parametrize("K", [2, 4])
def test_forms_equal_the_naive_one(T: int, window: int, K: int) -> None:
    q, k, v = qkv(1, T, 4, K, 16)
    expected = naive_attention(q, k, v, window)
    for form in (blocked_attention, sdpa_attention, attention):
        torch.testing.assert_close(form(q, k, v, window), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("T", "window"), [(150, 40), (300, 128), (256, 256), (600, 600)])
def test_gradients_equal(T: int, window: int) -> None:
    inputs = qkv(2, T, 4, 2, 16)
    weights = torch.randn(2, T, 4, 16)
    grads = []
    for form in (blocked_attention, sdpa_attention):
        leaves = [x.double().requires_grad_() for x in inputs]
        (form(*leaves, window) * weights).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, expected in zip(*grads):
        # The blocked form takes exp() in fp32 whatever the inputs' dtype.
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)


def test_bf16_stays_close() -> None:
    q, k, v = qkv(2, 512, 4, 4, 64)
    expected = sdpa_attention(q, k, v, 128)
    ours = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), 128)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - expected).abs().max() < 0.03


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("window", [40, 300])
def test_flex_equals_sdpa(window: int) -> None:
    q, k, v = qkv(1, 256, 4, 2, 16)
    with torch.no_grad():
        out = windowed_flex_attention(q, k, v, window)
    torch.testing.assert_close(out, sdpa_attention(q, k, v, window), rtol=0, atol=2e-6)
