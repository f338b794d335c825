"""Corpora from docstrings and from the user's files."""

from __future__ import annotations

import gzip
import json
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoray import storage
from nanoray.data.build import MIN_SHARDS, build_docstrings, build_from
from nanoray.data.docstrings import docstrings_of_file, is_english, source_files
from nanoray.data.shards import list_shards, read_row_group, row_groups
from nanoray.data.sources import expand, split_text
from nanoray.errors import NanorayError

PROSE = "This is a sentence of plain English prose that is long enough to be of use to anybody."


def texts_of(corpus: str) -> list[list[str]]:
    """The documents of each shard."""
    return [
        [t for g in row_groups([uri]) for t in read_row_group(uri, g.row_group)[0]]
        for uri in list_shards(corpus)
    ]


def flatten(shards: list[list[str]]) -> list[str]:
    return [text for shard in shards for text in shard]


def bytes_of(corpus: Path) -> list[bytes]:
    return [Path(uri).read_bytes() for uri in list_shards(str(corpus))]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_docstrings_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    doc = '"""%s"""'
    path.write_text(
        f"{doc % ('Module. ' + PROSE)}\n"
        f"raise SystemExit  # it is never run\n"
        f"class A:\n    {doc % ('Class. ' + PROSE)}\n"
        f"    if True:\n        async def f(self):\n"
        f"            {doc % ('Method. ' + PROSE + chr(10) * 2 + '                indented')}\n"
        f"            x = {doc % ('No docstring. ' + PROSE)}\n"
        f"def short():\n    {doc % 'Too short.'}\n"
    )
    assert docstrings_of_file(str(path)) == [
        f"Module. {PROSE}",
        f"Class. {PROSE}",
        f"Method. {PROSE}\n\nindented",
    ]
    for broken in (b"def (:\n", b'"""' + b"\xff" * 9 + b'"""', b'"""a"""\0', b"(" * 10_000):
        path.write_bytes(b'""" """\n' + broken)
        assert docstrings_of_file(str(path)) == []
    assert docstrings_of_file(str(tmp_path / "gone.py")) == []


@pytest.mark.parametrize(
    ("text", "english"),
    [
        (PROSE, True),
        ("Short text.", False),
        (
            ">>> x = f(1, 2, 3)\n>>> y = g(x, z=4)\n>>> print(x, y)\n(1, 2, 3), {4: 5, 6: 7}\n" * 2,
            False,
        ),
        (
            "Dieser Satz ist kein englischer, sondern ein deutscher, und er ist lang genug dafür.",
            False,
        ),
        ("これは英語ではありません。" * 20, False),
        (PROSE + "\0", False),
        (PROSE + "\ud800", False),
    ],
)
def test_english(text: str, english: bool) -> None:
    assert is_english(text) is english


def test_docstrings_smallest_package_first_and_deduplicated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count in [("big", 30), ("small", 3), ("tests", 9)]:
        folder = tmp_path / "lib" / name
        folder.mkdir(parents=True)
        for i in range(count):
            (folder / f"m{i:02d}.py").write_text(f'"""{name} {i % 20}: {PROSE}"""\n')
    (tmp_path / "lib" / "single.py").write_text(f'"""single: {PROSE}"""\n')
    paths = dict.fromkeys(("stdlib", "purelib", "platlib"), str(tmp_path / "lib"))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    names = [Path(file).relative_to(tmp_path / "lib").parts[0] for file in source_files()]
    assert names == ["single.py"] + ["small"] * 3 + ["big"] * 30
    (tmp_path / "lib" / "small" / ".#m00.py").symlink_to("me@host.1:2")  # an editor's lock
    assert len(source_files()) == 34
    corpus = build_docstrings(str(tmp_path / "all"), num_workers=1)
    assert (corpus.num_documents, corpus.skipped) == (24, {"duplicate": 10})
    assert corpus.num_shards == MIN_SHARDS
    flat = flatten(texts_of(str(tmp_path / "all")))
    assert len(set(flat)) == len(flat) == 24
    cut = build_docstrings(str(tmp_path / "cut"), max_bytes=5 * len(PROSE), num_workers=1)
    assert cut.num_documents == 4
    kept = flatten(texts_of(str(tmp_path / "cut")))
    assert sorted(t.split()[0] for t in kept) == ["single:"] + ["small"] * 3


@pytest.mark.slow
def test_docstrings_of_this_environment_are_reproducible(tmp_path: Path) -> None:
    one = build_docstrings(str(tmp_path / "a"), max_bytes=150_000, num_workers=1)
    two = build_docstrings(str(tmp_path / "b"), max_bytes=150_000, num_workers=2)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert one.fingerprint == two.fingerprint
    assert 140_000 < one.characters <= 150_000
    again = build_docstrings(str(tmp_path / "a"), max_bytes=150_000)
    assert again == one
    with pytest.raises(NanorayError, match="already holds a corpus of another source"):
        build_docstrings(str(tmp_path / "a"), max_bytes=160_000)


