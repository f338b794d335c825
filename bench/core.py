"""CORE evaluation against nanochat's: same bundle, same model, same tokenizer, one process.

The model is a d4 of width 256 with random weights, T 2048, in fp32 on both sides. Task by task
ours and nanochat's core_eval answer the same examples in turn. Prints one JSON line last: seconds
of each side (and of CPU time, which a busy machine disturbs less), their ratio, and the examples
that they answer differently (those with a margin under 1e-4 nats are ties).

    python bench/core.py --nanochat DIR --bundle DIR [--examples 100] [--tasks copa,squad]

DIR is a checkout of karpathy/nanochat, and an eval_bundle.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import demo_home
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from nanoray.evals.core import evaluate_examples
from nanoray.evals.core_bundle import Example, Task, read_bundle
from nanoray.evals.core_score import CachedScorer
from nanoray.model.config import GPTConfig
from nanoray.model.gpt import GPT
from nanoray.tokenizer import Tokenizer, load_tokenizer

TIE_NATS = 1e-4
Result = TypeVar("Result")
SHAPE: dict[str, Any] = {"n_layer": 4, "n_head": 4, "n_kv_head": 4, "n_embd": 256}
SHAPE |= {"sequence_len": 2048, "window_pattern": "SSSL"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nanochat", type=Path, required=True, help="a nanochat checkout")
    parser.add_argument("--bundle", required=True, help="the folder with core.yaml")
    parser.add_argument("--examples", type=int, default=100, help="of each task")
    parser.add_argument("--tasks", help="labels, comma-separated (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    demo_home.prepare()
    tokenizer = load_tokenizer(demo_home.HOME / "tokenizers" / "docstrings")
    model = random_model(tokenizer.vocab_size)
    ours = CachedScorer(model, tokenizer)
    theirs = Peer(args.nanochat, model, tokenizer)

    tasks = {}
    for task in read_bundle(args.bundle, args.tasks.split(",") if args.tasks else None):
        task = task.sample(args.examples)
        tasks[task.label] = compare(task, ours, theirs)
        print(task.label, json.dumps(tasks[task.label]), file=sys.stderr, flush=True)

    def total(key: str) -> float:
        return sum(figures[key] for figures in tasks.values())

    report = {
        "bench": "core",
        "examples_per_task": args.examples,
        "threads": args.threads,
        "nanoray_s": round(total("nanoray_s"), 2),
        "nanochat_s": round(total("nanochat_s"), 2),
        "speedup": round(total("nanochat_s") / total("nanoray_s"), 2),
        "speedup_cpu": round(total("nanochat_cpu_s") / total("nanoray_cpu_s"), 2),
        "examples": total("examples"),
        "different": total("different"),
        "different_ties": total("different_ties"),
        "speedup_by_task": {label: figures["speedup"] for label, figures in tasks.items()},
    }
    print(json.dumps(report))


def compare(task: Task, ours: CachedScorer, theirs: Peer) -> dict[str, Any]:
    results, ours_s, ours_cpu_s = timed(
        lambda: evaluate_examples(task, range(len(task.examples)), ours)
    )
    predictions, theirs_s, theirs_cpu_s = timed(lambda: theirs.predictions(task))
    different = [r for r in results if r.prediction != predictions[r.index]]
    return {
        "examples": len(results),
        "nanoray_s": round(ours_s, 3),
        "nanochat_s": round(theirs_s, 3),
        "nanoray_cpu_s": round(ours_cpu_s, 3),
        "nanochat_cpu_s": round(theirs_cpu_s, 3),
        "speedup": round(theirs_s / ours_s, 2),
        "accuracy": sum(r.correct for r in results) / len(results),
        "different": len(different),
        "different_ties": sum(r.margin < TIE_NATS for r in different),
        "closest": min(r.margin for r in results),
    }


def timed(work: Callable[[], Result]) -> tuple[Result, float, float]:
    """What it gives, the seconds it took, and those of CPU time over all threads."""
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - start_s, time.process_time() - start_cpu_s


def random_model(vocab_size: int) -> GPT:
    """Noise also where a fresh model has zeros, or every option would be equally likely."""
    model = GPT(GPTConfig(vocab_size=vocab_size, **SHAPE))
    model.init_weights(seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05, generator=generator)
        model.lm_head.weight.normal_(0, 0.2, generator=generator)
    return model


class Peer:
    """nanochat's core_eval on the same weights."""

    def __init__(self, checkout: Path, model: GPT, tokenizer: Tokenizer) -> None:
        os.environ["NANOCHAT_DTYPE"] = "float32"
        sys.path.insert(0, str(checkout))
        from nanochat import core_eval, gpt

        self.core_eval = core_eval
        self.model = gpt.GPT(gpt.GPTConfig(vocab_size=tokenizer.vocab_size, **SHAPE))
        self.model.init_weights()
        self.model.load_state_dict(model.state_dict())
        self.tokenizer = _TokenizerForPeer(tokenizer)
        # Only whether it was right is returned; the option itself shows in this call of min().
        self._losses: list[float] = []
        core_eval.min = self._listening_min

    def _listening_min(self, values: Any) -> Any:
        if isinstance(values, list):
            self._losses = values
        return min(values)

    def predictions(self, task: Task) -> list[int]:
        """The chosen option of each example; for language modelling 0 (right) or -1."""
        meta = {
            "task_type": task.kind,
            "num_fewshot": task.num_fewshot,
            "continuation_delimiter": task.delimiter,
        }
        data = [item_of(task, example) for example in task.examples]
        predictions = []
        for index in range(len(data)):
            correct = self.core_eval.evaluate_example(
                index, self.model, self.tokenizer, data, torch.device("cpu"), meta
            )
            if task.kind == "language_modeling":
                predictions.append(0 if correct else -1)
            else:
                predictions.append(self._losses.index(min(self._losses)))
                assert correct == (predictions[-1] == data[index]["gold"])
        return predictions


class _TokenizerForPeer:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def get_bos_token_id(self) -> int:
        return self._tokenizer.bos_id

    def __call__(self, texts: list[str], prepend: int) -> list[list[int]]:
        return [[prepend, *self._tokenizer.encode(text)] for text in texts]


def item_of(task: Task, example: Example) -> dict[str, Any]:
    """The example as it stands in the bundle."""
    if task.kind == "language_modeling":
        return {"context": example.contexts[0], "continuation": example.continuations[0]}
    if task.kind == "schema":
        continuation = example.continuations[0]
        options = {"context_options": list(example.contexts), "continuation": continuation}
    else:
        options = {"query": example.contexts[0], "choices": list(example.continuations)}
    return options | {"gold": example.gold}


if __name__ == "__main__":
    main()
