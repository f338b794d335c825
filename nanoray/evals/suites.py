"""The suites of `jobs.eval`: how each one's work is cut into items and its results merged.

A suite is a plain value that travels to the actors. An item's result depends on nothing but the
suite, the item and the model, so figures do not depend on how many actors there are.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from nanoray import storage
from nanoray.checkpoint.loading import LoadedModel, load_model
from nanoray.data.plan import validation_rows
from nanoray.data.shards import OnBad, list_shards, row_groups, split_shards
from nanoray.engine import Engine, SamplingParams
from nanoray.errors import NanorayError
from nanoray.evals.bpb import bits_and_bytes
from nanoray.evals.core import ExampleResult, core_csv, core_metric, evaluate_examples, task_result
from nanoray.evals.core_bundle import Task, read_bundle
from nanoray.evals.core_score import DAMAGED, CachedScorer, LanguageModel
from nanoray.evals.hf import load_hf
from nanoray.evals.sample import sample_report
from nanoray.machine import available_cpus
from nanoray.model.precision import pick_compute_dtype, pick_device, reserved_device

_BPB_CHUNKS = 16  # items of a split
_CORE_CHUNK = 128  # examples of an item
_PROMPT_TOKENS = 64  # room for a fixed prompt and its 16 new tokens
_HF_SEQUENCE_LEN = 2048  # rows for bits per byte, at most: ours of the recipe


@dataclass(frozen=True)
class Subject:
    """A model under evaluation: a checkpoint of ours, or a Hugging Face model.

    Attributes:
        folder: where its figures are kept.
        tokenizer: what packing and bits per byte need of one.
        token_losses: (inputs [B, T], targets [B, T]) -> losses [B, T] in nats.
        sequence_len: T of the rows for bits per byte.
        language_model: makes what CORE needs.
        loaded: our checkpoint; None for another model, which only CORE and bpb can read.
    """

    folder: str
    tokenizer: Any
    token_losses: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    sequence_len: int
    device: torch.device
    language_model: Callable[[], LanguageModel]
    loaded: LoadedModel | None = None

    @property
    def checkpoint(self) -> LoadedModel:
        assert self.loaded is not None, "this suite is for checkpoints of ours"
        return self.loaded


@dataclass(frozen=True)
class ModelSource:
    """Which model an actor loads, and how.

    Attributes:
        run: name, or folder or URI of a run or checkpoint; None for a Hugging Face model.
        hf_path: its name on the hub, or its folder.
        num_threads: of torch on a CPU; 0 leaves them as they are.
        on_gpu: whether a GPU is reserved for the process; None: it may use the best there is.
    """

    run: str | None
    step: int | None = None
    hf_path: str | None = None
    dtype: str = "auto"
    num_threads: int = 0
    on_gpu: bool | None = None

    def __post_init__(self) -> None:
        if self.hf_path and os.path.isdir(self.hf_path):  # actors may run in another folder
            object.__setattr__(self, "hf_path", os.path.abspath(self.hf_path))

    def load(self) -> Subject:
        """Raises NanorayError where the model cannot be had."""
        if self.num_threads:
            torch.set_num_threads(self.num_threads)
        device = pick_device() if self.on_gpu is None else reserved_device(self.on_gpu)
        if self.hf_path:
            return _hugging_face(self.hf_path, device, self.dtype)
        assert self.run is not None
        loaded = load_model(self.run, self.step, device=device, dtype=self.dtype)
        model, tokenizer = loaded.model, loaded.tokenizer
        parent, _, step = loaded.path.rpartition("/")
        run = parent.removesuffix("/checkpoints")
        return Subject(
            folder=storage.join(run, "evals", step),
            tokenizer=tokenizer,
            token_losses=lambda inputs, targets: model(inputs, targets, reduction="none"),
            sequence_len=model.config.sequence_len,
            device=device,
            language_model=lambda: CachedScorer(model, tokenizer),
            loaded=loaded,
        )


def _hugging_face(name: str, device: torch.device, dtype: str) -> Subject:
    model = load_hf(name, device, pick_compute_dtype(device, dtype))
    short = name.rstrip("/").replace("/", "--").lstrip("-.")
    return Subject(
        folder=storage.join(storage.home(), "evals", short),
        tokenizer=model,
        token_losses=model.token_losses,
        sequence_len=min(model.max_len, _HF_SEQUENCE_LEN),
        device=device,
        language_model=lambda: model,
    )


@dataclass(frozen=True)
class Report:
    """What a suite found: figures, a table to print, files to keep beside report.json."""

    metrics: dict[str, float]
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    text: str = ""


class Suite(Protocol):
    """One evaluation."""

    def items(self) -> Sequence[Any]:
        """The work, in a fixed order."""
        ...

    def worker(self, subject: Subject) -> Callable[[Any], Any]:
        """Called once in every actor; returns the function of one item."""
        ...

    def report(self, results: Sequence[Any]) -> Report:
        """Merge the items' results, given in the order of the items."""
        ...