def test_from_jsonl(tmp_path: Path) -> None:
    rows = [{"text": f"document {i % 900}", "id": i} for i in range(1000)]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    corpus = build_from(source, str(tmp_path / "c"), shard_chars=1000)
    assert (corpus.num_documents, corpus.skipped) == (900, {"duplicate": 100})
    shards = texts_of(str(tmp_path / "c"))
    assert sorted(flatten(shards)) == sorted(f"document {i}" for i in range(900))
    assert flatten(shards) != [f"document {i}" for i in range(900)]
    assert len(shards) == 11
    sizes = [sum(map(len, shard)) for shard in shards]
    assert max(sizes) <= 1.02 * min(sizes)
    build_from(source, str(tmp_path / "d"), shard_chars=1000)
    assert bytes_of(tmp_path / "c") == bytes_of(tmp_path / "d")
    build_from(source, str(tmp_path / "e"), shard_chars=1000, seed=1)
    assert bytes_of(tmp_path / "c") != bytes_of(tmp_path / "e")


def test_an_old_corpus_is_never_taken_for_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "a.jsonl", [{"text": f"{folder} {i}"} for i in range(9)])
    target = str(tmp_path / "c")
    monkeypatch.chdir(tmp_path / "here")
    made = build_from("a.jsonl", target)
    assert build_from("a.jsonl", target) == made
    assert build_from(str(tmp_path / "here" / "a.jsonl"), target) == made, "the same file"
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(NanorayError, match="already holds a corpus of another source"):
        build_from("a.jsonl", target)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(NanorayError, match="already holds a corpus of another source"):
        build_from("a.jsonl", target, text_column="body")
    write_jsonl(tmp_path / "here" / "a.jsonl", [{"text": f"hare {i}"} for i in range(9)])
    with pytest.raises(NanorayError, match=r"a.jsonl was before its files changed; delete that"):
        build_from("a.jsonl", target)
    assert bytes_of(tmp_path / "c")


