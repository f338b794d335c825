"""Frequent words of a corpus: which count, in which order, kept once, of a bounded sample."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoray import storage
from nanoray.data import words
from nanoray.data.words import frequent_words, word_list
from nanoray.data.writer import write_shard
from nanoray.errors import NanorayError


def make_corpus(folder: Path, *shards: list[str], row_group_size: int = 50) -> str:
    """The given training shards, and one for validation."""
    for number, texts in enumerate([*shards, ["validation only"] * 50]):
        write_shard(str(folder / f"shard_{number:05d}.parquet"), texts, row_group_size)
    return str(folder)


def test_most_frequent_first_ties_by_alphabet(tmp_path: Path) -> None:
    corpus = make_corpus(
        tmp_path, ["river " * 9 + "apple " * 7], ["garden " * 7 + "window " * 5 + "rare " * 4]
    )
    assert frequent_words(corpus) == ["river", "apple", "garden", "window"]
    assert frequent_words(corpus, count=2) == ["river", "apple"]


@pytest.mark.parametrize(
    "text",
    [
        "of",  # two letters
        "incomprehensibly",  # sixteen
        "Monday",
        "NASA",
        "snake_case",
        "numpy.array",
        "don't",
        "well-known",
        "x86",
        "naïve",
        "слово",
        "http",  # no vowel
        "hmmmmm",
        "aaargh",
        "path/to",
        "key=value",
    ],
)
def test_what_is_no_word(text: str, tmp_path: Path) -> None:
    assert frequent_words(make_corpus(tmp_path, [f"{text} house " * 20])) == ["house"]


def test_punctuation_around_a_word_is_put_aside(tmp_path: Path) -> None:
    text = "(apple) 'apple' \"apple\", apple. apple; apple: apple! apple?\napple\tapple..."
    assert frequent_words(make_corpus(tmp_path, [text])) == ["apple"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.sampled_from("abeiou zt_.'\n"), min_size=1, max_size=80), max_size=30))
def test_as_a_naive_count(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    texts = [*(text for text in texts if text.strip()), "beat " * 5]
    expected: Counter[str] = Counter()
    for piece in " ".join(texts).split():
        piece = re.sub(r"^[.']+|[.']+$", "", piece)
        triple = any(a * 3 in piece for a in piece)
        if re.fullmatch("[a-z]{3,14}", piece) and set(piece) & set("aeiouy") and not triple:
            expected[piece] += 1
    found = frequent_words(make_corpus(tmp_path_factory.mktemp("corpus"), texts))
    ranked = sorted((-times, word) for word, times in expected.items() if times >= 5)
    assert found == [word for _, word in ranked]


def test_of_a_large_corpus_a_sample_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make_corpus(
        tmp_path, *[[f"shard{i} stone river"] * 400 for i in range(5)], row_group_size=40
    )
    read: list[tuple[str, int]] = []
    original = words.read_row_group

    def reading(uri: str, row_group: int, **options: str) -> tuple[list[str], dict[str, int]]:
        read.append((uri, row_group))
        return original(uri, row_group, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(words, "read_row_group", reading)
    monkeypatch.setattr(words, "_SAMPLE_BYTES", 10_000)
    assert frequent_words(corpus) == ["river", "stone"]
    first = list(read)
    assert 3 <= len(first) < 25
    assert len({uri for uri, _ in first}) >= 3
    assert frequent_words(corpus) == ["river", "stone"]
    assert read == first * 2


def test_bad_rows_and_shards_are_passed_over(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, ["river " * 9], ["apple " * 9])
    (tmp_path / "shard_00000.parquet").write_bytes(b"no parquet")
    assert frequent_words(corpus) == ["apple"]


def test_no_corpus_is_said(tmp_path: Path) -> None:
    with pytest.raises(NanorayError, match="no corpus at"):
        word_list(str(tmp_path / "nowhere"))


def test_the_list_is_made_once(corpus: str, root: str) -> None:
    for name in storage.list_names(corpus):
        if name.startswith("shard_"):
            content = storage.read_bytes(storage.join(corpus, name))
            storage.write_bytes(storage.join(root, name), content)
    uri = word_list(root)
    assert uri == storage.join(root, "words.txt")
    assert storage.read_text(uri).split("\n")[:-1] == frequent_words(root)
    assert storage.read_text(uri).startswith("the\n")
    storage.write_text(uri, "mine\n")
    assert word_list(root) == uri
    assert storage.read_text(uri) == "mine\n"


def test_a_corpus_of_hardly_any_words_is_said(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, ["word " * 100])
    with pytest.raises(NanorayError, match=r"only 1 frequent words.*--words"):
        word_list(corpus)
    assert not (tmp_path / "words.txt").exists()
