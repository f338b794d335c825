"""The GPT, whole, in nanochat's two architectures (July and February 2026).

Parameter names are nanochat's, so that its checkpoints load. Master weights are fp32 and cast
to the compute dtype per matmul. One batch goes: embed -> blocks -> finish -> head and loss.

How gradients are weighted: forward() with targets returns the SUM of the token losses. A
training loop multiplies it by 1 / (target tokens of the whole global step) before backward(),
so that neither the micro-batch nor the rank on which a token happens to lie changes its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoray.errors import NanorayError
from nanoray.model.attention import attention, choose_kernels
from nanoray.model.config import ARCHITECTURES, GPTConfig, RecipeName
from nanoray.model.loss import (
    HeadStep,
    TokenLosses,
    chunked_cross_entropy,
    head_step,
    softcapped_logits,
    token_losses,
)

SOFTCAP = 15.0
NORM_EPS = torch.finfo(torch.float32).eps  # also in bf16
MAX_COMPILED_INPUTS = 3  # training, evaluation and one more; other shapes run uncompiled


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without parameters (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rotate(x_BTHD: Tensor, cos_T1d: Tensor, sin_T1d: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864) by -theta on the two halves of each head, as nanochat does."""
    a, b = x_BTHD.chunk(2, dim=-1)
    return torch.cat((a * cos_T1d + b * sin_T1d, b * cos_T1d - a * sin_T1d), dim=-1)


class Linear(nn.Linear):
    """A matrix without bias: fp32 master weight, cast to the input's dtype per matmul."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: GPT.init_weights fills every weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
    """A table of vectors, filled by GPT.init_weights."""

    def reset_parameters(self) -> None:
        """Nothing: GPT.init_weights fills every weight."""


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        D, arch = config.n_embd, config.architecture
        self.head_dim = config.head_dim
        self.window = config.window_sizes()[layer]
        self.qk_scale = arch.qk_scale
        self.gate_channels, self.gate_scale = arch.gate_channels, arch.gate_scale
        self.c_q = Linear(D, D)
        self.c_k = Linear(D, config.kv_dim)
        self.c_v = Linear(D, config.kv_dim)
        self.c_proj = Linear(D, D)
        self.ve_gate = (
            Linear(arch.gate_channels, config.n_kv_head)
            if config.has_value_embedding(layer)
            else None
        )

    def qkv(
        self, x_BTD: Tensor, ve_BTC: Tensor | None, cos_T1d: Tensor, sin_T1d: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, D], keys and values [B, T, K, D] of the normed x, ready to attend."""
        B, T, _ = x_BTD.shape
        q_BTHD = self.c_q(x_BTD).view(B, T, -1, self.head_dim)
        k_BTKD = self.c_k(x_BTD).view(B, T, -1, self.head_dim)
        v_BTKD = self.c_v(x_BTD).view(B, T, -1, self.head_dim)
        if ve_BTC is not None:
            assert self.ve_gate is not None
            gate_BTK = self.ve_gate(x_BTD[..., : self.gate_channels]).sigmoid() * self.gate_scale
            v_BTKD = v_BTKD + gate_BTK.unsqueeze(-1) * ve_BTC.view_as(v_BTKD)
        # Rotary tables may be wider than the compute dtype; the norm brings q and k back.
        q_BTHD = norm(rotate(q_BTHD, cos_T1d, sin_T1d)) * self.qk_scale
        k_BTKD = norm(rotate(k_BTKD, cos_T1d, sin_T1d)) * self.qk_scale
        return q_BTHD.to(x_BTD.dtype), k_BTKD.to(x_BTD.dtype), v_BTKD

    def forward(
        self, x_BTD: Tensor, ve_BTC: Tensor | None, cos_T1d: Tensor, sin_T1d: Tensor
    ) -> Tensor:
        q_BTHD, k_BTKD, v_BTKD = self.qkv(x_BTD, ve_BTC, cos_T1d, sin_T1d)
        return self.c_proj(attention(q_BTHD, k_BTKD, v_BTKD, self.window).flatten(2))


class MLP(nn.Module):
    """ReLU squared between two matrices, four times as wide inside (arXiv 2109.08668)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x_BTD)).square())


class Block(nn.Module):
    """One layer. Blocks of equal window and value embedding share one compiled code."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = CausalSelfAttention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BTD: Tensor,
        x0_BTD: Tensor,
        ve_BTC: Tensor | None,
        resid_lambda: Tensor,
        x0_lambda: Tensor,
        cos_T1d: Tensor,
        sin_T1d: Tensor,
    ) -> Tensor:
        x_BTD = resid_lambda * x_BTD + x0_lambda * x0_BTD
        x_BTD = x_BTD + self.attn(norm(x_BTD), ve_BTC, cos_T1d, sin_T1d)
        return x_BTD + self.mlp(norm(x_BTD))


