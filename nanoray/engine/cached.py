"""The GPT for inference: weights cast and fused once, keys and values kept in slots.

A slot holds the keys and values of one token sequence. A call of `CachedModel.forward` extends
the sequences of several slots at once, by one token each (decoding) or by a chunk (prefill), and
gives what GPT.hidden would give for the whole sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoray.errors import NanorayError
from nanoray.model.gpt import GPT, SOFTCAP, norm, rotate
from nanoray.model.loss import softcapped_logits

# What one more call of the attention costs, in keys of a row that the same time would read. On a
# CPU (d4, 4 heads of 64) a call takes 12 us and a key .06 us; on a GPU launches count most.
_CALL_KEYS_CPU, _CALL_KEYS_GPU = 128, 1_000_000


class KVCache:
    """Keys and values of every slot: per layer [slots, K, max_len + 1, D] in the compute dtype.

    Position max_len takes what padding writes and is never read. Starts as zeros, because a
    masked key has weight zero, and zero times an uninitialised NaN is NaN.
    """

    def __init__(self, model: CachedModel, num_slots: int, max_len: int) -> None:
        config = model.config
        assert 0 < max_len <= config.rotary_len
        self.num_slots, self.max_len = num_slots, max_len
        shape = (num_slots, config.n_kv_head, max_len + 1, config.head_dim)

        def allocate() -> list[Tensor]:
            return [
                torch.zeros(shape, dtype=model.compute_dtype, device=model.device)
                for _ in range(config.n_layer)
            ]

        self.keys, self.values = allocate(), allocate()

    def copy(self, source: int, target: int, length: int) -> None:
        """Give slot `target` the first `length` positions of slot `source`."""
        for cached in (*self.keys, *self.values):
            cached[target, :, :length] = cached[source, :, :length]

    def clear(self, slot: int | None = None) -> None:
        """Zero a slot, or all: after NaNs, which even masked positions would hand on."""
        for cached in (*self.keys, *self.values):
            (cached if slot is None else cached[slot]).zero_()


@dataclass(frozen=True)
class _Layer:
    """One block's weights in the compute dtype, matrices as [out, in]."""

    window: int
    resid_lambda: float
    x0_lambda: float
    qkvg: Tensor  # rows of the queries, keys, values and value gates (0 or K) stacked
    proj: Tensor
    fc: Tensor
    mlp_proj: Tensor
    value_embeds: Tensor | None  # [vocab, kv_dim]


@dataclass(frozen=True)
class _Run:
    """Neighbouring rows in neighbouring slots, which attend to keys first..last - 1 in one call."""

    rows: slice
    slots: slice
    keys: slice
    bias: Tensor | None  # [rows, 1, heads of a group * T, keys]: 0 or -inf; None if all is seen


