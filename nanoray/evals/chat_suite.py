"""The suite of `jobs.eval chat`: tasks cut into items, each example asked once."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanoray.engine import CachedModel, Engine
from nanoray.errors import NanorayError
from nanoray.evals.chat import (
    GROUP_SIZE,
    ExampleResult,
    LetterLogits,
    TaskScore,
    chatcore,
    evaluate_categorical,
    evaluate_generative,
    task_score,
)
from nanoray.evals.suites import Report, Subject
from nanoray.model.gpt import GPT
from nanoray.tasks.base import Task
from nanoray.tasks.catalog import Sources, load_task
from nanoray.tokenizer import Tokenizer
from nanoray.tools.calculator import calculate

_NUM_SLOTS = 16


Ask = Callable[[tuple[str, int, int]], tuple[str, list[ExampleResult]]]


@dataclass(frozen=True)
class ChatSuite:
    """Tasks asked in conversation form.

    Attributes:
        task_names: see `nanoray.tasks.catalog`.
        sources: where their data lies.
        max_per_task: examples of a task, evenly spread over it; -1 takes all.
        max_generative: of a generative task; None: as of any.
        num_samples, max_tokens, temperature, top_k: of generative tasks.
    """

    task_names: tuple[str, ...]
    sources: Sources
    max_per_task: int = -1
    max_generative: int | None = None
    num_samples: int = 1
    max_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    seed: int = 42

    @functools.cached_property
    def _tasks(self) -> dict[str, Task]:
        tasks = {name: load_task(name, "test", self.sources) for name in self.task_names}
        for name, task in tasks.items():
            if task.kind == "conversation":
                raise NanorayError(
                    f"{name} is for training: nothing says which answer to it is right; leave it "
                    f"out"
                )
        return {name: self._part(task) for name, task in tasks.items()}

    def _part(self, task: Task) -> Task:
        own = self.max_generative if task.kind == "generative" else None
        limit = self.max_per_task if own is None else own
        return task.spread(limit) if limit >= 0 else task

    def items(self) -> list[tuple[str, int, int]]:
        """See `Suite`. Raises NanorayError for a bad row: now, not after hours of others."""
        for task in self._tasks.values():
            for index in range(len(task)):
                task.example(index)
        return [
            (name, start, min(start + GROUP_SIZE, len(task)))
            for name, task in self._tasks.items()
            for start in range(0, len(task), GROUP_SIZE)
        ]

    def worker(self, subject: Subject) -> Ask:
        return self.asker(subject.checkpoint.model, subject.checkpoint.tokenizer)

    def asker(self, model: GPT, tokenizer: Tokenizer) -> Ask:
        """What asks this model the examples of an item."""
        letter_logits = LetterLogits(CachedModel(model))

        def work(item: tuple[str, int, int]) -> tuple[str, list[ExampleResult]]:
            name, start, stop = item
            task = self._tasks[name]
            if task.kind == "categorical":
                return name, evaluate_categorical(
                    letter_logits,
                    tokenizer,
                    task,
                    range(start, stop),
                    max_len=model.config.rotary_len,
                )
            # A new one for each item: what an old one has cached would round differently.
            engine = Engine(model, tokenizer, num_slots=_NUM_SLOTS, tool=calculate)
            return name, evaluate_generative(
                engine,
                tokenizer,
                task,
                range(start, stop),
                num_samples=self.num_samples,
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                top_k=self.top_k,
                seed=self.seed,
            )

        return work

    def report(self, results: Sequence[tuple[str, list[ExampleResult]]]) -> Report:
        merged = {
            name: [result for label, part in results if label == name for result in part]
            for name in self.task_names
        }
        scores = {name: task_score(self._tasks[name], merged[name]) for name in self.task_names}
        metrics = {"chatcore": chatcore(scores)}
        for name, score in scores.items():
            metrics[f"chat/{name}"] = score.accuracy
            metrics |= {f"chat/{name}/pass@{k}": v for k, v in score.pass_at.items() if k > 1}
        rows = [_table_row(name, score) for name, score in scores.items()]
        rows.append(("ChatCORE", "", "", "", f"{metrics['chatcore']:.4f}", "", ""))
        header = ("task", "examples", "accuracy", "95 % interval", "centred", "pass@k", "problems")
        lines = [self._sample_line(name, r) for name in self.task_names for r in merged[name]]
        return Report(
            metrics,
            header,
            rows,
            files={"chat_samples.jsonl": "".join(lines)},
            text="\n".join(
                _problems(name, merged[name]) for name in scores if scores[name].num_problems
            ),
        )

    def _sample_line(self, name: str, result: ExampleResult) -> str:
        messages = self._tasks[name].example(result.index)["messages"]
        sample = {
            "task": name,
            "index": result.index,
            "question": messages[-2]["content"],
            "completions": result.completions,
            "num_correct": result.num_correct,
            "problem": result.problem,
        }
        return json.dumps(sample, ensure_ascii=False) + "\n"


def _problems(name: str, results: Sequence[ExampleResult]) -> str:
    problems = [result.problem for result in results if result.problem]
    return (
        f"{name}: of {len(results):,} examples {len(problems):,} have an answer that counts as "
        f"wrong because it failed, such as: {problems[0]}"
    )


def _table_row(name: str, score: TaskScore) -> tuple[str, ...]:
    return (
        name,
        f"{score.num_examples:,}",
        f"{score.accuracy:.4f}",
        f"{score.low:.4f} to {score.high:.4f}",
        f"{score.centered:.4f}",
        "  ".join(f"@{k} {value:.4f}" for k, value in score.pass_at.items() if k > 1),
        str(score.num_problems or ""),
    )