class GPT(nn.Module):
    """The model. The constructor leaves the weights unset: call init_weights or load_state_dict.

    config: the shape and the recipe. compute_dtype: dtype of matmuls and activations.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        D, vocab, arch = config.n_embd, config.padded_vocab_size, config.architecture
        layers = range(config.n_layer)
        self.transformer = nn.ModuleDict(
            {
                "wte": Embedding(vocab, D),
                "h": nn.ModuleList(Block(config, layer) for layer in layers),
            }
        )
        self.lm_head = Linear(D, vocab)
        self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self.smear_gate: Linear | None = None
        if arch.smear_channels:
            self.smear_gate = Linear(arch.smear_channels, 1)
            self.smear_lambda = nn.Parameter(torch.empty(1))
            self.backout_lambda = nn.Parameter(torch.empty(1))
        self.value_embeds = nn.ModuleDict(
            {
                str(layer): Embedding(vocab, config.kv_dim)
                for layer in layers
                if config.has_value_embedding(layer)
            }
        )
        cos, sin = rotary_tables(config, compute_dtype)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._parts = EAGER
        self._compiled_inputs: set[tuple[torch.Size, bool]] = set()

    @property
    def wte(self) -> Embedding:
        return cast(Embedding, self.transformer["wte"])

    @property
    def blocks(self) -> list[Block]:
        return list(cast(Iterable[Block], self.transformer["h"]))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every weight, from a CPU generator: the same on any device and thread count."""
        config, arch = self.config, self.config.architecture
        generator = torch.Generator().manual_seed(seed)

        def normal(weight: Tensor, std: float) -> None:
            weight.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator))

        def uniform(weight: Tensor, low: float, high: float) -> None:
            weight.copy_(torch.empty(weight.shape).uniform_(low, high, generator=generator))

        normal(self.wte.weight, arch.wte_std)
        normal(self.lm_head.weight, 0.001)
        bound = (3 / config.n_embd) ** 0.5  # a uniform of this bound has the std 1/sqrt(width)
        for block in self.blocks:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                uniform(linear.weight, -bound, bound)
            uniform(block.mlp.c_fc.weight, -bound * arch.fc_scale, bound * arch.fc_scale)
            block.attn.c_proj.weight.zero_()  # each block starts as the identity
            block.mlp.c_proj.weight.zero_()
            if block.attn.ve_gate is not None:
                uniform(block.attn.ve_gate.weight, 0.0, arch.gate_init_max)
        for table in self.value_embeds.values():
            uniform(cast(Embedding, table).weight, -bound, bound)
        self.resid_lambdas.copy_(torch.linspace(*arch.resid_lambda, config.n_layer))
        self.x0_lambdas.copy_(torch.linspace(*arch.x0_lambda, config.n_layer))
        if self.smear_gate is not None:
            uniform(self.smear_gate.weight, 0.0, 0.02)
            self.smear_lambda.zero_()
            self.backout_lambda.fill_(0.2)

    def place(self, device: torch.device) -> GPT:
        """Move to the device; on a GPU the (value) embedding tables take the compute dtype.

        Their Adam moments follow them; half the memory, and no harm (nanochat's finding).
        """
        self.to(device)
        choose_kernels(device)
        if device.type != "cpu":
            self.wte.to(self.compute_dtype)
            self.value_embeds.to(self.compute_dtype)
        return self

    def forward(
        self, idx_BT: Tensor, targets_BT: Tensor | None = None, reduction: str = "sum"
    ) -> Tensor:
        """Logits, or the loss.

        idx_BT: token ids. Without targets: softcapped fp32 logits [B, T, vocab_size], never by
        compiled code, so that inputs of any length cost no compilation. With targets [B, T]
        (-1 is ignored): the fp32 SUM of the token losses in nats, or with reduction="none" the
        losses [B, T]. Raises NanorayError when T exceeds the rotary length.
        """
        if targets_BT is None:
            head_VD = self.lm_head.weight[: self.config.vocab_size].to(self.compute_dtype)
            return softcapped_logits(self.hidden(idx_BT), head_VD, SOFTCAP)
        parts = self._parts_for(idx_BT)
        loss = chunked_cross_entropy(
            self.hidden(idx_BT, parts).flatten(0, 1),
            self.lm_head.weight,
            targets_BT.flatten(),
            self.config.vocab_size,
            SOFTCAP,
            reduction=reduction,
            step=parts.head_step,
            token_losses=parts.token_losses,
        )
        return loss.view_as(targets_BT) if reduction == "none" else loss

    def hidden(self, idx_BT: Tensor, parts: Parts | None = None) -> Tensor:
        """Hidden states [B, T, D] after the final norm, in the compute dtype: the head's input."""
        parts = parts or EAGER
        T = idx_BT.size(1)
        if self.config.rotary_len < T:
            raise NanorayError(
                f"the input has {T} tokens, but this model reads at most {self.config.rotary_len} "
                "(its rotary length): crop the input."
            )
        cos_T1d, sin_T1d = self.cos[:T], self.sin[:T]
        x_BTD = parts.embed(self, self.wte(idx_BT).to(self.compute_dtype))
        # A tensor of its own, or the first block's equal arguments would compile a second time.
        x0_BTD = middle_BTD = x_BTD.view_as(x_BTD)
        lambdas = zip(self.resid_lambdas.unbind(), self.x0_lambdas.unbind())
        for layer, (block, (resid, x0)) in enumerate(zip(self.blocks, lambdas)):
            ve_BTC = self.value_embedding(layer, idx_BT)
            x_BTD = parts.block(block, x_BTD, x0_BTD, ve_BTC, resid, x0, cos_T1d, sin_T1d)
            if layer == self.config.backout_layer:
                middle_BTD = x_BTD
        return parts.finish(self, x_BTD, middle_BTD)

    def embed(self, wte_BTD: Tensor) -> Tensor:
        """Norm, then smear (July): x_t + lambda * sigmoid(W x_t[:24]) * x_{t-1}, t > 0."""
        x_BTD = norm(wte_BTD)
        if self.smear_gate is None:
            return x_BTD
        rest_BTD = x_BTD[:, 1:]
        gate_BT1 = self.smear_gate(rest_BTD[..., : self.smear_gate.in_features]).sigmoid()
        smeared_BTD = rest_BTD + self.smear_lambda.to(x_BTD.dtype) * gate_BT1 * x_BTD[:, :-1]
        return torch.cat((x_BTD[:, :1], smeared_BTD), dim=1)

    def value_embedding(self, layer: int, idx_BT: Tensor) -> Tensor | None:
        """The layer's value embeddings [B, T, kv_dim] in the compute dtype, if it has any."""
        if not self.config.has_value_embedding(layer):
            return None
        return self.value_embeds[str(layer)](idx_BT).to(self.compute_dtype)

    def finish(self, x_BTD: Tensor, middle_BTD: Tensor) -> Tensor:
        """Backout (July): subtract the middle layer's residual stream; then the final norm."""
        if self.smear_gate is not None:
            x_BTD = x_BTD - self.backout_lambda.to(x_BTD.dtype) * middle_BTD
        return norm(x_BTD)

    def use_parts(self, parts: Parts) -> None:
        """Let compiled parts run the training path (see compile.py)."""
        self._parts = parts
        self._compiled_inputs.clear()

    def _parts_for(self, idx_BT: Tensor) -> Parts:
        """The compiled parts for the first few kinds of input; further kinds stay eager."""
        kind = (idx_BT.shape, torch.is_grad_enabled())
        if kind not in self._compiled_inputs:
            if len(self._compiled_inputs) == MAX_COMPILED_INPUTS:
                return EAGER
            self._compiled_inputs.add(kind)
        return self._parts


