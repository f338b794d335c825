"""Checkpoints: whole or not there, whoever wrote them, whatever happens meanwhile."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from checkpoints import (
    STATES,
    assert_content,
    assert_latest,
    make_snapshot,
    make_writers,
    names,
    new_bucket,
    save_step,
    whole_state,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoray import storage
from nanoray.checkpoint import (
    Checkpoint,
    delete,
    delete_incomplete,
    list_steps,
    open_latest,
    step_dir,
)
from nanoray.checkpoint import writer as writer_module
from nanoray.checkpoint.writer import Snapshot
from nanoray.errors import NanorayError
from nanoray.optim.buckets import StateShard

# --- what is written can be read, by any number of workers


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_round_trip(root: str, world_size: int) -> None:
    assert_latest(root, None)
    writers = make_writers(root, world_size)
    save_step(writers, 500)
    assert list_steps(root) == [500]
    assert_latest(root, 500)
    shards = [f"optimizer_{rank:05d}.safetensors" for rank in range(world_size)]
    expected = ["manifest.json", "meta.json", "model.safetensors", *shards, "tokenizer.json"]
    assert names(root, 500) == expected, "the notes of the workers are gone"
    assert all(writer.last_save_s for writer in writers)


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, dict[int, list[int]]]:
    """A number of ranks, and for each number of rows some cuts between the ranks."""
    world_size = draw(st.integers(1, 3))
    cuts = {}
    for num_rows in {shape[0] for shape, _dtype in STATES.values() if shape}:
        inner = st.lists(st.integers(0, num_rows), min_size=world_size - 1, max_size=world_size - 1)
        cuts[num_rows] = [0, *sorted(draw(inner)), num_rows]
    return world_size, cuts


@settings(max_examples=15, deadline=None)
@given(split=splits(), data=st.data())
def test_any_rows_from_any_split(
    split: tuple[int, dict[int, list[int]]], data: st.DataObject
) -> None:
    world_size, cuts = split
    root = new_bucket()
    save_step(make_writers(root, world_size), 1, cuts=lambda num_rows, _world: cuts[num_rows])
    with Checkpoint(root, 1) as checkpoint:
        assert_content(checkpoint)
        for key in STATES:
            state = whole_state(key, 1)
            if state.dim() == 0:
                continue
            start = data.draw(st.integers(0, state.shape[0] - 1))
            stop = data.draw(st.integers(start + 1, state.shape[0]))
            assert torch.equal(checkpoint.optimizer_rows(*key, start, stop), state[start:stop])


def test_rows_that_were_never_saved(local_root: str) -> None:
    save_step(make_writers(local_root), 1)
    with Checkpoint(local_root, 1) as checkpoint:
        for key, start, stop in (
            (("transformer.wte.weight", "exp_avg"), 0, 12),
            (("transformer.wte.weight", "exp_avg"), 11, 13),
            (("transformer.wte.weight", "momentum"), 0, 1),
            (("other", "exp_avg"), 0, 1),
        ):
            with pytest.raises(NanorayError, match=f"lacks rows .*{key[0]}/{key[1]}"):
                checkpoint.optimizer_rows(*key, start, stop)
        with pytest.raises(NanorayError, match=r"has no file other\.json"):
            checkpoint.file("other.json")


def test_a_gap_and_an_overlap_between_shards(local_root: str) -> None:
    rows = torch.arange(14.0).view(7, 2)
    (writer,) = make_writers(local_root)
    for step, cuts in ((1, [(0, 2), (4, 7)]), (2, [(0, 5), (3, 4), (2, 7)])):
        shards = [StateShard("w", "exp_avg", i, j, 7, rows[i:j].clone()) for i, j in cuts]
        writer.save(Snapshot(step, shards))
        writer.wait()
    with Checkpoint(local_root, 1) as checkpoint:
        assert torch.equal(checkpoint.optimizer_rows("w", "exp_avg", 4, 6), rows[4:6])
        with pytest.raises(NanorayError, match="lacks rows 2:7 of w/exp_avg"):
            checkpoint.optimizer_rows("w", "exp_avg", 0, 7)
    with Checkpoint(local_root, 2) as checkpoint:
        assert torch.equal(checkpoint.optimizer_rows("w", "exp_avg", 0, 7), rows)
        assert torch.equal(checkpoint.optimizer_rows("w", "exp_avg", 3, 6), rows[3:6])


def test_saving_happens_in_the_background(local_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (writer,) = make_writers(local_root)
    go_on = threading.Event()
    crc32 = writer_module.crc32_of
    monkeypatch.setattr(writer_module, "crc32_of", lambda path: go_on.wait() and crc32(path))
    writer.save(make_snapshot(1, 0, 1))
    assert list_steps(local_root) == []
    go_on.set()
    writer.save(make_snapshot(2, 0, 1))  # waits for the one before
    assert list_steps(local_root)[0] == 1
    writer.wait()
    assert list_steps(local_root) == [1, 2]


# --- which checkpoints stay


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keep(root: str, keep: int) -> None:
    writers = make_writers(root, keep=keep)
    for step in range(1, 6):
        save_step(writers, step)
        assert list_steps(root) == list(range(max(1, step - keep + 1), step + 1))
    assert len(storage.list_names(root)) == keep


def test_steps_are_ordered_as_numbers(local_root: str) -> None:
    writers = make_writers(local_root, keep=3)
    for step in (999_999, 1_000_000, 10_000_001):
        save_step(writers, step)
    assert list_steps(local_root) == [999_999, 1_000_000, 10_000_001]
    assert_latest(local_root, 10_000_001)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_later_step_does_not_count(local_root: str, keep: int) -> None:
    """The run fell back to step 10 and saves at 15: 15 must not be deleted in favour of 20."""
    writers = make_writers(local_root, keep=2)
    save_step(writers, 10)
    save_step(writers, 20)
    os.truncate(f"{local_root}/step_000020/model.safetensors", 100)
    save_step(make_writers(local_root, keep=keep, attempt="b"), 15)
    assert list_steps(local_root) == [10, 15][-keep:]
    assert_latest(local_root, 15)


def denied(*_args: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def test_an_old_one_that_cannot_be_deleted_does_not_harm_the_new_one(
    local_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = make_writers(local_root, keep=1)
    save_step(writers, 1)
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "delete", denied)
        save_step(writers, 2)
    assert list_steps(local_root) == [1, 2]
    assert_latest(local_root, 2)
    save_step(writers, 3)
    assert list_steps(local_root) == [3]


def test_incomplete_folders(root: str) -> None:
    save_step(make_writers(root), 1)
    for step in (2, 3):
        storage.write_bytes(storage.join(step_dir(root, step), "model.safetensors"), b"half")
    storage.write_bytes(storage.join(root, "notes.txt"), b"mine")
    assert list_steps(root) == [1]
    assert_latest(root, 1)
    with pytest.raises(NanorayError, match="step_000002 is not a complete checkpoint"):
        Checkpoint(root, 2)
    delete_incomplete(root)
    assert storage.list_names(root) == ["notes.txt", "step_000001"]
    assert_latest(root, 1)


def test_a_half_deleted_checkpoint_does_not_count(
    local_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(make_writers(local_root), 1)
    save_step(make_writers(local_root), 2)
    remove = storage.remove

    def killed(uri: str) -> None:
        if uri.endswith("step_000002"):
            raise KeyboardInterrupt
        remove(uri)

    monkeypatch.setattr(storage, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        delete(local_root, 2)
    assert_latest(local_root, 1)


# --- saving a step again


def test_the_same_step_again(root: str) -> None:
    save_step(make_writers(root, world_size=3), 1)
    save_step(make_writers(root, world_size=3), 2)
    save_step(make_writers(root, world_size=1, attempt="b"), 2, version=5)
    assert "optimizer_00001.safetensors" not in names(root, 2)
    with Checkpoint(root, 2) as checkpoint:
        assert_content(checkpoint)
        assert checkpoint.meta["version"] == 5


def test_a_step_does_not_count_while_it_is_replaced(
    local_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(make_writers(local_root, 2), 1)
    save_step(make_writers(local_root, 2), 2)
    staged = storage.staged
    seen = []

    def watched(uri: str) -> object:
        seen.append(list_steps(local_root))
        return staged(uri)

    monkeypatch.setattr(storage, "staged", watched)
    save_step(make_writers(local_root, 2, attempt="b"), 2, version=1)
    assert seen == [[1]] * 3
    assert_latest(local_root, 2)


# --- damage


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_steps") / "checkpoints"
    writers = make_writers(str(folder), world_size=2)
    save_step(writers, 1)
    save_step(writers, 2)
    return folder


def change_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    place = data.index(b"1") if path.suffix == ".json" and b"1" in data else len(data) // 2
    data[place] ^= 1 if path.suffix != ".json" else ord("1") ^ ord("3")
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "changed": change_byte,
    "missing": os.unlink,
}
FILES = [
    "model.safetensors",
    "optimizer_00000.safetensors",
    "optimizer_00001.safetensors",
    "meta.json",
    "tokenizer.json",
    "manifest.json",
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage(two_steps: Path, local_root: str, name: str, damage: str) -> None:
    shutil.copytree(two_steps, local_root)
    path = Path(step_dir(local_root, 2)) / name
    DAMAGES[damage](path)
    with (
        pytest.raises(NanorayError, match=r"step_000002.* damaged"),
        Checkpoint(local_root, 2) as checkpoint,
    ):
        checkpoint.verify()
    warnings: list[str] = []
    assert_latest(local_root, 1, warnings.append)
    if name == "manifest.json" and damage == "missing":
        assert warnings == [], "it was never complete, as far as one can tell"
    else:
        assert len(warnings) == 1
        assert str(path.parent) in warnings[0]
        assert name in warnings[0]


def test_every_byte_of_the_manifest_counts(two_steps: Path, local_root: str) -> None:
    """No changed character makes other rows, files or sums of it."""
    shutil.copytree(two_steps, local_root)
    path = Path(step_dir(local_root, 2)) / "manifest.json"
    data = path.read_bytes()
    rng = random.Random(0)
    for place in rng.sample(range(len(data)), 100):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(NanorayError, match=r"manifest\.json is missing or damaged"):
            Checkpoint(local_root, 2)


def test_nothing_intact(two_steps: Path, local_root: str) -> None:
    """A run must not begin anew, and delete what could be mended, without being told to."""
    shutil.copytree(two_steps, local_root)
    for step, name in ((1, "meta.json"), (2, "manifest.json")):
        change_byte(Path(step_dir(local_root, step)) / name)
    warnings: list[str] = []
    with pytest.raises(NanorayError, match=r"none of the checkpoints .*\(steps 1, 2\)"):
        open_latest(local_root, warnings.append)
    assert len(warnings) == 2


def test_a_file_swapped_between_steps(two_steps: Path, local_root: str) -> None:
    shutil.copytree(two_steps, local_root)
    one, two = (Path(step_dir(local_root, step)) / FILES[1] for step in (1, 2))
    shutil.copy(one, two)
    warnings: list[str] = []
    assert_latest(local_root, 1, warnings.append)
    assert FILES[1] in warnings[0]


def test_the_manifest_is_plain(two_steps: Path) -> None:
    """What other tools may rely on: JSON with sizes, sums and the index of rows."""
    manifest = json.loads((two_steps / "step_000002" / "manifest.json").read_text())
    assert manifest["version"] == 1
    assert manifest["step"] == 2
    for name, entry in manifest["files"].items():
        assert (two_steps / "step_000002" / name).stat().st_size == entry["bytes"]
    rows: Sequence[object] = manifest["optimizer"]
    assert ["transformer.wte.weight", "exp_avg", 6, 11, 11] in [row[:5] for row in rows]  # type: ignore[index]