def test_a_file_that_joins_a_folder_changes_the_source(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    write_jsonl(source / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    build_from(str(source), str(tmp_path / "c"))
    write_jsonl(source / "b.jsonl", [{"text": "three"}])
    with pytest.raises(NanorayError, match="before its files changed"):
        build_from(str(source), str(tmp_path / "c"))


BAD_LINES = [
    (b'{"text": "cut sh', "invalid_json", "not a JSON object"),
    (b"[1, 2]", "invalid_json", "not a JSON object but list"),
    (b'{"content": "x"}', "missing_column", "no key 'text' .keys: content"),
    (b'{"text": null}', "null", "is null"),
    (b'{"text": 5}', "wrong_type", "is int, not text"),
    (b'{"text": " \\n"}', "empty", "empty or white space"),
    (b'{"text": "\xff"}', "invalid_utf8", "not valid UTF-8"),
    (b'{"text": "\\ud800"}', "invalid_utf8", "surrogate"),
]


@pytest.mark.parametrize(("line", "kind", "message"), BAD_LINES)
def test_bad_lines_are_named_or_counted(
    tmp_path: Path, line: bytes, kind: str, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"text": "two"}\n' + line + b'\n{"text": "three"}')
    with pytest.raises(NanorayError, match=rf"a.jsonl line 4: .*{message}"):
        build_from(str(path), str(tmp_path / "c"))
    corpus = build_from(str(path), str(tmp_path / "c"), on_bad="skip")
    assert (corpus.num_documents, corpus.skipped) == (3, {kind: 1})


def test_gzip_whole_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    lines = b"".join(b'{"body": "document %d"}\n' % i for i in range(5000))
    path.write_bytes(gzip.compress(lines))
    corpus = build_from(str(path), str(tmp_path / "c"), text_column="body")
    assert corpus.num_documents == 5000
    path.write_bytes(gzip.compress(lines)[:8000])
    with pytest.raises(NanorayError, match=r"a.jsonl.gz after line \d+: damaged gzip"):
        build_from(str(path), str(tmp_path / "d"), text_column="body")
    corpus = build_from(str(path), str(tmp_path / "d"), text_column="body", on_bad="skip")
    assert corpus.skipped == {"damaged": 1}
    assert 100 < corpus.num_documents < 5000


def test_from_parquet(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(50)] + [None, "  "]
    pq.write_table(pa.table({"content": texts, "n": range(52)}), tmp_path / "a.parquet")
    with pytest.raises(NanorayError, match=r"no column 'text'.*content, n"):
        build_from(str(tmp_path / "*.parquet"), str(tmp_path / "c"))
    with pytest.raises(NanorayError, match=r"a.parquet, row group 0, row 50: .*null"):
        build_from(str(tmp_path / "*.parquet"), str(tmp_path / "c"), text_column="content")
    corpus = build_from(
        str(tmp_path / "*.parquet"), str(tmp_path / "c"), text_column="content", on_bad="skip"
    )
    assert (corpus.num_documents, corpus.skipped) == (50, {"null": 1, "empty": 1})


def test_from_text_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_bytes(b"\xef\xbb\xbfone file,\r\ntwo lines\n")
    (tmp_path / "in" / "deep" / "b.md").write_text("# another")
    (tmp_path / "in" / "c.bin").write_bytes(b"\xff")
    build_from(str(tmp_path / "in"), str(tmp_path / "c"))
    assert sorted(texts_of(str(tmp_path / "c"))) == [["# another"], ["one file,\ntwo lines"]]
    (tmp_path / "in" / "d.txt").write_bytes(b"fine\nnot \xff fine")
    with pytest.raises(NanorayError, match=r"d.txt line 2: not valid UTF-8"):
        build_from(str(tmp_path / "in"), str(tmp_path / "d"))


@given(
    st.lists(st.text("ab \n", min_size=1, max_size=30), min_size=1, max_size=20).map("\n\n".join),
    st.integers(5, 60),
)
def test_split_text_loses_nothing(text: str, max_chars: int) -> None:
    documents = list(split_text(text, max_chars))
    assert "".join("".join(documents).split()) == "".join(text.split())
    for document in documents:
        assert len(document) <= max_chars or "\n\n" not in document.strip("\n")


def test_object_store(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/in/a.jsonl", b'{"text": "one"}\n{"text": "two"}\n')
    fs.pipe_file("/bucket/in/b.txt", b"three")
    assert expand("memory://bucket/in/*.txt") == ["memory:///bucket/in/b.txt"]
    corpus = build_from("memory://bucket/in", "memory://bucket/out")
    assert corpus.num_documents == 3
    assert sorted(texts_of("memory://bucket/out")) == [["one"], ["three"], ["two"]]
    fs.rm("/bucket", recursive=True)


def test_odd_names_are_taken_as_they_are(tmp_path: Path) -> None:
    """Brackets are a glob only where no file has them; a folder is one whatever it is called."""
    folder = tmp_path / "my texts é"
    (folder / "notes.txt").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name in (
        "draft [1].txt",
        "b.json",
        "c.ndjson.gz",
        "notes.txt/d.md",
        "e.html",
        "f.parquet.gz",
    ):
        (folder / name).write_text("one")
    (folder / ".git" / "description.txt").write_text("hidden")
    (folder / "._a.txt").write_bytes(b"\xff")

    def names(source: str) -> list[str]:
        return [name.removeprefix(f"{folder}/") for name in expand(source, left_out.append)]

    left_out: list[str] = []
    assert names(str(folder / "draft [1].txt")) == ["draft [1].txt"]
    assert names(str(folder / "notes.txt")) == ["notes.txt/d.md"]
    assert names(str(folder / "*.txt")) == ["draft [1].txt"]
    assert left_out == []
    assert names(str(folder)) == ["b.json", "c.ndjson.gz", "draft [1].txt", "notes.txt/d.md"]
    assert [text.split(" of ")[0] for text in left_out] == ["left out: 2 files"]


def test_refusals(tmp_path: Path) -> None:
    target = str(tmp_path / "c")
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "one.txt").write_text("only one")
    (tmp_path / "empty").mkdir()
    for source, message in [
        ("gone.jsonl", "no file"),
        ("gone", "no file or folder"),
        ("x.csv", "cannot tell what kind of file"),
        ("empty", "no file of a known kind"),
        ("*.jsonl", "no file matches"),
        ("*.csv", "no file of a known kind"),
        ("one.txt", r"one\.txt has 1 usable documents, but a corpus needs two"),
    ]:
        with pytest.raises(NanorayError, match=message):
            build_from(str(tmp_path / source), target)
    with pytest.raises(NanorayError, match="--from is empty"):
        build_from("", target)  # an unset variable of the shell, not this folder
    with pytest.raises(NanorayError, match=r"cannot be written|not writable"):
        build_from(str(tmp_path / "one.txt"), str(tmp_path / "x.csv" / "inside"))
    assert storage.list_names(target) == [".build.lock", "corpus.json"]


def test_shards_of_uneven_documents(tmp_path: Path) -> None:
    lengths = [5000, *[10] * 40, 3000, *[1] * 5]
    rows = [{"text": chr(97 + i % 26) * n + str(i)} for i, n in enumerate(lengths)]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    build_from(source, str(tmp_path / "c"))
    shards = texts_of(str(tmp_path / "c"))
    assert len(shards) == MIN_SHARDS
    assert all(shards)
    assert Counter(flatten(shards)) == Counter(row["text"] for row in rows)
