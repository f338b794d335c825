"""Downloading published corpora: shards by count, in parallel, each verified and published whole.

The validation shard (the last one of the corpus) comes first: whatever is cut short later, what
lies in the folder has the right shard at its end.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from nanoray import storage
from nanoray.data.corpus import Corpus, difference, finish_corpus, read_corpus
from nanoray.data.fetch import FileFetch, Patience
from nanoray.data.writer import shard_name
from nanoray.errors import NanorayError

_PATIENCE = Patience()
# name of the shard, bytes of it so far, its bytes (None: unknown)
ShardObserver = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Published:
    """A corpus on the network: ``base_url/shard_00000.parquet`` to ``shard_<last>.parquet``."""

    name: str
    base_url: str
    last: int
    """Number of the last shard, which is for validation."""


_HUB = "https://huggingface.co/datasets/karpathy"
PUBLISHED = {
    corpus.name: corpus
    for corpus in (
        Published("climbmix", f"{_HUB}/climbmix-400b-shuffle/resolve/main", 6542),
        Published("fineweb-edu", f"{_HUB}/fineweb-edu-100b-shuffle/resolve/main", 1822),
    )
}


@dataclass(frozen=True)
class Downloaded:
    """What a download left behind: shards fetched now, shards that were there, the corpus."""

    fetched: int
    present: int
    corpus: Corpus


def wanted_shards(published: Published, num_shards: int) -> list[str]:
    """The validation shard and the first ``num_shards`` training shards, in order of fetching.

    Raises:
        NanorayError: the corpus has fewer.
    """
    if num_shards > published.last:
        raise NanorayError(
            f"{published.name} has {published.last} training shards, but --num-shards is "
            f"{num_shards}; take fewer"
        )
    return [shard_name(published.last), *map(shard_name, range(num_shards))]


def check_target(published: Published, out_dir: str) -> dict[str, str]:
    """What ``corpus.json`` will say of the source.

    Raises:
        NanorayError: ``out_dir`` holds another corpus or cannot be written.
    """
    source = {"kind": "download", "name": published.name}
    storage.check_writable(out_dir)
    old = read_corpus(out_dir)
    if old is not None and old.source != source:
        raise NanorayError(
            f"{out_dir} holds a corpus of {difference(old, source)}; delete that folder or set "
            f"another NANORAY_HOME"
        )
    return source


def download_corpus(
    published: Published,
    out_dir: str,
    num_shards: int,
    num_workers: int = 8,
    patience: Patience = _PATIENCE,
    observe: ShardObserver = lambda name, done, total: None,
    note: Callable[[str], None] = lambda text: None,
) -> Downloaded:
    """Fetch what is missing of the validation shard and ``num_shards`` training shards.

    An interrupted download goes on from the byte where it was cut. Several downloads into one
    folder share the work (on one machine, or on several over a shared file system with locks).

    Args:
        out_dir: a folder, or a URI (shards then pass through this machine's temporary folder).
        num_workers: connections at once.
        observe: told of every piece that arrives, by several threads.
        note: told of every failure that is tried again.

    Raises:
        NanorayError: see `FileFetch`; also an ``out_dir`` that holds another corpus or cannot be
            written. Training shards that arrived are kept.
    """
    names = wanted_shards(published, num_shards)
    source = check_target(published, out_dir)
    stop = threading.Event()
    aside = _aside(out_dir)

    def fetch(name: str) -> bool:
        return FileFetch(
            f"{published.base_url.rstrip('/')}/{name}",
            storage.join(out_dir, name),
            aside,
            patience,
            stop,
            lambda done, total: observe(name, done, total),
            note,
        ).run()

    fetched = int(fetch(names[0]))
    fetched += _fetch_all(fetch, names[1:], num_workers, stop)
    return Downloaded(fetched, len(names) - fetched, finish_corpus(out_dir, source))


def _fetch_all(
    fetch: Callable[[str], bool], names: list[str], num_workers: int, stop: threading.Event
) -> int:
    """Run ``fetch`` over the names in threads; the first failure stops the others."""
    with ThreadPoolExecutor(num_workers) as pool:
        futures = [pool.submit(fetch, name) for name in names]
        try:
            return sum(future.result() for future in as_completed(futures))
        except BaseException:  # also an interrupt by the user
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _aside(out_dir: str) -> Path:
    """Where parts and locks lie: in the folder itself, or in this machine's temporary folder."""
    if storage.is_local(out_dir):
        folder = Path(storage.normalize(out_dir)) / ".download"
    else:
        digest = hashlib.sha256(out_dir.encode()).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"nanoray-download-{os.getuid()}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
