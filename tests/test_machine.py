"""How many cores a process may use: its affinity, and a container's quota."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nanoray import machine


@pytest.mark.parametrize(
    ("quota", "cores", "count"),
    [
        ("max 100000\n", 8, 8),
        ("400000 100000\n", 64, 4),
        ("150000 100000\n", 64, 2),  # one and a half
        ("10000 100000\n", 64, 1),
        ("6400000 100000\n", 2, 2),
        (None, 3, 3),
        ("nonsense", 3, 3),
    ],
)
def test_cores(
    quota: str | None, cores: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpu.max"
    if quota is not None:
        file.write_text(quota)
    monkeypatch.setattr(machine, "_QUOTA", file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)))
    assert machine.available_cpus() == count


def test_without_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_QUOTA", tmp_path / "none")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.available_cpus() == 1
