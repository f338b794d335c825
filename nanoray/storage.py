"""Where artefacts live: a folder or any fsspec URI (``s3://bucket/prefix``), one small door.

Every write but the growing log is atomic: local files are written aside and renamed, object
stores publish an object only when its upload is complete.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from nanoray.errors import NanorayError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_PASSWORD = re.compile(_SCHEME.pattern + r"[^/@]*:[^/@]*@")
# What fsspec's stores call an ETag or a modification time, the surest first.
_VERSION_KEYS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")


def home() -> str:
    """The root of all artefacts: ``NANORAY_HOME``, by default ``~/.cache/nanoray``."""
    return normalize(os.environ.get("NANORAY_HOME") or "~/.cache/nanoray")


def normalize(uri: str | os.PathLike[str]) -> str:
    """An absolute path without ``~``, or the URI without a trailing slash.

    Raises:
        NanorayError: the URI names nothing, or holds a password.
    """
    text = str(uri)
    if _PASSWORD.match(text):  # it would come to stand in config.json, checkpoints and messages
        store = text.split("://", 1)[0]
        raise NanorayError(
            f"a storage URI must hold no password, as URIs are written down and shown, and this "
            f"{store}:// one does; give credentials by the environment (AWS_SECRET_ACCESS_KEY, or "
            f"fsspec's FSSPEC_{store.upper()}_PASSWORD)"
        )
    if text.startswith("file://"):
        text = text[len("file://") :]
    if scheme := _SCHEME.match(text):
        if not text[scheme.end() :].strip("/"):
            raise NanorayError(f"storage {text} names no bucket or folder; write {text}NAME")
        return text.rstrip("/")
    return os.path.abspath(os.path.expanduser(text))


def is_local(uri: str) -> bool:
    """Whether ``uri`` is a path of this machine's file system."""
    return not _SCHEME.match(uri) or uri.startswith("file://")


def join(base: str, *parts: str) -> str:
    """``base`` with path components appended."""
    return "/".join([base.rstrip("/"), *parts])


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec file system of ``uri`` and the path within it.

    Raises:
        NanorayError: the scheme is unknown or its package is not installed.
    """
    if is_local(uri):
        return LocalFileSystem(), normalize(uri)
    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        scheme = uri.split("://", 1)[0]
        raise NanorayError(
            f"storage {scheme}:// cannot be used: {error}; install its fsspec package "
            f"(`pip install 'nanoray[s3]'` for s3://) or use a folder"
        ) from error
    fs.invalidate_cache()
    return fs, path


def check_name(name: str, what: str) -> str:
    """``name`` itself if it is a safe single path component, else NanorayError."""
    if not _NAME.fullmatch(name):
        raise NanorayError(
            f"{what} {name!r} is not a usable name: take letters, digits, dot, dash and "
            f"underscore, at most 128, beginning with a letter or digit"
        )
    return name


def data_dir(corpus: str) -> str:
    """The folder of a corpus's shards. A path or URI is taken as it is."""
    if "/" in corpus:
        return normalize(corpus)
    return join(home(), "data", check_name(corpus, "corpus"))


def tokenizer_dir(name: str) -> str:
    """The folder of a tokenizer. A path or URI is taken as it is."""
    if "/" in name:
        return normalize(name)
    return join(home(), "tokenizers", check_name(name, "tokenizer"))


def run_dir(run: str) -> str:
    """The folder of a run."""
    return join(home(), "runs", check_name(run, "run"))


