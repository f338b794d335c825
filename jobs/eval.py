"""``python -m jobs.eval bpb|sample|core|chat|infer``: what a checkpoint can do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.progress import CountProgress
from nanoray import storage
from nanoray.config import (
    BpbConfig,
    ChatEvalConfig,
    CoreConfig,
    EvalConfig,
    InferConfig,
    SampleConfig,
    UsageError,
    run_job,
)
from nanoray.config.eval import split_names
from nanoray.data.shards import list_shards, split_shards
from nanoray.errors import NanorayError

USAGE = (
    "usage: python -m jobs.eval bpb|sample|core|chat|infer [flags]; --help after the word lists "
    "the flags"
)
ITEM_DEADLINE_S = 3600.0


def main(argv: Sequence[str]) -> int:
    commands: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
        "bpb": (BpbConfig, bpb),
        "sample": (SampleConfig, sample),
        "core": (CoreConfig, core),
        "chat": (ChatEvalConfig, chat),
        "infer": (InferConfig, infer),
    }
    if not argv or argv[0] not in commands:
        if argv and argv[0] in ("-h", "--help"):
            print(f"{__doc__}\n\n{USAGE}")
            return 0
        raise UsageError(USAGE)
    config_type, command = commands[argv[0]]
    return command(config_type.parse(argv[1:], f"python -m jobs.eval {argv[0]}"))


def bpb(config: BpbConfig) -> int:
    from nanoray.evals.suites import BpbSuite

    def suite(subject: Any) -> BpbSuite:
        corpus = config.corpus
        if not corpus and subject.loaded is None:
            raise NanorayError("give the text to measure on: --corpus NAME")
        corpus_dir = storage.data_dir(corpus or subject.loaded.meta["plan"]["corpus_dir"])
        split_shards(list_shards(corpus_dir))  # a corpus that is not there is told now
        return BpbSuite(
            corpus_dir, config.eval_tokens, config.device_batch_size, config.on_bad_shard
        )

    return _evaluate("bpb", config, suite)


def sample(config: SampleConfig) -> int:
    from nanoray.evals.suites import SampleSuite

    suite = SampleSuite(config.num_free, config.free_tokens, config.seed)
    return _evaluate("sample", config, lambda _subject: suite)


def core(config: CoreConfig) -> int:
    from nanoray.evals.core_download import download_bundle
    from nanoray.evals.suites import CoreSuite

    def suite(_subject: Any) -> CoreSuite:
        if config.bundle:
            bundle = storage.normalize(config.bundle)
        else:
            with CountProgress("{:,} of {:,} bytes of the CORE bundle") as progress:
                bundle = download_bundle(observe=lambda done, total: progress(done, total or 0))
        return CoreSuite(bundle, split_names(config.tasks or ""), config.max_per_task)

    return _evaluate("core", config, suite)


def chat(config: ChatEvalConfig) -> int:
    from nanoray.data.words import words_of_run
    from nanoray.evals.chat_suite import ChatSuite
    from nanoray.tasks.catalog import SPELLING, Sources

    def suite(subject: Any) -> ChatSuite:
        names = split_names(config.tasks)
        words = config.words
        if not words and SPELLING & set(names):
            words = words_of_run(subject.checkpoint.meta["plan"])
        return ChatSuite(
            task_names=names,
            sources=Sources(config.data_dir, words),
            max_per_task=config.max_per_task,
            num_samples=config.num_samples,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            seed=config.seed,
        )

    return _evaluate("chat", config, suite)


def infer(config: InferConfig) -> int:
    from nanoray.evals.infer import check_length, measure
    from nanoray.evals.suites import Report

    subject = _source(config).load()
    check_length(subject.checkpoint.model, config.prompt_tokens, config.new_tokens)
    if config.dry_run:
        print(f"dry run: {subject.checkpoint.path} is fine")
        return 0
    start = time.perf_counter()
    found = measure(
        subject.checkpoint.model,
        [int(size) for size in config.batch_sizes.split(",")],
        prompt_tokens=config.prompt_tokens,
        new_tokens=config.new_tokens,
        repeats=config.repeats,
        seed=config.seed,
    )
    rows = [
        (
            str(row.batch_size),
            f"{row.ttft_s * 1000:.1f} ms",
            f"{row.token_s * 1000:.2f} ms",
            f"{row.prefill_tokens_per_s:,.0f}",
            f"{row.decode_tokens_per_s:,.0f}",
            f"{row.mfu:.1%}",
            f"{row.bandwidth_use:.1%}",
        )
        for row in found
    ]
    header = ("batch", "TTFT", "per token", "prefill tok/s", "decode tok/s", "MFU", "bandwidth")
    metrics = {
        f"infer/{key}@{row.batch_size}": value
        for row in found
        for key, value in row.to_dict().items()
        if key != "batch_size"
    }
    seconds = time.perf_counter() - start
    _tell("infer", config, subject.folder, Report(metrics, header, rows), seconds)
    return 0


def _source(config: EvalConfig) -> Any:
    from nanoray.evals.suites import ModelSource

    return ModelSource(config.run, config.step, getattr(config, "hf_path", None), config.dtype)


def _evaluate(name: str, config: EvalConfig, make_suite: Callable[[Any], Any]) -> int:
    """Run a suite, print what it found, and keep the report beside the checkpoint."""
    from nanoray import fleet

    source = _source(config)
    subject = source.load()  # here too, so that a mistake is told before anything starts
    if subject.loaded:  # all actors read this one, whatever is saved meanwhile
        source = replace(source, run=subject.loaded.path)
    suite = make_suite(subject)
    items = suite.items()
    alone = config.num_actors == 1 and not fleet.on_cluster()
    if config.dry_run:
        where = "this process" if alone else f"{config.num_actors} actors"
        print(f"dry run: model and data are fine, {len(items)} items for {where}")
        return 0
    start = time.perf_counter()
    results: list[Any] = [None] * len(items)
    done: Iterator[tuple[int, Any]]
    with CountProgress(name + ": {} of {}") as progress:
        if alone:
            work = suite.worker(subject)
            done = ((i, work(item)) for i, item in enumerate(items))
        else:
            done = _spread(name, config, suite, items, source)
        for count, (index, result) in enumerate(done, 1):
            results[index] = result
            progress(count, len(items))
    _tell(name, config, subject.folder, suite.report(results), time.perf_counter() - start)
    return 0


def _spread(
    name: str, config: EvalConfig, suite: Any, items: Sequence[Any], source: Any
) -> Iterator[tuple[int, Any]]:
    """The suite's (index, result) from actors, as they come."""
    import ray

    from nanoray import fleet
    from nanoray.evals.suites import threads_per_actor

    fleet.connect()

    def settle() -> tuple[float, list[fleet.Needs]]:
        asked = config.gpus_per_actor
        gpus = float(bool(ray.cluster_resources().get("GPU"))) if asked is None else asked
        return gpus, [fleet.Needs(config.num_actors, config.cpus_per_actor, gpus, 0, 0, 0)]

    with fleet.when_there_is_room(settle, config.wait_for_nodes) as (gpus, _give_turn_back):
        source = replace(source, on_gpu=bool(gpus))
        if not gpus:
            source = replace(source, num_threads=threads_per_actor(config.num_actors))
        pool: fleet.ActorPool[Any, Any] = fleet.ActorPool(
            lambda: suite.worker(source.load()),
            min(config.num_actors, len(items)),
            name=f"eval-{name}",
            num_cpus=config.cpus_per_actor,
            num_gpus=gpus,
        )
    try:
        yield from pool.map(items, ITEM_DEADLINE_S)
    finally:
        pool.close()


def _tell(name: str, config: EvalConfig, folder: str, report: Any, seconds: float) -> None:
    console = Console(highlight=False)
    if report.rows:
        table = Table(*report.header)
        for row in report.rows:
            table.add_row(*row)
        console.print(table)
    if report.text:
        print(report.text)
    for file, text in report.files.items():
        storage.write_text(storage.join(folder, file), text)
    record = {
        "stage": "eval",
        "suite": name,
        "seconds": round(seconds, 3),
        "config": config.model_dump(mode="json"),
        "metrics": report.metrics,
    }
    uri = storage.join(folder, f"{name}.json")
    storage.write_text(uri, json.dumps(record, indent=1) + "\n")
    print(f"figures: {uri}")


if __name__ == "__main__":
    run_job(main)
