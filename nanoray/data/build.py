"""Building a corpus of shards from docstrings or from the user's files.

The documents are held in memory: this is for corpora up to a few gigabytes. Larger ones are
parquet already, and `repackage` shuffles them on Ray.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nanoray.data.corpus import Corpus, building, finish_corpus
from nanoray.data.docstrings import iter_docstrings
from nanoray.data.shards import OnBad
from nanoray.data.sources import describe_files, expand, read_documents
from nanoray.data.writer import SHARD_CHARS, ShardWriter, write_errors
from nanoray.errors import NanorayError

# A small corpus is cut into this many shards, the last for validation.
MIN_SHARDS = 9
DOCSTRING_BYTES = 20_000_000


def build_docstrings(
    out_dir: str,
    max_bytes: int = DOCSTRING_BYTES,
    seed: int = 42,
    num_workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """The embedded default corpus: English docstrings of the installed packages, no network.

    The same environment gives the same bytes. See `nanoray.data.docstrings` for their order.

    Args:
        max_bytes: UTF-8 bytes of text to stop at.
        num_workers: processes that parse (default: the number of cores).
        progress: called with documents and bytes so far.

    Raises:
        NanorayError: `out_dir` holds other data or is not writable.
    """

    def documents(skipped: Counter[str]) -> Iterator[str]:
        total = 0
        for number, text in enumerate(unique(iter_docstrings(num_workers), skipped), 1):
            total += len(text.encode("utf-8"))
            if total > max_bytes:
                return
            if progress is not None and number % 1000 == 0:
                progress(number, total)
            yield text

    source = {"kind": "docstrings", "max_bytes": max_bytes, "seed": seed}
    return _build(out_dir, source, documents, seed, SHARD_CHARS)


def build_from(
    source: str,
    out_dir: str,
    text_column: str = "text",
    seed: int = 42,
    shard_chars: int = SHARD_CHARS,
    on_bad: OnBad = "fail",
    progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """A corpus from parquet, JSON lines (also gzipped) or text files: deduplicated and shuffled.

    A text file is one document, or several if it is long (`nanoray.data.sources.split_text`).

    Args:
        source: a file, folder or glob; a path or an fsspec URI.
        text_column: parquet column or JSON key of the text.
        progress: called with files done and files in all.

    Raises:
        NanorayError: no input, unusable input (file and line or row are named), fewer than two
            documents, or an `out_dir` that holds other data or is not writable.
    """
    files = expand(source)
    described: dict[str, Any] = {
        "kind": "files",
        **describe_files(source, files),
        "text_column": text_column,
        "seed": seed,
        "shard_chars": shard_chars,
        "on_bad_shard": on_bad,
    }

    def documents(skipped: Counter[str]) -> Iterator[str]:
        texts: list[Iterable[str]] = []
        for number, uri in enumerate(files, 1):
            texts.append(_reporting(read_documents(uri, text_column, on_bad, skipped), number))
        return unique(itertools.chain.from_iterable(texts), skipped)

    def _reporting(texts: Iterator[str], number: int) -> Iterator[str]:
        yield from texts
        if progress is not None:
            progress(number, len(files))

    return _build(out_dir, described, documents, seed, shard_chars)


def unique(texts: Iterable[str], skipped: Counter[str]) -> Iterator[str]:
    """Each distinct text once, in order of first appearance; the others are counted."""
    seen: set[bytes] = set()
    for text in texts:
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        if digest in seen:
            skipped["duplicate"] += 1
            continue
        seen.add(digest)
        yield text


def _build(
    out_dir: str,
    source: dict[str, Any],
    documents: Callable[[Counter[str]], Iterator[str]],
    seed: int,
    shard_chars: int,
) -> Corpus:
    with building(out_dir, source) as finished:
        if finished is not None:
            return finished
        skipped: Counter[str] = Counter()
        texts = list(documents(skipped))
        if len(texts) < 2:
            raise NanorayError(
                f"{source.get('from', 'the docstrings')} has {len(texts)} usable documents, but a "
                f"corpus needs two at least, one of them for validation"
            )
        random.Random(seed).shuffle(texts)
        characters = sum(map(len, texts))
        write_documents(texts, out_dir, characters, shard_chars)
        return finish_corpus(out_dir, source, characters, dict(skipped))


def write_documents(texts: list[str], out_dir: str, characters: int, shard_chars: int) -> None:
    """Write texts in order into shards of about equal length in characters.

    At least `MIN_SHARDS` of them where there are documents enough, none above about
    ``shard_chars``; every shard has a document.
    """
    num_shards = min(len(texts), max(MIN_SHARDS, -(-characters // shard_chars)))
    with write_errors(out_dir), ShardWriter(out_dir) as writer:
        done = shard = 0
        for number, text in enumerate(texts):
            left = len(texts) - number
            full = done * num_shards >= (shard + 1) * characters
            if number and shard < num_shards - 1 and (full or left == num_shards - 1 - shard):
                writer.next_shard()
                shard += 1
            writer.write(text)
            done += len(text)
