"""The data of DCLM CORE: 22 tasks in one folder, read and checked line by line.

A bundle is `core.yaml` (the tasks), `eval_meta_data.csv` (what guessing scores) and the JSON
lines that core.yaml names under `eval_data/`, as in llm-foundry and nanochat.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, Literal, get_args

import yaml

from nanoray import storage
from nanoray.errors import NanorayError

Kind = Literal["multiple_choice", "schema", "language_modeling"]

CONFIG_NAME = "core.yaml"
BASELINES_NAME = "eval_meta_data.csv"
DATA_FOLDER = "eval_data"
_SHUFFLE_SEED = 1337  # nanochat's, so that "100 examples a task" are the same 100


@dataclass(frozen=True)
class Example:
    """One question. Option i reads contexts[i] + delimiter + continuations[i].

    Multiple choice repeats its one context, a schema its one continuation; language modelling
    has one option, and the question is whether the model would say exactly that.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """One task of the bundle.

    Attributes:
        label: its name in core.yaml.
        delimiter: what stands between context and continuation.
        baseline: accuracy of guessing, from 0 to 1.
    """

    label: str
    kind: Kind
    num_fewshot: int
    delimiter: str
    baseline: float
    examples: tuple[Example, ...]

    def sample(self, limit: int) -> Task:
        """The task with ``limit`` of its examples (all if it has fewer), in nanochat's order.

        Few-shot examples are drawn from the sample too. Raises NanorayError when the sample is
        too small for that.
        """
        examples = list(self.examples)
        random.Random(_SHUFFLE_SEED).shuffle(examples)
        chosen = examples[:limit]
        if len(chosen) <= self.num_fewshot:
            raise NanorayError(
                f"task {self.label} shows {self.num_fewshot} examples before each question, so it "
                f"needs at least {self.num_fewshot + 1}, not {len(chosen)}; evaluate more of it"
            )
        return replace(self, examples=tuple(chosen))


def read_bundle(folder: str, labels: Sequence[str] | None = None) -> list[Task]:
    """The bundle's tasks in the order of core.yaml, or only those of ``labels``.

    Args:
        folder: a path or URI.

    Raises:
        NanorayError: names the file, and the line, that is missing or malformed.
    """
    folder = storage.normalize(folder)
    entries = _task_entries(folder)
    known = [entry["label"] for entry in entries]
    if unknown := [label for label in labels or [] if label not in known]:
        raise NanorayError(f"there is no CORE task {unknown[0]!r}; there are {', '.join(known)}")
    baselines = _read_baselines(storage.join(folder, BASELINES_NAME))
    return [
        _read_task(folder, entry, baselines)
        for entry in entries
        if labels is None or entry["label"] in labels
    ]


def _task_entries(folder: str) -> list[dict[str, Any]]:
    """The checked entries of core.yaml."""
    uri = storage.join(folder, CONFIG_NAME)
    try:
        config = yaml.safe_load(_read_text(uri))
    except yaml.YAMLError as error:
        raise NanorayError(f"{uri} is no YAML ({' '.join(str(error).split())}); mend it") from error
    entries = config.get("icl_tasks") if isinstance(config, dict) else None
    if not isinstance(entries, list) or not entries:
        raise NanorayError(f"{uri} has no list icl_tasks; give the folder of a CORE bundle")
    for number, entry in enumerate(entries, 1):
        where = f"{uri}, task {number}"
        if not isinstance(entry, dict):
            raise NanorayError(f"{where} is not a mapping")
        label, data, kind = (entry.get(k) for k in ("label", "dataset_uri", "icl_task_type"))
        shots: Any = entry.get("num_fewshot")
        delimiter = entry.get("continuation_delimiter", " ")
        is_count = isinstance(shots, list) and len(shots) == 1 and type(shots[0]) is int
        if not isinstance(label, str) or not label:
            raise NanorayError(f"{where} has no label")
        if label in [other["label"] for other in entries[: number - 1]]:
            raise NanorayError(f"{where}: the label {label} is there twice; rename one")
        where = f"{uri}, task {label}"
        if kind not in get_args(Kind):
            kinds = ", ".join(get_args(Kind))
            raise NanorayError(f"{where}: icl_task_type is {kind!r}, and must be one of {kinds}")
        if not isinstance(data, str) or not is_inside(data):
            raise NanorayError(f"{where}: dataset_uri {data!r} is no path inside {DATA_FOLDER}/")
        if not is_count or shots[0] < 0:
            raise NanorayError(f"{where}: num_fewshot is {shots!r}, and must be like [10]")
        if not isinstance(delimiter, str):
            raise NanorayError(f"{where}: continuation_delimiter {delimiter!r} is no text")
    return entries


