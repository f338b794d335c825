"""The GPT for inference: weights cast and fused once, keys and values kept in slots.

A slot holds the keys and values of one token sequence. A call of `CachedModel.forward` extends
the sequences of several slots at once, by one token each (decoding) or by a chunk (prefill), and
gives what GPT.hidden would give for the whole sequences.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap

# What one more call of the attention costs, in keys of a row that the same time would read. On a
# CPU (d4, 4 heads of 64) a call takes 12 us and a key .06 us; on a GPU launches count most.
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoray.engine.slots import Prefix
from nanoray.engine.weights import Layer, Unit, Weights
from nanoray.errors import NanorayError
from nanoray.model.gpt import GPT, SOFTCAP, norm

_CALL_KEYS_CPU, _CALL_KEYS_GPU = 128, 1_000_000
# Fewest keys of a common prefix that rows read together: for fewer the merging costs more.
_SHARED_KEYS = 32


class KVCache:
    """Keys (unit, rotated) and values of every slot: per layer [slots, 2, K, max_len, D].

    In the compute dtype. Starts as zeros, because a masked key has weight zero, and zero times an
    uninitialised NaN is NaN.
    """

    def __init__(self, model: CachedModel, num_slots: int, max_len: int) -> None:
        config = model.config
        assert 0 < max_len <= config.rotary_len
        self.num_slots, self.max_len = num_slots, max_len
        shape = (num_slots, 2, config.n_kv_head, max_len, config.head_dim)
        self.layers = [
            _zeros(shape, model.compute_dtype, model.device) for _ in range(config.n_layer)
        ]
        self._reach = [0] * num_slots  # up to it a slot may hold something else than zeros

    def written(self, slot: int, end: int) -> None:
        """To be told of what is written into `layers`, up to position `end`."""
        self._reach[slot] = max(self._reach[slot], end)

    def copy(self, source: int, target: int, length: int) -> None:
        """Give slot `target` the first `length` positions of slot `source`."""
        self.written(target, length)
        for cached in self.layers:
            cached[target, ..., :length, :] = cached[source, ..., :length, :]

    def clear(self, slot: int | None = None) -> None:
        """Zero a slot, or all: after NaNs, which even masked positions would hand on."""
        for index in range(self.num_slots) if slot is None else (slot,):
            for cached in self.layers:
                cached[index, ..., : self._reach[index], :].zero_()
            self._reach[index] = 0


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; in the host's memory pages take no time and space until they are used."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux: a decoding row touches thousands of small pages
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


@dataclass(frozen=True)
class _Run:
    """One call of the attention: neighbouring rows attend to the same range of keys."""

    rows: slice
    slots: slice  # as many as rows, or one for all
    keys: slice
    bias: Tensor | None  # [rows, 1, heads of a group * T, keys]: 0 or -inf; None if all is seen


@dataclass(frozen=True)
class _Plan:
    """The calls for the layers of one window.

    Rows that begin with copies of one prefix read a single one of them (`shared`; cascade
    attention, see FlashInfer, arXiv 2501.01005); `own` covers all rows, and what each sees
    apart from that.
    """

    own: list[_Run]
    shared: list[_Run]


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
        if self.device.type == "cuda":
            # cuDNN makes, and keeps, a plan for every length of the keys: one a step.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self._unit = Unit(model.config.n_embd, self.device)
        self._unit_head = Unit(model.config.head_dim, self.device)
        state_dict = model.state_dict()
        self._shapes = {name: tensor.shape for name, tensor in state_dict.items()}
        self._weights = self._read(state_dict, None)

    def load_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take other weights (a GPT's state_dict, any dtype and device) of the same shape.

        Raises NanorayError, and keeps the old weights, when names or shapes do not fit.
        """
        self._check(state_dict)
        self._weights = self._read(state_dict, self._weights)

    @torch.inference_mode()
    def _read(self, state_dict: Mapping[str, Tensor], before: Weights | None) -> Weights:
        return Weights(self.config, state_dict, self.device, self.compute_dtype, before)

    def _check(self, state_dict: Mapping[str, Tensor]) -> None:
        wanted = self._shapes
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
        prefixes_B: Sequence[Prefix | None] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Extend the sequences of some slots; hidden states [B, T, D] after the final norm.

        Row b is tokens_BT[b, :lengths_B[b]] at positions starts_B[b] and on of slot slots_B[b]
        (distinct slots). Their keys and values are written; the row attends to them and to what
        the slot holds below, within each layer's window. previous_B is the token id before each
        row (-1 at position 0), which July's smear needs. Beyond a row's length the output is
        meaningless and the slot untouched. prefixes_B: what slots have in common; used where
        neighbouring rows decode. last_only: give [B, 1, D], of each row's last token.
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
        positions_BT = torch.minimum(positions_BT, ends_B1 - 1)
        plans = {
            window: self._plan(window, slots_B, starts_B, ends_B, positions_BT, prefixes_B)
            for window in {layer.window for layer in weights.layers}
        }
        turn_BT1d = self._turn_T1d[positions_BT]
        for slot, end in zip(slots_B, ends_B):
            cache.written(slot, end)

        table_BTC, x0_BTD = self._embed(tokens_BT, previous_B)
        x0_LBTD = weights.x0_lambdas_L111 * x0_BTD
        x_BTD = middle_BTD = x0_BTD
        for i, layer in enumerate(weights.layers):
            x_BTD = torch.add(x0_LBTD[i], x_BTD, alpha=layer.resid_lambda)
            q_BTHD, kv_BT2KD = self._qkv(layer, self._unit(x_BTD), table_BTC, turn_BT1d)
            if T == 1:
                cache.layers[i][slots_B1, :, :, positions_BT] = kv_BT2KD
            else:  # a copy a row: an index for every token takes thrice the time
                for slot, start, end, kv_T2KD in zip(slots_B, starts_B, ends_B, kv_BT2KD):
                    kv_2KTD = kv_T2KD[: end - start].permute(1, 2, 0, 3)
                    cache.layers[i][slot, :, :, start:end] = kv_2KTD
            plan = plans[layer.window]
            if last_only and T > 1 and layer is weights.layers[-1]:
                # Of the others the last layer's keys and values are all that is ever used.
                lasts_B = [end - 1 for end in ends_B]
                plan = self._plan(layer.window, slots_B, lasts_B, ends_B, ends_B1 - 1, None)
                at = (torch.arange(B, device=self.device).unsqueeze(1), ends_B1 - starts_B1 - 1)
                q_BTHD, x_BTD, middle_BTD = q_BTHD[at], x_BTD[at], middle_BTD[at]
            out_BTD = self._attend(q_BTHD, cache.layers[i], plan)
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
        # c tanh(z / c), 4e-6 apart at most; on CPUs a sigmoid takes a fifth of a tanh's time.
        return z_NV.mul_(2 / SOFTCAP).sigmoid_().mul_(2 * SOFTCAP).sub_(SOFTCAP)

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
        """Queries [B, T, H, D], keys and values [B, T, 2, K, D]; all but values are rotated."""
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
        return heads[:, :, :H], heads[:, :, H:].unflatten(2, (2, K))

    def _plan(
        self,
        window: int,
        slots_B: Sequence[int],
        starts_B: Sequence[int],
        ends_B: Sequence[int],
        positions_BT: Tensor,
        prefixes_B: Sequence[Prefix | None] | None,
    ) -> _Plan:
        """Which keys the rows read in layers of one window, and in which calls."""
        bias_B1RS: Tensor | None = None
        firsts_B = [max(0, start - window) for start in starts_B]
        low, high = min(firsts_B), max(ends_B)

        def run(rows: slice, slots: slice, keys: slice) -> _Run:
            nonlocal bias_B1RS
            if positions_BT.size(1) == 1 and all(
                first <= keys.start and end >= keys.stop
                for first, end in zip(firsts_B[rows], ends_B[rows])
            ):
                return _Run(rows, slots, keys, None)
            if bias_B1RS is None:
                bias_B1RS = self._bias(window, positions_BT, low, high)
            bias = bias_B1RS[rows, ..., keys.start - low : keys.stop - low]
            return _Run(rows, slots, keys, bias if self.device.type == "cpu" else aligned(bias))

        call_keys = _CALL_KEYS_CPU if self.device.type == "cpu" else _CALL_KEYS_GPU
        segments = [(slice(0, len(slots_B)), 0)]
        if prefixes_B is not None and positions_BT.size(1) == 1 and self.device.type == "cpu":
            segments = _sharing(prefixes_B, firsts_B)
        own, shared = [], []
        for rows, end in segments:
            own_firsts = [max(first, end) for first in firsts_B[rows]]
            if end:
                slot, first = slots_B[rows.start], min(firsts_B[rows])
                shared.append(run(rows, slice(slot, slot + 1), slice(first, end)))
            for span, keys in _spans(slots_B[rows], own_firsts, ends_B[rows], call_keys):
                slot, count = slots_B[rows][span.start], span.stop - span.start
                span = slice(rows.start + span.start, rows.start + span.stop)
                own.append(run(span, slice(slot, slot + count), keys))
        return _Plan(own, shared)

    def _bias(self, window: int, positions_BT: Tensor, low: int, high: int) -> Tensor:
        """[B, 1, heads of a group * T, high - low]: -inf where a token does not see a key."""
        B, T = positions_BT.shape
        keys_S = torch.arange(low, high, device=self.device)
        distance_BTS = positions_BT.unsqueeze(-1) - keys_S
        bias_BTS = torch.zeros(distance_BTS.shape, dtype=self.compute_dtype, device=self.device)
        bias_BTS.masked_fill_((distance_BTS < 0) | (distance_BTS > window), -torch.inf)
        group = self.config.n_head // self.config.n_kv_head
        return bias_BTS[:, None, None].expand(B, 1, group, T, -1).reshape(B, 1, group * T, -1)

    def _attend(self, q_BTHD: Tensor, kv_S2KTD: Tensor, plan: _Plan) -> Tensor:
        """Attention of each row over its slot: [B, T, H * D]. The heads of a group are rows."""
        B, T, H, D = q_BTHD.shape
        K = self.config.n_kv_head
        q_BKRD = q_BTHD.unflatten(2, (K, H // K)).permute(0, 2, 3, 1, 4).reshape(B, K, -1, D)
        if plan.shared:
            out_BKRD = self._cascade(q_BKRD, kv_S2KTD, plan)
        else:
            outs = []
            for run in plan.own:
                k, v = kv_S2KTD[run.slots, :, :, run.keys].unbind(1)
                outs.append(
                    F.scaled_dot_product_attention(
                        q_BKRD[run.rows],
                        k,
                        v,
                        attn_mask=run.bias,
                        scale=self._weights.attention_scale,
                    )
                )
            out_BKRD = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out_BKRD.view(B, K, H // K, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H * D)

    def _cascade(self, q_BKRD: Tensor, kv_S2KTD: Tensor, plan: _Plan) -> Tensor:
        """Attention by parts, merged by the sums of their exponentials: [B, K, R, D]."""
        R = q_BKRD.size(2)

        def attend(q_NKRD: Tensor, run: _Run, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            k, v = kv_S2KTD[run.slots, :, :, run.keys].unbind(1)
            out_NKRD, logsumexp_NKR = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_NKRD, k, v, attn_mask=bias, scale=self._weights.attention_scale
            )
            return out_NKRD, logsumexp_NKR

        outs, sums = zip(*[attend(q_BKRD[run.rows], run, run.bias) for run in plan.own])
        out_BKRD, logsumexp_BKR = torch.cat(outs), torch.cat(sums)
        for run in plan.shared:
            # All rows as rows of one: each head's keys are read once.
            q_1KRD = q_BKRD[run.rows].transpose(0, 1).flatten(1, 2).unsqueeze(0)
            bias = None if run.bias is None else run.bias.flatten(0, 2)
            out_1KRD, logsumexp_1KR = attend(q_1KRD, run, bias)
            out_NKRD = out_1KRD[0].unflatten(1, (-1, R)).transpose(0, 1)
            logsumexp_NKR = logsumexp_1KR[0].unflatten(1, (-1, R)).transpose(0, 1)
            share_NKR1 = (logsumexp_NKR - logsumexp_BKR[run.rows]).sigmoid_().unsqueeze(-1)
            out_BKRD[run.rows].lerp_(out_NKRD, share_NKR1.to(out_NKRD.dtype))
        return out_BKRD


def aligned(bias_BhRS: Tensor) -> Tensor:
    """A copy whose rows begin at multiples of 8 elements: what attention on GPUs asks of it."""
    keys = bias_BhRS.size(-1)
    padded = bias_BhRS.new_zeros((*bias_BhRS.shape[:-1], -(-keys // 8) * 8))
    padded[..., :keys] = bias_BhRS
    return padded[..., :keys]


def _sharing(
    prefixes_B: Sequence[Prefix | None], firsts_B: Sequence[int]
) -> list[tuple[slice, int]]:
    """Cut the rows where neighbours begin or cease to share: rows, end of their prefix or 0."""
    ends_B = [
        prefix.length if prefix and prefix.length - first >= _SHARED_KEYS else 0
        for prefix, first in zip(prefixes_B, firsts_B)
    ]
    segments = []
    start = 0
    for key, group in itertools.groupby(
        prefix if end else None for prefix, end in zip(prefixes_B, ends_B)
    ):
        stop = start + len(list(group))
        segments.append((slice(start, stop), key.length if key and stop > start + 1 else 0))
        start = stop
    return segments


def _spans(
    slots_B: Sequence[int], firsts_B: Sequence[int], ends_B: Sequence[int], call_keys: int
) -> list[tuple[slice, slice]]:
    """Cut the rows into calls of the attention: rows, keys.

    Attention reads the cache where it lies: to gather the keys of scattered slots would take as
    long as to attend to them. Rows share a call unless that makes them read far more keys than
    they see (rows of unlike lengths), for decoding is bound by reading keys.
    """
    spans: list[tuple[slice, slice]] = []
    needed = 0
    for b, (first, end) in enumerate(zip(firsts_B, ends_B)):
        if b and slots_B[b] == slots_B[b - 1] + 1:
            rows, keys = spans[-1]
            joint = slice(min(first, keys.start), max(end, keys.stop))
            read = (joint.stop - joint.start) * (b + 1 - rows.start)
            if read <= needed + end - first + call_keys:
                spans[-1], needed = (slice(rows.start, b + 1), joint), needed + end - first
                continue
        spans.append((slice(b, b + 1), slice(first, end)))
        needed = end - first
    return spans


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))
