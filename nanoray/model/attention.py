"""One door to causal sliding-window attention: attention(q, k, v, window).

A token sees itself and `window` earlier tokens. Heads may be grouped (fewer key/value heads
than query heads). Behind the door: FlashAttention where it is installed and supported, else
flex_attention (inside compiled code) or SDPA on a GPU, and plain blocked matmuls on a CPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

BLOCK_ROWS = 128  # query rows per block on a CPU (tuned on a 2-core EPYC, T 512, head_dim 64)
MAX_BLOCKS = 4  # of a causal triangle: each is unrolled into the compiled code
_flash_attention: Callable[..., Any] | None = None  # see `choose_kernels`


def attention(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, window: int) -> Tensor:
    """Causal attention, each token over itself and `window` earlier ones; scale 1/sqrt(D).

    q is [B, T, H, D], k and v are [B, T, K, D] with H a multiple of K; all share one dtype.
    Returns [B, T, H, D] in that dtype. q and k must be normed per head, as QK-norm does: the
    CPU form takes exp() of the scores without subtracting their maximum, which is exact as
    long as they stay below 80 (QK-norm with its factor 1.2 bounds them by 1.44 sqrt(D)).
    """
    device = q_BTHD.device
    if device.type == "cpu":
        return blocked_attention(q_BTHD, k_BTKD, v_BTKD, window)
    if device.type == "cuda":
        if _flash_attention and q_BTHD.dtype in (torch.bfloat16, torch.float16):
            out = _flash_attention(q_BTHD, k_BTKD, v_BTKD, causal=True, window_size=(window, 0))
            return out[0] if isinstance(out, tuple) else out  # early FA3 also returns the lse
        if torch.compiler.is_compiling():
            return windowed_flex_attention(q_BTHD, k_BTKD, v_BTKD, window)
    return sdpa_attention(q_BTHD, k_BTKD, v_BTKD, window)


def blocked_attention(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, window: int) -> Tensor:
    """Query blocks against only the keys that they can see, by plain matmuls.

    Half of a causal score matrix is never computed, and of a windowed one most of it. Two
    forms: `_band` where the window is short, `_triangle` where it is not.
    """
    B, T, H, D = q_BTHD.shape
    K = k_BTKD.size(2)
    q_BKGTD = (q_BTHD * D**-0.5).view(B, T, K, H // K, D).permute(0, 2, 3, 1, 4)
    k_BKTD, v_BKTD = k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2)
    form = _band if 2 * window <= T else _triangle
    return form(q_BKGTD, k_BKTD, v_BKTD, window).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


def _band(q_BKGTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, window: int) -> Tensor:
    """All blocks at once, each against itself and the blocks before it that the window reaches."""
    B, K, G, T, D = q_BKGTD.shape
    rows = BLOCK_ROWS * max(1, -(-window // (2 * BLOCK_ROWS)))
    before = -(-window // rows)
    blocks = -(-T // rows)
    end = blocks * rows - T
    q_BKGNRD = F.pad(q_BKGTD, (0, 0, 0, end)).view(B, K, G, blocks, rows, D)
    q_BKNRD = q_BKGNRD.transpose(2, 3).reshape(B, K, blocks, G * rows, D)

    def spans(x_BKTD: Tensor) -> Tensor:
        x_BKNRD = F.pad(x_BKTD, (0, 0, before * rows, end)).view(B, K, -1, rows, D)
        return torch.cat([x_BKNRD[:, :, i : i + blocks] for i in range(before + 1)], dim=3)

    mask = visible(before * rows, (before + 1) * rows, 0, window, q_BKGTD.device)
    # The first blocks have padding before them; block n sees the keys from before - n on.
    block = torch.arange(blocks, device=q_BKGTD.device, dtype=torch.int32).view(-1, 1, 1)
    key = torch.arange((before + 1) * rows, device=q_BKGTD.device, dtype=torch.int32)
    mask = mask & (key >= (before - block) * rows)
    out_BKNRD = _BlockAttention.apply(q_BKNRD, spans(k_BKTD), spans(v_BKTD), mask)
    out_BKGNRD = out_BKNRD.view(B, K, blocks, G, rows, D).transpose(2, 3)
    return out_BKGNRD.reshape(B, K, G, blocks * rows, D)[:, :, :, :T]


def _triangle(q_BKGTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, window: int) -> Tensor:
    """Block by block, each against the keys up to its end and inside the window."""
    B, K, G, T, D = q_BKGTD.shape
    rows = BLOCK_ROWS * -(-T // (BLOCK_ROWS * MAX_BLOCKS))
    outs = []
    for start in range(0, T, rows):
        stop, first = min(start + rows, T), max(0, start - window)
        q_BKRD = q_BKGTD[:, :, :, start:stop].reshape(B, K, -1, D)
        mask = visible(start, stop, first, window, q_BKGTD.device)
        k_BKSD, v_BKSD = k_BKTD[:, :, first:stop], v_BKTD[:, :, first:stop]
        out_BKRD = _BlockAttention.apply(q_BKRD, k_BKSD, v_BKSD, mask)
        outs.append(out_BKRD.view(B, K, G, stop - start, D))
    return torch.cat(outs, dim=3)


class _BlockAttention(torch.autograd.Function):
    """softmax(q k^T, masked) v of blocks: q [..., G * R, D] (scaled), k and v [..., S, D].

    mask is bool [..., R, S], the same for the G query heads of a group. As in FlashAttention
    (arXiv 2205.14135) the sum of the weights divides the output, not the weights, and the
    backward pass needs no row reduction over the scores: the weights' exp() is all it keeps.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = (q @ k.transpose(-2, -1)).unflatten(-2, (-1, mask.size(-2))).float()
        weights = torch.where(mask.unsqueeze(-3), scores.exp(), 0.0)
        total = weights.sum(-1, keepdim=True).flatten(-3, -2)
        weights = weights.to(q.dtype).flatten(-3, -2)
        out = ((weights @ v).float() / total).to(q.dtype)
        ctx.save_for_backward(q, k, v, weights, total, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, total, out = ctx.saved_tensors
        grad = grads[0].float() / total
        shift = (grad * out.float()).sum(-1, keepdim=True)
        grad = grad.to(q.dtype)
        d_weights = (grad @ v.transpose(-2, -1)).float()
        d_scores = ((d_weights - shift) * weights.float()).to(q.dtype)
        d_q, d_k = d_scores @ k, d_scores.transpose(-2, -1) @ q
        return d_q, d_k, weights.transpose(-2, -1) @ grad, None


def visible(start: int, stop: int, first: int, window: int, device: torch.device) -> Tensor:
    """Which keys first..stop the queries start..stop see: bool [stop - start, stop - first]."""
    query = torch.arange(start, stop, device=device, dtype=torch.int32).unsqueeze(1)
    key = torch.arange(first, stop, device=device, dtype=torch.int32).unsqueeze(0)
    return (key <= query) & (query - key <= window)


def sdpa_attention(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, window: int) -> Tensor:
    """torch's own attention; a window shorter than the input costs an explicit mask."""
    T = q_BTHD.size(1)
    mask = None if window >= T - 1 else visible(0, T, 0, window, q_BTHD.device)
    out_BHTD = F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2),
        k_BTKD.transpose(1, 2),
        v_BTKD.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q_BTHD.size(2) != k_BTKD.size(2),
    )
    return out_BHTD.transpose(1, 2)