def _read_baselines(uri: str) -> dict[str, float]:
    """Accuracy of guessing, from 0 to 1 (the file has per cent), by label."""
    reader = csv.DictReader(io.StringIO(_read_text(uri), newline=""))
    names = ("Eval Task", "Random baseline")
    if missing := [name for name in names if name not in (reader.fieldnames or [])]:
        raise NanorayError(f"{uri} has no column {missing[0]!r}; its first line must name it")
    baselines = {}
    for row in reader:
        try:
            per_cent = float(row[names[1]])
        except (TypeError, ValueError):
            per_cent = -1.0
        if not 0 <= per_cent < 100:
            raise NanorayError(
                f"{uri}, line {reader.line_num}: {names[1]} is {row[names[1]]!r}, and must be a "
                f"number from 0 up to 100"
            )
        baselines[row[names[0]]] = 0.01 * per_cent
    return baselines


def _read_task(folder: str, entry: dict[str, Any], baselines: dict[str, float]) -> Task:
    label, kind, num_fewshot = entry["label"], entry["icl_task_type"], entry["num_fewshot"][0]
    if label not in baselines:
        raise NanorayError(
            f"{storage.join(folder, BASELINES_NAME)} has no line for the task {label}; add its "
            f"random baseline"
        )
    uri = storage.join(folder, DATA_FOLDER, entry["dataset_uri"])
    examples = []
    for number, line in enumerate(_read_text(uri).removesuffix("\n").split("\n"), 1):
        try:
            examples.append(parse_example(kind, line))
        except ValueError as error:
            raise NanorayError(f"{uri}, line {number}: {error}; mend or remove it") from error
    if len(examples) <= num_fewshot:
        raise NanorayError(
            f"{uri} has {len(examples)} examples, too few to show {num_fewshot} and ask another; "
            f"lower num_fewshot of {label}"
        )
    delimiter = entry.get("continuation_delimiter", " ")
    return Task(label, kind, num_fewshot, delimiter, baselines[label], tuple(examples))


def parse_example(kind: Kind, line: str) -> Example:
    """One JSON line. Raises ValueError that says what is wrong with it."""
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("no JSON that can be read (too many brackets in one another)") from error
    if not isinstance(item, dict):
        raise ValueError("not a JSON object")
    if kind == "language_modeling":
        # The context is trimmed, as its end would otherwise run into the delimiter.
        return Example((_text(item, "context").strip(),), (_text(item, "continuation"),), 0)
    if kind == "multiple_choice":
        contexts, continuations = [_text(item, "query")], _texts(item, "choices")
    else:
        contexts, continuations = _texts(item, "context_options"), [_text(item, "continuation")]
    count = max(len(contexts), len(continuations))
    gold = item.get("gold")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < count:
        raise ValueError(f"gold is {gold!r}, and must be one of 0 to {count - 1}")
    if len(contexts) < count:
        contexts *= count
    if len(continuations) < count:
        continuations *= count
    return Example(tuple(contexts), tuple(continuations), gold)


def _text(item: dict[str, Any], key: str) -> str:
    value = item.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} is {value!r}, and must be a text that is not empty")
    return value


def _texts(item: dict[str, Any], key: str) -> list[str]:
    values = item.get(key)
    if not isinstance(values, list) or len(values) < 2:
        raise ValueError(f"{key} must be a list of at least two texts")
    return [_text({key: value}, key) for value in values]


def is_inside(path: str) -> bool:
    """Whether a relative path with slashes stays inside its folder."""
    parts = PurePosixPath(path).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts and not {"\\", ":"} & set(path)


def _read_text(uri: str) -> str:
    try:
        return storage.read_text(uri)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NanorayError(
            f"the CORE bundle has no file {uri}; give the folder that holds {CONFIG_NAME}, or "
            f"download the bundle again"
        ) from error
    except IsADirectoryError as error:
        raise NanorayError(f"{uri} is a folder where the CORE bundle has a file") from error
    except UnicodeDecodeError as error:
        raise NanorayError(f"{uri} is no UTF-8 text ({error}); save it as UTF-8") from error
