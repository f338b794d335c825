"""Programs that try to hurt the host, hang the caller or leave something behind; none may."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanoray.errors import NanorayError
from nanoray.tools import run_python, sandbox
from nanoray.tools.sandbox import ISOLATION, MIB, SandboxResult

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="isolation is Linux's")

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
        result = run_python(prelude + code, **({"timeout_s": 5.0} | limits))  # type: ignore[arg-type]
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


def program(name: str, statuses: str, code: str, **limits: object) -> object:
    """A row of the table. Those that only time can end are kept short, and all but two are slow."""
    limits = ({"timeout_s": 0.5} if "timeout" in statuses else {}) | limits
    slow = statuses == "timeout" and name not in {"infinite loop", "fork bomb"}
    marks = [pytest.mark.slow] if slow else []
    return pytest.param(code, set(statuses.split()), limits, id=name, marks=marks)


HOSTILE = [
    # Too many
    program("fork bomb", "timeout", """
import os
while True:
    try: os.fork()
    except OSError: pass
"""),
    program("fork bomb that gives up", "error timeout", """
import os
while True:
    os.fork()
"""),
    program("thread bomb", "error memory", """
import threading, time
while True:
    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
"""),
    program("zombie flood", "ok error", """
import os
for _ in range(300):
    try: pid = os.fork()
    except BlockingIOError: break
    if pid == 0: os._exit(0)
"""),
    program("descriptor exhaustion", "error", """
files = []
while True: files.append(open('/dev/null'))
"""),
    program("inotify exhaustion", "ok", """
import ctypes
libc = ctypes.CDLL(None)
while libc.inotify_init() >= 0: pass
"""),
    program("pipes filled", "error", """
import os
pipes = []
while True:
    pipes.append(os.pipe()); os.set_blocking(pipes[-1][1], False)
    os.write(pipes[-1][1], b'x' * 65536)
"""),
    # Memory
    program("one large bytearray", "memory", "x = bytearray(10**10)"),
    program("growing list", "memory", """
x = []
while True: x.append('y' * 100_000)
""", memory_bytes=128 * MIB),
    program("growing list that swallows errors", "timeout memory", """
x = []
while True:
    try: x.append(bytearray(100_000))
    except MemoryError: pass
""", memory_bytes=128 * MIB),
    program("mmap", "memory", "import mmap; mmap.mmap(-1, 10**10)"),
    program("huge integer", "memory", "x = 1 << (8 * 10**9)"),
    program("slow integer", "timeout", "x = 7 ** (7 ** 9)"),
    program("many processes of middling size", "memory", """
import os, time
for _ in range(8):
    if os.fork() == 0: break
