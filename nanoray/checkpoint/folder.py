"""A checkpoint's folder: its name, when it counts, how it is found, and how it goes."""

from __future__ import annotations

import json
import re
import zlib
from typing import Any

from nanoray import storage
from nanoray.errors import NanorayError

_STEP = re.compile(r"step_(\d{6,})")


def step_dir(root: str, step: int) -> str:
    return storage.join(root, f"step_{step:06d}")


def step_of(name: str) -> int | None:
    """The step of a folder's name, None where it is no checkpoint's."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def list_steps(root: str) -> list[int]:
    """Steps of the complete checkpoints under ``root``, ascending."""
    steps = []
    for name in storage.list_names(root):
        step = step_of(name)
        if step is not None and storage.exists(storage.join(root, name, "manifest.json")):
            steps.append(step)
    return sorted(steps)


def find_checkpoint(where: str, step: int | None) -> tuple[str, int]:
    """The ``checkpoints`` folder and the step that are meant by a run's name or a path.

    Raises:
        NanorayError: there is no such run, or no such checkpoint in it; says what there is.
    """
    is_path = "/" in where
    base = storage.normalize(where) if is_path else storage.run_dir(where)
    parent, name = base.rsplit("/", 1)
    own_step = step_of(name)
    if own_step is not None:
        if step not in (None, own_step):
            raise NanorayError(
                f"{base} is the checkpoint of step {own_step}, not of step {step}; leave the "
                f"step out, or give the run's folder"
            )
        if not storage.exists(base):
            raise NanorayError(f"there is no checkpoint {base}; {_told(parent)}")
        return parent, own_step
    if not storage.exists(base):
        runs = [] if is_path else storage.list_names(parent)
        known = f"the runs there are {', '.join(runs)}" if runs else "give a run's name or folder"
        raise NanorayError(
            f"there is no {f'folder {base}' if is_path else f'run {where} in {parent}'}; {known}"
        )
    root = storage.join(base, "checkpoints")
    steps = list_steps(root)
    if not steps:
        raise NanorayError(
            f"{base} has no complete checkpoint yet; train on until the first is saved "
            f"(--save-every), or take another run"
        )
    if step is not None and step not in steps:
        raise NanorayError(f"{base} has no complete checkpoint of step {step}; {_told(root)}")
    return root, steps[-1] if step is None else step


def _told(root: str) -> str:
    steps = list_steps(root)
    return f"there are {', '.join(map(str, steps))}" if steps else f"there are none in {root}"


def delete(root: str, step: int) -> None:
    """Delete a checkpoint, the manifest first, so that a half deleted one never counts."""
    folder = step_dir(root, step)
    storage.remove(storage.join(folder, "manifest.json"))
    storage.remove(folder)


def delete_incomplete(root: str) -> None:
    """Delete what killed writers left behind. Only the holder of the run's lease may call it."""
    complete = {None, *list_steps(root)}
    for name in storage.list_names(root):
        if step_of(name) not in complete:
            storage.remove(storage.join(root, name))


def crc32_of(path: str) -> int:
    """CRC-32 of a local file."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc


def seal(manifest: dict[str, Any]) -> str:
    """JSON with the checksum of its own content."""
    return json.dumps({**manifest, "crc32": zlib.crc32(json.dumps(manifest).encode())})


def unseal(text: bytes) -> dict[str, Any]:
    """The inverse of `seal`. Raises ValueError, KeyError or TypeError for other text."""
    manifest: dict[str, Any] = dict(json.loads(text))
    if manifest.pop("crc32") != zlib.crc32(json.dumps(manifest).encode()):
        raise ValueError("the manifest has other content than was written")
    return manifest
