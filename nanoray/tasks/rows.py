"""Rows of a data set: from a local folder, or from a copy of what the hub has.

What comes from the Hugging Face hub is written once as JSON lines under ``NANORAY_HOME/tasks``, so
that a second run needs no network.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from nanoray import storage
from nanoray.errors import NanorayError
from nanoray.tasks.files import SUFFIXES, Rows, open_rows

LOCK_DEADLINE_S = 1800.0


@dataclass(frozen=True)
class HubSplit:
    """One split on the Hugging Face hub, and the files that may hold its rows here.

    Attributes:
        stems: their names without suffix, the first that is there is taken; a copy of the hub's
            rows gets the first one's name.
    """

    dataset: str
    config: str | None
    split: str
    stems: tuple[str, ...]


def load_rows(source: HubSplit, data_dir: str | None = None) -> Rows:
    """All rows of a split, in order, each read when it is asked for.

    Args:
        data_dir: folder or URI with a file ``STEM.jsonl``, ``STEM.jsonl.gz`` or ``STEM.parquet``;
            without it the hub is asked, once.

    Raises:
        NanorayError: the file is not there, empty or damaged, or the hub does not give the split.
            Reading a row: it is no JSON (says where).
    """
    if data_dir is None:
        folder = storage.join(storage.home(), "tasks", source.dataset.replace("/", "--"))
        uri = storage.join(folder, f"{source.stems[0]}.jsonl")
        _fetch_once(source, uri)
        return open_rows(uri)
    folder = storage.normalize(data_dir)
    there = set(storage.list_names(folder))
    for stem in source.stems:
        for suffix in SUFFIXES:
            if stem + suffix in there:
                return open_rows(storage.join(folder, stem + suffix))
    raise NanorayError(
        f"there is no {' or '.join(source.stems)} ({', '.join(SUFFIXES)}) in {folder}; point "
        f"--data-dir at the folder that has the data sets' folders, or leave --data-dir out to "
        f"take them from the Hugging Face hub"
    )


def _fetch_once(source: HubSplit, uri: str) -> None:
    """Copy the split to ``uri`` unless it is there; of several processes here only one fetches."""
    if storage.exists(uri):
        return
    digest = hashlib.sha256(uri.encode()).hexdigest()[:16]
    lock = Path(tempfile.gettempdir()) / f"nanoray-task-{os.getuid()}-{digest}.lock"
    try:
        with FileLock(lock, timeout=LOCK_DEADLINE_S):
            if not storage.exists(uri):  # another process may have had the lock before
                _download(source, uri)
    except Timeout:
        raise NanorayError(
            f"waited {LOCK_DEADLINE_S:.0f} s for another process that is fetching "
            f"{source.dataset} (it holds {lock}); end that process and try again"
        ) from None


def _download(source: HubSplit, uri: str) -> None:
    # Seconds to import, and nothing else here needs it.
    import datasets

    with (
        storage.explained(
            f"{source.dataset} could not be loaded from the Hugging Face hub",
            f"try again with a network, or give --data-dir with a folder that holds "
            f"{source.stems[0]}.jsonl",
        ),
        storage.staged(uri) as path,
        open(path, "w", encoding="utf-8") as file,
    ):
        for row in datasets.load_dataset(source.dataset, source.config, split=source.split):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
