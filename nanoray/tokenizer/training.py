"""Train a BPE tokenizer, and compare how it compresses with the vocabularies of GPT-2 and GPT-4."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rustbpe
import tiktoken
from tiktoken_ext import openai_public

from nanoray.errors import NanorayError
from nanoray.tokenizer.base import SPECIAL_TOKENS, Tokenizer, to_utf8
from nanoray.tokenizer.bpe import SPLIT_PATTERN, BPETokenizer

_CACHE_VARIABLE = "TIKTOKEN_CACHE_DIR"
_MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    max_chars: int = 2_000_000_000,
    doc_cap: int = 10_000,
) -> BPETokenizer:
    """Train on at most `max_chars` characters, of each text its first `doc_cap` (nanochat's caps).

    The same texts give the same tokenizer. `vocab_size` counts the nine special tokens.

    Raises:
        NanorayError: the vocabulary is below 265, or there is too little text for it.
    """
    if vocab_size < _MIN_VOCAB_SIZE:
        raise NanorayError(
            f"a vocabulary of {vocab_size} is too small: it needs 256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens, so at least {_MIN_VOCAB_SIZE}"
        )
    num_ranks = vocab_size - len(SPECIAL_TOKENS)
    trainer = rustbpe.Tokenizer()
    capped = _capped(texts, max_chars, doc_cap)
    trainer.train_from_iterator(capped, num_ranks, pattern=SPLIT_PATTERN)
    ranks = {bytes(piece): rank for piece, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < num_ranks:
        raise NanorayError(
            f"the text gives a vocabulary of only {len(ranks) + len(SPECIAL_TOKENS)}, not "
            f"{vocab_size}: take more text or a smaller vocabulary"
        )
    return BPETokenizer(ranks)


def _capped(texts: Iterable[str], max_chars: int, doc_cap: int) -> Iterator[str]:
    chars_left = max_chars
    for text in texts:
        capped = text[: min(doc_cap, chars_left)]
        chars_left -= len(capped)
        yield to_utf8(capped).decode()
        if chars_left <= 0:
            return


@dataclass(frozen=True)
class CompressionRow:
    """How one vocabulary compresses the texts; `note` says why the figures are missing."""

    name: str
    vocab_size: int | None = None
    num_bytes: int | None = None
    num_tokens: int | None = None
    note: str = ""

    @property
    def bytes_per_token(self) -> float | None:
        return self.num_bytes / self.num_tokens if self.num_bytes and self.num_tokens else None


def compare_compression(
    tokenizer: Tokenizer, texts: Sequence[str], *, download_timeout_s: float = 20.0
) -> list[CompressionRow]:
    """The tokenizer against gpt2 and cl100k_base on the same texts, a row each.

    Their rank files come from tiktoken's cache, from an installed `litellm` (which ships some),
    or by download; without them the row says so, after `download_timeout_s` at most.
    """
    num_bytes = sum(len(to_utf8(text)) for text in texts)
    num_tokens = sum(len(tokenizer.encode_numpy(text)) for text in texts)
    rows = [CompressionRow("ours", tokenizer.vocab_size, num_bytes, num_tokens)]
    for name, load in (("gpt2", _gpt2), ("cl100k_base", _cl100k_base)):
        with _shipped_cache():
            encoding = _within(download_timeout_s, load)
        if isinstance(encoding, str):
            rows.append(CompressionRow(name, note=encoding))
            continue
        num_tokens = sum(len(encoding.encode_ordinary(text)) for text in texts)
        rows.append(CompressionRow(name, encoding.n_vocab, num_bytes, num_tokens))
    return rows


@contextlib.contextmanager
def _shipped_cache() -> Iterator[None]:
    """Point tiktoken at the rank files inside litellm, unless the user chose a cache."""
    spec = importlib.util.find_spec("litellm")  # does not import it
    shipped = Path(spec.origin or "").parent / "litellm_core_utils" / "tokenizers" if spec else None
    if _CACHE_VARIABLE in os.environ or shipped is None or not shipped.is_dir():
        yield
        return
    os.environ[_CACHE_VARIABLE] = str(shipped)
    try:
        yield
    finally:
        del os.environ[_CACHE_VARIABLE]


def _within(timeout_s: float, load: Callable[[], tiktoken.Encoding]) -> tiktoken.Encoding | str:
    """The encoding, or why there is none. tiktoken downloads without a deadline of its own."""
    outcome: list[Any] = []

    def attempt() -> None:
        try:
            outcome.append(load())
        except Exception as error:  # network, disk, hash: all mean "not to be had"
            outcome.append(
                f"its file is not in the cache and could not be downloaded ({type(error).__name__})"
            )

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        return f"its file is not in the cache and did not download within {timeout_s:g} s"
    found: tiktoken.Encoding | str = outcome[0]
    return found


def _gpt2() -> tiktoken.Encoding:
    # p50k_base begins with exactly gpt2's ranks and has the same pattern, in a single file that
    # litellm ships as well.
    arguments = openai_public.p50k_base()
    end_of_text = 50_256
    ranks = {
        piece: rank for piece, rank in arguments["mergeable_ranks"].items() if rank < end_of_text
    }
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=arguments["pat_str"],
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": end_of_text},
    )


def _cl100k_base() -> tiktoken.Encoding:
    return tiktoken.Encoding(**openai_public.cl100k_base())
