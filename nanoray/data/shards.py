"""Shards: parquet files ``shard_*.parquet`` with one string column ``text``.

A corpus is a folder of them; the last one is for validation, the others are for training. What
comes out of `read_row_group` has been checked: it is never trusted before, never checked again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nanoray import storage
from nanoray.errors import NanorayError

OnBad = Literal["fail", "skip"]
TEXT_COLUMN = "text"
MANIFEST = "corpus.json"
FOOTER_THREADS = 16
# A footer of a shard is some kilobytes; one read of the tail nearly always holds all of it.
_TAIL_BYTES = 64 * 1024
_T = TypeVar("_T")
_VIEW = pa.string_view()
# The ends of messages. A run goes on with the same data only, but may skip what is bad in it.
_SKIP_OR = "pass --on-bad-shard skip to leave it out"
_OTHER_COLUMN = (
    "make a corpus of it with `python -m jobs.data build --from PATH --text-column NAME`"
)


@dataclass(frozen=True)
class RowGroup:
    """One row group of one shard, as its footer describes it."""

    shard: str
    """URI of the parquet file."""
    row_group: int
    """Index within the shard."""
    num_rows: int
    num_bytes: int
    """Uncompressed bytes of the text column."""


class BadShardError(NanorayError):
    """A shard's content is wrong (not the storage around it).

    ``kind`` is the counter's key, ``reason`` what was found, without place and mend.
    """

    def __init__(self, message: str, kind: str, reason: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.reason = reason or message

    def __reduce__(self) -> tuple[Any, ...]:  # it travels out of Ray tasks
        return type(self), (str(self), self.kind, self.reason)


def list_shards(corpus_dir: str, unfinished_ok: bool = False) -> list[str]:
    """The sorted URIs of a corpus's shards; the last is the validation shard.

    Raises:
        NanorayError: no shard, only one, or a corpus whose building was cut short.
    """
    corpus_dir = storage.normalize(corpus_dir)
    names = storage.list_names(corpus_dir)
    shards = [name for name in names if name.startswith("shard_") and name.endswith(".parquet")]
    name = corpus_dir.rstrip("/").rsplit("/", 1)[-1]
    if not shards:
        raise NanorayError(
            f"no corpus at {corpus_dir} (no file shard_*.parquet); make one with `{_mend(name)}`, "
            f"or name another with --corpus"
        )
    if len(shards) == 1:
        raise NanorayError(
            f"corpus {corpus_dir} has only one shard ({shards[0]}), but the last shard is kept for "
            f"validation, so training needs at least two; get more with `{_mend(name)}`"
        )
    if MANIFEST in names and not unfinished_ok:
        text = storage.read_text(storage.join(corpus_dir, MANIFEST))
        if re.search(r'"complete": false', text):
            raise NanorayError(
                f"corpus {corpus_dir} is not complete: building it was cut short or still goes on; "
                f"run the command that builds it again"
            )
    return [storage.join(corpus_dir, shard) for shard in shards]


def _mend(name: str) -> str:
    if name == "docstrings":
        return "python -m jobs.data build --corpus docstrings"
    if name in ("climbmix", "fineweb-edu"):
        return f"python -m jobs.data download --corpus {name} --num-shards 8"
    return f"python -m jobs.data build --corpus {name} --from PATH"


def split_shards(shards: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training shards and validation shards (the last one)."""
    return list(shards[:-1]), list(shards[-1:])


def map_threads(function: Callable[[str], _T], uris: Sequence[str]) -> Iterator[_T]:
    """``map`` in order over some threads: footers are small reads that wait for storage."""
    if len(uris) <= 2:
        yield from map(function, uris)
        return
    with ThreadPoolExecutor(min(FOOTER_THREADS, len(uris))) as pool:
        yield from pool.map(function, uris)