x = bytearray(os.urandom(4096)) * (100 * 2**20 // 4096)
time.sleep(9)
"""),
    program("System V shared memory", "error", """
import ctypes
assert ctypes.CDLL(None, use_errno=True).shmget(0, 10**9, 0o1666) >= 0, 'refused'
print('ESCAPED')
"""),
    program("memfd", "error", "import os; os.memfd_create('x'); print('ESCAPED')"),
    # Disk
    program("disk bomb in one file", "error", """
with open('bomb', 'wb') as f:
    while True: f.write(bytes(2**20))
"""),
    program("disk bomb in many files of /tmp", "error", """
for i in range(10**9):
    with open(f'/tmp/{i}', 'wb') as f: f.write(bytes(2**20))
"""),
    program("inode bomb", "error", """
for i in range(10**9): open(f'/tmp/{i}', 'wb').close()
"""),
    program("deep folders", "ok error", """
import os
for i in range(3000):
    os.mkdir('d'); os.chdir('d')
"""),
    # Time
    program("infinite loop", "timeout", "while True: pass"),
    program("sleep for ever", "timeout", "import time; time.sleep(1e6)"),
    program("ignores signals", "timeout", """
import signal
for s in range(1, 65):
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
"""),
    program("swallows everything", "timeout", """
while True:
    try:
        while True: pass
    except BaseException: pass
"""),
    program("thread that never ends", "timeout", """
import threading, time
threading.Thread(target=time.sleep, args=(1e6,)).start()
"""),
    program("endless atexit", "timeout", "import atexit, time; atexit.register(time.sleep, 1e6)"),
    program("endless destructor", "timeout", """
class Undead:
    def __del__(self):
        while True: pass
x = Undead()
"""),
    program("regular expression", "timeout", "import re; re.match('(a+)+$', 'a' * 64 + 'b')"),
    program("waits for its parent", "timeout", "import signal; signal.pause()"),
    program("stops itself", "timeout", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"),
    program("reads stdin for ever", "ok", """
import sys
while sys.stdin.read(1): pass
print(len(sys.stdin.read()))
"""),
    # Looking around
    program("own environment", "ok", "import os; print(dict(os.environ))"),
    program("environment of all processes", "ok", """
import glob
for p in glob.glob('/proc/*/environ'):
    try: print(open(p).read())
    except OSError: pass
"""),
    program("a file in the home", "error", "print(open(SECRET).read())"),
    program("password file", "error", "print(open('/etc/passwd').read()); print('ESCAPED')"),
    program("root and homes", "ok", """
import os
assert set(os.listdir('/')) <= {*'dev lib lib64 proc tmp usr'.split(), os.__file__.split('/')[1]}
assert not os.path.exists('/etc') and not os.path.exists('/home') and not os.path.exists('/sys')
"""),
    program("inherited descriptors", "ok", """
import os
for fd in range(3, 4096):
    for call in (lambda: os.pread(fd, 99, 0), lambda: os.write(fd, b'x')):
        try: print('ESCAPED', fd, call())
        except OSError: pass
try: print('ESCAPED', os.readlink(f'/proc/self/fd/{DESCRIPTOR}'))
except OSError: pass
"""),
    program("symlinks out", "ok", """
import os
for target in ('/proc/1/root', '/proc/1/cwd', '/proc/self/root/..', '../../../../../..'):
    for path in (SECRET, '/etc/passwd'):
        link = f'l{len(os.listdir())}'
        os.symlink(target + path, link)
        try: print('ESCAPED', open(link).read())
        except OSError: pass
"""),
    program("frames above", "ok error", """
import sys
frame = sys._getframe()
while frame:
    for name, value in list(frame.f_locals.items()):
        if name == 'status_fd':
            import os
            os.write(value, b'{"end": "exit", "code": 101}\\n')
            print('ESCAPED')
    frame = frame.f_back
"""),
    # Killing
    program("kills its parent", "ok error", """
import os
for pid in (os.getppid(), PARENT, SIBLING, 1, 0, -1):
    if pid == 0: continue
    try: os.kill(pid, 9)
    except OSError as e: pass
"""),
    program("signals the process group", "crashed", "import os; os.killpg(0, 9)"),
    program("kills the session's leader", "ok crashed", """
import os
for call in (lambda: os.killpg(os.getsid(0) or PARENT, 9), lambda: os.killpg(PARENT, 9)):
    try: call()
    except OSError: pass
"""),
    program("ptraces", "error", """
import ctypes
libc = ctypes.CDLL(None)
assert any(libc.ptrace(16, pid, 0, 0) == 0 for pid in (PARENT, SIBLING, 1)), 'refused'
print('ESCAPED')
"""),
    program("limits of another process", "error", """
import resource
resource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0)); print('ESCAPED')
"""),
    program("raises its own limits", "error", """
import resource
resource.setrlimit(resource.RLIMIT_AS, (10**12, 10**12)); print('ESCAPED')
"""),
    program("daemon that outlives", "ok", """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3): os.close(fd)
        time.sleep(60)
    os._exit(0)
"""),
    program("daemon that holds stdout", "ok", """
import os, time
if os.fork() == 0:
    os.setsid(); time.sleep(60)
"""),
    # Writing outside
    program("writes outside", "ok", """
import os
places = '/ /usr/lib /var/tmp /dev/shm /dev /root /home /proc'.split()
for place in (os.path.dirname(SECRET), os.path.dirname(os.__file__), *places):
    try:
        with open(place + '/nanoray-was-here', 'w') as f: f.write('x')
        print('ESCAPED', place)
    except OSError: pass
