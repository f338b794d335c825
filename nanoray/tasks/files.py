"""Rows of a file by number: JSON lines (plain or gzipped) and parquet, read when asked for.

Opening finds where rows begin and no more, so that each of many processes can open a file of
gigabytes. A row costs its own parsing; nothing of it stays. Any number of threads may read.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import mmap
import threading
import zlib
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanoray import storage
from nanoray.errors import NanorayError

T = TypeVar("T")

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")

# Decoded row groups that are kept. A shuffled pass over a larger file decodes one for each row:
# such a file is better turned into JSON lines.
PARQUET_CACHE_BYTES = 256 * 1024 * 1024

_NAMES = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Row:
    """One JSON value, and the file and line where it stands (for messages)."""

    value: Any
    where: str

    def field(self, name: str, kind: type[T]) -> T:
        """A field of exactly that type. Raises NanorayError: there is no such field."""
        if not isinstance(self.value, dict):
            raise NanorayError(
                f"{self.where}: a JSON object is expected, this is {str(self.value)[:40]!r}"
            )
        found = self.value.get(name)
        if type(found) is not kind:  # no subclass: True is no number
            raise NanorayError(f"{self.where}: its field {name!r} must be {_NAMES[kind]}")
        return found

    def texts(self, name: str) -> list[str]:
        """A field that is a list of texts. Raises NanorayError."""
        found = self.field(name, list)
        if not all(isinstance(item, str) for item in found):
            raise NanorayError(f"{self.where}: its field {name!r} must be a list of texts")
        return found

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Put file and line before what is found wrong in the block."""
        try:
            yield
        except NanorayError as error:
            raise NanorayError(f"{self.where}: {error}") from error


class Rows(Sequence[Row]):
    """The rows of one file; pickled by its URI."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.uri,)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self._row(number) for number in range(len(self))[index]]
        return self._row(range(len(self))[index])

    @abstractmethod
    def _row(self, number: int) -> Row: ...


class JSONLines(Rows):
    """A value a line; empty lines are passed over. A line is parsed when it is asked for."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._content = _content(uri)
        # Line n (from 0) is content[ends[n] + 1 : ends[n + 1]].
        self._ends, self._lines = _index_lines(self._content)

    def __len__(self) -> int:
        return len(self._lines)

    def _row(self, number: int) -> Row:
        line = int(self._lines[number])
        where = f"{self.uri}, line {line + 1}"
        text = self._content[int(self._ends[line]) + 1 : int(self._ends[line + 1])]
        try:
            return Row(json.loads(text), where)
        except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, or no JSON
            raise NanorayError(f"{where}: no JSON ({error}); mend or delete the line") from error


def _content(uri: str) -> bytes | mmap.mmap:
    """The bytes of the lines: mapped where the file is one of this machine's, else read."""
    if uri.endswith(".gz"):
        try:
            return gzip.decompress(storage.read_bytes(uri))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise NanorayError(f"{uri} is no whole gzip file ({error}); fetch it again") from error
    if not storage.is_local(uri):
        return storage.read_bytes(uri)
    with storage.open_read(uri) as file:
        if not file.seek(0, 2):
            return b""  # an empty file cannot be mapped
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _index_lines(content: bytes | mmap.mmap) -> tuple[np.ndarray, np.ndarray]:
    """Where the lines end (int64, with -1 before the first), and the numbers of those not blank."""
    ends = [-1]
    while (end := content.find(b"\n", ends[-1] + 1)) >= 0:
        ends.append(end)
    if ends[-1] + 1 < len(content):
        ends.append(len(content))
    # Most lines show in their first bytes that they are not blank.
    numbers = [
        number
        for number, (before, end) in enumerate(itertools.pairwise(ends))
        if content[before + 1 : min(end, before + 17)].strip() or content[before + 1 : end].strip()
    ]
    return np.array(ends, dtype=np.int64), np.array(numbers, dtype=np.int64)


class ParquetRows(Rows):
    """Rows of a parquet file as objects of its columns; row groups are read as needed."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        with self._named():
            self._file = pq.ParquetFile(storage.open_read(uri))
        metadata = self._file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        self._lock = threading.Lock()
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _row(self, number: int) -> Row:
        group = int(np.searchsorted(self._starts, number, side="right")) - 1
        table = self._group(group).slice(number - int(self._starts[group]), 1)
        where = f"{self.uri}, row {number + 1}"
        try:
            return Row(table.to_pylist()[0], where)
        except UnicodeDecodeError as error:
            raise NanorayError(f"{where}: no UTF-8 ({error}); mend or delete the row") from error

    def _group(self, group: int) -> pa.Table:
        with self._lock:
            if group not in self._groups:
                with self._named():
                    self._groups[group] = self._file.read_row_group(group)
                while len(self._groups) > 1 and self._cached_bytes() > PARQUET_CACHE_BYTES:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            return self._groups[group]

    def _cached_bytes(self) -> int:
        return sum(table.nbytes for table in self._groups.values())

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            cause = str(error).split("\n")[0][:200]
            raise NanorayError(
                f"{self.uri} is no whole parquet file ({cause}); fetch it again"
            ) from error


def open_rows(uri: str) -> Rows:
    """The rows of a file, of the kind that its name ends with (JSON lines, if with none of them).

    Raises:
        NanorayError: there is no such file, it is damaged, or has no rows.
    """
    absent = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
    mend = "check the path, the credentials and the network"
    try:
        with storage.explained(f"{uri} cannot be read", mend, *absent):
            rows = ParquetRows(uri) if uri.endswith(".parquet") else JSONLines(uri)
    except absent as error:
        raise NanorayError(f"there is no file {uri}; check the path") from error
    if not len(rows):
        raise NanorayError(f"{uri} is empty; fetch it again")
    return rows
