"""Saving: every worker writes its files, the first one publishes the manifest."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nanoray import storage
from nanoray.checkpoint.folder import crc32_of, delete, list_steps, seal, step_dir
from nanoray.errors import NanorayError
from nanoray.optim.buckets import StateShard

PART_DEADLINE_S = 600.0


class SaveFailedError(NanorayError):
    """A checkpoint could not be saved; the one before it stands. A second try may succeed.

    Attributes:
        what: which one, and why, without advice.
    """

    def __init__(self, step: int, folder: str, cause: object) -> None:
        self.what = f"checkpoint of step {step} could not be saved to {folder}: {cause}"
        super().__init__(
            f"{self.what}; the checkpoint before it is intact - make room or mend the storage, "
            f"then run the same command again to go on from there"
        )


@dataclass(frozen=True)
class Snapshot:
    """What one worker adds to a checkpoint; all tensors are copies on the CPU."""

    step: int
    optimizer: Sequence[StateShard]
    model: Mapping[str, Tensor] | None = None  # the first worker only
    meta: Mapping[str, Any] | None = None
    files: Mapping[str, bytes] | None = None  # further files, such as the tokenizer's


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
        self._num_saves = 0
        self._others_failed = threading.Event()
        self.last_save_s: float | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Start saving; waits for the save before it. Raises that one's error, if any."""
        self.wait()
        self._num_saves += 1
        self._others_failed.clear()
        self._thread = threading.Thread(
            target=self._save_guarded, args=(snapshot,), name="checkpoint"
        )
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the latest save is known to have failed; it does not wait."""
        return self._error is not None

    def give_up(self) -> None:
        """Have the save under way wait no longer for other workers: one of them has failed."""
        self._others_failed.set()

    def outcome(self) -> BaseException | None:
        """Wait until the running save is done; its error, told once."""
        if self._thread:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def wait(self) -> None:
        """Wait until the running save is done.

        Raises:
            SaveFailedError: it failed (disk full, storage gone); the checkpoint before stands.
            NanorayError: what ``guard`` raised.
        """
        error = self.outcome()
        if error:
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
        return SaveFailedError(step, folder, error)

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
            return {"bytes": size, "crc32": crc32_of(path)}

    def _part(self, folder: str, rank: int) -> str:
        # The workers save equally often: a second try at a step does not read the first's notes.
        name = f"part_{rank:05d}.{self._attempt}.{self._num_saves}.json"
        return storage.join(folder, name)

    def _await_part(self, folder: str, rank: int) -> dict[str, Any]:
        deadline = time.monotonic() + PART_DEADLINE_S
        uri = self._part(folder, rank)
        while not storage.exists(uri):
            if self._others_failed.is_set():
                raise OSError("another worker could not save its part")
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
        storage.write_text(storage.join(folder, "manifest.json"), seal(manifest))
        with contextlib.suppress(Exception):  # the new one stands; the next save tries again
            self._delete_superseded(step)

    def _delete_superseded(self, step: int) -> None:
        """Keep the latest. Later steps are damaged: the run went on from before them."""
        steps = list_steps(self._root)
        kept = [old for old in steps if old <= step][-self._keep :]
        for old in steps:
            if old not in kept:
                delete(self._root, old)
