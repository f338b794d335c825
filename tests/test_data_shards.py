"""Shards: what is written is read back; what is wrong is named with its place."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoray import storage
from nanoray.data.corpus import building, finish_corpus, read_corpus
from nanoray.data.report import histogram, inspect_shard, render
from nanoray.data.shards import (
    BadShardError,
    RowGroup,
    bad_rows,
    corpus_fingerprint,
    list_shards,
    read_row_group,
    row_groups,
    split_shards,
)
from nanoray.data.writer import ShardWriter, write_shard
from nanoray.errors import NanorayError

ROOT = Path(__file__).parents[1]
TEXTS = [f"document {i} " + "word " * (i % 50) for i in range(2500)]


def write_raw(path: Path, rows: list[bytes | None], column: str = "text") -> str:
    """A parquet file whose strings may be no UTF-8, as foreign writers make them."""
    array = pa.array(rows, pa.binary()).view(pa.string())
    pq.write_table(pa.table({column: array}), path, row_group_size=4)
    return str(path)


def corrupt(path: str, position: float = 0.3, num_bytes: int = 64) -> None:
    with open(path, "r+b") as file:
        file.seek(int(os.path.getsize(path) * position))
        raw = file.read(num_bytes)
        file.seek(-len(raw), os.SEEK_CUR)
        file.write(bytes(255 - byte for byte in raw))


def test_round_trip_and_form(tmp_path: Path) -> None:
    uri = str(tmp_path / "shard_00000.parquet")
    write_shard(uri, TEXTS)
    groups = row_groups([uri])
    assert [(g.shard, g.row_group, g.num_rows) for g in groups] == [
        (uri, 0, 1024),
        (uri, 1, 1024),
        (uri, 2, 452),
    ]
    assert all(isinstance(g, RowGroup) and g.num_bytes > 0 for g in groups)
    assert [t for g in groups for t in read_row_group(uri, g.row_group)[0]] == TEXTS
    meta = pq.read_metadata(uri)
    column = meta.row_group(0).column(0)
    assert column.compression == "ZSTD"
    assert not column.has_dictionary_page
    assert not column.is_stats_set
    assert pq.read_schema(uri).names == ["text"]


def test_same_texts_same_bytes(tmp_path: Path) -> None:
    a, b = tmp_path / "a.parquet", tmp_path / "b.parquet"
    write_shard(str(a), TEXTS)
    write_shard(str(b), TEXTS)
    assert a.read_bytes() == b.read_bytes()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(
        st.one_of(
            st.none(),
            st.binary(max_size=12),
            st.text(max_size=12).map(lambda text: text.encode("utf-8", "ignore")),
            st.text("\x1c\x1f\x85\u2028\u3000 \t\n\v\f\xa0\u200b", max_size=3).map(str.encode),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_any_rows(rows: list[bytes | None]) -> None:
    """Each row is a valid text or counted under its one kind, as Python itself judges it."""
    want, kinds = [], Counter[str]()
    for raw in rows:
        try:
            text = None if raw is None else raw.decode("utf-8")
        except UnicodeDecodeError:
            kinds["invalid_utf8"] += 1
            continue
        if text is None:
            kinds["null"] += 1
        elif not text.strip():
            kinds["empty"] += 1
        else:
            want.append(text)
    with tempfile.TemporaryDirectory() as folder:
        uri = write_raw(Path(folder) / "x.parquet", rows)
        texts: list[str] = []
        skipped: Counter[str] = Counter()
        for group in row_groups([uri]):
            some, bad = read_row_group(uri, group.row_group, "skip")
            texts += some
            skipped.update(bad)
            if bad:
                with pytest.raises(BadShardError, match=f"row group {group.row_group}, row "):
                    read_row_group(uri, group.row_group)
            else:
                assert read_row_group(uri, group.row_group) == (some, {})
    assert (texts, skipped) == (want, kinds)


def test_bad_rows_are_named(tmp_path: Path) -> None:
    uri = write_raw(tmp_path / "x.parquet", [b"a"] * 4 + [b"b", b"", b"\xff\xfe", None])
    assert read_row_group(uri, 0) == (["a"] * 4, {})
    with pytest.raises(NanorayError, match=r"x.parquet, row group 1, row 1: the text is empty"):
        read_row_group(uri, 1)
    assert bad_rows(uri, 1) == {"empty": [1], "invalid_utf8": [2], "null": [3]}


def test_missing_column_and_wrong_type(tmp_path: Path) -> None:
    other = write_raw(tmp_path / "shard_0.parquet", [b"a"], column="content")
    numbers = str(tmp_path / "shard_1.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), numbers)
    good = str(tmp_path / "shard_2.parquet")
    write_shard(good, ["x"])
    for uri, message in [(other, "no column 'text'.*content"), (numbers, "type int64")]:
        with pytest.raises(NanorayError, match=message):
            row_groups([uri])
        with pytest.raises(NanorayError, match=message):
            read_row_group(uri, 0)
    assert read_row_group(other, 0, "skip") == ([], {"missing_column": 1})
    assert read_row_group(numbers, 0, "skip") == ([], {"wrong_type": 1})
    skipped: Counter[str] = Counter()
    assert [g.shard for g in row_groups([other, numbers, good], "skip", skipped)] == [good]
    assert skipped == {"shard_missing_column": 1, "shard_wrong_type": 1}


def test_other_forms_of_strings_are_text(tmp_path: Path) -> None:
    texts = ["one", None, "two", "one", ""]
    plain = pa.array(texts, pa.string())
    for i, values in enumerate([plain.dictionary_encode(), plain.cast(pa.string_view())]):
        uri = str(tmp_path / f"shard_{i}.parquet")
        pq.write_table(pa.table({"text": values}), uri)
        assert row_groups([uri])[0].num_rows == 5
        assert read_row_group(uri, 0, "skip") == (["one", "two", "one"], {"null": 1, "empty": 1})


def test_a_message_offers_what_a_run_that_has_begun_can_do(tmp_path: Path) -> None:
    """It is refused with other data, but may skip."""
    uri = write_raw(tmp_path / "shard_0.parquet", [b"a", b""])
    cut = str(tmp_path / "shard_1.parquet")
    Path(cut).write_bytes(Path(uri).read_bytes()[:-20])
    for bad in (uri, cut):
        with pytest.raises(NanorayError, match=r"pass --on-bad-shard skip to leave it out, or"):
            read_row_group(bad, 0)
    with pytest.raises(NanorayError, match="a run that has begun goes on with its old data only"):
        read_row_group(uri, 0)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.99])
def test_cut_short(tmp_path: Path, share: float) -> None:
    uri = str(tmp_path / "shard_00003.parquet")
    write_shard(uri, TEXTS)
    os.truncate(uri, int(os.path.getsize(uri) * share))
    with pytest.raises(BadShardError, match=r"shard_00003.parquet is damaged or cut short"):
        row_groups([uri])
    with pytest.raises(BadShardError, match=r"shard_00003.parquet is damaged or cut short"):
        read_row_group(uri, 0)
    skipped: Counter[str] = Counter()
    assert row_groups([uri], "skip", skipped) == []
    assert skipped == {"shard_damaged": 1}
    assert read_row_group(uri, 0, "skip") == ([], {"damaged": 1})
    corpus_fingerprint([uri])  # of whatever is there


@pytest.mark.parametrize("position", [0.1, 0.3, 0.6])
def test_damaged_pages_name_the_row_group(tmp_path: Path, position: float) -> None:
    """Checksums find what zstd would decode to nonsense."""
    uri = str(tmp_path / "shard_00000.parquet")
    write_shard(uri, TEXTS)
    corrupt(uri, position)
    outcomes = [read_row_group(uri, g.row_group, "skip") for g in row_groups([uri])]
    damaged = [i for i, (_texts, bad) in enumerate(outcomes) if bad == {"damaged": 1}]
    assert len(damaged) == 1
    with pytest.raises(BadShardError, match=f"row group {damaged[0]}, is damaged"):
        read_row_group(uri, damaged[0])


def test_storage_that_fails_is_never_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NanorayError, match="does not exist") as caught:
        read_row_group(str(tmp_path / "gone.parquet"), 0, "skip")
    assert not isinstance(caught.value, BadShardError)

    def refuse(uri: str) -> None:
        raise ConnectionError("bucket is down")

    monkeypatch.setattr(storage, "open_read", refuse)
    with pytest.raises(NanorayError, match="cannot be read from storage: bucket is down"):
        row_groups(["memory://b/x.parquet"], "skip")


def test_bad_shard_error_travels() -> None:
    error = pickle.loads(pickle.dumps(BadShardError("message", "damaged", "why")))
    assert (str(error), error.kind, error.reason) == ("message", "damaged", "why")


def test_listing(tmp_path: Path) -> None:
    folder = str(tmp_path)
    with pytest.raises(NanorayError, match=r"no corpus at .* jobs.data build --corpus"):
        list_shards(folder)
    write_shard(storage.join(folder, "shard_00000.parquet"), ["a"])
    with pytest.raises(NanorayError, match="only one shard"):
        list_shards(folder)
    write_shard(storage.join(folder, "shard_00010.parquet"), ["a"])
    write_shard(storage.join(folder, "shard_00002.parquet"), ["a"])
    (tmp_path / ".shard_00003.parquet.x.tmp").write_bytes(b"")
    train, val = split_shards(list_shards(folder))
    assert [uri[-13:-8] for uri in train] == ["00000", "00002"]
    assert val == [storage.join(folder, "shard_00010.parquet")]


def test_fingerprint(tmp_path: Path) -> None:
    uris = [str(tmp_path / f"shard_{i:05d}.parquet") for i in range(4)]
    for uri in uris:
        write_shard(uri, ["same length A", "x"])
    first = corpus_fingerprint(uris)
    assert corpus_fingerprint(uris) == first
    assert corpus_fingerprint(uris[:3]) != first
    size = os.path.getsize(uris[1])
    write_shard(uris[1], ["same length B", "x"])
    assert os.path.getsize(uris[1]) == size
    assert corpus_fingerprint(uris) != first
    write_shard(uris[1], ["same length A", "x"])
    assert corpus_fingerprint(uris) == first


def test_writer_cuts_shards(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path), row_group_size=100) as writer:
        for number, text in enumerate(TEXTS, 1):
            writer.write(text)
            if not number % 250:
                writer.next_shard()
    assert len(writer.shards) == -(-len(TEXTS) // 250)
    assert (writer.num_docs, writer.num_chars) == (len(TEXTS), sum(map(len, TEXTS)))
    read = [t for g in row_groups(writer.shards) for t in read_row_group(g.shard, g.row_group)[0]]
    assert read == TEXTS
    assert list_shards(str(tmp_path)) == writer.shards


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path) -> None:
    uri = str(tmp_path / "shard_00000.parquet")
    with pytest.raises(UnicodeEncodeError):
        write_shard(uri, ["fine"] * 2000 + ["half a pair \ud800"])
    with pytest.raises(ZeroDivisionError), ShardWriter(str(tmp_path), row_group_size=2) as writer:
        [writer.write(str(1 // (99 - i))) for i in range(100)]
    assert list(tmp_path.iterdir()) == []


def test_disk_full_while_writing_keeps_the_old_shard(tmp_path: Path) -> None:
    uri = str(tmp_path / "shard_00000.parquet")
    write_shard(uri, ["old"])
    code = (
        "import resource, os, sys\n"
        "from nanoray.data.writer import write_errors, write_shard\n"
        "from nanoray.errors import NanorayError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try:\n"
        "    with write_errors(sys.argv[1]):\n"
        "        write_shard(sys.argv[1], [os.urandom(500).hex() for _ in range(2000)])\n"
        "except NanorayError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, uri], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "there is no room to write" in done.stdout
    assert read_row_group(uri, 0) == (["old"], {})
    assert [path.name for path in tmp_path.iterdir()] == ["shard_00000.parquet"]


def test_object_store() -> None:
    home = "memory://bucket/data/tiny"
    with ShardWriter(home, row_group_size=100) as writer:
        for number, text in enumerate(TEXTS):
            if number == 1000:
                writer.next_shard()
            writer.write(text)
    shards = list_shards(home)
    assert shards == writer.shards
    read = [t for g in row_groups(shards) for t in read_row_group(g.shard, g.row_group)[0]]
    assert read == TEXTS
    corpus = finish_corpus(home, {"kind": "test"})
    assert read_corpus(home) == corpus
    assert corpus.fingerprint == corpus_fingerprint(shards)
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_a_half_built_corpus_is_known_and_built_again(tmp_path: Path) -> None:
    folder = str(tmp_path / "c")
    with pytest.raises(ZeroDivisionError), building(folder, {"kind": "x"}):
        [
            write_shard(storage.join(folder, f"shard_{i}.parquet"), [str(1 // (3 - i))])
            for i in range(4)
        ]
    with pytest.raises(NanorayError, match="is not complete"):
        list_shards(folder)
    with building(folder, {"kind": "y"}) as old:
        assert old is None
        assert not [name for name in storage.list_names(folder) if name.startswith("shard_")]
        with pytest.raises(NanorayError, match="another job is building"), building(folder, {}):
            pass
        for i in range(2):
            write_shard(storage.join(folder, f"shard_{i:05d}.parquet"), ["a"])
        done = finish_corpus(folder, {"kind": "y"})
    with building(folder, {"kind": "y"}) as old:
        assert old == done
    with pytest.raises(NanorayError, match="already holds a corpus"), building(folder, {"k": 1}):
        pass
    assert len(list_shards(folder)) == 2


def test_inspection_lists_every_problem(tmp_path: Path) -> None:
    rows = [b"a", b"", b"\xff", None, b"fine", b"fine", b"  ", b"long " * 100]
    uri = write_raw(tmp_path / "shard_0.parquet", rows)
    report = inspect_shard(uri, num_documents=2)
    assert (report.row_groups, report.documents, report.first) == (2, 4, ["a", "fine"])
    assert report.problems == [
        "row group 0: empty or white-space rows: 1",
        "row group 0: rows of invalid UTF-8: 2",
        "row group 0: null rows: 3",
        "row group 1: empty or white-space rows: 2",
    ]
    damaged = str(tmp_path / "shard_1.parquet")
    write_shard(damaged, TEXTS)
    corrupt(damaged, 0.05)
    corrupt(damaged, 0.85)
    problems = inspect_shard(damaged).problems
    assert [problem[:13] for problem in problems] == ["row group 0: ", "row group 2: "]
    os.truncate(damaged, 100)
    assert "magic" in inspect_shard(damaged).problems[0].lower()
    assert "2 of 2 shards have problems" in render([report, inspect_shard(damaged)])


def test_a_document_cannot_command_the_terminal(tmp_path: Path) -> None:
    uri = write_raw(tmp_path / "shard_0.parquet", [b"\x1b[2J\0red\r\nnext\t\xc2\x9bx"])
    shown = "\n".join(render([inspect_shard(uri, num_documents=1)]))
    assert "\\x1b[2J\\x00red\\r\nnext\t\\x9bx" in shown


def test_histogram() -> None:
    lines = histogram(Counter({1: 1, 3: 4}))
    assert [line.split() for line in lines] == [
        ["1", "–", "1", "1", "█" * 10],
        ["2", "–", "3", "0"],
        ["4", "–", "7", "4", "█" * 40],
    ]
