"""Rows of files by number: against naive readers, from threads, and what damaged files say."""

from __future__ import annotations

import gzip
import json
import pickle
import tracemalloc
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoray import storage
from nanoray.errors import NanorayError
from nanoray.tasks import files
from nanoray.tasks.files import Row, open_rows
from nanoray.tasks.rows import HubSplit, load_rows

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
blanks = st.sampled_from(["", " ", "\t \r", " " * 40])
spaces = st.sampled_from(["", " ", " " * 30, "\r"])
lines_of_json = st.lists(
    st.tuples(st.just(""), blanks) | st.tuples(values.map(json.dumps), spaces), max_size=12
)


@settings(max_examples=150, deadline=None)
@given(lines_of_json, st.booleans(), st.sampled_from(["plain", "gz", "memory"]))
def test_json_lines_are_those_of_a_naive_reader(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[tuple[str, str]],
    ends_with_newline: bool,
    kind: str,
) -> None:
    texts = [space + text + space if text else space for text, space in lines]
    content = ("\n".join(texts) + "\n" * ends_with_newline).encode()
    wanted = [
        (json.loads(line), number)
        for number, line in enumerate(content.decode().split("\n"), 1)
        if line.strip()
    ]
    name = "rows.jsonl.gz" if kind == "gz" else "rows.jsonl"
    folder = tmp_path_factory.getbasetemp() / "json-lines"
    uri = f"memory://{uuid.uuid4().hex}/{name}" if kind == "memory" else str(folder / name)
    storage.write_bytes(uri, gzip.compress(content) if kind == "gz" else content)
    if not wanted:
        with pytest.raises(NanorayError, match="is empty"):
            open_rows(uri)
        return
    rows = open_rows(uri)
    assert list(rows) == [Row(value, f"{uri}, line {number}") for value, number in wanted]
    assert rows[-1] == rows[len(rows) - 1]
    assert rows[1:3] == list(rows)[1:3]
    for index in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            rows[index]


def write_parquet(path: Path, num_rows: int, row_group_size: int) -> list[dict]:
    rows = [{"text": f"ü {i}" * (i % 5), "tags": [i, None], "n": i} for i in range(num_rows)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return rows


@pytest.mark.parametrize("cache_bytes", [0, 1000, 10**9])
def test_parquet_rows_from_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_bytes: int
) -> None:
    monkeypatch.setattr(files, "PARQUET_CACHE_BYTES", cache_bytes)
    path = tmp_path / "rows.parquet"
    wanted = write_parquet(path, 205, 20)
    rows = pickle.loads(pickle.dumps(open_rows(str(path))))
    order = [(i * 67) % 205 for i in range(410)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(rows.__getitem__, order))
    assert [row.value for row in found] == [wanted[i] for i in order]
    assert found[0] == Row(wanted[0], f"{path}, row 1")
    num_kept = len(rows._groups)
    assert num_kept == (1 if cache_bytes == 0 else num_kept)
    assert (num_kept == 11) == (cache_bytes == 10**9)


def test_json_lines_from_threads_and_processes(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"n": {i}}}\n' for i in range(500)))
    rows = open_rows(str(path))
    pickled = pickle.dumps(rows)
    assert len(pickled) < 300
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(pickle.loads(pickled).__getitem__, range(499, -1, -1)))
    assert [row.value["n"] for row in found] == list(range(499, -1, -1))


def test_a_large_file_is_opened_without_reading_it_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    line = json.dumps({"text": "x" * 20_000}) + "\n"
    path.write_text(line * 1000)
    tracemalloc.start()
    rows = open_rows(str(path))
    assert rows[999].value == json.loads(line)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 1000
    assert peak < 500_000


def test_a_bad_line_is_told_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \n"\xff"\n' + b"[" * 100_000)
    rows = open_rows(str(path))
    assert rows[0].value == {"a": 1}
    for index, line in ((1, 3), (2, 4), (3, 5)):
        with pytest.raises(NanorayError, match=f"{path}, line {line}: no JSON .*; mend or delete"):
            rows[index]


def cut(path: Path, content: bytes) -> None:
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("a.jsonl", lambda path: path.write_bytes(b""), "is empty"),
        ("a.jsonl", lambda path: None, "there is no file"),
        ("a.jsonl", lambda path: path.mkdir(), "there is no file"),
        ("a.jsonl.gz", lambda path: path.write_bytes(b""), "is empty"),
        ("a.jsonl.gz", lambda path: path.write_bytes(b'{"a": 1}\n'), "is no whole gzip file"),
        ("a.jsonl.gz", lambda path: cut(path, gzip.compress(b"1\n" * 500)), "no whole gzip file"),
        ("a.parquet", lambda path: path.write_bytes(b""), "is no whole parquet file"),
        ("a.parquet", lambda path: write_parquet(path, 0, 1), "is (empty|no whole parquet file)"),
        ("a.parquet", lambda path: None, "there is no file"),
    ],
)
def test_damaged_files(
    tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    damage(tmp_path / name)
    with pytest.raises(NanorayError, match=message) as caught:
        open_rows(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, 500, 100)
    whole = path.read_bytes()
    cut(path, whole)
    with pytest.raises(NanorayError, match=f"{path} is no whole parquet file"):
        open_rows(str(path))
    path.write_bytes(whole[:4] + b"\x00" * (len(whole) // 3) + whole[4 + len(whole) // 3 :])
    rows = open_rows(str(path))
    with pytest.raises(NanorayError, match=f"{path} is no whole parquet file"):
        rows[0]
    strings = pa.array([b"good", b"\xff\xfe"]).cast(pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 2, strings.buffers())})
    pq.write_table(table, path)
    rows = open_rows(str(path))
    assert rows[0].value == {"text": "good"}
    with pytest.raises(NanorayError, match=f"{path}, row 2: no UTF-8"):
        rows[1]


def test_the_first_stem_and_suffix_that_is_there(tmp_path: Path) -> None:
    source = HubSplit("a/b", None, "train", ("best", "other"))
    with pytest.raises(NanorayError, match=f"no best or other .* in {tmp_path}.*--data-dir"):
        load_rows(source, str(tmp_path))
    write_parquet(tmp_path / "other.parquet", 3, 2)
    assert len(load_rows(source, str(tmp_path))) == 3
    (tmp_path / "other.jsonl.gz").write_bytes(gzip.compress(b"1\n"))
    assert len(load_rows(source, str(tmp_path))) == 1
    write_parquet(tmp_path / "best.parquet", 4, 2)
    assert len(load_rows(source, str(tmp_path))) == 4
    (tmp_path / "best.jsonl").write_text('"x"\n' * 5)
    assert len(load_rows(source, str(tmp_path))) == 5


@pytest.mark.parametrize("value", [3, "x", None, ["question"]])
def test_fields_are_those_of_objects(value: object) -> None:
    with pytest.raises(NanorayError, match="f, line 1: a JSON object is expected"):
        Row(value, "f, line 1").field("question", str)


def test_fields_have_exactly_their_type() -> None:
    row = Row({"flag": True, "n": 3, "some": ["a", 1], "all": ["a"]}, "f, line 2")
    assert row.field("n", int) == 3
    assert row.texts("all") == ["a"]
    with pytest.raises(NanorayError, match="f, line 2: its field 'flag' must be a whole number"):
        row.field("flag", int)
    with pytest.raises(NanorayError, match="f, line 2: its field 'some' must be a list of texts"):
        row.texts("some")
    with pytest.raises(NanorayError, match="outer"), Row({}, "f, line 2").named():
        raise NanorayError("outer")
