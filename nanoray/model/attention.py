"""One door to causal sliding-window attention: attention(q, k, v, window).

A token sees itself and `window` earlier tokens. Heads may be grouped (fewer key/value heads
than query heads). Behind the door: FlashAttention where it is installed and supported, else
flex_attention (inside compiled code) or SDPA on a GPU, and plain blocked matmuls on a CPU.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

BLOCK_ROWS = 128  # query rows per block on a CPU (tuned on a 2-core EPYC, T 512, head_dim 64)
MAX_BLOCKS = 8  # longer inputs get larger blocks: each block is unrolled into the compiled code


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
        flash = load_flash_attention(device)
        if flash is not None and q_BTHD.dtype in (torch.bfloat16, torch.float16):
            out = flash(q_BTHD, k_BTKD, v_BTKD, causal=True, window_size=(window, 0))
            return out[0] if isinstance(out, tuple) else out  # early FA3 also returns the lse
        if torch.compiler.is_compiling():
            return windowed_flex_attention(q_BTHD, k_BTKD, v_BTKD, window)
    return sdpa_attention(q_BTHD, k_BTKD, v_BTKD, window)


def blocked_attention(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, window: int) -> Tensor:
    """Query blocks against the keys up to the block and inside the window, by plain matmuls.

    Half of a causal score matrix is never computed, and of a windowed one most of it. The sum
    of the weights divides the output rather than the weights, as FlashAttention does (arXiv
    2205.14135): autograd then needs no row reduction over the scores' gradient.
    """
    B, T, H, D = q_BTHD.shape
    K = k_BTKD.size(2)
    G = H // K
    q_BKGTD = (q_BTHD * D**-0.5).view(B, T, K, G, D).permute(0, 2, 3, 1, 4)
    k_BKDT = k_BTKD.permute(0, 2, 3, 1)
    v_BKTD = v_BTKD.transpose(1, 2)
    rows = BLOCK_ROWS * -(-T // (BLOCK_ROWS * MAX_BLOCKS))
    outs = []
    for start in range(0, T, rows):
        stop, first = min(start + rows, T), max(0, start - window)
        q_BKRD = q_BKGTD[:, :, :, start:stop].reshape(B, K, -1, D)
        scores = (q_BKRD @ k_BKDT[..., first:stop]).view(B, K, G, stop - start, stop - first)
        mask = visible(start, stop, first, window, q_BTHD.device)
        weights = torch.where(mask, scores.float().exp(), 0.0)
        v_BKSD = v_BKTD[:, :, first:stop]
        out_BKRD = weights.to(v_BKSD.dtype).view(B, K, -1, stop - first) @ v_BKSD
        out_BKGRD = out_BKRD.view(B, K, G, -1, D).float() / weights.sum(-1, keepdim=True)
        outs.append(out_BKGRD.to(q_BTHD.dtype))
    return torch.cat(outs, dim=3).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


def visible(start: int, stop: int, first: int, window: int, device: torch.device) -> Tensor:
    """Which keys first..stop the queries start..stop see: bool [stop - start, stop - first]."""
    query = torch.arange(start, stop, device=device).unsqueeze(1)
    key = torch.arange(first, stop, device=device).unsqueeze(0)
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


@functools.cache
def load_flash_attention(device: torch.device) -> Callable[..., Tensor] | None:
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
