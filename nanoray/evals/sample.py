"""Samples by the naive full forward: slow, simple, and the reference of the engine's tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nanoray.tokenizer import Tokenizer

# What a chat model is asked, to see at a glance what it has learned.
QUESTIONS = (
    "Hello!",
    "Who are you?",
    "What is 17 + 25?",
    "How many r are in the word strawberry?",
    "What is the capital of France?",
    "Why is the sky blue?",
)
# The prompts that nanochat shows, so that samples can be compared side by side.
PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)


@torch.no_grad()
def sample_naive(
    logits: Callable[[Tensor], Tensor],
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop_ids: Sequence[int],
    temperature: float,
    seed: int,
    device: torch.device,
) -> list[list[int]]:
    """Continue each prompt by a full forward for every token.

    Args:
        logits: ids [1, T] → logits [1, T, vocab].
        temperature: 0 takes the likeliest token.

    Returns:
        The new ids of each prompt, without the stop token.
    """
    generator = torch.Generator().manual_seed(seed)
    outputs = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(max_tokens):
            scores = logits(torch.tensor([ids], device=device))[0, -1].float().cpu()
            if temperature == 0:
                token = int(scores.argmax())
            else:
                probabilities = torch.softmax(scores / temperature, -1)
                token = int(torch.multinomial(probabilities, 1, generator=generator))
            if token in stop_ids:
                break
            ids.append(token)
        outputs.append(ids[len(prompt) :])
    return outputs


# (prompts, most new tokens, temperature) -> new ids of each prompt, without a stop token.
Generate = Callable[[list[list[int]], int, float], list[list[int]]]


def naive_generate(
    logits: Callable[[Tensor], Tensor], tokenizer: Tokenizer, seed: int, device: torch.device
) -> Generate:
    """`sample_naive` as `sample_report` wants it; BOS ends an answer."""

    def generate(prompts: list[list[int]], max_tokens: int, temperature: float) -> list[list[int]]:
        return sample_naive(
            logits,
            prompts,
            max_tokens=max_tokens,
            stop_ids=[tokenizer.bos_id],
            temperature=temperature,
            seed=seed,
            device=device,
        )

    return generate


def sample_report(
    generate: Generate,
    tokenizer: Tokenizer,
    *,
    step: int,
    num_free: int = 3,
    free_tokens: int = 64,
) -> str:
    """A Markdown section: the seven prompts continued greedily, and free samples."""

    def continue_(prompts: list[list[int]], max_tokens: int, temperature: float) -> list[str]:
        outputs = generate(prompts, max_tokens, temperature)
        return [tokenizer.decode(ids).replace("\n", " ⏎ ") for ids in outputs]

    bos = tokenizer.bos_id
    lines = [f"## Step {step}", ""]
    greedy = continue_([[bos, *tokenizer.encode(prompt)] for prompt in PROMPTS], 16, 0.0)
    lines += [f"- {prompt}**{text}**" for prompt, text in zip(PROMPTS, greedy)]
    if num_free:
        lines += ["", "Without a prompt:", ""]
        lines += [f"- {text}" for text in continue_([[bos]] * num_free, free_tokens, 0.8)]
    return "\n".join(lines) + "\n"


def chat_report(
    answer: Callable[[list[list[int]]], list[str]], tokenizer: Tokenizer, *, step: int
) -> str:
    """A Markdown section: the fixed questions, and what the assistant answers.

    Args:
        answer: prompts, each up to the assistant's turn -> texts.
    """
    prompts = [
        tokenizer.render_for_completion({"messages": [{"role": "user", "content": question}]})
        for question in QUESTIONS
    ]
    answers = (text.replace("\n", " ⏎ ") for text in answer(prompts))
    lines = [f"- {question} **{text}**" for question, text in zip(QUESTIONS, answers)]
    return "\n".join([f"## Step {step}", "", *lines]) + "\n"