@dataclass(frozen=True)
class BpbSuite:
    """Bits per byte of both splits of a corpus, over a fixed budget of tokens each."""

    corpus_dir: str
    eval_tokens: int
    batch_rows: int
    on_bad: OnBad = "fail"

    def items(self) -> list[tuple[str, int]]:
        return [(split, i) for split in ("train", "val") for i in range(_BPB_CHUNKS)]

    def worker(self, subject: Subject) -> Callable[[tuple[str, int]], tuple[float, int]]:
        token_bytes = subject.tokenizer.token_bytes()

        @functools.cache
        def rows(split: str) -> np.ndarray:
            train, validation = split_shards(list_shards(self.corpus_dir))
            return validation_rows(
                row_groups(validation if split == "val" else train, self.on_bad),
                subject.tokenizer,
                sequence_len=subject.sequence_len,
                num_tokens=self.eval_tokens,
                on_bad=self.on_bad,
            )

        def work(item: tuple[str, int]) -> tuple[float, int]:
            split, i = item
            chunk = np.array_split(rows(split), _BPB_CHUNKS)[i]
            return bits_and_bytes(
                subject.token_losses, chunk, token_bytes, self.batch_rows, subject.device
            )

        return work

    def report(self, results: Sequence[tuple[float, int]]) -> Report:
        metrics = {}
        for split in ("train", "val"):
            parts = [r for (name, _), r in zip(self.items(), results) if name == split]
            bpb = sum(bits for bits, _ in parts) / sum(n for _, n in parts)
            if not math.isfinite(bpb):
                raise NanorayError(DAMAGED)
            metrics[f"{split}_bpb"] = bpb
        rows = [(split, f"{value:.4f}") for split, value in metrics.items()]
        return Report(metrics, ("split", "bits per byte"), rows)


@dataclass(frozen=True)
class SampleSuite:
    """The seven fixed prompts, continued greedily, and samples without a prompt."""

    num_free: int
    free_tokens: int
    seed: int

    def items(self) -> list[None]:
        return [None]

    def worker(self, subject: Subject) -> Callable[[None], str]:
        loaded = subject.checkpoint
        # A sample may be longer than the training context, as far as the rotary tables go.
        max_len = max(loaded.model.config.sequence_len, _PROMPT_TOKENS + self.free_tokens)
        engine = Engine(loaded.model, loaded.tokenizer, num_slots=8, max_len=max_len)
        stop = loaded.tokenizer.bos_id

        def generate(
            prompts: list[list[int]], max_tokens: int, temperature: float
        ) -> list[list[int]]:
            params = [
                SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=self.seed + i)
                for i in range(len(prompts))
            ]
            completions = engine.generate(prompts, params)
            for completion in completions:
                if completion.error:
                    raise NanorayError(f"the samples could not be drawn: {completion.error}")
            return [[t for t in c.tokens if t != stop] for c in completions]

        def work(_item: None) -> str:
            return sample_report(
                generate,
                loaded.tokenizer,
                step=loaded.step,
                num_free=self.num_free,
                free_tokens=self.free_tokens,
            )

        return work

    def report(self, results: Sequence[str]) -> Report:
        return Report({}, files={"samples.md": results[0]}, text=results[0])


@dataclass(frozen=True)
class CoreSuite:
    """The DCLM CORE metric."""

    bundle: str
    labels: tuple[str, ...]
    max_per_task: int

    def tasks(self) -> list[Task]:
        tasks = read_bundle(self.bundle, self.labels or None)
        # All of a task is put in nanochat's order, too: what examples a question is shown with
        # depends on it.
        limit = self.max_per_task if self.max_per_task > 0 else sys.maxsize
        return [task.sample(limit) for task in tasks]

    def items(self) -> list[tuple[str, int, int]]:
        return [
            (task.label, start, min(start + _CORE_CHUNK, len(task.examples)))
            for task in self.tasks()
            for start in range(0, len(task.examples), _CORE_CHUNK)
        ]

    def worker(
        self, subject: Subject
    ) -> Callable[[tuple[str, int, int]], tuple[str, list[ExampleResult]]]:
        tasks = {task.label: task for task in self.tasks()}
        model = subject.language_model()

        def work(item: tuple[str, int, int]) -> tuple[str, list[ExampleResult]]:
            label, start, stop = item
            return label, evaluate_examples(tasks[label], range(start, stop), model)

        return work

    def report(self, results: Sequence[tuple[str, list[ExampleResult]]]) -> Report:
        found = {
            task.label: task_result(
                task, [r for label, part in results if label == task.label for r in part]
            )
            for task in self.tasks()
        }
        metrics = {f"core/{label}": result.centered for label, result in found.items()}
        metrics["core"] = core_metric(found)
        rows = [(name, f"{r.accuracy:.4f}", f"{r.centered:.4f}") for name, r in found.items()]
        rows.append(("CORE", "", f"{metrics['core']:.4f}"))
        header = ("task", "accuracy", "centred")
        return Report(metrics, header, rows, files={"core.csv": core_csv(found)})


def threads_per_actor(num_actors: int) -> int:
    """Cores shared among actors on one machine."""
    return max(1, available_cpus() // num_actors)
