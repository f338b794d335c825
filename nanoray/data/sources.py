"""The user's own text: parquet, JSON lines and plain text files, as documents with checked text."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import IO, Any

from nanoray import storage
from nanoray.data.shards import OnBad, map_threads, read_row_group, row_groups
from nanoray.errors import NanorayError

# A text file up to this length is one document; a longer one is cut at blank lines.
TEXT_DOCUMENT_CHARS = 10_000
KINDS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",  # as many published corpora name their JSON lines
    ".txt": "text",
    ".md": "text",
}
_GLOB = re.compile(r"[*?\[]")
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)


def expand(source: str, note: Callable[[str], None] = lambda _text: None) -> list[str]:
    """The sorted URIs of the files that a path, glob, folder or URI stands for.

    Hidden files are none of them, unless named.

    Args:
        note: told how many files are left out because they are of other kinds.

    Raises:
        NanorayError: there are none, or a file of an unknown kind is named.
    """
    if not source.strip():
        raise NanorayError("--from is empty; give it a file, folder, glob or URI")
    source = storage.normalize(source)
    fs, path = storage.filesystem(source)
    if storage.exists(source):  # whatever characters its name has
        # Over HTTP a folder is told from a file by listing it, which would fetch a file.
        if fs.info(path)["type"] != "directory" and (_kind(source) or not fs.isdir(path)):
            if not _kind(source):
                raise NanorayError(
                    f"cannot tell what kind of file {source} is; take one of {_known()}"
                )
            return [source]
        found = fs.find(path)
    elif _GLOB.search(source):
        entries = fs.glob(path, detail=True).items()
        found = [name for name, info in entries if info["type"] != "directory"]
        if not found:
            raise NanorayError(f"no file matches {source}; check the pattern given to --from")
    else:
        raise NanorayError(f"there is no file or folder {source}; check the path given to --from")
    given = _GLOB.split(path)[0].rstrip("/") if _GLOB.search(source) else path
    found = [name for name in found if "/." not in name[len(given) :]]
    local = storage.is_local(source)
    files = [name if local else fs.unstrip_protocol(name) for name in found if _kind(name)]
    if not files:
        raise NanorayError(f"{source} holds no file of a known kind; take one of {_known()}")
    if len(files) < len(found):
        note(f"left out: {len(found) - len(files):,} files of other kinds than {_known()}")
    return sorted(files)


def describe_files(source: str, files: list[str]) -> dict[str, Any]:
    """What a corpus's manifest keeps of its input: equal only for the same, unchanged files.

    Args:
        source: as the user typed it.
        files: what `expand` made of it.
    """
    versions = hashlib.sha256()
    for uri, version in zip(files, map_threads(storage.version, files)):
        versions.update(f"{uri}\0{version}\n".encode("utf-8", "surrogateescape"))
    return {
        "from": storage.normalize(source),
        "num_files": len(files),
        "versions": versions.hexdigest(),
    }


def _kind(uri: str) -> str | None:
    name = uri.rsplit("/", 1)[-1].lower()
    kind = KINDS.get(os.path.splitext(name.removesuffix(".gz"))[1])
    return None if kind == "parquet" and name.endswith(".gz") else kind


def _known() -> str:
    return ", ".join(KINDS) + " (all but parquet also .gz)"


def read_documents(
    uri: str, text_column: str, on_bad: OnBad, skipped: Counter[str]
) -> Iterator[str]:
    """The documents of one file in order.

    Args:
        text_column: column (parquet) or key (JSON lines) that holds the text.
        skipped: counts what ``on_bad="skip"`` leaves out, by kind.

    Raises:
        NanorayError: something unusable, with ``fail``; names the file and the line or row.
    """
    kind = _kind(uri)
    if kind == "parquet":
        for group in row_groups([uri], on_bad, skipped, text_column):
            texts, bad = read_row_group(uri, group.row_group, on_bad, text_column)
            skipped.update(bad)
            yield from texts
    elif kind == "jsonl":
        yield from _read_jsonl(uri, text_column, on_bad, skipped)
    else:
        yield from _read_text(uri, on_bad, skipped)


def _open(uri: str) -> IO[bytes]:
    file = storage.open_read(uri)
    return gzip.open(file) if uri.lower().endswith(".gz") else file  # type: ignore[return-value]


def _bad(where: str, kind: str, what: str, on_bad: OnBad, skipped: Counter[str]) -> None:
    if on_bad == "fail":
        raise NanorayError(f"{where}: {what}; mend the data or pass --on-bad-shard skip")
    skipped[kind] += 1


def _read_jsonl(uri: str, key: str, on_bad: OnBad, skipped: Counter[str]) -> Iterator[str]:
    number = 0
    try:
        with _open(uri) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                text, kind, what = _parse_line(line, key)
                if kind:
                    _bad(f"{uri} line {number}", kind, what, on_bad, skipped)
                else:
                    yield text
    except _DAMAGED as error:
        _bad(f"{uri} after line {number}", "damaged", f"damaged gzip ({error})", on_bad, skipped)


def _parse_line(line: bytes, key: str) -> tuple[str, str, str]:
    """(text, "", "") or ("", kind of mistake, what is wrong)."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "", "invalid_utf8", "the line is not valid UTF-8"
    except (ValueError, RecursionError) as error:
        return "", "invalid_json", f"not a JSON object ({error})"
    if not isinstance(row, dict):
        return "", "invalid_json", f"not a JSON object but {type(row).__name__}"
    if key not in row:
        keys = ", ".join(list(row)[:8]) or "none"
        return "", "missing_column", f"no key {key!r} (keys: {keys}; choose with --text-column)"
    text = row[key]
    if text is None:
        return "", "null", f"{key!r} is null"
    if not isinstance(text, str):
        return "", "wrong_type", f"{key!r} is {type(text).__name__}, not text"
    if not text.strip():
        return "", "empty", f"{key!r} is empty or white space"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "", "invalid_utf8", f"{key!r} holds half a surrogate pair"
    return text, "", ""


def _read_text(uri: str, on_bad: OnBad, skipped: Counter[str]) -> Iterator[str]:
    try:
        with _open(uri) as file:
            raw = file.read()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        _bad(f"{uri} line {line}", "invalid_utf8", "not valid UTF-8", on_bad, skipped)
        return
    except _DAMAGED as error:
        _bad(uri, "damaged", f"damaged gzip ({error})", on_bad, skipped)
        return
    if not text.strip():
        _bad(uri, "empty", "the file is empty or white space", on_bad, skipped)
        return
    yield from split_text(text.replace("\r\n", "\n"))


def split_text(text: str, max_chars: int = TEXT_DOCUMENT_CHARS) -> Iterator[str]:
    """Cut a long text at blank lines into documents of at most ``max_chars`` characters.

    A paragraph that is longer stays whole: a document is never cut within a paragraph.
    """
    if len(text) <= max_chars:
        yield text.strip()
        return
    paragraphs: list[str] = []
    length = 0
    for paragraph in re.split(r"\n[ \t]*(?:\n[ \t]*)+", text.strip()):
        if paragraphs and length + len(paragraph) > max_chars:
            yield "\n\n".join(paragraphs)
            paragraphs, length = [], 0
        paragraphs.append(paragraph)
        length += len(paragraph) + 2
    yield "\n\n".join(paragraphs)
