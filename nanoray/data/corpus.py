"""``corpus.json``: where a corpus came from, what is in it, and whether it is complete.

A folder of shards without it is a corpus too (shards that a user put there). With it, a corpus
whose building was cut short is known as such, and building it again is known to be unnecessary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from filelock import FileLock, Timeout

from nanoray import storage
from nanoray.data.shards import (
    MANIFEST,
    corpus_fingerprint,
    list_shards,
    map_threads,
    open_shard,
)
from nanoray.data.writer import write_errors
from nanoray.errors import NanorayError


@dataclass(frozen=True)
class Corpus:
    """What `corpus.json` says.

    Attributes:
        source: how the corpus was made; equal sources (and code) give equal shards.
        complete: false while it is being built.
        characters: 0 where they were not counted (downloads).
        skipped: unusable rows that were left out while building, by kind.
    """

    source: dict[str, Any]
    complete: bool
    num_shards: int = 0
    num_documents: int = 0
    characters: int = 0
    fingerprint: str = ""
    skipped: dict[str, int] | None = None


def read_corpus(corpus_dir: str) -> Corpus | None:
    """The manifest, or None where there is none. Raises NanorayError: it cannot be understood."""
    uri = storage.join(corpus_dir, MANIFEST)
    try:
        corpus = Corpus(**json.loads(storage.read_text(uri)))
        if not isinstance(corpus.source, dict):
            raise TypeError("its source is no object")
        return corpus
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise NanorayError(
            f"{uri} is not a corpus description ({error}); delete it, or build the corpus again"
        ) from error


def _write_corpus(corpus_dir: str, corpus: Corpus) -> None:
    uri = storage.join(corpus_dir, MANIFEST)
    with write_errors(uri):
        storage.write_text(uri, json.dumps(asdict(corpus), indent=2, sort_keys=True) + "\n")


def finish_corpus(
    corpus_dir: str,
    source: dict[str, Any],
    characters: int = 0,
    skipped: dict[str, int] | None = None,
) -> Corpus:
    """Count the shards that are there and write the manifest that says "complete"."""

    def count(uri: str) -> int:
        with open_shard(uri) as file:
            return int(file.metadata.num_rows)

    shards = list_shards(corpus_dir, unfinished_ok=True)
    corpus = Corpus(
        source=source,
        complete=True,
        num_shards=len(shards),
        num_documents=sum(map_threads(count, shards)),
        characters=characters,
        fingerprint=corpus_fingerprint(shards),
        skipped=skipped or {},
    )
    _write_corpus(corpus_dir, corpus)
    return corpus


@contextmanager
def building(corpus_dir: str, source: dict[str, Any]) -> Iterator[Corpus | None]:
    """Hold a corpus folder while its shards are written.

    Yields the finished corpus if it is there already, made from the same source; else None, with
    the folder emptied of what an interrupted building left.

    Raises:
        NanorayError: the folder holds other data, is being built by another job, or is not
            writable.
    """
    storage.check_writable(corpus_dir)
    with _build_lock(corpus_dir):
        old = read_corpus(corpus_dir)
        if old is not None and old.complete and old.source == source:
            yield old
            return
        names = storage.list_names(corpus_dir)
        shards = [name for name in names if name.startswith("shard_")]
        if (old is None and shards) or (old is not None and old.complete):
            raise NanorayError(
                f"{corpus_dir} already holds a corpus of {difference(old, source)}; delete that "
                f"folder or choose another --corpus"
            )
        for name in shards + [name for name in names if name.startswith(".shard_")]:
            storage.remove(storage.join(corpus_dir, name))
        _write_corpus(corpus_dir, Corpus(source, complete=False))
        yield None


def difference(old: Corpus | None, source: dict[str, Any]) -> str:
    """What tells the corpus that is there from the one that is wanted."""
    if old is None:
        return "an equal name"
    differing = {k for k in {*old.source, *source} if old.source.get(k) != source.get(k)}
    if differing <= {"num_files", "versions"}:
        return f"what {source['from']} was before its files changed"
    differing -= {"num_files", "versions"}
    return "another source: " + ", ".join(
        f"{key} {old.source.get(key)!r} instead of {source.get(key)!r}" for key in sorted(differing)
    )


@contextmanager
def _build_lock(corpus_dir: str) -> Iterator[None]:
    """One builder a folder, where the folder is a local one."""
    if not storage.is_local(corpus_dir):
        yield
        return
    with write_errors(corpus_dir):
        storage.make_dirs(corpus_dir)
        lock = FileLock(storage.join(storage.normalize(corpus_dir), ".build.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise NanorayError(
                f"another job is building {corpus_dir}; wait until it is done, or choose another "
                f"--corpus"
            ) from error
    try:
        yield
    finally:
        lock.release()
