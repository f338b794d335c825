"""A GPT's weights as inference wants them: cast, folded into each other and packed, once.

What is folded, so that a token costs fewer and larger operations:

- RMSNorm over D channels is sqrt(D) times `unit`. The factor goes into the matrix that follows,
  and for queries and keys into the scale of the attention.
- The channels of queries and keys are reordered so that rotary pairs lie side by side: a pair is
  one complex number, turned by one multiplication. Scores do not change, both being reordered.
- Queries, keys, values and value gates are one matrix.
- What depends on a token id alone is one table: the normed embedding, the value embeddings of
  all layers with their gates' scale, the smear gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoray.model.config import GPTConfig
from nanoray.model.gpt import NORM_EPS, norm

_PACK_ROWS = 64  # oneDNN's layout for blocks of rows; a few rows are as fast in it


class Matrix:
    """x -> x W^T for a weight [out, in] that stays as it is.

    CPUs read it in oneDNN's packed layout. At the 16 to 256 rows of inference that takes 55 to
    75 % of F.linear's time in fp32 (MKL, on an AMD EPYC), and in bf16 saves packing at each call.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        self._packed = _can_pack(weight_OI)
        self._weight = weight_OI
        if self._packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _PACK_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        """x W^T."""
        return self._pointwise(x, "none") if self._packed else F.linear(x, self._weight)

    def relu(self, x: Tensor) -> Tensor:
        """relu(x W^T)."""
        return self._pointwise(x, "relu") if self._packed else F.linear(x, self._weight).relu_()

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """x W^T + other."""
        if not self._packed:
            return F.linear(x, self._weight).add_(other)
        binary = torch.ops.mkldnn._linear_pointwise.binary
        summed: Tensor = binary(x, other, self._weight, None, "add")
        return summed

    def _pointwise(self, x: Tensor, function: str) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, None, function, [], "")
        return y


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class Unit:
    """norm() without its constant: x / sqrt(|x|^2 + D eps), over the last dimension, D wide."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self._floor = torch.tensor((channels * NORM_EPS) ** 0.5, device=device)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """In x's dtype, or into `out`."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        length.hypot_(self._floor)
        return (x / length).to(x.dtype) if out is None else torch.div(x, length, out=out)


@dataclass(frozen=True)
class Layer:
    """One block's weights."""

    window: int
    resid_lambda: float
    qkvg: Matrix  # rows of queries, keys, values and value gates (0 or K), then padding
    proj: Matrix
    fc: Matrix
    mlp_proj: Matrix
    value_columns: slice | None  # of the table


class Weights:
    """All weights on `device` in `dtype`, from a GPT's state_dict of any device and dtype.

    Attributes:
        table_VC: a token id's normed embedding, value embeddings and (July, last column) smear
            gate. Its last row, of no token, is zero: what stands before the first token.
        x0_lambdas_L111: a factor a layer.
        attention_scale: of the products of unit queries and keys.
    """

    def __init__(
        self,
        config: GPTConfig,
        state_dict: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        before: Weights | None = None,
    ) -> None:
        """`before`, of the same config, device and dtype, gives its table's memory away."""

        # Copies in any case: the trainer may change its own tensors while we sample.
        def weight(name: str, factor: float = 1.0) -> Tensor:
            tensor = state_dict[name].detach()
            return (tensor * factor).to(device, dtype, copy=factor == 1.0)

        arch, D = config.architecture, config.n_embd
        self.attention_scale = arch.qk_scale**2 * config.head_dim**0.5
        self.head = Matrix(weight("lm_head.weight")[: config.vocab_size].contiguous())
        self.x0_lambdas_L111 = weight("x0_lambdas").view(-1, 1, 1, 1)
        self.backout_lambda = float(state_dict["backout_lambda"]) if arch.smear_channels else 0.0
        columns = [norm(weight("transformer.wte.weight"))]
        width = D
        self.layers = []
        for i, (window, resid_lambda) in enumerate(
            zip(config.window_sizes(), state_dict["resid_lambdas"].tolist())
        ):
            block = f"transformer.h.{i}"
            after_norm = D**0.5
            qkvg = [weight(f"{block}.attn.c_{name}.weight", after_norm) for name in "qkv"]
            qkvg[:2] = [pairs_together(rows, config.head_dim) for rows in qkvg[:2]]
            value_columns = None
            if config.has_value_embedding(i):
                gate_KC = weight(f"{block}.attn.ve_gate.weight", after_norm)
                # Up to 16 rows, for aligned outputs.
                missing = -len(gate_KC) % 16
                qkvg.append(F.pad(gate_KC, (0, D - gate_KC.size(1), 0, missing)))
                columns.append(weight(f"value_embeds.{i}.weight", arch.gate_scale))
                value_columns = slice(width, width + config.kv_dim)
                width += config.kv_dim
            self.layers.append(
                Layer(
                    window=window,
                    resid_lambda=resid_lambda,
                    qkvg=Matrix(torch.cat(qkvg)),
                    proj=Matrix(weight(f"{block}.attn.c_proj.weight")),
                    fc=Matrix(weight(f"{block}.mlp.c_fc.weight", after_norm)),
                    mlp_proj=Matrix(weight(f"{block}.mlp.c_proj.weight")),
                    value_columns=value_columns,
                )
            )
        if arch.smear_channels:
            gate_V1 = F.linear(columns[0][:, : arch.smear_channels], weight("smear_gate.weight"))
            columns.append(weight("smear_lambda") * gate_V1.sigmoid())
        # The largest tensor by far: finding it new memory takes longer than filling it.
        shape = (config.vocab_size + 1, sum(column.size(1) for column in columns))
        self.table_VC: Tensor = before.table_VC if before else columns[0].new_zeros(shape)
        torch.cat([c[: config.vocab_size] for c in columns], dim=1, out=self.table_VC[:-1])


def pairs_together(weight_OI: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from (first halves, second halves) to (first, second), (first, ...."""
    return weight_OI.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