for path in (SECRET, os.__file__):
    for call in (os.unlink, lambda p: os.truncate(p, 0), lambda p: os.chmod(p, 0o777)):
        try: call(path); print('ESCAPED', path)
        except OSError: pass
"""),
    program("writes kernel settings", "ok", """
for path in 'sys/kernel/core_pattern sys/vm/panic_on_oom sysrq-trigger 1/mem'.split():
    try: open('/proc/' + path, 'w').write('1'); print('ESCAPED', path)
    except OSError: pass
"""),
    program("mounts", "error", """
import ctypes
libc = ctypes.CDLL(None)
mounted = libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None)
assert mounted == 0 or libc.umount2(b'/tmp', 2) == 0, 'refused'
print('ESCAPED')
"""),
    program("a user namespace of its own", "error", """
import ctypes
libc = ctypes.CDLL(None)
clone = lambda flags: libc.syscall(56, flags | 17, 0, 0, 0, 0) > 0
assert libc.unshare(0x10000000) == 0 or clone(0x10000000) or clone(0x40000000), 'refused'
print('ESCAPED')
"""),
    program("chroot and climb", "error", """
import os
os.mkdir('x'); os.chroot('x'); print('ESCAPED')
"""),
    program("device nodes", "error", """
import os
os.mknod('sda', 0o60666, os.makedev(8, 0)); print('ESCAPED')
"""),
    program("becomes root", "error", "import os; os.setuid(0); print('ESCAPED')"),
    # The network
    program("connects to the host", "error", """
import socket
socket.create_connection(('127.0.0.1', PORT), 0.5); print('ESCAPED')
"""),
    program("sockets at all", "ok", """
import ctypes, socket
for family in (1, 2, 10, 16, 17, 40):
    fd = ctypes.CDLL(None).socket(family, 1, 0)
    if fd >= 0: print('ESCAPED', family)
"""),
    # Crashes and output
    program("recursion", "error", "def f(): f()\nf()"),
    program("recursion without limit", "crashed memory error", """
import sys
sys.setrecursionlimit(10**9)
class A:
    def __repr__(self): return repr(self)
repr(A())
"""),
    program("stack overflow in C", "crashed", """
import ctypes
kind = ctypes.CFUNCTYPE(None)
def again(): callback()
callback = kind(again)
import sys; sys.setrecursionlimit(10**9)
callback()
"""),
    program("null pointer", "crashed", "import ctypes; ctypes.string_at(0)"),
    program("abort", "crashed", "import os; os.abort()"),
    program("leaves half-way", "crashed", "import os, sys; print('half', flush=True); os._exit(0)"),
    program("parser bomb", "error memory crashed", "eval('(' * 10**5 + ')' * 10**5)"),
    program("closes stdout", "ok error crashed", "import os; os.close(1); os.close(2); print('x')"),
    program("closes all descriptors", "ok", "import os; os.closerange(3, 4096)"),
    program("floods stdout", "timeout", "while True: print('x' * 10_000)"),
    program("floods stderr", "timeout", """
import sys
while True: sys.stderr.write('x' * 10_000)
"""),
    program("invalid UTF-8", "ok", "import sys; sys.stdout.buffer.write(b'\\xff\\xfe\\x00ok')"),
    program("terminal escapes and surrogates", "error", "print('\\ud800')"),
    program("runs a shell", "error", """
import os
os.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED'])
"""),
    program("runs the interpreter", "error", """
import subprocess, sys
subprocess.run([sys.executable, '-c', 'print("ESCAPED")'])
"""),
    program("huge argument list", "error", """
