"""The global shuffle on Ray Data."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanoray.data.shards import list_shards, read_row_group, row_groups
from nanoray.data.writer import write_shard
from nanoray.errors import NanorayError

TEXTS = [f"document {i % 990} " + "word " * (i % 40) for i in range(1000)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for i in range(4):
        texts = TEXTS[250 * i : 250 * (i + 1)]
        write_shard(str(folder / f"part_{i}.parquet"), texts, row_group_size=100)
    return folder


def texts_of(corpus: Path) -> list[str]:
    groups = row_groups(list_shards(str(corpus)))
    return [t for g in groups for t in read_row_group(g.shard, g.row_group)[0]]


def bytes_of(corpus: Path) -> list[bytes]:
    return [Path(uri).read_bytes() for uri in list_shards(str(corpus))]


@pytest.mark.slow
def test_shuffles_all_and_again_the_same(ray_session: None, source: Path, tmp_path: Path) -> None:
    from nanoray.data.repackage import repackage

    seen: list[tuple[int, int]] = []
    corpus = repackage(
        str(source),
        str(tmp_path / "a"),
        shard_chars=30_000,
        row_group_size=64,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert corpus.num_shards == 4
    assert corpus.num_documents == len(TEXTS)
    assert corpus.characters == sum(map(len, TEXTS))
    texts = texts_of(tmp_path / "a")
    assert Counter(texts) == Counter(TEXTS)
    # A shuffle: neighbours come from all over, and each shard has its share of every source.
    places = [TEXTS.index(text) for text in texts]
    assert 200 < sum(abs(a - b) for a, b in pairwise(places)) / len(places) < 450
    for uri in list_shards(str(tmp_path / "a")):
        meta = pq.read_metadata(uri)
        assert {meta.row_group(i).num_rows for i in range(meta.num_row_groups - 1)} == {64}
        assert abs(meta.num_rows - len(TEXTS) / corpus.num_shards) <= 1
    assert seen[-1] == (corpus.num_shards, corpus.num_shards)

    repackage(str(source), str(tmp_path / "b"), shard_chars=30_000, row_group_size=64)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_an_old_corpus_is_never_taken_for_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanoray.data import repackage as module

    def shuffle(_items: object, _assign: object, out_dir: str, *_rest: object) -> int:
        """In place of Ray's: which texts come out does not matter here."""
        for i in range(2):
            write_shard(f"{out_dir}/shard_{i:05d}.parquet", ["a"])
        return 2

    monkeypatch.setattr(module, "_shuffle", shuffle)
    for folder in ("here", "there"):
        columns = {"text": ["a", "b"], "body": ["c", "d"]}
        (tmp_path / folder).mkdir()
        pq.write_table(pa.table(columns), tmp_path / folder / "x.parquet")
    target = str(tmp_path / "c")
    monkeypatch.chdir(tmp_path / "here")
    made = module.repackage("x.parquet", target)
    assert module.repackage("./x.parquet", target) == made
    with pytest.raises(NanorayError, match="already holds a corpus of another source"):
        module.repackage("x.parquet", target, text_column="body")
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(NanorayError, match="already holds a corpus of another source"):
        module.repackage("x.parquet", target)
    monkeypatch.chdir(tmp_path / "here")
    write_shard("x.parquet", ["a", "c"])
    with pytest.raises(NanorayError, match="before its files changed"):
        module.repackage("x.parquet", target)


@pytest.mark.slow
def test_bad_rows_are_named_through_ray_or_counted(ray_session: None, tmp_path: Path) -> None:
    from nanoray.data.repackage import repackage

    folder = tmp_path / "source"
    write_shard(str(folder / "x.parquet"), ["a", "b", "  ", "c", "d"], row_group_size=2)
    with pytest.raises(NanorayError, match=r"x.parquet, row group 1, row 0: the text is empty"):
        repackage(str(folder), str(tmp_path / "a"))
    with pytest.raises(NanorayError, match="no corpus"):
        list_shards(str(tmp_path / "a"))
    corpus = repackage(str(folder), str(tmp_path / "a"), seed=7, on_bad="skip")
    assert (corpus.num_shards, corpus.skipped) == (2, {"empty": 1})
    assert sorted(texts_of(tmp_path / "a")) == ["a", "b", "c", "d"]
    repackage(str(folder), str(tmp_path / "b"), seed=8, on_bad="skip")
    assert bytes_of(tmp_path / "a") != bytes_of(tmp_path / "b")


@pytest.mark.slow
def test_too_few_usable_documents_for_the_shards(ray_session: None, tmp_path: Path) -> None:
    """They fall into every second shard; no other node is to blame."""
    from nanoray.data.repackage import repackage

    texts = ["a", " "] * 6
    write_shard(str(tmp_path / "source" / "x.parquet"), texts, row_group_size=2)
    with pytest.raises(NanorayError, match=r"documents are unusable \(6\) that 1 of 2 shards"):
        repackage(str(tmp_path / "source"), str(tmp_path / "out"), on_bad="skip")


def test_refusals_before_ray(tmp_path: Path) -> None:
    from nanoray.data.repackage import repackage

    (tmp_path / "a.txt").write_text("text")
    write_shard(str(tmp_path / "one" / "x.parquet"), ["a"])
    for source, message in [
        ("a.txt", "holds no parquet file"),
        ("gone", "no file or folder"),
        ("one", "holds 1 documents"),
    ]:
        with pytest.raises(NanorayError, match=message):
            repackage(str(tmp_path / source), str(tmp_path / "out"))
