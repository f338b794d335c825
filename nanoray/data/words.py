"""The frequent words of a corpus: what the spelling tasks ask about.

A model can learn to spell only words whose tokens it has met, so the list comes from the very text
that it is pretrained on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from nanoray import storage
from nanoray.data.shards import list_shards, read_row_group, row_groups, split_shards
from nanoray.data.writer import write_errors
from nanoray.errors import NanorayError

WORDS_FILE = "words.txt"
MIN_WORDS = 20  # fewer make no task

_SAMPLE_BYTES = 20_000_000
_MAX_SHARDS = 32
_MIN_COUNT = 5
_WORD = re.compile(r"[a-z]{3,14}")
_SCRAP = re.compile(r"[^aeiouy]+|.*(.)\1\1.*")  # no vowel, or three equal letters in a row
_PUNCTUATION = ".,;:!?()\"'"
_T = TypeVar("_T")


def frequent_words(corpus_dir: str, count: int = 5000) -> list[str]:
    """The ``count`` most frequent words of the training shards, the most frequent first.

    A word is 3 to 14 letters a to z between white space, punctuation around it aside: so names
    (capitals), identifiers and compounds do not count, nor does what is rare or no word by its
    looks. Ties are in alphabetical order. Of a large corpus a sample is read, some 20 MB of row
    groups at even distances, always the same.

    Raises:
        NanorayError: there is no corpus, or storage does not give it.
    """
    shards, _ = split_shards(list_shards(corpus_dir))
    groups = row_groups(_evenly(shards, _MAX_SHARDS), on_bad="skip")
    mean_bytes = sum(group.num_bytes for group in groups) / max(1, len(groups))
    pieces: Counter[str] = Counter()
    for group in _evenly(groups, int(_SAMPLE_BYTES / max(1.0, mean_bytes)) or 1):
        texts, _ = read_row_group(group.shard, group.row_group, on_bad="skip")
        for text in texts:
            pieces.update(text.split())
    words: Counter[str] = Counter()
    for piece, times in pieces.items():
        word = piece.strip(_PUNCTUATION)
        if _WORD.fullmatch(word) and not _SCRAP.fullmatch(word):
            words[word] += times
    ranked = sorted(words, key=lambda word: (-words[word], word))
    return [word for word in ranked[:count] if words[word] >= _MIN_COUNT]


def word_list(corpus_dir: str) -> str:
    """URI of the corpus's ``words.txt``, a word per line, which is made if it is not there.

    Raises:
        NanorayError: there is no corpus, it has hardly any words, or the file cannot be written.
    """
    uri = storage.join(storage.normalize(corpus_dir), WORDS_FILE)
    if storage.exists(uri):
        return uri
    words = frequent_words(corpus_dir)
    if len(words) < MIN_WORDS:
        raise NanorayError(
            f"corpus {corpus_dir} has only {len(words)} frequent words of the letters a to z; give "
            f"a list of words with --words, one per line"
        )
    with write_errors(uri):
        storage.write_text(uri, "\n".join(words) + "\n")
    return uri


def words_of_run(plan: Mapping[str, Any]) -> str:
    """The word list that a run knows: the one it was given, or that of its corpus.

    Args:
        plan: the values of the run's plan, as its checkpoints keep them.

    Raises:
        NanorayError: see `word_list`.
    """
    given = plan.get("sources", {}).get("words")
    return str(given) if given else word_list(plan["corpus_dir"])


def _evenly(items: Sequence[_T], count: int) -> list[_T]:
    """At most ``count`` of the items, at even distances."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]
