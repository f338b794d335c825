"""Checkpoints: the only writer and deleter of them.

``checkpoints/step_000500/`` holds ``model.safetensors``, ``optimizer_<n>.safetensors`` (tensors
named ``<parameter>/<state>@<first row>``), ``meta.json``, the tokenizer's files, and, written
last, ``manifest.json``; without it the folder does not count. Every worker writes the optimiser
rows it owns; the index in the manifest finds any rows again for any other number of workers.
Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanoray import storage
from nanoray.errors import NanorayError
from nanoray.optim.buckets import StateShard

PART_DEADLINE_S = 600.0
_STEP = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class Snapshot:
    """What one worker adds to a checkpoint; all tensors are copies on the CPU."""

    step: int
    optimizer: Sequence[StateShard]
    model: Mapping[str, Tensor] | None = None  # the first worker only
    meta: Mapping[str, Any] | None = None
    files: Mapping[str, bytes] | None = None  # further files, such as the tokenizer's


def step_dir(root: str, step: int) -> str:
    return storage.join(root, f"step_{step:06d}")


def list_steps(root: str) -> list[int]:
    """Steps of the complete checkpoints under ``root``, ascending."""
    steps = []
    for name in storage.list_names(root):
        match = _STEP.fullmatch(name)
        if match and storage.exists(storage.join(root, name, "manifest.json")):
            steps.append(int(match[1]))
    return sorted(steps)


def delete(root: str, step: int) -> None:
    """Delete a checkpoint, the manifest first, so that a half deleted one never counts."""
    folder = step_dir(root, step)
    storage.remove(storage.join(folder, "manifest.json"))
    storage.remove(folder)


def delete_incomplete(root: str) -> None:
    """Delete what killed writers left behind. Only the holder of the run's lease may call it."""
    complete = set(list_steps(root))
    for name in storage.list_names(root):
        match = _STEP.fullmatch(name)
        if match and int(match[1]) not in complete:
            storage.remove(storage.join(root, name))


def _crc32(path: str) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc


