"""The CORE metric of DCLM (arXiv 2406.11794): accuracy on 22 tasks, centred on guessing.

The same prompts, examples and decisions as nanochat's core_eval, so that figures compare. The
result of an example depends on nothing but task, index and model: any split of the indices over
workers, merged in any order, gives the same accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nanoray.evals.core_bundle import Task
from nanoray.evals.core_render import build_question
from nanoray.evals.core_score import LanguageModel, SpanScore

_EXAMPLES_AT_ONCE = 1024  # enough for full batches; their tokens fit in memory


@dataclass(frozen=True)
class ExampleResult:
    """What the model made of one example.

    Attributes:
        prediction: the option of the lowest mean loss; for language modelling 0 if every token
            of the continuation is the likeliest, else -1.
        margin: how far the decision was from falling otherwise: between the two best mean
            losses in nats, or between the continuation's and the other logits. Decisions closer
            than rounding (1e-4) may differ between machines. Infinite where nothing competes.
    """

    index: int
    prediction: int
    correct: bool
    margin: float


@dataclass(frozen=True)
class TaskResult:
    """Accuracy from 0 to 1, and centred: 0 is guessing, 1 is all correct."""

    accuracy: float
    centered: float


def evaluate_examples(
    task: Task, indices: Sequence[int], model: LanguageModel
) -> list[ExampleResult]:
    """Results of some of a task's examples, in the order of ``indices``."""
    results = []
    for first in range(0, len(indices), _EXAMPLES_AT_ONCE):
        part = indices[first : first + _EXAMPLES_AT_ONCE]
        questions = [build_question(task, index, model, model.max_len) for index in part]
        for index, scores in zip(part, model.score(questions)):
            results.append(judge(task, index, scores))
    return results


def judge(task: Task, index: int, scores: Sequence[SpanScore]) -> ExampleResult:
    """Decide an example by the scores of its options."""
    gold = task.examples[index].gold
    if task.kind == "language_modeling":
        (score,) = scores
        prediction, margin = 0 if score.greedy else -1, abs(score.gap)
    else:
        losses = [score.loss for score in scores]
        # An option without tokens has the loss NaN, which wins only as the first one. That is
        # no good rule, but nanochat's, by way of Python's min().
        prediction = min(range(len(losses)), key=losses.__getitem__)
        behind = [loss - losses[prediction] for i, loss in enumerate(losses) if i != prediction]
        margin = min((loss for loss in behind if not math.isnan(loss)), default=math.inf)
    return ExampleResult(index, prediction, prediction == gold, margin)


def task_result(task: Task, results: Iterable[ExampleResult]) -> TaskResult:
    """Merge the results of all of a task's examples, from any number of workers."""
    correct = {result.index: result.correct for result in results}
    assert correct.keys() == set(range(len(task.examples))), "every example exactly once"
    accuracy = sum(correct.values()) / len(correct)
    return TaskResult(accuracy, (accuracy - task.baseline) / (1 - task.baseline))


def evaluate_task(task: Task, model: LanguageModel) -> TaskResult:
    """All examples of a task in this process. Use `Task.sample` for fewer."""
    return task_result(task, evaluate_examples(task, range(len(task.examples)), model))


def core_metric(results: Mapping[str, TaskResult]) -> float:
    """The mean centred accuracy of the tasks, by label."""
    return sum(result.centered for result in results.values()) / len(results)


def core_csv(results: Mapping[str, TaskResult]) -> str:
    """The results as nanochat writes them: padded columns, the last line is CORE."""
    lines = [f"{'Task':<35}, {'Accuracy':<10}, {'Centered':<10}"]
    for label, result in results.items():
        lines.append(f"{label:<35}, {result.accuracy:<10.6f}, {result.centered:<10.6f}")
    lines.append(f"{'CORE':<35}, {'':<10}, {core_metric(results):<10.6f}")
    return "\n".join(lines) + "\n"
