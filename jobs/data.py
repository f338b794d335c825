"""``python -m jobs.data download|build|repackage|inspect``: corpora of text in parquet shards."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace

from jobs.data_progress import DownloadProgress
from jobs.progress import CountProgress
from nanoray import storage
from nanoray.config import (
    BuildConfig,
    DownloadConfig,
    InspectConfig,
    RepackageConfig,
    UsageError,
    run_job,
)
from nanoray.data.build import build_docstrings, build_from
from nanoray.data.corpus import Corpus, read_corpus
from nanoray.data.download import PUBLISHED, check_target, download_corpus, wanted_shards
from nanoray.data.report import inspect_corpus, render
from nanoray.data.shards import list_shards
from nanoray.data.sources import expand

USAGE = (
    "usage: python -m jobs.data download|build|repackage|inspect [flags]; --help after the word "
    "lists the flags"
)
HELP = """\
  download   fetch shards of ClimbMix or FineWeb-Edu
  build      make a corpus from docstrings, or from your files (--from)
  repackage  shuffle a large corpus globally on Ray
  inspect    count a corpus, show some of it, list what is wrong with its shards"""


def main(argv: Sequence[str]) -> int:
    word, rest = (argv[0], argv[1:]) if argv else ("", [])
    prog = f"python -m jobs.data {word}"
    if word == "download":
        return download(DownloadConfig.parse(rest, prog))
    if word == "build":
        return build(BuildConfig.parse(rest, prog))
    if word == "repackage":
        return repackage(RepackageConfig.parse(rest, prog))
    if word == "inspect":
        return inspect(InspectConfig.parse(rest, prog))
    if word in ("-h", "--help"):
        print(f"{__doc__}\n\n{HELP}\n\n{USAGE}")
        return 0
    raise UsageError(USAGE)


def download(config: DownloadConfig) -> int:
    published = PUBLISHED[config.corpus]
    if config.base_url is not None:
        if not re.match(r"https?://[^/]", config.base_url):
            raise UsageError(f"--base-url {config.base_url} is not an http:// or https:// address")
        published = replace(published, base_url=config.base_url)
    out_dir = storage.data_dir(config.corpus)
    names = wanted_shards(published, config.num_shards)
    print(f"{len(names)} shards from {published.base_url} -> {out_dir}", flush=True)
    if config.dry_run:
        check_target(published, out_dir)
        missing = sorted(set(names) - set(storage.list_names(out_dir)))
        print(f"dry run: {len(names) - len(missing)} are there, {len(missing)} would be fetched")
        return 0
    start = time.perf_counter()
    with DownloadProgress(len(names)) as progress:
        done = download_corpus(
            published,
            out_dir,
            config.num_shards,
            config.num_workers,
            observe=progress.observe,
            note=progress.note,
        )
    what = f"{done.fetched} shards fetched, {done.present} were there,"
    return _made(what, start, done.corpus, out_dir)


def build(config: BuildConfig) -> int:
    out_dir = storage.data_dir(config.corpus)
    if config.source is None and config.corpus != "docstrings":
        raise UsageError(f"--corpus {config.corpus} needs --from PATH|GLOB|URI, the text to build")
    files = expand(config.source, print) if config.source is not None else []
    what = f"{len(files)} file(s)" if files else "docstrings of the installed packages"
    print(f"{what} -> {out_dir}", flush=True)
    if config.dry_run:
        return _checked(out_dir)
    start = time.perf_counter()
    if config.source is None:
        with CountProgress("{:,} documents, {:,} bytes") as progress:
            corpus = build_docstrings(
                out_dir, config.max_bytes, config.seed, config.num_workers, progress
            )
    else:
        with CountProgress("{:,} of {:,} files") as progress:
            corpus = build_from(
                config.source,
                out_dir,
                config.text_column,
                config.seed,
                config.shard_chars,
                config.on_bad_shard,
                progress,
            )
    return _made("built in", start, corpus, out_dir)


def repackage(config: RepackageConfig) -> int:
    source = config.source
    if config.corpus is None or source is None:
        raise UsageError("repackage needs --from OLD and --corpus NEW")
    # Ray takes a second to import, and the other words of this job do without it.
    from nanoray import fleet
    from nanoray.data.repackage import repackage as run

    if not re.search(r"[/*?\[]|\.parquet$", source):
        source = storage.data_dir(source)
    out_dir = storage.data_dir(config.corpus)
    files = expand(source, print)
    print(f"{len(files)} file(s) of {source} -> {out_dir}", flush=True)
    if config.dry_run:
        return _checked(out_dir)
    fleet.connect()
    start = time.perf_counter()
    with CountProgress("{:,} of {:,} shards") as progress:
        corpus = run(
            source,
            out_dir,
            config.seed,
            config.shard_chars,
            config.row_group_size,
            config.text_column,
            config.on_bad_shard,
            progress,
        )
    return _made("repackaged in", start, corpus, out_dir)


def inspect(config: InspectConfig) -> int:
    shards = list_shards(storage.data_dir(config.corpus))
    if config.dry_run:
        print(f"dry run: {len(shards)} shards would be read")
        return 0
    reports = inspect_corpus(shards, config.num_documents, config.num_workers)
    print("\n".join(render(reports)))
    return 1 if any(report.problems for report in reports) else 0


def _checked(out_dir: str) -> int:
    storage.check_writable(out_dir)
    there = read_corpus(out_dir)
    if there is not None and there.complete:
        print(f"{out_dir} holds a corpus, which stays: if made of other data, the job will refuse")
    print("dry run: sources and target are fine")
    return 0


def _made(what: str, start: float, corpus: Corpus, out_dir: str) -> int:
    """Say what was made of a corpus since ``start``, and what it is now."""
    print(f"{what} {time.perf_counter() - start:.1f} s")
    characters = f", {corpus.characters:,} characters" if corpus.characters else ""
    print(
        f"{out_dir}: {corpus.num_shards} shards (the last for validation), "
        f"{corpus.num_documents:,} documents{characters}"
    )
    for kind, count in sorted((corpus.skipped or {}).items()):
        print(f"left out: {count:,} {kind.replace('_', ' ')}")
    return 0


if __name__ == "__main__":
    run_job(main)
