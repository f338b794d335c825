"""Writing shards: zstd, row groups of 1,024 documents, published only when complete."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nanoray import storage
from nanoray.data.shards import TEXT_COLUMN
from nanoray.errors import NanorayError

ROW_GROUP_SIZE = 1024
SHARD_CHARS = 250_000_000


@contextlib.contextmanager
def write_errors(uri: str) -> Iterator[None]:
    """Turn a full disk or a missing permission into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NanorayError(
                f"there is no room to write {uri} ({os.strerror(error.errno)}); free some space or "
                f"set NANORAY_HOME to a larger disk"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise NanorayError(
                f"{uri} cannot be written ({os.strerror(error.errno)}); set NANORAY_HOME to a "
                f"folder or bucket that you may write to"
            ) from error
        raise


def write_shard(uri: str, texts: Sequence[str], row_group_size: int = ROW_GROUP_SIZE) -> None:
    """Write one shard and publish it atomically.

    zstd; no dictionary and no statistics, which only cost space in a column of long, distinct
    strings. Pages carry checksums. The footer carries a hash of the texts, so that
    `corpus_fingerprint` sees any change of content. Same texts, same bytes.
    """
    with _ShardFile(uri) as file:
        for start in range(0, len(texts), row_group_size):
            file.write(texts[start : start + row_group_size])


class _ShardFile:
    """One shard being written aside; published on a clean exit, else deleted."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.num_docs = 0
        self.num_chars = 0
        self._sha256 = hashlib.sha256()
        folder = None
        if storage.is_local(uri):
            folder = os.path.dirname(storage.normalize(uri))
            os.makedirs(folder, exist_ok=True)
        name = uri.rsplit("/", 1)[-1]
        handle, self._aside = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=folder)
        os.close(handle)
        os.chmod(self._aside, 0o644)
        self._writer = pq.ParquetWriter(
            self._aside,
            pa.schema([(TEXT_COLUMN, pa.string())]),
            compression="zstd",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )

    def write(self, texts: Sequence[str]) -> None:
        """Append one row group."""
        array = pa.array(texts, pa.string())
        self._writer.write_table(pa.table({TEXT_COLUMN: array}), row_group_size=len(texts))
        lengths = pc.binary_length(array).to_numpy()
        self._sha256.update(lengths.tobytes())
        self._sha256.update("".join(texts).encode("utf-8"))
        self.num_docs += len(texts)
        self.num_chars += sum(map(len, texts))

    def publish(self) -> None:
        self._writer.add_key_value_metadata({"nanoray.sha256": self._sha256.hexdigest()})
        self._writer.close()
        storage.upload(self._aside, self.uri)
        self._clean()

    def discard(self) -> None:
        with contextlib.suppress(Exception):  # a full disk fails again here
            self._writer.close()
        self._clean()

    def _clean(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._aside)

    def __enter__(self) -> _ShardFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            try:
                self.publish()
            except BaseException:
                self.discard()
                raise
        else:
            self.discard()


class ShardWriter:
    """Streams texts into ``shard_00000.parquet``, ``shard_00001.parquet``, …

    Its user says where one shard ends and the next begins.

    Example:
        with ShardWriter(folder) as writer:
            for texts in shards:
                for text in texts:
                    writer.write(text)
                writer.next_shard()
        print(writer.shards)
    """

    def __init__(self, out_dir: str, row_group_size: int = ROW_GROUP_SIZE) -> None:
        self.out_dir = out_dir
        self.row_group_size = row_group_size
        self.shards: list[str] = []
        self.num_docs = 0
        self.num_chars = 0
        self._buffer: list[str] = []
        self._file: _ShardFile | None = None

    def write(self, text: str) -> None:
        self._buffer.append(text)
        if len(self._buffer) == self.row_group_size:
            self._flush()

    def next_shard(self) -> None:
        """Finish the current shard; the next text begins a new one."""
        self._flush()
        if self._file is None:
            return
        file, self._file = self._file, None
        with file:
            pass
        self.shards.append(file.uri)
        self.num_docs += file.num_docs
        self.num_chars += file.num_chars

    def _flush(self) -> None:
        if not self._buffer:
            return
        if self._file is None:
            self._file = _ShardFile(storage.join(self.out_dir, shard_name(len(self.shards))))
        self._file.write(self._buffer)
        self._buffer = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.next_shard()
        elif self._file is not None:
            self._file.discard()


def shard_name(index: int) -> str:
    """``shard_00042.parquet``."""
    return f"shard_{index:05d}.parquet"
