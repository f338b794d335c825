"""The sandbox with fewer isolations: a kernel or a container that refuses some of them."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sandbox_host import SECRET, Host, host

from nanoray.errors import NanorayError
from nanoray.tools import run_python, sandbox
from nanoray.tools.sandbox import ISOLATION

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="isolation is Linux's")

__all__ = ["host"]  # the fixture


LANDLOCK = ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) > 0


def held_without(refused: set[str]) -> set[str]:
    """What is left of the isolation; Landlock is there for the want of a mount namespace."""
    landlock = LANDLOCK and "mount" in refused
    return set(ISOLATION) - refused - (set() if landlock else {"landlock"}) | {"rlimits"}


FALLBACKS = [
    pytest.param({"user"}, id="no user namespace", marks=pytest.mark.slow),
    pytest.param({"seccomp"}, id="no seccomp", marks=pytest.mark.slow),
    pytest.param({"network", "ipc", "uts"}, id="no network, ipc, uts", marks=pytest.mark.slow),
    pytest.param({"pid"}, id="no pid"),
    pytest.param({"user", "pid"}, id="no user and pid", marks=pytest.mark.slow),
    pytest.param({"mount"}, id="no mount", marks=pytest.mark.slow),
    pytest.param({"user", "mount"}, id="no user and mount", marks=pytest.mark.slow),
    pytest.param({"mount", "landlock"}, id="no mount and landlock", marks=pytest.mark.slow),
    pytest.param(set(ISOLATION) - {"seccomp", "landlock"}, id="no namespace"),
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
    assert result.isolation >= held_without(refused)
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
import nanoray.tools
from nanoray.tools import sandbox
sandbox._OPTIONS = (*sandbox._OPTIONS, "-X", {host.marker!r})
run_python = lambda code, **limits: nanoray.tools.run_python(code, require=set(), **limits)
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
        assert set(results[0][2]) == held_without(set())
    else:
        assert results[0][1] == "0 []\n"
        assert set(results[0][2]) == {"seccomp", "rlimits", *(["landlock"] if LANDLOCK else [])}
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
import nanoray.tools
from nanoray.tools import sandbox, seccomp
from nanoray.tools.jail import linux, program
sandbox._OPTIONS = (*sandbox._OPTIONS, "-X", {host.marker!r})
everything = seccomp._DENIED
seccomp._DENIED = {{name: everything[name] for name in {sorted(denied)!r}}}
linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
assert program.install_filter(seccomp.filter_program(platform.machine(), may_signal=True))
seccomp._DENIED = everything
run_python = lambda code, **limits: nanoray.tools.run_python(code, require=set(), **limits)
results = [
    run_python("import math; open('x', 'w').close(); print(input())", stdin="in"),
    run_python("import os; os.kill({host.sibling.pid}, 9)"),
    run_python("print(open({str(host.secret)!r}).read())"),
    run_python("while True: pass", timeout_s=0.3),
]
print(json.dumps([(r.status, r.stdout, sorted(r.isolation)) for r in results]))
"""
    if not LANDLOCK:
        host.secret.chmod(0o600)  # with neither, another user reads what all may read
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
    assert set(results[0][2]) == held_without(missing) | {"uid"}
    assert host.sibling.poll() is None
    assert host.left_behind() == []
    assert os.listdir(host.secret.parents[1]) == ["home"]


def test_nothing_runs_without_what_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o777)
    witness = tmp_path / "ran"
    code = f"open({str(witness)!r}, 'w').write('ran')"
    monkeypatch.setattr(sandbox, "ISOLATION", ISOLATION - {"network"})
    with pytest.raises(NanorayError, match=r"no network for the sandbox.*nothing was run"):
        run_python("print(1)")
    assert run_python("print(1)", require={"pid", "mount"}).stdout == "1\n"
    monkeypatch.setattr(sandbox, "ISOLATION", ISOLATION - {"mount", "landlock"})
    monkeypatch.setattr(sys, "executable", readable_interpreter())
    for folder in [tmp_path, *tmp_path.parents[:3]]:
        folder.chmod(folder.stat().st_mode | 0o755)
    with pytest.raises(NanorayError, match="no mount for the sandbox"):
        run_python(code)
    assert not witness.exists()
    run_python(code, require=set())
    assert witness.read_text() == "ran"


@pytest.mark.skipif(not LANDLOCK, reason="this kernel has no Landlock")
def test_landlock_keeps_the_files_where_no_mount_namespace_does(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "ISOLATION", ISOLATION - {"mount", "pid"})
    monkeypatch.setattr(sys, "executable", readable_interpreter())
    result = host.run("""
import os, sqlite3
folder = os.path.dirname(SECRET)
for attempt in (
    lambda: open(SECRET).read(), lambda: open(SECRET, 'a').write('x'), lambda: os.listdir(folder),
    lambda: os.unlink(SECRET), lambda: os.symlink('x', folder + '/x'), lambda: os.listdir('/'),
    lambda: os.link(SECRET, 'secret'), lambda: os.rename(SECRET, 'secret'),
    lambda: os.truncate(SECRET, 0), lambda: open(f'/proc/{PARENT}/environ').read(),
):
    try: print('ESCAPED', attempt())
    except OSError: pass
os.symlink(SECRET, 'link')
try: print('ESCAPED', open('link').read())
except OSError: pass
with open('own', 'w') as f: f.write('y')
os.rename('own', 'mine'); os.mkdir('d'); open('/dev/null', 'w').write(open('mine').read())
""")
    assert result.status == "ok", result
    assert "landlock" in result.isolation


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
