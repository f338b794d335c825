"""Reading: nothing is taken whose bytes are not those that were written."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from nanoray import storage
from nanoray.checkpoint.folder import crc32_of, list_steps, step_dir, step_of, unseal
from nanoray.errors import NanorayError

if TYPE_CHECKING:
    from torch import Tensor


class DamagedCheckpointError(NanorayError):
    """A checkpoint is incomplete, or has other bytes than were written."""


class Checkpoint:
    """A complete checkpoint, opened for reading. Use as a context manager.

    Raises:
        DamagedCheckpointError: the folder is not a complete checkpoint, or a file in it is
            missing, truncated or has other bytes than were written (named).
    """

    def __init__(self, root: str, step: int) -> None:
        self.step = step
        self.folder = step_dir(root, step)
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        try:
            manifest = unseal(storage.read_bytes(storage.join(self.folder, "manifest.json")))
            self.files: dict[str, dict[str, int]] = manifest["files"]
            index = manifest["optimizer"]
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpointError(
                f"{self.folder} is not a complete checkpoint (its manifest.json is missing or "
                f"damaged); delete this folder to use the checkpoint before it"
            ) from error
        self._index: dict[tuple[str, str], list[list[Any]]] = {}
        for param, state, start, stop, _num_rows, name, key in index:
            self._index.setdefault((param, state), []).append([start, stop, name, key])

    @classmethod
    def at(cls, folder: str) -> Checkpoint:
        """The checkpoint of a folder or URI, named as ours are."""
        root, name = folder.rsplit("/", 1)
        step = step_of(name)
        assert step is not None, f"{folder} is no checkpoint's folder"
        return cls(root, step)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = json.loads(self.file("meta.json"))
        return meta

    def file(self, name: str) -> bytes:
        """The bytes of a small file, verified."""
        expected = self.files.get(name)
        if expected is None:
            raise NanorayError(f"checkpoint {self.folder} has no file {name}")
        try:
            data = storage.read_bytes(storage.join(self.folder, name))
        except FileNotFoundError:
            data = b""
        if len(data) != expected["bytes"] or zlib.crc32(data) != expected["crc32"]:
            raise self._damaged(name)
        return data

    def _damaged(self, name: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(
            f"checkpoint file {storage.join(self.folder, name)} is damaged (missing, truncated "
            f"or changed since it was written); delete this checkpoint's folder to use the one "
            f"before it"
        )

    def _tensors(self, name: str) -> Any:
        if name not in self._open:
            uri = storage.join(self.folder, name)
            expected = self.files[name]
            try:
                path = self._stack.enter_context(storage.local_copy(uri))
                if crc32_of(path) != expected["crc32"]:
                    raise self._damaged(name)
                self._open[name] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (FileNotFoundError, SafetensorError) as error:
                raise self._damaged(name) from error
        return self._open[name]

    def verify(self) -> None:
        """Raise DamagedCheckpointError unless every file has the bytes that were written."""
        for name in self.files:
            if name.endswith(".safetensors"):
                self._tensors(name)
            else:
                self.file(name)

    def model_state(self) -> dict[str, Tensor]:
        """All weights by parameter name."""
        file = self._tensors("model.safetensors")
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def optimizer_rows(self, param: str, state: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of one optimiser state, whoever wrote them.

        Raises:
            NanorayError: the checkpoint does not hold all of these rows.
        """
        pieces = []
        row = start
        for first, last, name, key in sorted(self._index.get((param, state), [])):
            if last <= row or first >= stop or first > row:
                continue
            rows = self._tensors(name).get_slice(key)
            if not rows.get_shape():
                return self._tensors(name).get_tensor(key)
            pieces.append(rows[row - first : min(last, stop) - first])
            row = min(last, stop)
        if row < stop:
            raise NanorayError(
                f"checkpoint {self.folder} lacks rows {row}:{stop} of {param}/{state}; it was "
                f"written by another model or recipe"
            )
        if len(pieces) == 1:
            return pieces[0]
        import torch  # here: who looks for a checkpoint does without

        return torch.cat(pieces)


def open_latest(root: str, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose every byte is right, or None where there is none at all.

    A damaged one is named through ``warn`` and the one before it is taken.

    Raises:
        NanorayError: there are checkpoints, and every one is damaged.
    """
    steps = list_steps(root)
    for step in reversed(steps):
        with ExitStack() as stack:
            try:
                checkpoint = stack.enter_context(Checkpoint(root, step))
                checkpoint.verify()
            except DamagedCheckpointError as error:
                warn(str(error))
            else:
                stack.pop_all()  # the caller closes it
                return checkpoint
    if steps:
        raise NanorayError(
            f"none of the checkpoints in {root} is intact (steps {', '.join(map(str, steps))}); "
            f"restore one of them, or delete that folder to begin anew"
        )
    return None
