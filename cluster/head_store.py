"""The Redis of a local cluster, in which its head keeps what shall outlive it.

Ray hands a Redis password on to its processes on their command lines, which every user of the
machine can read. So there is no password: this Redis answers only who shows its own certificate,
whose key the owner alone can read.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_PROGRAMS = "redis-server", "openssl"


def missing_program() -> str:
    """A program that is needed and not on the PATH; an empty string if all are there."""
    return next((name for name in _PROGRAMS if not shutil.which(name)), "")


def prepare(folder: Path, host: str, port: int) -> None:
    """Make a new folder for Redis: its certificate and its configuration, no data yet."""
    shutil.rmtree(folder, ignore_errors=True)  # of a cluster that was not taken `down`
    folder.mkdir(mode=0o700)
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "3650",
         "-subj", "/CN=nanoray", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    key.chmod(0o600)
    lines = [
        f"bind {host}",
        "port 0",  # none without TLS
        f"tls-port {port}",
        f'tls-cert-file "{certificate}"',
        f'tls-key-file "{key}"',
        f'tls-ca-cert-file "{certificate}"',
        "tls-auth-clients yes",
        "protected-mode no",  # it would ask for a password
        f'dir "{folder}"',
        "appendonly yes",  # what it has said yes to outlives Redis, too
        'save ""',
    ]
    (folder / "redis.conf").write_text("\n".join(lines) + "\n")


def command(folder: Path) -> list[str]:
    """What starts Redis, the first time or again."""
    return ["redis-server", str(folder / "redis.conf")]


def head_environment(folder: Path, host: str, port: int) -> dict[str, str]:
    """What the head must find in its environment to keep its state in this Redis."""
    certificate, key = str(folder / "certificate.pem"), str(folder / "key.pem")
    return {
        "RAY_REDIS_ADDRESS": f"rediss://{host}:{port}",
        "RAY_REDIS_CA_CERT": certificate,
        "RAY_REDIS_CLIENT_CERT": certificate,
        "RAY_REDIS_CLIENT_KEY": key,
    }