class CachedModel:
    """An inference view of a GPT; the model itself is read at construction and left alone.

    What depends on a token id alone is tabulated: the normed embedding and its smear gate.
    Everything runs on the model's device and in its compute dtype. Not thread-safe.

    Attributes:
        config: the GPT's.
        device, compute_dtype: where and in what everything runs.
        vocab_size: number of ids, without padding.
    """

    def __init__(self, model: GPT) -> None:
        self.config = model.config
        self.vocab_size = model.config.vocab_size
        self.device, self.compute_dtype = model.cos.device, model.compute_dtype
        self._cos_T1d, self._sin_T1d = model.cos, model.sin
        self.load_weights(model.state_dict())

    @torch.inference_mode()
    def load_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take other weights (a GPT's state_dict, any dtype and device) of the same shape.

        Raises NanorayError, and keeps the old weights, when names or shapes do not fit.
        """
        self._check(state_dict)

        def weight(name: str) -> Tensor:
            # A copy in any case: the trainer may change its own tensors while we sample.
            return state_dict[name].detach().to(self.device, self.compute_dtype, copy=True)

        config, arch = self.config, self.config.architecture
        self._head_VD = weight("lm_head.weight")[: self.vocab_size].contiguous()
        self._wte_VD = norm(weight("transformer.wte.weight"))
        self._smear_gate_V1: Tensor | None = None
        self._backout_lambda = 0.0
        if arch.smear_channels:
            gate_V1 = F.linear(
                self._wte_VD[:, : arch.smear_channels], weight("smear_gate.weight")
            ).sigmoid()
            self._smear_gate_V1 = weight("smear_lambda") * gate_V1
            self._backout_lambda = float(state_dict["backout_lambda"])
        resid = state_dict["resid_lambdas"].tolist()
        x0 = state_dict["x0_lambdas"].tolist()
        self._layers = []
        for i, window in enumerate(config.window_sizes()):
            block = f"transformer.h.{i}"
            rows = [weight(f"{block}.attn.c_{name}.weight") for name in "qkv"]
            value_embeds_VC = None
            if config.has_value_embedding(i):
                gate_KC = weight(f"{block}.attn.ve_gate.weight")
                rows.append(F.pad(gate_KC, (0, config.n_embd - gate_KC.size(1))))
                value_embeds_VC = weight(f"value_embeds.{i}.weight")
            self._layers.append(
                _Layer(
                    window=window,
                    resid_lambda=resid[i],
                    x0_lambda=x0[i],
                    qkvg=torch.cat(rows),
                    proj=weight(f"{block}.attn.c_proj.weight"),
                    fc=weight(f"{block}.mlp.c_fc.weight"),
                    mlp_proj=weight(f"{block}.mlp.c_proj.weight"),
                    value_embeds=value_embeds_VC,
                )
            )

    def _check(self, state_dict: Mapping[str, Tensor]) -> None:
        with torch.device("meta"):
            wanted = {name: t.shape for name, t in GPT(self.config).state_dict().items()}
        given = {name: t.shape for name, t in state_dict.items()}
        wrong = sorted(
            name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name)
        )
        if wrong:
            raise NanorayError(
                f"these weights do not fit the engine's model: {wrong[0]} is "
                f"{_shape(given.get(wrong[0]))}, the model's is {_shape(wanted.get(wrong[0]))} "
                f"({len(wrong)} tensor(s) differ); load weights of the same shape."
            )

    @torch.inference_mode()
    def forward(
        self,
        cache: KVCache,
        slots_B: Sequence[int],
        starts_B: Sequence[int],
        tokens_BT: Tensor,
        lengths_B: Sequence[int],
        previous_B: Sequence[int],
    ) -> Tensor:
        """Extend the sequences of some slots; hidden states [B, T, D] after the final norm.

        Row b is tokens_BT[b, :lengths_B[b]] at positions starts_B[b] and on of slot slots_B[b]
        (distinct slots). Their keys and values are written; the row attends to them and to what
        the slot holds below, within each layer's window. previous_B is the token id before each
        row (-1 at position 0), which July's smear needs. Beyond a row's length the output is
        meaningless and the slot untouched.
        """
        B, T = tokens_BT.shape
        ends_B = [start + length for start, length in zip(starts_B, lengths_B)]
        assert len(set(slots_B)) == B
        assert max(ends_B) <= cache.max_len
        assert min(lengths_B) > 0
        host_4B1 = torch.tensor([slots_B, starts_B, ends_B, previous_B]).unsqueeze(-1)
        slots_B1, starts_B1, ends_B1, previous_B1 = host_4B1.to(self.device)
        tokens_BT = tokens_BT.to(self.device)
        positions_BT = starts_B1 + torch.arange(T, device=self.device)
        write_BT = torch.where(positions_BT < ends_B1, positions_BT, cache.max_len)
        positions_BT = torch.minimum(positions_BT, ends_B1 - 1)
        runs = {
            window: self._runs(window, slots_B, starts_B, ends_B, positions_BT)
            for window in {layer.window for layer in self._layers}
        }
        cos_BT1d, sin_BT1d = self._cos_T1d[positions_BT], self._sin_T1d[positions_BT]

        x0_BTD = x_BTD = middle_BTD = self._embed(tokens_BT, previous_B1)
        for i, layer in enumerate(self._layers):
            x_BTD = layer.resid_lambda * x_BTD + layer.x0_lambda * x0_BTD
            q_BTHD, k_BTKD, v_BTKD = self._qkv(layer, norm(x_BTD), tokens_BT, cos_BT1d, sin_BT1d)
            keys_SKTD, values_SKTD = cache.keys[i], cache.values[i]
            keys_SKTD[slots_B1, :, write_BT] = k_BTKD
            values_SKTD[slots_B1, :, write_BT] = v_BTKD
            out_BTD = self._attend(q_BTHD, keys_SKTD, values_SKTD, runs[layer.window])
            x_BTD = x_BTD + F.linear(out_BTD, layer.proj)
            hidden_BTM = F.linear(norm(x_BTD), layer.fc).relu_().square_()
            x_BTD = x_BTD + F.linear(hidden_BTM, layer.mlp_proj)
            if i == self.config.backout_layer:
                middle_BTD = x_BTD
        if self._backout_lambda:
            x_BTD = x_BTD - self._backout_lambda * middle_BTD
        return norm(x_BTD)

    @torch.inference_mode()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Softcapped logits of hidden states, fp32 [N, vocab_size]."""
        return softcapped_logits(hidden_ND, self._head_VD, SOFTCAP)

    def _embed(self, tokens_BT: Tensor, previous_B1: Tensor) -> Tensor:
        x_BTD = F.embedding(tokens_BT, self._wte_VD)
        if self._smear_gate_V1 is None:
            return x_BTD
        before_BT = torch.cat((previous_B1, tokens_BT[:, :-1]), dim=1)
        gate_BT1 = F.embedding(tokens_BT, self._smear_gate_V1) * (before_BT >= 0).unsqueeze(-1)
        return x_BTD + gate_BT1 * F.embedding(before_BT.clamp_(min=0), self._wte_VD)

    def _qkv(
        self,
        layer: _Layer,
        x_BTD: Tensor,
        tokens_BT: Tensor,
        cos_BT1d: Tensor,
        sin_BT1d: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normed and rotated queries and keys (without qk_scale), and values: [B, T, heads, D]."""
        config, arch = self.config, self.config.architecture
        H, K, D = config.n_head, config.n_kv_head, config.head_dim
        out_BTO = F.linear(x_BTD, layer.qkvg)
        heads = out_BTO[..., : (H + 2 * K) * D].unflatten(-1, (H + 2 * K, D))
        qk = norm(rotate(heads[:, :, : H + K], cos_BT1d, sin_BT1d)).to(self.compute_dtype)
        v_BTKD = heads[:, :, H + K :]
        if layer.value_embeds is not None:
            gate_BTK1 = out_BTO[..., (H + 2 * K) * D :].sigmoid().unsqueeze(-1) * arch.gate_scale
            ve_BTC = F.embedding(tokens_BT, layer.value_embeds)
            v_BTKD = torch.addcmul(v_BTKD, gate_BTK1, ve_BTC.view_as(v_BTKD))
        return qk[:, :, :H], qk[:, :, H:], v_BTKD

    def _runs(
        self,
        window: int,
        slots_B: Sequence[int],
        starts_B: Sequence[int],
        ends_B: Sequence[int],
        positions_BT: Tensor,
    ) -> list[_Run]:
        """Cut the rows into calls of the attention; what they see in layers of one window.

        Attention reads the cache where it lies: to gather the keys of scattered slots would take
        as long as to attend to them. Rows share a call unless that makes them read far more keys
        than they see (rows of unlike lengths), for decoding is bound by reading keys.
        """
        call_keys = _CALL_KEYS_CPU if self.device.type == "cpu" else _CALL_KEYS_GPU
        firsts_B = [max(0, start - window) for start in starts_B]
        spans: list[tuple[int, int, int]] = []  # first row, first key, end of the keys
        needed = 0
        for b, (first, end) in enumerate(zip(firsts_B, ends_B)):
            if b and slots_B[b] == slots_B[b - 1] + 1:
                row, *keys = spans[-1]
                joint = (min(first, keys[0]), max(end, keys[1]))
                shared = (joint[1] - joint[0]) * (b + 1 - row)
                if shared <= needed + end - first + call_keys:
                    spans[-1], needed = (row, *joint), needed + end - first
                    continue
            spans.append((b, first, end))
            needed = end - first
        stops = [row for row, *_ in spans[1:]] + [len(slots_B)]
        return [
            self._run(window, slots_B[row], slice(row, stop), slice(*keys), positions_BT)
            for (row, *keys), stop in zip(spans, stops)
        ]

    def _run(self, window: int, slot: int, rows: slice, keys: slice, positions_BT: Tensor) -> _Run:
        slots = slice(slot, slot + rows.stop - rows.start)
        if slots.stop - slots.start == 1 and positions_BT.size(1) == 1:
            return _Run(rows, slots, keys, None)
        keys_S = torch.arange(keys.start, keys.stop, device=self.device)
        distance_RTS = positions_BT[rows].unsqueeze(-1) - keys_S
        hidden_RTS = (distance_RTS < 0) | (distance_RTS > window)
        bias_RTS = torch.zeros(hidden_RTS.shape, dtype=self.compute_dtype, device=self.device)
        bias_RTS.masked_fill_(hidden_RTS, -torch.inf)
        group = self.config.n_head // self.config.n_kv_head
        return _Run(rows, slots, keys, bias_RTS.repeat(1, group, 1).unsqueeze(1))

    def _attend(
        self, q_BTHD: Tensor, keys_SKTD: Tensor, values_SKTD: Tensor, runs: list[_Run]
    ) -> Tensor:
        """Attention of each row over its slot: [B, T, H * D]. The heads of a group are rows."""
        B, T, H, D = q_BTHD.shape
        K = self.config.n_kv_head
        q_BKRD = q_BTHD.unflatten(2, (K, H // K)).permute(0, 2, 3, 1, 4).reshape(B, K, -1, D)
        outs = [
            F.scaled_dot_product_attention(
                q_BKRD[run.rows],
                keys_SKTD[run.slots, :, run.keys],
                values_SKTD[run.slots, :, run.keys],
                attn_mask=run.bias,
                scale=self.config.architecture.qk_scale**2 * D**-0.5,
            )
            for run in runs
        ]
        out_BKRD = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out_BKRD.view(B, K, H // K, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H * D)


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))
