"""A host that hostile programs are after, for the sandbox's tests."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanoray.tools import run_python, sandbox
from nanoray.tools.sandbox import SandboxResult

SECRET = "the-secret-of-the-host"
BASE = {"rlimits", "seccomp"}


class Host(SimpleNamespace):
    """What the programs are after: a file, a process, a listening socket, an environment."""

    secret: Path
    sibling: subprocess.Popen[bytes]
    port: int
    marker: str
    descriptor: int

    def run(self, code: str, **limits: object) -> SandboxResult:
        """Run with the host's addresses defined; afterwards the host must be as before."""
        prelude = (
            f"SECRET, PARENT, SIBLING, PORT, DESCRIPTOR = {str(self.secret)!r}, {os.getpid()}, "
            f"{self.sibling.pid}, {self.port}, {self.descriptor}\n"
        )
        start = time.monotonic()
        limits = {"timeout_s": 5.0, "require": frozenset()} | limits
        result = run_python(prelude + code, **limits)  # type: ignore[arg-type]
        assert time.monotonic() - start < 10
        assert SECRET not in result.stdout + result.stderr
        assert "ESCAPED" not in result.stdout
        assert self.secret.read_text() == SECRET
        assert os.listdir(self.secret.parent) == [self.secret.name]
        assert self.sibling.poll() is None
        assert max(len(result.stdout), len(result.stderr)) <= 64 * 1024
        if "pid" in result.isolation:
            assert self.left_behind() == []
        return result

    def left_behind(self) -> list[str]:
        """Processes of our sandboxes that outlive their run by more than the blink of an eye."""
        for _ in range(50):
            if not (found := self.left_behind_now()):
                return []
            time.sleep(0.01)
        return found

    def left_behind_now(self) -> list[str]:
        found = []
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            try:
                if self.marker.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
            except OSError:
                continue
        return found


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    marker = f"nanoray_test_{uuid.uuid4().hex}"
    # The interpreter ignores the option, and every process of the sandbox shows it.
    monkeypatch.setattr(sandbox, "_OPTIONS", (*sandbox._OPTIONS, "-X", marker))
    monkeypatch.setenv("HOST_SECRET", SECRET)
    secret = tmp_path / "home" / "secret"
    secret.parent.mkdir()
    secret.write_text(SECRET)
    secret.parent.chmod(0o777)  # only the sandbox may be what keeps a stranger out
    secret.chmod(0o666)
    for folder in [tmp_path, *tmp_path.parents[:3]]:
        if folder.owner() == secret.owner() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o755)
    descriptor = os.open(secret, os.O_RDWR)
    os.set_inheritable(descriptor, True)
    sibling = subprocess.Popen(["sleep", "60"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        yield Host(secret=secret, sibling=sibling, port=port, marker=marker, descriptor=descriptor)
    sibling.kill()
    sibling.wait()
    os.close(descriptor)
