"""The public CORE bundle, fetched once and unpacked into the home."""

from __future__ import annotations

import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from nanoray import storage
from nanoray.data.fetch import FileFetch, Observer, Patience
from nanoray.errors import NanorayError
from nanoray.evals.core_bundle import CONFIG_NAME, is_inside

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # nanochat's
_ROOT = "eval_bundle"  # the one folder inside the archive
_MAX_BYTES = 2 * 2**30  # unpacked; the bundle has 0.1 GB
_PATIENCE = Patience(attempts=4)


def download_bundle(
    folder: str | None = None,
    url: str = BUNDLE_URL,
    patience: Patience = _PATIENCE,
    observe: Observer = lambda done, total: None,
    note: Callable[[str], None] = lambda text: None,
) -> str:
    """The folder (or URI) of the bundle; fetched and unpacked there unless it is there.

    Args:
        folder: where to (None: `eval_bundle` in the home).
        observe, note: told of bytes that arrive, and of failures that are tried again.

    Raises:
        NanorayError: the network or the archive cannot be used.
    """
    folder = storage.normalize(folder or storage.join(storage.home(), _ROOT))
    if storage.exists(storage.join(folder, CONFIG_NAME)):
        return folder
    storage.check_writable(folder)
    with tempfile.TemporaryDirectory(prefix="nanoray-core-") as aside:
        archive = Path(aside) / "eval_bundle.zip"
        fetch = _ZipFetch(
            url, str(archive), Path(aside), patience, threading.Event(), observe, note
        )
        try:
            fetch.run()
        except NanorayError as error:
            raise NanorayError(
                f"the CORE bundle could not be downloaded: {error}; without a network, copy a "
                f"bundle (the folder with {CONFIG_NAME}) to {folder} or give its path"
            ) from error
        unpack_bundle(archive, folder)
    return folder


def unpack_bundle(archive: Path, folder: str) -> None:
    """Write the archive's files under ``folder``; core.yaml last, as the sign that all are there.

    Raises:
        NanorayError: damaged, too large, without core.yaml, or a file would lie outside.
    """
    try:
        with zipfile.ZipFile(archive) as bundle:
            members = [m for m in bundle.infolist() if not m.is_dir()]
            if sum(member.file_size for member in members) > _MAX_BYTES:
                raise NanorayError(
                    f"{archive.name} holds more than {_MAX_BYTES >> 30} GiB unpacked"
                )
            if outside := [m.filename for m in members if not is_inside(m.filename)]:
                raise NanorayError(
                    f"{archive.name} would write outside of its folder: {outside[0]}"
                )
            # Only what lies in the bundle's folder: archives made on a Mac carry a second one.
            files = {
                member.filename.removeprefix(f"{_ROOT}/"): member
                for member in members
                if member.filename.startswith(f"{_ROOT}/")
            }
            if CONFIG_NAME not in files:
                raise NanorayError(f"{archive.name} has no {_ROOT}/{CONFIG_NAME}")
            for name in sorted(files, key=lambda name: name == CONFIG_NAME):
                storage.write_bytes(storage.join(folder, name), bundle.read(files[name]))
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise NanorayError(f"{archive.name} is no whole zip archive ({error})") from error


class _ZipFetch(FileFetch):
    """A fetch whose body is a zip archive; `unpack_bundle` checks each member's CRC."""

    def _is_published(self) -> bool:
        return False

    def _verify(self) -> None:
        pass
