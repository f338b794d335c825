"""A global shuffle of a corpus on Ray Data: any parquet files in, shards as nanoray likes them out.

Every document gets a shard and a sort key from the seed and its place in the source. Ray Data
brings each shard's documents together, and the task that has them sorts and writes. So the result
follows from the source and the seed alone, whatever the number of nodes and the order of tasks.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from nanoray import storage
from nanoray.data.corpus import Corpus, building, finish_corpus
from nanoray.data.shards import OnBad, read_row_group, row_groups
from nanoray.data.sources import describe_files, expand
from nanoray.data.writer import ROW_GROUP_SIZE, SHARD_CHARS, shard_name, write_errors, write_shard
from nanoray.errors import NanorayError


def repackage(
    source: str,
    out_dir: str,
    seed: int = 42,
    shard_chars: int = SHARD_CHARS,
    row_group_size: int = ROW_GROUP_SIZE,
    text_column: str = "text",
    on_bad: OnBad = "fail",
    progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """Shuffle all documents of ``source`` into new shards; nothing is lost or doubled.

    Needs a Ray that is connected. On several nodes both places must be seen by all of them.

    Args:
        source: parquet files: folder, glob or file; a path or an fsspec URI.
        shard_chars: characters of a shard, about (by the bytes that the footers tell).
        progress: called with shards written and shards in all.

    Raises:
        NanorayError: no input, unusable input (file, row group and row are named), fewer than two
            documents, or an `out_dir` that holds other data or is not writable.
    """
    files = _parquet_files(source)
    described: dict[str, Any] = {
        "kind": "repackage",
        **describe_files(source, files),
        "text_column": text_column,
        "seed": seed,
        "shard_chars": shard_chars,
        "row_group_size": row_group_size,
        "on_bad_shard": on_bad,
    }
    skipped: Counter[str] = Counter()
    groups = row_groups(files, on_bad, skipped, text_column)
    num_rows = sum(group.num_rows for group in groups)
    if num_rows < 2:
        raise NanorayError(
            f"{source} holds {num_rows} documents; a corpus needs two at least, one of them for "
            f"validation"
        )
    num_bytes = sum(group.num_bytes for group in groups)
    num_shards = min(num_rows, max(2, round(num_bytes / shard_chars)))
    first_rows = itertools.accumulate((group.num_rows for group in groups), initial=0)
    items = [
        {"uri": group.shard, "row_group": group.row_group, "first_row": first_row}
        for group, first_row in zip(groups, first_rows)
    ]
    with building(out_dir, described) as finished:
        if finished is not None:
            return finished
        assign = _assigner(seed, num_shards, text_column, on_bad)
        characters = _shuffle(items, assign, out_dir, num_shards, row_group_size, skipped, progress)
        _check_written(out_dir, num_shards)
        return finish_corpus(out_dir, described, characters, dict(skipped))


def _parquet_files(source: str) -> list[str]:
    files = [file for file in expand(source) if file.lower().endswith(".parquet")]
    if not files:
        raise NanorayError(f"{source} holds no parquet file; make a corpus with `jobs.data build`")
    return files


def _assigner(
    seed: int, num_shards: int, text_column: str, on_bad: OnBad
) -> Callable[[dict[str, np.ndarray]], pa.Table]:
    """A task from a row group to its texts with shard and sort key; counts go to shard -1."""

    def assign(batch: dict[str, np.ndarray]) -> pa.Table:
        (uri,), (row_group,), (first_row,) = batch["uri"], batch["row_group"], batch["first_row"]
        texts, bad = read_row_group(str(uri), int(row_group), on_bad, text_column)
        n = len(texts)
        rng = np.random.default_rng([seed, int(first_row)])
        # Dealt round in random order: shards of equal size, none without a document.
        shards = (int(first_row) + rng.permutation(n)) % num_shards
        keys = rng.integers(0, 2**63, n + 1)
        columns = {
            "text": pa.array([*texts, json.dumps(bad)], pa.large_string()),
            "shard": np.append(shards, -1).astype(np.int64),
            "key": keys,
        }
        return pa.table(columns)

    assign.__name__ = "read_and_deal"
    return assign


def _shuffle(
    items: list[dict[str, Any]],
    assign: Callable[[dict[str, np.ndarray]], pa.Table],
    out_dir: str,
    num_shards: int,
    row_group_size: int,
    skipped: Counter[str],
    progress: Callable[[int, int], None] | None,
) -> int:
    """Run the shuffle; returns the characters written and adds to ``skipped``."""

    def write(table: pa.Table) -> pa.Table:
        shard = table["shard"][0].as_py()
        texts = table.sort_by("key")["text"].to_pylist()
        if shard < 0:
            bad: Counter[str] = Counter()
            for counts in texts:
                bad.update(json.loads(counts))
            return pa.table({"characters": [0], "bad": [json.dumps(bad)]})
        uri = storage.join(out_dir, shard_name(shard))
        with write_errors(uri):
            write_shard(uri, texts, row_group_size)
        return pa.table({"characters": [sum(map(len, texts))], "bad": ["{}"]})

    write.__name__ = "sort_and_write"
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised
    source = ray.data.from_items(items, override_num_blocks=len(items))
    dealt = source.map_batches(assign, batch_size=1, batch_format="numpy")
    parts = dealt.groupby("shard", num_partitions=num_shards + 1)
    written = parts.map_groups(write, batch_format="pyarrow")
    characters = num_written = 0
    try:
        for row in written.iter_rows():
            characters += row["characters"]
            skipped.update(json.loads(row["bad"]))
            num_written += row["characters"] > 0
            if progress is not None:
                progress(num_written, num_shards)
    except ray.exceptions.RayError as error:
        raise _cause(error) from error
    if num_written < num_shards:
        raise NanorayError(
            f"so many documents are unusable ({sum(skipped.values()):,}) that {num_written} of "
            f"{num_shards} shards would hold any; mend the data, or take larger --shard-chars"
        )
    return characters


def _cause(error: ray.exceptions.RayError) -> Exception:
    """The user's mistake that a failed task met, else the error itself. Ray hands on its text."""
    found = re.search(r"^nanoray\.[\w.]*Error: (.+)$", str(error), re.MULTILINE)
    return NanorayError(found[1]) if found else error


def _check_written(out_dir: str, num_shards: int) -> None:
    names = set(storage.list_names(out_dir))
    missing = [shard_name(i) for i in range(num_shards) if shard_name(i) not in names]
    if missing:
        raise NanorayError(
            f"{len(missing)} of {num_shards} shards were written but are not in {out_dir} here; on "
            f"several nodes set NANORAY_HOME to storage that all of them share"
        )
