"""From a task's example to token rows and the spans of them that are scored."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jinja2

from nanoray.errors import NanorayError
from nanoray.evals.core_bundle import Task

_FEWSHOT_SEED = 1234  # plus the example's index; nanochat's
_PROMPT = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False).from_string(
    "{% for shot in shots %}{{ shot.contexts[shot.gold] }}{{ delimiter }}"
    "{{ shot.continuations[shot.gold] }}\n\n{% endfor %}"
    "{{ context }}{{ delimiter }}{{ continuation }}"
)


class TextEncoder(Protocol):
    """A tokenizer, as far as prompts need it. Text never yields special tokens."""

    @property
    def bos_id(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Question:
    """What the model reads: one row of token ids per option; row[start:] is what is scored.

    1 <= start <= len(row). A span is empty where the option adds no token of its own (one choice
    is the beginning of all others).
    """

    rows: tuple[list[int], ...]
    starts: tuple[int, ...]

    @property
    def num_shared(self) -> int:
        """Leading tokens that all rows share, up to the last one that predicts no scored token."""
        return min(common_prefix(self.rows), min(self.starts) - 1)


def render_prompts(task: Task, index: int) -> list[str]:
    """The texts of example ``index``: one per option; for language modelling the text without
    and with the continuation.

    The few-shot examples are drawn from all others, by a seed that depends on the index alone.
    """
    shots = []
    if task.num_fewshot:
        others = range(len(task.examples) - 1)  # all but the example itself
        chosen = random.Random(_FEWSHOT_SEED + index).sample(others, task.num_fewshot)
        shots = [task.examples[i + (i >= index)] for i in chosen]
    example = task.examples[index]

    def render(context: str, continuation: str) -> str:
        return _PROMPT.render(
            shots=shots, delimiter=task.delimiter, context=context, continuation=continuation
        )

    prompts = [render(*option) for option in zip(example.contexts, example.continuations)]
    if task.kind == "language_modeling":
        # Stripped of the delimiter's last space, which belongs to the next word's token.
        prompts.insert(0, render(example.contexts[0], "").strip())
    return prompts


def build_question(task: Task, index: int, encoder: TextEncoder, max_len: int) -> Question:
    """Tokenize an example. Rows begin with BOS; longer ones than ``max_len`` lose their beginning.

    What is scored: of choices, what follows the rows' common beginning; of a schema, the rows'
    common end; of language modelling, what follows the row without the continuation.

    Raises:
        NanorayError: a scored span alone does not fit ``max_len``.
    """
    rows = [[encoder.bos_id, *encoder.encode(text)] for text in render_prompts(task, index)]
    if task.kind == "schema":
        suffix = common_prefix([row[::-1] for row in rows])
        starts = [max(1, len(row) - suffix) for row in rows]  # 0: equal rows, BOS and all
    else:
        starts = [common_prefix(rows)] * len(rows)
    if task.kind == "language_modeling":
        rows, starts = rows[1:], starts[1:]
    crops = [max(0, len(row) - max_len) for row in rows]
    starts = [start - crop for start, crop in zip(starts, crops)]
    if min(starts) < 1:
        raise NanorayError(
            f"example {index} of {task.label} has a continuation that does not fit the model's "
            f"{max_len} tokens; leave out this task or take a model of a longer context"
        )
    return Question(tuple(row[crop:] for row, crop in zip(rows, crops)), tuple(starts))


def common_prefix(rows: Sequence[list[int]]) -> int:
    """Length of the longest beginning that all rows share."""
    # What the least and the greatest row share, in the order of lists, those between share too.
    least, greatest = min(rows), max(rows)
    pairs = enumerate(zip(least, greatest))
    return next((i for i, (a, b) in pairs if a != b), min(len(least), len(greatest)))
