"""Programs that try to hurt the host, hang the caller or leave something behind."""

from __future__ import annotations

import pytest

from nanoray.tools.sandbox import MIB


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