def exists(uri: str) -> bool:
    """Whether there is a file or folder. Raises NanorayError where the store cannot tell."""
    fs, path = filesystem(uri)
    try:
        with _readable(uri):
            fs.info(path)  # fs.exists() takes any error for a no
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def list_names(uri: str) -> list[str]:
    """Sorted names of the entries of a folder; empty if there is no such folder.

    Raises NanorayError where the store cannot tell.
    """
    fs, path = filesystem(uri)
    try:
        with _readable(uri):
            entries = fs.ls(path, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = {entry.rstrip("/") for entry in entries}
    found.discard(path.rstrip("/"))  # s3 lists a folder's own marker
    return sorted(entry.rsplit("/", 1)[-1] for entry in found)


def version(uri: str) -> str:
    """Size and modification time (or ETag) of a file: another one after nearly every change.

    Raises FileNotFoundError.
    """
    fs, path = filesystem(uri)
    info = fs.info(path)
    stamps = (info.get(key) for key in _VERSION_KEYS)
    return f"{info['size']} {next((stamp for stamp in stamps if stamp is not None), '')}"


def open_read(uri: str) -> IO[bytes]:
    """A seekable binary file. Raises FileNotFoundError."""
    fs, path = filesystem(uri)
    file: IO[bytes] = fs.open(path, "rb")
    return file


def read_bytes(uri: str) -> bytes:
    """The content of a file. Raises FileNotFoundError."""
    fs, path = filesystem(uri)
    return bytes(fs.cat_file(path))


def read_text(uri: str) -> str:
    return read_bytes(uri).decode("utf-8")


def make_dirs(uri: str) -> None:
    """Create a folder and its parents (nothing to do on object stores)."""
    if is_local(uri):
        os.makedirs(normalize(uri), exist_ok=True)


def write_bytes(uri: str, data: bytes | memoryview) -> None:
    """Write a whole file atomically, creating its folder; a failure leaves what was there."""
    if not is_local(uri):
        fs, path = filesystem(uri)
        fs.pipe_file(path, bytes(data))
        return
    target = Path(normalize(uri))
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


@contextlib.contextmanager
def staged(uri: str) -> Iterator[str]:
    """A local path to write a large file to; it is published at ``uri`` when the block ends.

    The path is beside the target where that is local, so that publishing is a rename; a failure
    removes what was written and leaves what was there.
    """
    local = is_local(uri)
    target = normalize(uri)
    folder = os.path.dirname(target) if local else None
    if folder:
        os.makedirs(folder, exist_ok=True)
    name = target.rsplit("/", 1)[-1]
    handle, path = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=folder)
    os.close(handle)
    try:
        yield path
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        if local:
            os.chmod(path, 0o644)
            os.replace(path, target)
        else:
            fs, remote = filesystem(uri)
            fs.put_file(path, remote)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[str]:
    """A local path with the content of ``uri`` (the file itself where it is local)."""
    if is_local(uri):
        yield normalize(uri)
        return
    fs, remote = filesystem(uri)
    with tempfile.TemporaryDirectory(prefix="nanoray-") as folder:
        path = os.path.join(folder, remote.rsplit("/", 1)[-1])
        fs.get_file(remote, path)
        yield path


def write_text(uri: str, text: str) -> None:
    write_bytes(uri, text.encode("utf-8"))


def upload(path: str | os.PathLike[str], uri: str) -> None:
    """Publish a finished local file at ``uri`` (a rename when both are on one disk)."""
    if is_local(uri):
        target = normalize(uri)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.replace(path, target)
        return
    fs, remote = filesystem(uri)
    fs.put_file(str(path), remote)


def remove(uri: str) -> None:
    """Delete a file or a whole folder; nothing happens if it is not there."""
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


@contextlib.contextmanager
def explained(problem: str, mend: str, *passing: type[Exception]) -> Iterator[None]:
    """Tell a failure in the block as one sentence: every store has its own error classes.

    Args:
        passing: besides NanorayError, what the caller understands by itself.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (NanorayError, *passing)):
            raise
        cause = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        raise NanorayError(f"{problem} ({cause}); {mend}") from error


def _readable(uri: str) -> contextlib.AbstractContextManager[None]:
    return explained(
        f"storage {uri} cannot be read",
        "check the path, the credentials and the network",
        FileNotFoundError,
        NotADirectoryError,
    )


def check_writable(uri: str) -> None:
    """Raise NanorayError unless a file can be written and deleted under ``uri``."""
    probe = join(uri, f".nanoray-probe-{uuid.uuid4().hex[:8]}")
    with explained(
        f"storage {uri} is not writable",
        "set NANORAY_HOME to a folder or bucket that you may write to",
    ):
        write_bytes(probe, b"probe")
        remove(probe)


def remove_half_written(folder: str) -> None:
    """Delete what killed writers left beside the files of a folder. Nobody may be writing there."""
    if is_local(folder):  # object stores publish whole objects, and show nothing before
        for name in list_names(folder):
            if name.startswith(".") and name.endswith(".tmp"):
                remove(join(folder, name))
