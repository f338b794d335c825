"""Rows of a task's data: JSON lines of a local folder, or of a copy of what the hub has.

What comes from the Hugging Face hub is written once as JSON lines under ``NANORAY_HOME/tasks``, so
there is one form to read, and a second run needs no network.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nanoray import storage
from nanoray.errors import NanorayError

LOCK_DEADLINE_S = 1800.0


@dataclass(frozen=True)
class HubSplit:
    """One split on the Hugging Face hub, and the name of the file that holds its rows here."""

    dataset: str
    config: str | None
    split: str
    file_name: str


@dataclass(frozen=True)
class Row:
    """One JSON object, and the file and line where it stands (for messages)."""

    values: dict[str, Any]
    where: str


def load_rows(source: HubSplit, data_dir: str | None = None) -> list[Row]:
    """All rows of a split, in order.

    Args:
        data_dir: folder or URI that holds ``source.file_name``; without it the hub is asked, once.

    Raises:
        NanorayError: the file is not there or holds something else than JSON objects (says where),
            or the hub does not give the split.
    """
    if data_dir is None:
        folder = storage.join(storage.home(), "tasks", source.dataset.replace("/", "--"))
        _fetch_once(source, storage.join(folder, source.file_name))
    else:
        folder = storage.normalize(data_dir)
    uri = storage.join(folder, source.file_name)
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError:
        raise NanorayError(
            f"there is no {source.file_name} in {folder}; point --data-dir at the folder that has "
            f"it, or leave --data-dir out to take it from the Hugging Face hub"
        ) from None
    rows = list(parse_jsonl(content, uri))
    if not rows:
        raise NanorayError(f"{uri} is empty; fetch it again")
    return rows


def parse_jsonl(content: bytes, uri: str) -> Iterator[Row]:
    """The objects of a JSON-lines file; empty lines are passed over.

    Raises:
        NanorayError: a line is no UTF-8, no JSON or no object; names it.
    """
    for number, line in enumerate(content.split(b"\n"), start=1):
        where = f"{uri}, line {number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, or no JSON
            raise NanorayError(f"{where}: no JSON ({error}); mend or delete the line") from error
        if not isinstance(values, dict):
            raise NanorayError(f"{where}: a JSON object is expected, this is {line[:40]!r}")
        yield Row(values, where)


def _fetch_once(source: HubSplit, uri: str) -> None:
    """Copy the split to ``uri`` unless it is there; of several processes here only one fetches."""
    if storage.exists(uri):
        return
    digest = hashlib.sha256(uri.encode()).hexdigest()[:16]
    lock = Path(tempfile.gettempdir()) / f"nanoray-task-{os.getuid()}-{digest}.lock"
    try:
        with FileLock(lock, timeout=LOCK_DEADLINE_S):
            if not storage.exists(uri):  # another process may have had the lock before
                storage.write_bytes(uri, _download(source))
    except Timeout:
        raise NanorayError(
            f"waited {LOCK_DEADLINE_S:.0f} s for another process that is fetching "
            f"{source.dataset} (it holds {lock}); end that process and try again"
        ) from None


def _download(source: HubSplit) -> bytes:
    # Seconds to import, and nothing else here needs it.
    import datasets

    try:
        rows = datasets.load_dataset(source.dataset, source.config, split=source.split)
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    except Exception as error:  # the hub's client has no common error class
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        raise NanorayError(
            f"{source.dataset} could not be loaded from the Hugging Face hub ({reason}); try again "
            f"with a network, or give --data-dir with a folder that holds {source.file_name}"
        ) from error
    return ("\n".join(lines) + "\n").encode()
