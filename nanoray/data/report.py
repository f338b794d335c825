"""Looking at a corpus: counts, lengths, a few documents, and everything that is wrong with it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from nanoray.data.shards import (
    BadShardError,
    bad_rows,
    check_schema,
    open_shard,
    read_row_group,
)

_WHAT = {
    "null": "null rows",
    "empty": "empty or white-space rows",
    "invalid_utf8": "rows of invalid UTF-8",
}
_ROWS_SHOWN = 8
_BAR = 40
# What a terminal would obey: anybody may have written the text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass
class ShardReport:
    """What one shard holds. ``lengths`` counts documents by bits of their length in characters:
    key k stands for lengths from 2**(k-1) to 2**k - 1."""

    uri: str
    row_groups: int = 0
    documents: int = 0
    characters: int = 0
    text_bytes: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)


def inspect_shard(uri: str, num_documents: int = 0) -> ShardReport:
    """Read a whole shard. Damage is listed (all of it), not raised.

    Raises:
        NanorayError: the storage does not give the shard.
    """
    report = ShardReport(uri)
    try:
        with open_shard(uri) as file:
            report.row_groups = file.num_row_groups
            check_schema(uri, file.schema_arrow)
    except BadShardError as error:
        report.problems.append(error.reason)
        return report
    if report.row_groups == 0:
        report.problems.append("no row groups")
    for index in range(report.row_groups):
        texts, skipped = read_row_group(uri, index, "skip")
        report.documents += len(texts)
        report.characters += sum(map(len, texts))
        report.text_bytes += sum(len(text.encode("utf-8")) for text in texts)
        report.lengths.update(len(text).bit_length() for text in texts)
        report.first += texts[: num_documents - len(report.first)]
        if skipped:
            report.problems += _problems(uri, index)
    return report


def _problems(uri: str, row_group: int) -> list[str]:
    try:
        bad = bad_rows(uri, row_group)
    except BadShardError as error:
        return [f"row group {row_group}: {error.reason}"]
    return [f"row group {row_group}: {_rows(kind, rows)}" for kind, rows in bad.items()]


def _rows(kind: str, rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:_ROWS_SHOWN]))
    more = f", … ({len(rows)} in all)" if len(rows) > _ROWS_SHOWN else ""
    return f"{_WHAT[kind]}: {shown}{more}"


def inspect_corpus(
    shards: Sequence[str], num_documents: int = 3, num_workers: int = 4
) -> list[ShardReport]:
    """A report of each shard; the documents to show are of the first shard."""
    wanted = [num_documents] + [0] * (len(shards) - 1)
    with ThreadPoolExecutor(num_workers) as pool:
        return list(pool.map(inspect_shard, shards, wanted))


def histogram(lengths: Counter[int]) -> list[str]:
    """Lines of a bar chart: documents by length in characters, a power of two a line."""
    if not lengths:
        return []
    most = max(lengths.values())
    lines = []
    for bits in range(min(lengths), max(lengths) + 1):
        count = lengths[bits]
        bar = "█" * -(-count * _BAR // most)
        lines.append(f"{2 ** (bits - 1):>11,} – {2**bits - 1:<11,} {count:>11,} {bar}")
    return lines


def render(reports: Sequence[ShardReport]) -> list[str]:
    """The whole report as lines of text."""
    groups = sum(report.row_groups for report in reports)
    documents = sum(report.documents for report in reports)
    characters = sum(report.characters for report in reports)
    size = sum(report.text_bytes for report in reports)
    lines = [
        f"{len(reports):,} shards (the last for validation), {groups:,} row groups, "
        f"{documents:,} documents, {characters:,} characters, {size:,} bytes of text"
    ]
    lengths: Counter[int] = Counter()
    for report in reports:
        lengths.update(report.lengths)
    lines += ["", "documents by length in characters:", *histogram(lengths)]
    for number, text in enumerate((t for report in reports for t in report.first), 1):
        shown = _CONTROL.sub(lambda found: repr(found[0])[1:-1], text[:1000])
        lines += ["", f"--- document {number} ({len(text):,} characters)", shown]
        if len(text) > 1000:
            lines.append("…")
    lines.append("")
    bad = [report for report in reports if report.problems]
    for report in bad:
        lines += [f"{report.uri}: {problem}" for problem in report.problems]
    lines.append(f"{len(bad)} of {len(reports)} shards have problems" if bad else "no problems")
    return lines
