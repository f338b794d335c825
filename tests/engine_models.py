"""Small models for the engine's tests, and the naive full forward that they are held against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from nanoray.engine.engine import Engine
from nanoray.engine.request import Completion
from nanoray.engine.sampling import SamplingParams
from nanoray.model.config import GPTConfig
from nanoray.model.gpt import GPT

VOCAB_SIZE = 257  # the byte tokenizer's
GREEDY = SamplingParams(temperature=0, max_tokens=8)


def tiny(seed: int = 0, **changes: object) -> GPT:
    """A small model with GQA and short windows; every weight is noise, so that nothing hides.

    sequence_len 64 gives July a short window of 128 (a long one of 64), February 32 and 64.
    """
    shape = {"sequence_len": 64, "vocab_size": VOCAB_SIZE, "n_layer": 3, "n_head": 4}
    model = GPT(GPTConfig(**{**shape, "n_kv_head": 2, "n_embd": 64, **changes}))
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.2, generator=generator)
        # Not the 0.001 of the initialisation: flat logits would make every greedy choice a tie.
        model.lm_head.weight.normal_(0, 0.3, generator=generator)
    return model.eval()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small matrices gain nothing from threads, and on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scripted(chain: list[int]) -> GPT:
    """A model that greedily says the token after the last one in the chain.

    Its layers do nothing, and its head maps each token's embedding to the token's successor.
    """
    pairs = set(pairwise(chain))
    assert len({token for token, _ in pairs}) == len(pairs), "the chain is ambiguous"
    model = tiny(recipe="february", n_embd=128)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, following in pairs:
            model.lm_head.weight[following] += model.wte.weight[token] / 4
    return model


@torch.no_grad()
def full_logits(model: GPT, tokens: Sequence[int]) -> Tensor:
    """Logits [T, vocab_size] of a whole sequence, without any cache."""
    return model(torch.tensor([list(tokens)]))[0]


def random_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 247, (count,), generator=generator).tolist()


def assert_greedy(model: GPT, completion: Completion, tolerance: float = 1e-4) -> None:
    """Each sampled token is the likeliest by a full forward, save ties closer than 1e-4."""
    whole = completion.prompt + completion.tokens
    logits_TV = full_logits(model, whole)[len(completion.prompt) - 1 : -1]
    wanted_T = logits_TV.log_softmax(-1)
    for i, (token, sampled) in enumerate(zip(completion.tokens, completion.mask)):
        if sampled:
            assert logits_TV[i, token] > logits_TV[i].max() - tolerance, f"token {i}"
            assert abs(completion.logprobs[i] - wanted_T[i, token]) < 1e-4, f"logprob {i}"


def run_until_idle(engine: Engine, most_steps: int = 20_000) -> None:
    while engine.step():
        most_steps -= 1
        assert most_steps, "the engine does not come to an end"


def sampled(seed: int) -> SamplingParams:
    return SamplingParams(temperature=1.1, top_k=40, top_p=0.95, seed=seed, max_tokens=12)