import os
os.execv('/dev/null', ['x' * 100_000] * 100)
"""),
    program("a lone surrogate in the code", "error", "x = '\ud800'"),
    program("a null in the code", "error", "x = '\0'"),
]  # fmt: skip


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


# Fewer isolations: a kernel or a container that refuses some of them

FALLBACKS = [
    pytest.param({"user"}, id="no user namespace", marks=pytest.mark.slow),
    pytest.param({"seccomp"}, id="no seccomp", marks=pytest.mark.slow),
    pytest.param({"network", "ipc", "uts"}, id="no network, ipc, uts", marks=pytest.mark.slow),
    pytest.param({"pid"}, id="no pid"),
    pytest.param({"user", "pid"}, id="no user and pid", marks=pytest.mark.slow),
    pytest.param({"mount"}, id="no mount", marks=pytest.mark.slow),
    pytest.param({"user", "mount"}, id="no user and mount", marks=pytest.mark.slow),
    pytest.param(set(ISOLATION) - {"seccomp"}, id="no namespace"),
    pytest.param(set(ISOLATION), id="nothing"),
]


def readable_interpreter() -> str:
    """Without a file system of its own, the unprivileged user must be able to read Python's."""
    own = all(p.stat().st_mode & 1 for p in Path(os.__file__).parents)
    system = f"/usr/bin/python3.{sys.version_info.minor}"
    if own or os.geteuid() != 0:
        return sys.executable
    if os.path.exists(system):
        return system
    pytest.skip("Python lies in a closed home")


@pytest.mark.parametrize("refused", FALLBACKS)
def test_what_is_refused_is_named_and_the_rest_holds(
    host: Host, monkeypatch: pytest.MonkeyPatch, refused: set[str]
) -> None:
    monkeypatch.setattr(sandbox, "ISOLATION", ISOLATION - refused)
    if "mount" in refused:
        monkeypatch.setattr(sys, "executable", readable_interpreter())
    result = host.run("import math; print(math.pi, input())", stdin="in")
    assert (result.status, result.stdout) == ("ok", "3.141592653589793 in\n"), result
    assert result.isolation >= ISOLATION - refused | {"rlimits"}
    assert not result.isolation & refused
    assert host.run("x = bytearray(10**10)").status == "memory"
    assert host.run("while True: pass", timeout_s=0.3).status == "timeout"
    assert host.run("import os; os.kill(os.getpid(), 9)").status in {"crashed", "error"}
    daemon = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(60)
    os._exit(0)
time.sleep(0.1)
"""
    # Without a user namespace, all processes of one's user count for the limit.
    assert host.run(daemon).status in {"ok", "error"}
    assert host.left_behind() == []
    assert host.run(daemon + "time.sleep(60)", timeout_s=0.4).status in {"timeout", "error"}
    assert host.left_behind() == []


@pytest.mark.parametrize("refused", FALLBACKS)
def test_the_parent_and_its_network_stay_safe_with_less(
    host: Host, monkeypatch: pytest.MonkeyPatch, refused: set[str]
) -> None:
    monkeypatch.setattr(sandbox, "ISOLATION", ISOLATION - refused)
    if "mount" in refused:
        monkeypatch.setattr(sys, "executable", readable_interpreter())
    if refused >= {"seccomp", "pid", "user"} and os.geteuid() != 0:
        pytest.skip("nothing is left to stop a signal within one user")
    host.run("""
import os
for pid in (SIBLING, PARENT, os.getppid()):
    try: os.kill(pid, 9)
    except OSError: pass
""")
    if not refused >= {"seccomp", "network"}:
        host.run(
            "import socket; socket.create_connection(('127.0.0.1', PORT), 1); print('ESCAPED')"
        )


@pytest.mark.parametrize("caller", ["ordinary user", "root without rights"])
def test_callers_with_few_rights(host: Host, caller: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    code = f"""
import ctypes, json, os
if {caller!r} == "root without rights":
    assert ctypes.CDLL(None).prctl(28, 3, 0, 0, 0) == 0  # exec shall not give them back
    nothing = (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), nothing) == 0
else:
    os.setgroups([]); os.setresgid(12345, 12345, 12345); os.setresuid(12345, 12345, 12345)
