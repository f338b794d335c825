"""How well a model answers as an assistant: the tasks of `nanoray.tasks`, and ChatCORE.

Results are per example and depend on task, index and model alone, so that shards of the indices
merge in any order. In floating point a sum depends on what else is in the batch; so that even
near-ties fall the same way, batches are cut from fixed groups of examples, by index // GROUP_SIZE:
shards made of whole groups give exactly what one run gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoray.engine import CachedModel, Completion, Engine, KVCache, SamplingParams
from nanoray.errors import NanorayError
from nanoray.evals.core_score import DAMAGED
from nanoray.evals.stats import centered, pass_at_k, wilson_interval
from nanoray.tasks.base import Task
from nanoray.tokenizer import Conversation, Tokenizer

GROUP_SIZE = 64
_BATCH_SIZE = 16
_JUDGES = 4

# (prompts, token ids) -> logits of these ids after each prompt, fp32 [prompts, ids] on the host.
LastLogits = Callable[[Sequence[Sequence[int]], Sequence[int]], Tensor]


@dataclass(frozen=True)
class ExampleResult:
    """What the model made of one example.

    Attributes:
        completions: its answers; for a categorical task the one letter.
        num_correct: how many of them are right.
        problem: why an answer is missing or cut short by a failure; empty as a rule.
    """

    index: int
    completions: tuple[str, ...]
    num_correct: int
    problem: str = ""


class LetterLogits:
    """`LastLogits` of our model: prompts as one padded batch, the head at their ends only."""

    def __init__(self, model: CachedModel) -> None:
        self._model = model
        self._cache: KVCache | None = None

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> Tensor:
        B, T = len(prompts), max(map(len, prompts))
        lengths = [len(prompt) for prompt in prompts]
        tokens_BT = torch.zeros(B, T, dtype=torch.long)
        for row_T, prompt in zip(tokens_BT, prompts):
            row_T[: len(prompt)] = torch.tensor(prompt)
        hidden_B1D = self._model.forward(
            self._room(B, T), range(B), [0] * B, tokens_BT, lengths, [-1] * B, last_only=True
        )
        logits_BV = self._model.logits(hidden_B1D[:, 0])
        return logits_BV[:, list(token_ids)].cpu()

    def _room(self, num_slots: int, length: int) -> KVCache:
        """A cache of at least that size; grows by doubling, so that it is seldom made anew."""
        cache = self._cache
        if cache is None or cache.num_slots < num_slots or cache.max_len < length:
            max_len = min(1 << (length - 1).bit_length(), self._model.config.rotary_len)
            self._cache = cache = KVCache(self._model, num_slots, max_len)
        return cache


def evaluate_categorical(
    last_logits: LastLogits,
    tokenizer: Tokenizer,
    task: Task,
    indices: Sequence[int],
    *,
    max_len: int,
) -> list[ExampleResult]:
    """Take the likeliest of each example's letters, in the order of ``indices``.

    Args:
        max_len: a longer prompt is not read: its example counts as wrong, and says so.

    Raises:
        NanorayError: a letter is not one token; the logits are NaN or infinite.
    """
    assert task.kind == "categorical"
    results: dict[int, ExampleResult] = {}
    for _, group in itertools.groupby(sorted(set(indices)), lambda index: index // GROUP_SIZE):
        questions = []
        for index in group:
            conversation = task.example(index)
            prompt = tokenizer.render_for_completion(conversation)
            if len(prompt) > max_len:
                results[index] = _too_long(index, len(prompt), max_len)
            else:
                questions.append((index, conversation, prompt))
        questions.sort(key=lambda question: len(question[2]))  # so that little is padding
        for first in range(0, len(questions), _BATCH_SIZE):
            batch = questions[first : first + _BATCH_SIZE]
            results |= _choose(last_logits, tokenizer, task, batch)
    return [results[index] for index in indices]


def _choose(
    last_logits: LastLogits,
    tokenizer: Tokenizer,
    task: Task,
    batch: list[tuple[int, Conversation, list[int]]],
) -> dict[int, ExampleResult]:
    letters = sorted({letter for _, conversation, _ in batch for letter in conversation["letters"]})
    columns = {letter: column for column, letter in enumerate(letters)}
    token_ids = [_letter_token(tokenizer, letter) for letter in letters]
    logits_BL = last_logits([prompt for *_, prompt in batch], token_ids)
    if not bool(logits_BL.isfinite().all()):  # max() would take the first letter
        raise NanorayError(DAMAGED)
    results = {}
    for (index, conversation, _), row in zip(batch, logits_BL.tolist()):
        scores = {letter: row[columns[letter]] for letter in conversation["letters"]}
        letter = max(scores, key=scores.__getitem__)
        results[index] = ExampleResult(index, (letter,), task.evaluate(conversation, letter))
    return results


def _letter_token(tokenizer: Tokenizer, letter: str) -> int:
    tokens = tokenizer.encode(letter)
    if len(tokens) != 1:
        raise NanorayError(
            f"the answer {letter!r} is {len(tokens)} tokens, but a categorical task needs answers "
            f"of one token; take other letters, or a tokenizer that has it as one"
        )
    return tokens[0]


def evaluate_generative(
    engine: Engine,
    tokenizer: Tokenizer,
    task: Task,
    indices: Sequence[int],
    *,
    num_samples: int = 1,
    max_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 42,
) -> list[ExampleResult]:
    """Sample ``num_samples`` answers of each example and judge them, in the order of ``indices``.

    What is drawn depends on ``seed``, the example's index and the sample's number.

    Raises:
        NanorayError: the sampling parameters contradict each other.
    """
    assert task.kind == "generative"
    results: dict[int, ExampleResult] = {}
    conversations, prompts, params = {}, [], []
    for index in indices:
        conversation = task.example(index)
        prompt = tokenizer.render_for_completion(conversation)
        if len(prompt) > engine.max_len:
            results[index] = _too_long(index, len(prompt), engine.max_len)
            continue
        conversations[index] = conversation
        prompts.append(prompt)
        params.append(
            SamplingParams(
                temperature=temperature,
                top_k=top_k,
                # The engine hashes it, so that neighbouring numbers do.
                seed=((seed & 0xFFFFFFFF) << 32) + index,
                n=num_samples,
                max_tokens=max_tokens,
            )
        )
    completions = iter(engine.generate(prompts, params))
    samples = {index: list(itertools.islice(completions, num_samples)) for index in conversations}

    def judge(index: int) -> ExampleResult:
        return _judge(task, tokenizer, index, conversations[index], samples[index])

    # Threads, because a judge may wait for a sandbox.
    with ThreadPoolExecutor(_JUDGES) as pool:
        results |= zip(conversations, pool.map(judge, conversations))
    return [results[index] for index in indices]


def _judge(
    task: Task,
    tokenizer: Tokenizer,
    index: int,
    conversation: Conversation,
    samples: list[Completion],
) -> ExampleResult:
    failures = [sample.error for sample in samples if sample.finish_reason in ("error", "abort")]
    correct = [
        sample.finish_reason in ("stop", "length")
        and task.evaluate(conversation, answer_text(tokenizer, sample.tokens))
        for sample in samples
    ]
    texts = tuple(sample.text for sample in samples)
    return ExampleResult(index, texts, sum(correct), str(failures[0]) if failures else "")


def answer_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """What is judged of an answer: its text without marks, tool calls and their output.

    As `nanoray.tasks.base.reference_answer` leaves them out, too.
    """
    hidden_from = {tokenizer.special_id(f"<|{part}_start|>") for part in ("python", "output")}
    marks = set(tokenizer.special_tokens.values())
    shown: list[int] = []
    hidden = False
    for token in tokens:
        if token in marks:
            hidden = token in hidden_from
        elif not hidden:
            shown.append(token)
    return tokenizer.decode(shown)


def _too_long(index: int, length: int, max_len: int) -> ExampleResult:
    return ExampleResult(index, (), 0, f"the prompt of {length} tokens exceeds {max_len}")


@dataclass(frozen=True)
class TaskScore:
    """A line of the table.

    Attributes:
        accuracy: mean share of right answers, 0 to 1.
        low, high: its 95 % confidence interval, for examples as drawn from a population.
        centered: accuracy with guessing as 0.
        pass_at: k -> pass@k, for 1 to 8 (as nanochat) and the number of samples.
        num_problems: examples with an answer missing or failed (they count as wrong).
    """

    task: str
    num_examples: int
    accuracy: float
    low: float
    high: float
    centered: float
    pass_at: dict[int, float]
    num_problems: int


def task_score(task: Task, results: Iterable[ExampleResult]) -> TaskScore:
    """Merge the results of all of a task's examples, from any number of shards.

    Every example must have the same number of samples (or none, for a prompt that does not fit).
    """
    merged = {result.index: result for result in results}
    assert merged.keys() == set(range(len(task))), "every example exactly once"
    if not merged:
        raise NanorayError(f"{task.name} has no examples to evaluate; take a larger slice")
    num_samples = max(1, max(len(result.completions) for result in merged.values()))
    ks = sorted({*range(1, min(8, num_samples) + 1), num_samples})
    ordered = [merged[index] for index in range(len(task))]
    pass_at = {
        k: sum(pass_at_k(num_samples, result.num_correct, k) for result in ordered) / len(ordered)
        for k in ks
    }
    accuracy = sum(result.num_correct for result in ordered) / (num_samples * len(ordered))
    low, high = wilson_interval(accuracy, len(ordered))
    return TaskScore(
        task=task.name,
        num_examples=len(ordered),
        accuracy=accuracy,
        low=low,
        high=high,
        centered=centered(accuracy, task.baseline),
        pass_at=pass_at,
        num_problems=sum(bool(result.problem) for result in ordered),
    )


def chatcore(scores: Mapping[str, TaskScore]) -> float:
    """ChatCORE (nanochat): the mean of the tasks' centred accuracies."""
    return sum(score.centered for score in scores.values()) / len(scores)