def row_groups(
    shards: Sequence[str],
    on_bad: OnBad = "fail",
    skipped: Counter[str] | None = None,
    column: str = TEXT_COLUMN,
) -> list[RowGroup]:
    """All row groups of the shards in order, from their footers only.

    Args:
        on_bad: ``skip`` leaves out shards whose footer cannot be read or that have no usable
            text column.
        skipped: counts what was left out, by kind (in shards).

    Raises:
        NanorayError: such a shard, with ``fail``; a shard that storage does not give, always.
    """

    def of_shard(uri: str) -> list[RowGroup] | BadShardError:
        try:
            with open_shard(uri) as file:
                check_schema(uri, file.schema_arrow, column)
                meta = file.metadata
        except BadShardError as error:
            return error
        groups = (meta.row_group(i) for i in range(meta.num_row_groups))
        return [RowGroup(uri, i, g.num_rows, _text_bytes(g, column)) for i, g in enumerate(groups)]

    found: list[RowGroup] = []
    for result in map_threads(of_shard, shards):
        if not isinstance(result, BadShardError):
            found.extend(result)
        elif on_bad == "fail":
            raise result
        elif skipped is not None:
            skipped[f"shard_{result.kind}"] += 1
    return found


def _text_bytes(group: pq.RowGroupMetaData, column: str) -> int:
    columns = map(group.column, range(group.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == column)


@contextlib.contextmanager
def open_shard(uri: str) -> Iterator[pq.ParquetFile]:
    """A parquet file, read through fsspec unless it is local.

    Raises:
        BadShardError: it is no parquet file, is cut short or damaged.
        NanorayError: the storage does not give it.
    """
    with _shard_errors(uri, ""), contextlib.ExitStack() as stack:
        local = storage.is_local(uri)
        source = storage.normalize(uri) if local else stack.enter_context(storage.open_read(uri))
        yield stack.enter_context(
            pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=not local)
        )


@contextlib.contextmanager
def _shard_errors(uri: str, where: str) -> Iterator[None]:
    """Tell damaged content, which may be skipped, from storage that fails, which may not:
    what is trained on must follow from the content alone."""
    try:
        yield
    except FileNotFoundError as error:
        raise NanorayError(f"shard {uri} does not exist") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        no_data = isinstance(error, (PermissionError, ConnectionError, TimeoutError))
        if no_data or getattr(error, "errno", None) is not None:
            raise NanorayError(f"shard {uri} cannot be read from storage: {error}") from error
        reason = str(error).strip().split("\n")[0][:200]
        raise BadShardError(
            f"shard {uri}{where} is damaged or cut short ({reason}); {_SKIP_OR}, or delete it and "
            f"fetch or build it again as it was",
            "damaged",
            reason,
        ) from error


def check_schema(uri: str, schema: pa.Schema, column: str = TEXT_COLUMN) -> None:
    """Raise BadShardError unless ``column`` is there and holds strings."""
    if schema.names.count(column) != 1:
        raise BadShardError(
            f"shard {uri} has no column {column!r} (it has: {', '.join(schema.names) or 'none'}); "
            f"{_OTHER_COLUMN}",
            "missing_column",
        )
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):  # as pandas' categories are stored
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == _VIEW):
        raise BadShardError(
            f"shard {uri} has a column {column!r} of type {kind}, which is not text; "
            f"{_OTHER_COLUMN}",
            "wrong_type",
        )


def read_row_group(
    uri: str, row_group: int, on_bad: OnBad = "fail", column: str = TEXT_COLUMN
) -> tuple[list[str], dict[str, int]]:
    """The valid documents of one row group, in order.

    Returns:
        The texts, and how many rows were skipped by kind: ``null``, ``empty`` (or white space),
        ``invalid_utf8``; ``damaged``, ``missing_column`` and ``wrong_type`` count 1 for the whole
        row group. Always empty with ``fail``.

    Raises:
        BadShardError: any of these, with ``fail``; names shard, row group and row.
        NanorayError: the storage does not give the shard.
    """
    try:
        values = _read_column(uri, row_group, column)
    except BadShardError as error:
        if on_bad == "fail":
            raise
        return [], {error.kind: 1}
    texts, bad = _check_rows(values)
    if bad and on_bad == "fail":
        row, kind = min((rows[0], kind) for kind, rows in bad.items())
        raise BadShardError(
            f"shard {uri}, row group {row_group}, row {row}: {_WHAT[kind]}; {_SKIP_OR}, or mend "
            f"the data (a run that has begun goes on with its old data only)",
            kind,
        )
    return texts, {kind: len(rows) for kind, rows in bad.items()}


