"""Storage: local folders and object stores behave the same, and writes are atomic."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoray import storage
from nanoray.errors import NanorayError


def debris(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.name.endswith(".tmp")]


def test_files_and_folders(root: str) -> None:
    a, b = storage.join(root, "sub", "a.txt"), storage.join(root, "sub", "deep", "b.bin")
    assert storage.list_names(root) == []
    assert not storage.exists(a)
    storage.make_dirs(root)
    storage.write_text(a, "grüße")
    storage.write_bytes(b, memoryview(b"\x00\x01"))
    assert storage.exists(a)
    assert storage.exists(storage.join(root, "sub")), "a folder exists, too"
    assert not storage.exists(storage.join(a, "below-a-file"))
    assert storage.list_names(root) == ["sub"]
    assert storage.list_names(storage.join(root, "sub") + "/") == ["a.txt", "deep"]
    assert storage.list_names(a) == [], "a file is no folder"
    assert storage.read_text(a) == "grüße"
    assert storage.read_bytes(b) == b"\x00\x01"
    with storage.open_read(a) as file:
        file.seek(5)
        assert file.read() == b"\x9fe"
    storage.write_text(a, "new")
    assert storage.read_text(a) == "new"
    storage.remove(a)
    assert storage.list_names(storage.join(root, "sub")) == ["deep"]
    storage.remove(storage.join(root, "sub"))
    assert not storage.exists(b)
    storage.remove(a)  # nothing there: nothing happens


@pytest.mark.parametrize("read", [storage.read_bytes, storage.open_read, storage.version])
def test_a_missing_file(root: str, read: Callable[[str], object]) -> None:
    with pytest.raises(FileNotFoundError):
        read(storage.join(root, "nothing"))


def test_a_version_changes_with_the_content(root: str) -> None:
    uri = storage.join(root, "a.txt")
    storage.write_text(uri, "one")
    first = storage.version(uri)
    assert first.startswith("3 ")
    assert storage.version(uri) == first
    storage.write_text(uri, "two")
    assert storage.version(uri) != first, "same size, written later"


def test_a_folder_may_hold_its_own_name(root: str) -> None:
    folder = storage.join(root, "data")
    storage.write_text(storage.join(folder, "data", "shard"), "x")
    storage.write_text(storage.join(folder, "other"), "x")
    assert storage.list_names(folder) == ["data", "other"]


def test_exists_does_not_take_an_outage_for_a_no(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, _path = storage.filesystem(root)

    def broken(*_args: object, **_options: object) -> None:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(type(fs), "info", broken)
    with pytest.raises(NanorayError, match=r"cannot be read .PermissionError"):
        storage.exists(storage.join(root, "x"))


def test_staged(root: str) -> None:
    target = storage.join(root, "deep", "big.bin")
    with storage.staged(target) as path:
        Path(path).write_bytes(b"one")
        assert not storage.exists(target), "published at the end only"
    assert storage.read_bytes(target) == b"one"
    assert not os.path.exists(path)

    def fail_midway() -> None:
        nonlocal path
        with storage.staged(target) as path:
            Path(path).write_bytes(b"two")
            raise KeyError

    with pytest.raises(KeyError):
        fail_midway()
    assert storage.read_bytes(target) == b"one"
    assert not os.path.exists(path)
    assert storage.list_names(storage.join(root, "deep")) == ["big.bin"]


def test_local_copy(root: str) -> None:
    uri = storage.join(root, "file.bin")
    storage.write_bytes(uri, b"content")
    with storage.local_copy(uri) as path:
        assert Path(path).read_bytes() == b"content"
    assert os.path.exists(path) == storage.is_local(root), "a fetched copy is cleaned away"


def test_upload(root: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    storage.upload(source, storage.join(root, "deep", "target"))
    assert storage.read_bytes(storage.join(root, "deep", "target")) == b"x"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    target = tmp_path / "file"
    storage.write_text(str(target), "old")

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        storage.write_text(str(target), "new")
    with pytest.raises(OSError, match="No space left"), storage.staged(str(target)) as path:
        Path(path).write_text("new")
    assert target.read_text() == "old"
    assert not debris(tmp_path)


def test_a_write_that_does_not_fit(tmp_path: Path) -> None:
    """For real: the kernel refuses bytes beyond a limit of 1,000."""
    target = tmp_path / "file"
    target.write_text("old")
    code = f"""
import resource, signal
from nanoray import storage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    storage.write_bytes({str(target)!r}, b"x" * 5000)
except OSError as error:
    print("errno", error.errno)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"errno {errno.EFBIG}\n"
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_check_writable(root: str) -> None:
    storage.check_writable(root)
    assert storage.list_names(root) == [], "the probe is gone"


def test_an_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NanorayError, match=r"is not writable .*set NANORAY_HOME"):
        storage.check_writable(str(tmp_path / "file" / "runs"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(NanorayError, match=r"is not writable .*PermissionError"):
        storage.check_writable(str(tmp_path))


def test_an_unknown_scheme() -> None:
    for call in (storage.check_writable, storage.exists, storage.list_names):
        with pytest.raises(NanorayError, match="storage nope:// cannot be used"):
            call("nope://bucket/x")


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(_uri: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", not_installed)
    with pytest.raises(NanorayError, match=r"Install s3fs.*pip install 'nanoray\[s3\]'"):
        storage.read_bytes("s3://bucket/x")


def test_normalize(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert storage.normalize("~/x/") == "/somewhere/x"
    assert storage.normalize("file:///a/b") == "/a/b"
    assert storage.normalize("s3://bucket/a/") == "s3://bucket/a"
    assert storage.normalize(Path("/a/../b")) == "/b"
    assert storage.is_local("/a")
    assert storage.is_local("file:///a")
    assert not storage.is_local("s3://a")
    with pytest.raises(NanorayError, match="names no bucket"):
        storage.normalize("s3://")


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NANORAY_HOME", "")
    assert storage.home() == str(tmp_path / ".cache" / "nanoray")
    monkeypatch.setenv("NANORAY_HOME", "s3://bucket/prefix/")
    assert storage.data_dir("stories") == "s3://bucket/prefix/data/stories"
    assert storage.tokenizer_dir("stories") == "s3://bucket/prefix/tokenizers/stories"
    assert storage.run_dir("d12") == "s3://bucket/prefix/runs/d12"
    assert storage.data_dir("s3://other/corpus/") == "s3://other/corpus"
    assert storage.tokenizer_dir("./mine") == str(Path.cwd() / "mine")


@pytest.mark.parametrize("name", ["d12", "a", "2024.run-1_x", "x" * 128])
def test_names(name: str) -> None:
    assert storage.check_name(name, "run") == name


@pytest.mark.parametrize("name", ["", ".hidden", "..", "a/b", "a b", "a\n", "é", "x" * 129, "-a"])
def test_bad_names(name: str) -> None:
    with pytest.raises(NanorayError, match="is not a usable name"):
        storage.run_dir(name)


@given(st.text(max_size=12))
def test_wild_names_stay_within_their_folder(name: str) -> None:
    try:
        path = storage.run_dir(name)
    except NanorayError:
        return
    assert os.path.dirname(os.path.abspath(path)) == storage.join(storage.home(), "runs")
