"""What every tokenizer can do, and how it is stored.

A stored tokenizer is `tokenizer.json` (kind, pattern, special tokens) and, for BPE, a
tiktoken-style rank file that the JSON names together with its sha256. `to_files` and
`from_files` give the same content as bytes, for checkpoints and object stores.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from nanoray import storage
from nanoray.errors import NanorayError
from nanoray.tokenizer import conversation as chat

if TYPE_CHECKING:
    from rich.text import Text

SPECIAL_TOKENS = (
    "<|bos|>",  # begins every document
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the calculator
    "<|python_end|>",
    "<|output_start|>",  # what the calculator answered
    "<|output_end|>",
)

_JSON_NAME = "tokenizer.json"
_FORMAT = "nanoray-tokenizer"
_VERSION = 1


class Tokenizer(ABC):
    """Text to token ids and back; special tokens never come out of text, only by their id.

    Attributes:
        vocab_size: number of ids, special tokens included.
        special_tokens: name of each of the nine special tokens -> its id.
        token_dtype: the smallest unsigned dtype that holds every id (uint16 or uint32).
    """

    kind: ClassVar[str]
    _kinds: ClassVar[dict[str, type[Tokenizer]]] = {}

    def __init_subclass__(cls) -> None:
        Tokenizer._kinds[cls.kind] = cls

    def __init__(self, pieces: list[bytes], special_tokens: dict[str, int]) -> None:
        # pieces[id]: the bytes that an id stands for; a special token's are its name.
        self._pieces = pieces
        self.special_tokens = special_tokens
        self.vocab_size = len(pieces)
        self.token_dtype: type[np.unsignedinteger] = (
            np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        )

    @abstractmethod
    def encode_numpy(self, text: str) -> np.ndarray:
        """Token ids of `text`, shape [n], dtype `token_dtype`, without BOS.

        Names of special tokens inside the text are plain text. Lone surrogates, which UTF-8
        cannot hold, become U+FFFD.
        """

    @abstractmethod
    def to_files(self) -> dict[str, bytes]:
        """The stored form: file name -> content."""

    @classmethod
    @abstractmethod
    def _from_meta(cls, meta: dict[str, Any], files: Mapping[str, bytes]) -> Tokenizer:
        """Build from a checked tokenizer.json and the files beside it."""

    @property
    def bos_id(self) -> int:
        return self.special_tokens["<|bos|>"]

    def special_id(self, name: str) -> int:
        """The id of a special token. Raises NanorayError for an unknown name."""
        try:
            return self.special_tokens[name]
        except KeyError:
            known = ", ".join(self.special_tokens)
            raise NanorayError(f"there is no special token {name!r}; there are {known}") from None

    def encode(self, text: str) -> list[int]:
        """As `encode_numpy`, as a list."""
        ids: list[int] = self.encode_numpy(text).tolist()
        return ids

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[np.ndarray]:
        """`encode_numpy` of every text, in order, by `num_threads` threads."""
        if num_threads <= 1:
            return [self.encode_numpy(text) for text in texts]
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(self.encode_numpy, texts))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids; special tokens by name. Raises ValueError for a strange id."""
        parts = []
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"token id {token} is outside the vocabulary [0, {self.vocab_size})"
                )
            parts.append(self._pieces[token])
        return b"".join(parts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are no UTF-8 (half a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """Bytes of text per token, int32 [vocab_size], 0 for special tokens.

        With it, bits per byte = sum of nats / ln 2 / sum of bytes, special targets left out.
        """
        sizes = np.array([len(piece) for piece in self._pieces], dtype=np.int32)
        sizes[list(self.special_tokens.values())] = 0
        return sizes

    def render_conversation(
        self, conversation: chat.Conversation, max_tokens: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids and mask (1 = trained on) of a conversation, cut to `max_tokens` if given.

        See `nanoray.tokenizer.conversation` for its form and what is trained on.

        Raises:
            NanorayError: the conversation is malformed; says where.
        """
        ids, mask = chat.render(self, conversation)
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: chat.Conversation) -> list[int]:
        """Ids up to and including `<|assistant_start|>`: the assistant's turn to speak.

        If the last message is the assistant's (the reference answer), it is left out.

        Raises:
            NanorayError: the conversation is malformed; says where.
        """
        return chat.render_for_completion(self, conversation)

    def visualize(self, ids: Sequence[int], mask: Sequence[int] | None = None) -> Text:
        """Tokens in colour for a terminal (print with rich): green is trained on, red is not.

        Without a mask two shades alternate. Special tokens are bold.
        """
        return chat.visualize(self, ids, mask)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the stored content: equal if and only if the tokenizer is."""
        digest = hashlib.sha256()
        for name, content in sorted(self.to_files().items()):
            digest.update(f"{name} {len(content)}\n".encode() + content)
        return digest.hexdigest()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Store in a folder or under a URI. A reader sees the old or the new, never a mixture.

        The rank file's name holds its hash, so a new one does not touch the old; the switch is
        the one atomic write of tokenizer.json.
        """
        base = storage.normalize(directory)
        files = self.to_files()
        for name in sorted(files, key=lambda name: name == _JSON_NAME):
            storage.write_bytes(storage.join(base, name), files[name])
        for name in storage.list_names(base):
            if name.startswith("ranks-") and name not in files:
                storage.remove(storage.join(base, name))

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """Read what `save` wrote; on a subclass only that kind is accepted.

        Raises:
            NanorayError: a file is missing, damaged or of the wrong kind; says which and where.
        """
        base = storage.normalize(directory)
        names = storage.list_names(base)
        if _JSON_NAME not in names:
            raise NanorayError(
                f"there is no tokenizer in {base} (no {_JSON_NAME}); "
                f"train one with `python -m jobs.tokenizer train`"
            )
        files = {}
        for name in names:
            if name == _JSON_NAME or name.startswith("ranks-"):
                with contextlib.suppress(FileNotFoundError):  # an old rank file, just replaced
                    files[name] = storage.read_bytes(storage.join(base, name))
        return cls.from_files(files, where=base)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], where: str = "tokenizer files") -> Tokenizer:
        """The inverse of `to_files`. `where` names the origin in error messages.

        Raises:
            NanorayError: as `load`.
        """
        try:
            meta = _parse_meta(files)
            child = cls._kinds.get(str(meta.get("kind")))
            if child is None or not issubclass(child, cls):
                wanted = cls.__dict__.get("kind") or " or ".join(sorted(cls._kinds))
                raise NanorayError(
                    f"{_JSON_NAME}: the kind is {meta.get('kind')!r}, expected {wanted}"
                )
            return child._from_meta(meta, files)
        except NanorayError as error:
            raise NanorayError(f"cannot load the tokenizer from {where}: {error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        # Travels between processes in its stored form, so that it is checked there too.
        return type(self).from_files, (self.to_files(),)


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer stored in a folder or under a URI, of whatever kind. See `Tokenizer.load`."""
    return Tokenizer.load(directory)


def dump_meta(**fields: Any) -> bytes:
    """The content of tokenizer.json with a kind's own fields."""
    meta = {"format": _FORMAT, "version": _VERSION, **fields}
    return (json.dumps(meta, indent=2, ensure_ascii=False) + "\n").encode()


def meta_file(content: bytes) -> dict[str, bytes]:
    return {_JSON_NAME: content}


def to_utf8(text: str) -> bytes:
    """UTF-8 of a text; surrogate pairs are joined, lone surrogates become U+FFFD."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")


def _parse_meta(files: Mapping[str, bytes]) -> dict[str, Any]:
    if _JSON_NAME not in files:
        raise NanorayError(f"{_JSON_NAME} is missing")
    try:
        meta = json.loads(files[_JSON_NAME].decode("utf-8"))
    except UnicodeDecodeError as error:
        raise NanorayError(f"{_JSON_NAME} is no UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        raise NanorayError(f"{_JSON_NAME}, line {error.lineno}: no JSON: {error.msg}") from error
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
        raise NanorayError(f"{_JSON_NAME} is not of the format {_FORMAT!r}")
    if meta.get("version") != _VERSION:
        raise NanorayError(
            f"{_JSON_NAME}: version {meta.get('version')!r} is not known (expected {_VERSION}); "
            f"use the nanoray that wrote it"
        )
    if meta.get("special_tokens") != list(SPECIAL_TOKENS):
        raise NanorayError(f"{_JSON_NAME}: special_tokens must be {list(SPECIAL_TOKENS)}")
    return meta
