"""The GPT for inference: weights cast and fused once, keys and values kept in slots.

A slot holds the keys and values of one token sequence. A call of `CachedModel.forward` extends
the sequences of several slots at once, by one token each (decoding) or by a chunk (prefill), and
gives what GPT.hidden would give for the whole sequences.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoray.engine.weights import Layer, Unit, Weights
from nanoray.errors import NanorayError
from nanoray.model.gpt import GPT, SOFTCAP, norm

# What one more call of the attention costs, in keys of a row that the same time would read. On a
# CPU (d4, 4 heads of 64) a call takes 12 us and a key .06 us; on a GPU launches count most.
_CALL_KEYS_CPU, _CALL_KEYS_GPU = 128, 1_000_000


class KVCache:
    """Keys and values of every slot: per layer [slots, 2K, max_len + 1, D] in the compute dtype.

    K heads of (unit, rotated) keys, then K of values. Position max_len takes what padding writes
    and is never read. Starts as zeros, because a masked key has weight zero, and zero times an
    uninitialised NaN is NaN.
    """

    def __init__(self, model: CachedModel, num_slots: int, max_len: int) -> None:
        config = model.config
        assert 0 < max_len <= config.rotary_len
        self.num_slots, self.max_len = num_slots, max_len
        shape = (num_slots, 2 * config.n_kv_head, max_len + 1, config.head_dim)
        self.layers = [
            _zeros(shape, model.compute_dtype, model.device) for _ in range(config.n_layer)
        ]

    def copy(self, source: int, target: int, length: int) -> None:
        """Give slot `target` the first `length` positions of slot `source`."""
        for cached in self.layers:
            cached[target, :, :length] = cached[source, :, :length]

    def clear(self, slot: int | None = None) -> None:
        """Zero a slot, or all: after NaNs, which even masked positions would hand on."""
        for cached in self.layers:
            (cached if slot is None else cached[slot]).zero_()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; in the host's memory pages are not touched, and so take none, until they are used."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


@dataclass(frozen=True)
class _Run:
    """Neighbouring rows in neighbouring slots, which attend to keys first..last - 1 in one call."""

    rows: slice
    slots: slice
    keys: slice
    bias: Tensor | None  # [rows, 1, heads of a group * T, keys]: 0 or -inf; None if all is seen


class CachedModel:
    """An inference view of a GPT; the model itself is read at construction and left alone.

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
        # (a, b) -> (a cos + b sin, b cos - a sin) is a turn by -theta.
        self._turn_T1d = torch.complex(model.cos.float(), -model.sin.float())
        self._unit = Unit(model.config.n_embd, self.device)
        self._unit_head = Unit(model.config.head_dim, self.device)
        self.load_weights(model.state_dict())

    @torch.inference_mode()
    def load_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take other weights (a GPT's state_dict, any dtype and device) of the same shape.

        Raises NanorayError, and keeps the old weights, when names or shapes do not fit.
        """
        self._check(state_dict)

        self._weights = Weights(self.config, state_dict, self.device, self.compute_dtype)

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
        weights, config = self._weights, self.config
        slots_B1, starts_B1, ends_B1 = (
            torch.tensor([slots_B, starts_B, ends_B]).to(self.device).unsqueeze(-1)
        )
        positions_BT = starts_B1 + torch.arange(T, device=self.device)
        write_BT = positions_BT
        if T > 1:
            write_BT = torch.where(positions_BT < ends_B1, positions_BT, cache.max_len)
            positions_BT = torch.minimum(positions_BT, ends_B1 - 1)
        runs = {
            window: self._runs(window, slots_B, starts_B, ends_B, positions_BT)
            for window in {layer.window for layer in weights.layers}
        }
        turn_BT1d = self._turn_T1d[positions_BT]

        table_BTC, x0_BTD = self._embed(tokens_BT, previous_B)
        x0_LBTD = weights.x0_lambdas_L111 * x0_BTD
        x_BTD = middle_BTD = x0_BTD
        for i, layer in enumerate(weights.layers):
            x_BTD = torch.add(x0_LBTD[i], x_BTD, alpha=layer.resid_lambda)
            q_BTHD, kv_BTKD = self._qkv(layer, self._unit(x_BTD), table_BTC, turn_BT1d)
            kv_SKTD = cache.layers[i]
            kv_SKTD[slots_B1, :, write_BT] = kv_BTKD
            out_BTD = self._attend(q_BTHD, kv_SKTD, runs[layer.window])
            x_BTD = layer.proj.plus(out_BTD, x_BTD)
            hidden_BTM = layer.fc.relu(self._unit(x_BTD)).square_()
            x_BTD = layer.mlp_proj.plus(hidden_BTM, x_BTD)
            if i == config.backout_layer:
                middle_BTD = x_BTD
        if weights.backout_lambda:
            x_BTD = torch.sub(x_BTD, middle_BTD, alpha=weights.backout_lambda)
        return norm(x_BTD)

    @torch.inference_mode()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Softcapped logits of hidden states, fp32 [N, vocab_size]."""
        z_NV = self._weights.head(hidden_ND).float()
        return z_NV.div_(SOFTCAP).tanh_().mul_(SOFTCAP)

    def _embed(self, tokens_BT: Tensor, previous_B: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Each token's row of the table [B, T, C], and the smeared embeddings [B, T, D]."""
        D = self.config.n_embd
        before_B1 = torch.tensor(previous_B).unsqueeze(1).remainder_(self.vocab_size + 1)
        ids_BT = torch.cat((before_B1, tokens_BT), dim=1).to(self.device)
        table_BTC = F.embedding(ids_BT, self._weights.table_VC)
        before_BTD, table_BTC = table_BTC[:, :-1, :D], table_BTC[:, 1:]
        x_BTD = table_BTC[..., :D]
        if self.config.architecture.smear_channels:
            x_BTD = torch.addcmul(x_BTD, table_BTC[..., -1:], before_BTD)
        return table_BTC, x_BTD

    def _qkv(
        self, layer: Layer, x_BTD: Tensor, table_BTC: Tensor, turn_BT1d: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries [B, T, H, D], and keys and values [B, T, 2K, D]; unit and rotated but values."""
        H, K, D = self.config.n_head, self.config.n_kv_head, self.config.head_dim
        out_BTO = layer.qkvg(x_BTD)
        heads = out_BTO[..., : (H + 2 * K) * D].unflatten(-1, (H + 2 * K, D))
        qk = heads[:, :, : H + K]
        turned = torch.view_as_complex(qk.float().unflatten(-1, (-1, 2))) * turn_BT1d
        self._unit_head(torch.view_as_real(turned).flatten(-2), out=qk)
        if layer.value_columns is not None:
            gate_BTK1 = out_BTO[..., (H + 2 * K) * D :][..., :K].sigmoid().unsqueeze(-1)
            v_BTKD = heads[:, :, H + K :]
            v_BTKD.addcmul_(gate_BTK1, table_BTC[..., layer.value_columns].view_as(v_BTKD))
        return heads[:, :, :H], heads[:, :, H:]

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

    def _attend(self, q_BTHD: Tensor, kv_SKTD: Tensor, runs: list[_Run]) -> Tensor:
        """Attention of each row over its slot: [B, T, H * D]. The heads of a group are rows."""
        B, T, H, D = q_BTHD.shape
        K = self.config.n_kv_head
        q_BKRD = q_BTHD.unflatten(2, (K, H // K)).permute(0, 2, 3, 1, 4).reshape(B, K, -1, D)
        outs = [
            F.scaled_dot_product_attention(
                q_BKRD[run.rows],
                kv_SKTD[run.slots, :K, run.keys],
                kv_SKTD[run.slots, K:, run.keys],
                attn_mask=run.bias,
                scale=self._weights.attention_scale,
            )
            for run in runs
        ]
        out_BKRD = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out_BKRD.view(B, K, H // K, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H * D)


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))