def windowed_flex_attention(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, window: int) -> Tensor:
    """flex_attention (arXiv 2412.05496); fast only inside torch.compile. No backward on CPU."""
    T = q_BTHD.size(1)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key <= window)

    block_mask = create_block_mask(mask_mod, None, None, T, T, device=str(q_BTHD.device))
    out_BHTD = flex_attention(
        q_BTHD.transpose(1, 2),
        k_BTKD.transpose(1, 2),
        v_BTKD.transpose(1, 2),
        block_mask=block_mask,
        enable_gqa=q_BTHD.size(2) != k_BTKD.size(2),
    )
    assert isinstance(out_BHTD, Tensor)
    return out_BHTD.transpose(1, 2)


def choose_kernels(device: torch.device) -> None:
    """See which FlashAttention this process has; compiled code could not without breaking up."""
    global _flash_attention
    if device.type == "cuda":
        _flash_attention = _load_flash_attention(device)


def _load_flash_attention(device: torch.device) -> Callable[..., Any] | None:
    """flash_attn_func of FlashAttention 3 (Hopper) or 2 (Ampere and later), if installed."""
    major, _ = torch.cuda.get_device_capability(device)
    names = (["flash_attn_interface"] if major == 9 else []) + (
        ["flash_attn"] if major >= 8 else []
    )
    for name in names:
        try:
            return importlib.import_module(name).flash_attn_func
        except ImportError:
            continue
    return None