from nanoray.tools import run_python, sandbox
sandbox._OPTIONS = (*sandbox._OPTIONS, "-X", {host.marker!r})
results = [
    run_python("import os; print(os.getuid(), os.listdir())"),
    run_python("import os\\nos.kill({host.sibling.pid}, 9)"),
    run_python("import socket; socket.create_connection(('127.0.0.1', {host.port}), 1)"),
    run_python("while True: pass", timeout_s=0.3),
    # Linux does not count the processes of root outside of a user namespace.
    run_python("import os\\nwhile os.getuid(): os.fork()\\n1/0", timeout_s=0.5),
]
print(json.dumps([(r.status, r.stdout, sorted(r.isolation)) for r in results]))
"""
    environment = {"PYTHONPATH": str(Path(sandbox.__file__).parents[2])}
    output = subprocess.check_output([readable_interpreter(), "-B", "-c", code], env=environment)
    results = json.loads(output)
    statuses = [status for status, _, _ in results]
    assert statuses[:4] == ["ok", "error", "error", "timeout"]
    assert statuses[4] in {"error", "timeout"}
    if caller == "ordinary user":
        assert results[0][1] == "1000 []\n"
        assert set(results[0][2]) == ISOLATION | {"rlimits"}
    else:
        assert results[0][1] == "0 []\n"
        assert set(results[0][2]) == {"seccomp", "rlimits"}
    assert host.sibling.poll() is None
    assert host.secret.read_text() == SECRET
    assert host.left_behind() == []


@pytest.mark.parametrize(
    ("denied", "missing"),
    [
        ({"unshare"}, {"user", "mount", "pid", "network", "ipc", "uts"}),
        ({"mount"}, {"mount"}),
        ({"pivot_root"}, {"mount"}),
    ],
)
def test_a_container_that_refuses_system_calls(
    host: Host, denied: set[str], missing: set[str]
) -> None:
    """As Docker does it, with a filter that our own must then pass."""
    code = f"""
import ctypes, json, platform
from nanoray.tools import run_python, sandbox, seccomp
from nanoray.tools.jail import linux, program
sandbox._OPTIONS = (*sandbox._OPTIONS, "-X", {host.marker!r})
everything = seccomp._DENIED
seccomp._DENIED = {{name: everything[name] for name in {sorted(denied)!r}}}
linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
assert program.install_filter(seccomp.filter_program(platform.machine(), may_signal=True))
seccomp._DENIED = everything
results = [
    run_python("import math; open('x', 'w').close(); print(input())", stdin="in"),
    run_python("import os; os.kill({host.sibling.pid}, 9)"),
    run_python("print(open({str(host.secret)!r}).read())"),
    run_python("while True: pass", timeout_s=0.3),
]
print(json.dumps([(r.status, r.stdout, sorted(r.isolation)) for r in results]))
"""
    host.secret.chmod(0o600)  # without a mount namespace, another user reads what all may read
    environment = {
        "PYTHONPATH": str(Path(sandbox.__file__).parents[2]),
        "TMPDIR": str(host.secret.parents[1]),
    }
    output = subprocess.check_output([readable_interpreter(), "-B", "-c", code], env=environment)
    results = json.loads(output)
    statuses = [status for status, _, _ in results]
    assert statuses[0] == "ok", results
    assert results[0][1] == "in\n"
    assert statuses[1:] == ["error", "error", "timeout"]
    assert set(results[0][2]) == ISOLATION - missing | {"rlimits", "uid"}
    assert host.sibling.poll() is None
    assert host.left_behind() == []
    assert os.listdir(host.secret.parents[1]) == ["home"]


def test_without_user_namespaces_each_sandbox_still_has_its_own_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    monkeypatch.setattr(sandbox, "ISOLATION", ISOLATION - {"user"})
    uids = {run_python("import os; print(os.getuid())").stdout for _ in range(3)}
    assert len(uids) == 3
    assert "0\n" not in uids


def test_a_closed_interpreter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0 or all(p.stat().st_mode & 1 for p in Path(os.__file__).parents):
        pytest.skip("Python lies open here")
    monkeypatch.setattr(sandbox, "ISOLATION", frozenset({"seccomp"}))
    with pytest.raises(NanorayError, match="cannot read Python's library"):
        run_python("print(1)")
