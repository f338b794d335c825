"""Latency and throughput of a checkpoint, as the engine serves it, over batch sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nanoray.engine import Engine, SamplingParams
from nanoray.errors import NanorayError
from nanoray.model.gpt import GPT
from nanoray.model.precision import peak_flops

_COPY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class InferRow:
    """Medians at one batch size; all requests arrive at once, with prompts of their own.

    Attributes:
        ttft_s: until every request has its first token, which is mostly prefill.
        token_s: from one token of a request to the next, while all of them decode.
        prefill_tokens_per_s, decode_tokens_per_s: over the whole batch.
        mfu: of the prefill, against the device's (on a CPU, measured) peak.
        bandwidth_use: of the decode: bytes of weights, keys and values that a step must read,
            against what a large copy reaches.
    """

    batch_size: int
    ttft_s: float
    token_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    mfu: float
    bandwidth_use: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    model: GPT,
    batch_sizes: Sequence[int],
    *,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    seed: int,
) -> list[InferRow]:
    """Run the engine at every batch size; once unmeasured first.

    Raises:
        NanorayError: prompt and answer are longer than the model can read, or decoding took no
            longer than the measurement's noise.
    """
    check_length(model, prompt_tokens, new_tokens)
    device, dtype = model.cos.device, model.compute_dtype
    flops = peak_flops(device, dtype)
    bandwidth = copy_bandwidth(device)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for batch_size in batch_sizes:
        engine = Engine(
            model,
            None,
            num_slots=batch_size,
            max_len=prompt_tokens + new_tokens,
            prefill_chunk=256,
            stop_token_ids=(),
            prefix_cache=False,
        )

        def seconds(
            max_tokens: int, engine: Engine = engine, batch_size: int = batch_size
        ) -> float:
            prompts = torch.randint(
                model.config.vocab_size, (batch_size, prompt_tokens), generator=generator
            ).tolist()
            start = time.perf_counter()
            done = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=max_tokens))
            assert all(len(completion.tokens) == max_tokens for completion in done)
            return time.perf_counter() - start

        seconds(new_tokens)
        firsts = [seconds(1) for _ in range(repeats)]
        alls = [seconds(new_tokens) for _ in range(repeats)]
        ttft_s = statistics.median(firsts)
        token_s = (statistics.median(alls) - ttft_s) / (new_tokens - 1)
        if token_s <= 0:
            raise NanorayError(
                f"{new_tokens} tokens take no longer than the first one, as far as {repeats} "
                f"measurements tell; raise --new-tokens or --repeats"
            )
        prefill_rate = batch_size * prompt_tokens / ttft_s
        step_bytes = decode_bytes(model, batch_size, prompt_tokens + new_tokens // 2)
        rows.append(
            InferRow(
                batch_size=batch_size,
                ttft_s=ttft_s,
                token_s=token_s,
                prefill_tokens_per_s=prefill_rate,
                decode_tokens_per_s=batch_size / token_s,
                mfu=prefill_rate * model.config.flops_per_token() / 3 / flops,  # forward only
                bandwidth_use=step_bytes / token_s / bandwidth,
            )
        )
    return rows


def check_length(model: GPT, prompt_tokens: int, new_tokens: int) -> None:
    """Raises NanorayError where prompt and answer are longer than the model can read."""
    if prompt_tokens + new_tokens > model.config.rotary_len:
        raise NanorayError(
            f"{prompt_tokens} + {new_tokens} tokens are more than this model can read "
            f"({model.config.rotary_len}); lower --prompt-tokens or --new-tokens"
        )


def decode_bytes(model: GPT, batch_size: int, length: int) -> int:
    """What one decoding step must read: the matrices, and keys and values in every window."""
    config = model.config
    width = torch.empty((), dtype=model.compute_dtype).element_size()
    seen = sum(min(window + 1, length) for window in config.window_sizes())
    return width * (config.num_scaling_parameters() + batch_size * 2 * config.kv_dim * seen)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by the best of five large copies."""
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * _COPY_BYTES / best
