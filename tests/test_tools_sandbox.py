"""The sandbox against hostile programs, callers that die, and honest work."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sandbox_host import Host, host
from sandbox_programs import HOSTILE

from nanoray.errors import NanorayError
from nanoray.tools import run_python, sandbox
from nanoray.tools.sandbox import MIB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="isolation is Linux's")

__all__ = ["host"]  # the fixture


@pytest.mark.parametrize(("code", "statuses", "limits"), HOSTILE)
def test_hostile_program(
    host: Host, code: str, statuses: set[str], limits: dict[str, object]
) -> None:
    result = host.run(code, **limits)
    assert result.status in statuses, result


def test_result_of_an_honest_program() -> None:
    result = run_python(
        "print(input() + '!')\nimport sys; print('e', file=sys.stderr)", stdin="hé\n"
    )
    assert (result.status, result.stdout, result.stderr) == ("ok", "hé!\n", "e\n")
    assert not result.truncated
    assert 0 < result.duration_s < 5
    assert {"user", "mount", "pid", "network", "rlimits"} <= result.isolation


@pytest.mark.parametrize(
    ("code", "status", "stderr"),
    [
        ("exit()", "ok", ""),
        ("import sys; sys.exit(0)", "ok", ""),
        ("raise SystemExit('why')", "error", "why\n"),
        ("import sys; sys.exit(7)", "error", ""),
        ("1/0", "error", "ZeroDivisionError: division by zero\n"),
        ("assert 1 == 2, 'unequal'", "error", "AssertionError: unequal\n"),
        ("def f(:", "error", "SyntaxError: invalid syntax\n"),
        ("raise KeyboardInterrupt", "error", "KeyboardInterrupt\n"),
        ("raise MemoryError", "memory", "MemoryError\n"),
    ],
)
def test_how_programs_end(code: str, status: str, stderr: str) -> None:
    result = run_python(code)
    assert result.status == status
    assert result.stderr.endswith(stderr)
    assert "jail" not in result.stderr


def test_programs_have_the_standard_library_and_a_folder() -> None:
    code = """
import asyncio, bisect, collections, ctypes, decimal, hashlib, itertools, json, math, pickle
import random, re, sqlite3, statistics, subprocess, tempfile, threading, typing, zlib
class Point: pass
assert type(pickle.loads(pickle.dumps(Point()))) is Point
asyncio.run(asyncio.sleep(0))
with tempfile.TemporaryFile() as f: f.write(b'x')
with open('own.txt', 'w') as f: f.write('y')
assert open('own.txt').read() == 'y'
thread = threading.Thread(target=print, args=('from a thread',)); thread.start()
import os
if os.fork() == 0: os._exit(5)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 5
try: import numpy
except ImportError: print('no packages')
"""
    result = run_python(code)
    assert result.stderr == ""
    assert result.status == "ok"
    assert sorted(result.stdout.splitlines()) == ["from a thread", "no packages"]


def test_runs_do_not_see_each_other_and_repeat_exactly() -> None:
    first = run_python("open('a', 'w').close(); print({'x', 'y', 'z', 'w'})")
    again = run_python("import os; assert os.listdir() == []; print({'x', 'y', 'z', 'w'})")
    assert first.status == again.status == "ok"
    assert first.stdout == again.stdout


def test_output_is_cut_at_its_bound_and_the_program_runs_on() -> None:
    code = "import sys\nfor _ in range(300): print('x' * 999)\nprint('end', file=sys.stderr)"
    result = run_python(code, max_output_bytes=5000)
    assert (result.status, result.stdout, result.stderr) == ("ok", ("x" * 999 + "\n") * 5, "end\n")
    assert result.truncated


def test_large_standard_input_arrives_whole() -> None:
    result = run_python("import sys; print(len(sys.stdin.read()))", stdin="x" * 3_000_000)
    assert result.stdout == "3000000\n"


def test_many_at_once_from_threads(host: Host) -> None:
    def one(i: int) -> str:
        return run_python(f"import os; print({i}, os.getpid())", timeout_s=20).stdout.split()[0]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(24))) == [str(i) for i in range(24)]
    assert host.left_behind() == []
    assert threading.active_count() < 20


def test_nothing_stays_open_or_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = os.listdir("/proc/self/fd")
    for code in ("print(1)", "1/0", "while True: pass"):
        run_python(code, timeout_s=0.2)
    assert os.listdir("/proc/self/fd") == before
    assert os.listdir(tmp_path) == []


def test_all_dies_with_the_caller(host: Host) -> None:
    code = f"""
from nanoray.tools import run_python, sandbox
sandbox._OPTIONS = (*sandbox._OPTIONS, "-X", {host.marker!r})
run_python("import time; time.sleep(60)", timeout_s=60)
"""
    environment = os.environ | {"TMPDIR": str(host.secret.parents[1])}  # it cannot clean up
    caller = subprocess.Popen([sys.executable, "-c", code], env=environment)
    for _ in range(1000):
        if len(host.left_behind_now()) >= 3:
            break
        time.sleep(0.01)
    assert len(host.left_behind_now()) >= 3
    caller.kill()
    caller.wait()
    assert host.left_behind() == []


def test_an_interrupted_caller_leaves_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(sandbox, "_follow", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_python("import time; time.sleep(60)", timeout_s=60)
    assert host.left_behind() == []


@pytest.mark.parametrize(
    "limits",
    [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"timeout_s": float("inf")},
     {"memory_bytes": 1}, {"disk_bytes": 0}, {"disk_bytes": MIB, "stdin": "x" * 2 * MIB},
     {"max_processes": 0}, {"max_output_bytes": -1}],
)  # fmt: skip
def test_senseless_limits_are_refused(limits: dict[str, object]) -> None:
    with pytest.raises(NanorayError, match="sandbox's"):
        run_python("print(1)", **limits)  # type: ignore[arg-type]


def test_an_interpreter_that_does_not_start_is_the_users_news(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(NanorayError, match="no sandbox could be started"):
        run_python("print(1)")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(NanorayError, match="did not start"):
        run_python("print(1)")