_WHAT = {
    "null": "the text is missing (null)",
    "empty": "the text is empty or white space",
    "invalid_utf8": "the text is not valid UTF-8",
}


def bad_rows(uri: str, row_group: int, column: str = TEXT_COLUMN) -> dict[str, list[int]]:
    """Row numbers of a row group's unusable rows, by kind. Raises BadShardError."""
    return _check_rows(_read_column(uri, row_group, column))[1]


def _read_column(uri: str, row_group: int, column: str) -> pa.ChunkedArray:
    where = f", row group {row_group},"
    with open_shard(uri) as file, _shard_errors(uri, where):
        check_schema(uri, file.schema_arrow, column)
        if not 0 <= row_group < file.num_row_groups:
            raise NanorayError(
                f"shard {uri} has {file.num_row_groups} row groups, but row group {row_group} was "
                f"planned: it changed since; start the job again"
            )
        values = file.read_row_group(row_group, columns=[column]).column(column)
        if pa.types.is_dictionary(values.type) or values.type == _VIEW:
            return values.cast(pa.large_string())
        return values


def _check_rows(values: pa.ChunkedArray) -> tuple[list[str], dict[str, list[int]]]:
    """Valid texts and the numbers of the bad rows by kind."""
    try:
        values.validate(full=True)  # at C++ speed; the rare bad group takes the slow path
        # Something that is not white space. Arrow's trim would copy, and fails on bad UTF-8.
        has_text = pc.match_substring_regex(values, r"[^\s\v\x1c-\x1f\x{85}\p{Z}]")
        if values.null_count == 0 and pc.all(has_text).as_py() is not False:
            return values.to_pylist(), {}
    except pa.ArrowInvalid:
        pass
    texts: list[str] = []
    bad: dict[str, list[int]] = {}
    raw_type = pa.large_binary() if pa.types.is_large_string(values.type) else pa.binary()
    raw_rows = (raw for chunk in values.chunks for raw in chunk.view(raw_type).to_pylist())
    for row, raw in enumerate(raw_rows):
        kind = _classify(raw)
        if kind is None:
            texts.append(raw.decode("utf-8"))
        else:
            bad.setdefault(kind, []).append(row)
    return texts, bad


def _classify(raw: bytes | None) -> str | None:
    if raw is None:
        return "null"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return "invalid_utf8"
    return None if text.strip() else "empty"


def corpus_fingerprint(shards: Sequence[str]) -> str:
    """sha256 over the names, sizes and footers of the shards: cheap, and another for other data.

    Footers written here carry a hash of the texts; in foreign ones a change of content that moves
    no size and no statistic goes unseen.

    Raises:
        NanorayError: a shard cannot be read.
    """
    total = hashlib.sha256()
    for uri, (size, footer) in zip(shards, map_threads(_read_footer, shards)):
        total.update(f"{uri.rsplit('/', 1)[-1]}\0{size}\0".encode() + footer)
    return total.hexdigest()


def _read_footer(uri: str) -> tuple[int, bytes]:
    """Size of the file and the raw bytes of its parquet footer."""
    with _shard_errors(uri, ""), storage.open_read(uri) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        tail = file.read()
        length = struct.unpack("<I", tail[-8:-4])[0] + 8 if size >= 12 else size
        if length > len(tail):
            file.seek(max(0, size - length))
            tail = file.read()
        return size, tail[-length:]