class CheckpointWriter:
    """Saves in a background thread, one checkpoint at a time.

    The workers of a run each hold one. Each writes its files and a ``part`` note; the first
    worker waits for all notes and publishes the manifest, so no collective is needed and a lost
    worker cannot hang the others.

    Args:
        root: the ``checkpoints`` folder or URI.
        rank, world_size: of this worker.
        attempt: a name shared by the workers of this start, so that notes of a killed start
            are not taken for ours.
        keep: how many of the latest checkpoints stay.
        guard: raises if this run is no longer ours (the lease); called before anything is
            published.
    """

    def __init__(
        self,
        root: str,
        *,
        rank: int,
        world_size: int,
        attempt: str,
        keep: int,
        guard: Callable[[], None],
    ) -> None:
        self._root = root
        self._rank = rank
        self._world_size = world_size
        self._attempt = attempt
        self._keep = keep
        self._guard = guard
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.last_save_s: float | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Start saving; waits for the save before it. Raises that one's error, if any."""
        self.wait()
        self._thread = threading.Thread(
            target=self._save_guarded, args=(snapshot,), name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until the running save is done.

        Raises:
            NanorayError: it failed (disk full, storage gone); the checkpoint before stands.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def _save_guarded(self, snapshot: Snapshot) -> None:
        start = time.monotonic()
        folder = step_dir(self._root, snapshot.step)
        try:
            self._save(folder, snapshot)
            self.last_save_s = time.monotonic() - start
        except BaseException as error:  # kept for the training thread, which raises it
            self._error = self._explained(error, folder, snapshot.step)

    def _explained(self, error: BaseException, folder: str, step: int) -> BaseException:
        """Clean up after a failed save, and say what it means."""
        if isinstance(error, NanorayError):  # a lost lease: the folder is another's
            return error
        if storage.is_local(folder) and not isinstance(error, OSError | SafetensorError):
            return error  # a bug; on object stores it may be one of the store's own classes
        with contextlib.suppress(Exception):
            if self._rank != 0:  # so that the first worker need not wait for the deadline
                note = {"error": f"worker {self._rank}: {error}"}
                storage.write_text(self._part(folder, self._rank), json.dumps(note))
            elif not storage.exists(storage.join(folder, "manifest.json")):
                self._remove_unpublished(folder)
        return NanorayError(
            f"checkpoint of step {step} could not be saved to {folder}: {error}; "
            f"the checkpoint before it is intact - make room or mend the storage, then run "
            f"the same command again to go on from there"
        )

    def _remove_unpublished(self, folder: str) -> None:
        """Make room. The next start deletes what other workers are still writing."""
        if self._world_size == 1:
            storage.remove(folder)
            return
        for name in storage.list_names(folder):
            if not name.startswith("."):  # another worker's file, not whole yet
                storage.remove(storage.join(folder, name))

    def _save(self, folder: str, snapshot: Snapshot) -> None:
        self._guard()
        # An older checkpoint of this step must not count while its files are replaced. Every
        # worker sees to it: the first to come replaces a file.
        storage.remove(storage.join(folder, "manifest.json"))
        files: dict[str, dict[str, int]] = {}
        index: list[list[Any]] = []
        tensors: dict[str, Tensor] = {}
        name = f"optimizer_{self._rank:05d}.safetensors"
        for owned in snapshot.optimizer:
            key = f"{owned.param}/{owned.state}@{owned.start_row}"
            tensors[key] = owned.tensor.contiguous()
            row_range = [owned.start_row, owned.stop_row, owned.num_rows]
            index.append([owned.param, owned.state, *row_range, name, key])
        if tensors:
            files[name] = self._write_tensors(folder, name, tensors)
        if snapshot.model is not None:
            model = {key: value.contiguous() for key, value in snapshot.model.items()}
            files["model.safetensors"] = self._write_tensors(folder, "model.safetensors", model)
        extra = dict(snapshot.files or {})
        if snapshot.meta is not None:
            extra["meta.json"] = json.dumps(snapshot.meta, indent=1).encode()
        for file_name, data in extra.items():
            storage.write_bytes(storage.join(folder, file_name), data)
            files[file_name] = {"bytes": len(data), "crc32": zlib.crc32(data)}
        note = {"files": files, "index": index}
        if self._rank != 0:
            storage.write_text(self._part(folder, self._rank), json.dumps(note))
            return
        for rank in range(1, self._world_size):
            part = self._await_part(folder, rank)
            files.update(part["files"])
            index.extend(part["index"])
        self._publish(folder, snapshot.step, files, index)

    def _write_tensors(
        self, folder: str, name: str, tensors: Mapping[str, Tensor]
    ) -> dict[str, int]:
        with storage.staged(storage.join(folder, name)) as path:
            save_file(dict(tensors), path)
            with open(path, "rb") as file:
                size = file.seek(0, 2)
            return {"bytes": size, "crc32": _crc32(path)}

    def _part(self, folder: str, rank: int) -> str:
        return storage.join(folder, f"part_{rank:05d}.{self._attempt}.json")

    def _await_part(self, folder: str, rank: int) -> dict[str, Any]:
        deadline = time.monotonic() + PART_DEADLINE_S
        uri = self._part(folder, rank)
        while not storage.exists(uri):
            if time.monotonic() > deadline:
                raise OSError(f"worker {rank} wrote no part within {PART_DEADLINE_S:.0f} s")
            time.sleep(0.05)
        note: dict[str, Any] = json.loads(storage.read_bytes(uri))
        if "error" in note:
            raise OSError(note["error"])
        return note

    def _publish(
        self, folder: str, step: int, files: dict[str, dict[str, int]], index: list[list[Any]]
    ) -> None:
        self._guard()
        for name in storage.list_names(folder):
            if name not in files:
                storage.remove(storage.join(folder, name))
        manifest = {"version": 1, "step": step, "files": files, "optimizer": index}
        storage.write_text(storage.join(folder, "manifest.json"), _seal(manifest))
        with contextlib.suppress(Exception):  # the new one stands; the next save tries again
            self._delete_superseded(step)

    def _delete_superseded(self, step: int) -> None:
        """Keep the latest. Later steps are damaged: the run went on from before them."""
        steps = list_steps(self._root)
        kept = [old for old in steps if old <= step][-self._keep :]
        for old in steps:
            if old not in kept:
                delete(self._root, old)


def _seal(manifest: dict[str, Any]) -> str:
    """JSON with the checksum of its own content."""
    return json.dumps({**manifest, "crc32": zlib.crc32(json.dumps(manifest).encode())})


def _unseal(text: bytes) -> dict[str, Any]:
    """The inverse of `_seal`. Raises ValueError, KeyError or TypeError for other text."""
    manifest: dict[str, Any] = dict(json.loads(text))
    if manifest.pop("crc32") != zlib.crc32(json.dumps(manifest).encode()):
        raise ValueError("the manifest has other content than was written")
    return manifest


class Checkpoint:
    """A complete checkpoint, opened for reading. Use as a context manager.

    Raises:
        NanorayError: the folder is not a complete checkpoint, or a file in it is missing,
            truncated or has other bytes than were written (named).
    """

    def __init__(self, root: str, step: int) -> None:
        self.step = step
        self.folder = step_dir(root, step)
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        try:
            manifest = _unseal(storage.read_bytes(storage.join(self.folder, "manifest.json")))
            self.files: dict[str, dict[str, int]] = manifest["files"]
            index = manifest["optimizer"]
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise NanorayError(
                f"{self.folder} is not a complete checkpoint (its manifest.json is missing or "
                f"damaged); delete this folder to use the checkpoint before it"
            ) from error
        self._index: dict[tuple[str, str], list[list[Any]]] = {}
        for param, state, start, stop, _num_rows, name, key in index:
            self._index.setdefault((param, state), []).append([start, stop, name, key])

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

    def _damaged(self, name: str) -> NanorayError:
        return NanorayError(
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
                if _crc32(path) != expected["crc32"]:
                    raise self._damaged(name)
                self._open[name] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (FileNotFoundError, SafetensorError) as error:
                raise self._damaged(name) from error
        return self._open[name]

    def verify(self) -> None:
        """Raise NanorayError unless every file has the bytes that were written."""
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
        return torch.cat(pieces) if len(pieces) != 1 else pieces[0]


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
            except NanorayError as error:
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
