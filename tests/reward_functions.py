"""Rewards for tests, well and badly behaved; run in a reward pool's processes."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time


def behave(index: int, text: str) -> object:
    """What the text asks for; else the number it is, plus the example's index."""
    match text.partition(" "):
        case "loop", _, _:
            while True:
                pass
        case "sleep", _, seconds:
            time.sleep(float(seconds))
        case "loop-in-c", _, _:
            sum(range(10**12))
        case "stop", _, _:
            os.kill(os.getpid(), signal.SIGSTOP)
        case "defiant", _, _:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            time.sleep(3600)
        case "allocate", _, size:
            return float(len(bytearray(int(size))) > 0)
        case "hoard", _, _:
            hoard: list[bytes] = []
            while True:
                hoard.append(bytes(10**6))
        case "exit", _, status:
            os._exit(int(status))
        case "kill", _, _:
            os.kill(os.getpid(), signal.SIGKILL)
        case "leave", _, _:
            sys.exit("leaving")
        case "segfault", _, _:
            ctypes.string_at(0)
        case "raise", _, message:
            raise ValueError(message)
        case "recurse", _, _:
            return behave(index, text)
        case "return", _, what:
            return {"nan": float("nan"), "none": None, "true": True}[what]
        case "print", _, _:
            print("[0.0, 'crashed', 'said the reward']", flush=True)
            return 1.0
        case "orphan", _, path:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
            with open(path, "w") as file:
                file.write(f"{os.getpid()} {child.pid}")
            time.sleep(3600)
        case "pid", _, _:
            time.sleep(0.02)
            return os.getpid()
    return index + float(text)
