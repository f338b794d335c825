"""The chunked loss equals the plain one, and costs less memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanoray.model.loss import chunked_cross_entropy, pick_chunk

SOFTCAP = 15.0


def plain_losses(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, vocab_size: int) -> Tensor:
    logits = (x_ND @ weight_VD.to(x_ND.dtype).T)[:, :vocab_size].float()
    logits = SOFTCAP * torch.tanh(logits / SOFTCAP)
    return F.cross_entropy(logits, targets_N, ignore_index=-1, reduction="none")


def make(N: int, D: int, vocab: int, padded: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(N, D, generator=generator)
    weight_VD = torch.randn(padded, D, generator=generator)
    targets_N = torch.randint(-1, vocab, (N,), generator=generator)
    return x_ND.requires_grad_(), weight_VD.requires_grad_(), targets_N


@settings(max_examples=30, deadline=None)
@given(
    N=st.integers(1, 70),
    vocab=st.integers(1, 90),
    padding=st.integers(0, 20),
    chunk=st.integers(1, 80),
    reduction=st.sampled_from(["sum", "none"]),
    seed=st.integers(0, 99),
)
def test_losses_and_gradients_equal_the_plain_ones(
    N: int, vocab: int, padding: int, chunk: int, reduction: str, seed: int
) -> None:
    x_ND, weight_VD, targets_N = make(N, 12, vocab, vocab + padding, seed)
    weights_N = torch.rand(N) if reduction == "none" else torch.full((N,), 0.3)
    expected = plain_losses(x_ND, weight_VD, targets_N, vocab)
    expected_grads = torch.autograd.grad((expected * weights_N).sum(), (x_ND, weight_VD))

    loss = chunked_cross_entropy(
        x_ND, weight_VD, targets_N, vocab, SOFTCAP, chunk=chunk, reduction=reduction
    )
    grads = torch.autograd.grad((loss * weights_N[: loss.numel()]).sum(), (x_ND, weight_VD))
    scale = max(1.0, expected.sum().item()) if reduction == "sum" else 15.0
    reference = expected.sum() if reduction == "sum" else expected
    torch.testing.assert_close(loss, reference.view_as(loss), rtol=0, atol=1e-6 * scale)
    for ours, theirs in zip(grads, expected_grads):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_ignored_targets_give_nothing() -> None:
    x_ND, weight_VD, targets_N = make(40, 8, 30, 64, seed=1)
    targets_N[:] = -1
    loss = chunked_cross_entropy(x_ND, weight_VD, targets_N, 30, SOFTCAP)
    loss.backward()
    assert loss.item() == 0
    assert x_ND.grad is not None
    assert weight_VD.grad is not None
    assert not x_ND.grad.any()
    assert not weight_VD.grad.any()


def test_saturated_logits_stay_finite() -> None:
    x_ND, weight_VD, targets_N = make(20, 8, 30, 30, seed=2)
    with torch.no_grad():
        weight_VD *= 1e4
    loss = chunked_cross_entropy(x_ND, weight_VD, targets_N, 30, SOFTCAP)
    loss.backward()
    assert torch.isfinite(loss)
    assert x_ND.grad is not None
    assert torch.isfinite(x_ND.grad).all()
    expected = plain_losses(x_ND, weight_VD, targets_N, 30).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)


def test_bf16_gradients_of_confident_predictions_keep_their_digits() -> None:
    """p - 1 is computed before rounding: the target's own gradient is small and still exact."""
    x_ND = torch.eye(4, 8).bfloat16().requires_grad_()
    weight_VD = (14 * torch.eye(8)).requires_grad_()
    targets_N = torch.arange(4)
    chunked_cross_entropy(x_ND, weight_VD, targets_N, 8, SOFTCAP).backward()
    exact = weight_VD.detach().clone().requires_grad_()
    plain_losses(x_ND.detach().float(), exact, targets_N, 8).sum().backward()
    assert exact.grad is not None
    torch.testing.assert_close(weight_VD.grad, exact.grad, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize(("vocab", "rows"), [(4096, 512), (32768, 256), (257, 4096)])
def test_chunk_adapts_to_the_vocabulary(vocab: int, rows: int) -> None:
    cpu = torch.device("cpu")
    assert pick_chunk(10**6, vocab, cpu) == rows
    assert pick_chunk(100, vocab, cpu) == 128
    assert pick_chunk(10**6, vocab, torch.device("cuda")) > rows
