"""Byte-pair encoding: trained by rustbpe, run by tiktoken, stored as a tiktoken-style rank file."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import tiktoken

from nanoray.errors import NanorayError
from nanoray.tokenizer.base import SPECIAL_TOKENS, Tokenizer, dump_meta, meta_file, to_utf8

# GPT-4's split pattern with numbers in groups of at most two digits (nanochat: better than one
# or three at a vocabulary of 32K).
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)

# A longer run of white space overflows the stack of tiktoken's regex (seen between 1e5 and 1e6
# characters), so such a text is encoded in slices of this many characters.
_MAX_SPACE_RUN_CHARS = 100_000
_NO_SPECIALS: frozenset[str] = frozenset()


class BPETokenizer(Tokenizer):
    """Ids 0 .. n-1 are the byte-pair ranks, the nine special tokens follow.

    Args:
        ranks: bytes of each token -> rank; ranks are 0 .. n-1 and all 256 bytes are there.
        pattern: the regular expression that splits text before any merge.
    """

    kind = "bpe"

    def __init__(self, ranks: dict[bytes, int], pattern: str = SPLIT_PATTERN) -> None:
        pieces = sorted(ranks, key=ranks.__getitem__)
        assert [ranks[piece] for piece in pieces] == list(range(len(pieces)))
        special_tokens = {name: len(pieces) + i for i, name in enumerate(SPECIAL_TOKENS)}
        super().__init__([*pieces, *(name.encode() for name in SPECIAL_TOKENS)], special_tokens)
        self.pattern = pattern
        self._ranks = ranks
        self._core = tiktoken.Encoding(
            name="nanoray",
            pat_str=pattern,
            mergeable_ranks=ranks,
            special_tokens=special_tokens,
        )._core_bpe

    def encode_numpy(self, text: str) -> np.ndarray:
        if len(text) > _MAX_SPACE_RUN_CHARS and _has_long_space_run(text):
            starts = range(0, len(text), _MAX_SPACE_RUN_CHARS)
            slices = [self._encode(text[start : start + _MAX_SPACE_RUN_CHARS]) for start in starts]
            return np.concatenate(slices)
        return self._encode(text)

    def _encode(self, text: str) -> np.ndarray:
        # The buffer saves the detour over a Python list (a tenth of the time).
        try:
            buffer = self._core.encode_to_tiktoken_buffer(text, _NO_SPECIALS)
        except UnicodeEncodeError:
            buffer = self._core.encode_to_tiktoken_buffer(to_utf8(text).decode(), _NO_SPECIALS)
        return np.frombuffer(buffer, dtype=np.uint32).astype(self.token_dtype)

    def to_files(self) -> dict[str, bytes]:
        ranks = b"".join(
            base64.b64encode(piece) + b" %d\n" % rank
            for rank, piece in enumerate(self._pieces[: len(self._ranks)])
        )
        sha256 = hashlib.sha256(ranks).hexdigest()
        ranks_name = f"ranks-{sha256[:12]}.tiktoken"
        meta = dump_meta(
            kind=self.kind,
            vocab_size=self.vocab_size,
            pattern=self.pattern,
            special_tokens=list(SPECIAL_TOKENS),
            ranks_file=ranks_name,
            ranks_sha256=sha256,
        )
        return {**meta_file(meta), ranks_name: ranks}

    @classmethod
    def _from_meta(cls, meta: dict[str, Any], files: Mapping[str, bytes]) -> BPETokenizer:
        name = meta.get("ranks_file")
        if not isinstance(name, str) or not name:
            raise NanorayError("tokenizer.json: ranks_file does not name a file")
        if name not in files:
            raise NanorayError(f"{name}, the rank file that tokenizer.json names, is missing")
        ranks = _parse_ranks(files[name], name)
        if hashlib.sha256(files[name]).hexdigest() != meta.get("ranks_sha256"):
            raise NanorayError(f"{name} has another sha256 than tokenizer.json says")
        if meta.get("vocab_size") != len(ranks) + len(SPECIAL_TOKENS):
            raise NanorayError(
                f"tokenizer.json: vocab_size is {meta.get('vocab_size')!r}, but {name} has "
                f"{len(ranks)} ranks and there are {len(SPECIAL_TOKENS)} special tokens"
            )
        pattern = meta.get("pattern")
        if not isinstance(pattern, str) or not pattern:
            raise NanorayError("tokenizer.json: pattern is not a regular expression")
        try:
            return cls(ranks, pattern)
        except ValueError as error:  # what tiktoken raises for a pattern that does not compile
            raise NanorayError(f"tokenizer.json: pattern does not compile: {error}") from error


def _parse_ranks(content: bytes, name: str) -> dict[bytes, int]:
    """Token bytes -> rank; every line is `<base64> <rank>`, ranks count up from 0."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        parts = line.split()
        if len(parts) != 2:
            raise NanorayError(f"{name}, line {number}: expected `<base64> <rank>`")
        try:
            piece = base64.b64decode(parts[0], validate=True)
        except binascii.Error as error:
            raise NanorayError(f"{name}, line {number}: bad base64: {error}") from error
        if parts[1] != b"%d" % len(ranks):
            raise NanorayError(
                f"{name}, line {number}: the rank is {parts[1].decode(errors='replace')}, "
                f"expected {len(ranks)} (ranks count up from 0 without gap or repetition)"
            )
        if not piece or piece in ranks:
            what = "an empty token" if not piece else "the same token as an earlier line"
            raise NanorayError(f"{name}, line {number}: {what}")
        ranks[piece] = len(ranks)
    missing = sum(bytes([value]) not in ranks for value in range(256))
    if missing:
        raise NanorayError(f"{name}: {missing} of the 256 single bytes have no rank")
    return ranks


def _has_long_space_run(text: str) -> bool:
    return any(run.end() - run.start() > _MAX_SPACE_RUN_CHARS for run in re.finditer(r"\s+", text))
