"""A tokenizer that needs no training: one id per byte, and BOS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nanoray.errors import NanorayError
from nanoray.tokenizer.base import SPECIAL_TOKENS, Tokenizer, dump_meta, meta_file, to_utf8

_VOCAB_SIZE = 257
_BOS_ID = 256
# The byte values 0xF8..0xFF occur nowhere in UTF-8 (RFC 3629), so no text encodes to them.
_FIRST_CHAT_ID = 0xF8


class ByteTokenizer(Tokenizer):
    """257 symbols: id = value of the UTF-8 byte, and 256 = `<|bos|>`.

    The eight chat tokens do not get ids of their own: they take 0xF8..0xFF in the order of
    SPECIAL_TOKENS. UTF-8 never uses these byte values, so conversations render without loss
    and no user text can forge a chat token; like all special tokens they count zero bytes.
    """

    kind = "byte"

    def __init__(self) -> None:
        special_tokens = {"<|bos|>": _BOS_ID}
        special_tokens |= {name: _FIRST_CHAT_ID + i for i, name in enumerate(SPECIAL_TOKENS[1:])}
        pieces = [bytes([value]) for value in range(256)] + [b""]
        for name, token in special_tokens.items():
            pieces[token] = name.encode()
        super().__init__(pieces, special_tokens)

    def encode_numpy(self, text: str) -> np.ndarray:
        return np.frombuffer(to_utf8(text), dtype=np.uint8).astype(self.token_dtype)

    def to_files(self) -> dict[str, bytes]:
        meta = dump_meta(
            kind=self.kind, vocab_size=_VOCAB_SIZE, special_tokens=list(SPECIAL_TOKENS)
        )
        return meta_file(meta)

    @classmethod
    def _from_meta(cls, meta: dict[str, Any], files: Mapping[str, bytes]) -> ByteTokenizer:
        if meta.get("vocab_size") != _VOCAB_SIZE:
            raise NanorayError(
                f"tokenizer.json: vocab_size is {meta.get('vocab_size')!r}, "
                f"but a byte tokenizer has {_VOCAB_SIZE}"
            )
        return cls()