@dataclass(frozen=True)
class Parts:
    """The pieces of the training path, each a compiled region of its own or plain Python.

    Regions per block rather than one whole graph: equal blocks compile once, and in the
    backward pass each block's gradients are there before the next block starts, so that
    their communication can overlap with it.
    """

    embed: Callable[[GPT, Tensor], Tensor] = GPT.embed
    block: Callable[..., Tensor] = Block.forward
    finish: Callable[[GPT, Tensor, Tensor], Tensor] = GPT.finish
    head_step: HeadStep = head_step
    token_losses: TokenLosses = token_losses


EAGER = Parts()


def rotary_tables(config: GPTConfig, compute_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [rotary_len, 1, head_dim / 2], computed in fp32, then cast."""
    arch = config.architecture
    channel = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    frequency = 1.0 / arch.rope_base ** (channel / config.head_dim)
    angle = torch.outer(torch.arange(config.rotary_len, dtype=torch.float32), frequency)
    dtype = torch.bfloat16 if arch.rotary_always_bf16 else compute_dtype
    return angle.cos().to(dtype).unsqueeze(1), angle.sin().to(dtype).unsqueeze(1)


def strip_compile_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names that an uncompiled nanochat model has."""
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in state_dict.items()}


def detect_recipe(state_dict: Mapping[str, Tensor]) -> RecipeName:
    """Which recipe's architecture a checkpoint's tensors have; their config does not tell.

    February: value gates read 32 channels, neither smear nor backout. Raises NanorayError when
    the tensors are of neither architecture.
    """
    tensors = strip_compile_prefix(state_dict)
    widths = {tensor.size(1) for name, tensor in tensors.items() if name.endswith("ve_gate.weight")}
    has_smear = {"smear_gate.weight", "smear_lambda", "backout_lambda"} & tensors.keys()
    for recipe, arch in ARCHITECTURES.items():
        if widths == {arch.gate_channels} and bool(has_smear) == bool(arch.smear_channels):
            return cast(RecipeName, recipe)
    raise NanorayError(
        f"this checkpoint is of neither recipe: its value gates read {sorted(widths)} channels "
        f"and it has {', '.join(sorted(has_smear)) or 'no smear'}; July and February are known."
    )
