"""Connecting, the preflight, and the board."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import ray

from nanoray import fleet
from nanoray.errors import NanorayError

GIB = 2**30


def needs(**changes: object) -> fleet.Needs:
    values: dict[str, object] = {
        "num_workers": 2,
        "cpus_per_worker": 1.0,
        "gpus_per_worker": 0.0,
        "other_cpus": 1.0,
        "memory_bytes_per_worker": GIB,
        "object_store_bytes": 2**26,
    }
    return fleet.Needs(**(values | changes))  # type: ignore[arg-type]


HAVE = {"CPU": 4.0, "memory": 8.0 * GIB, "object_store_memory": float(GIB)}


def test_enough_is_enough() -> None:
    fleet.check_resources(needs(), HAVE, "this machine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_workers": 4}, "4 workers of 1 CPUs and 1 for data tasks need 5 .* has 4"),
        ({"cpus_per_worker": 2.0}, "need 5 logical CPUs"),
        ({"gpus_per_worker": 1.0}, "2 workers need 2 GPUs, but this machine has 0"),
        ({"memory_bytes_per_worker": 5 * GIB}, "about 10.0 GiB of memory, .* has 8.0 GiB"),
        ({"object_store_bytes": 2 * GIB}, "about 2048 MiB of object store, .* has 1024 MiB"),
    ],
)
def test_a_shortfall_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(NanorayError, match=message):
        fleet.check_resources(needs(**changes), HAVE, "this machine")


def test_workers_must_fit_on_single_nodes() -> None:
    small = [{"Resources": {"CPU": 2.0, "GPU": 1.0}}] * 8  # 16 CPUs in all
    fleet.check_places(needs(num_workers=8, cpus_per_worker=2, gpus_per_worker=1), small)
    with pytest.raises(NanorayError, match=r"4 CPUs on one node, .* room for 0 of 4"):
        fleet.check_places(needs(num_workers=4, cpus_per_worker=4, gpus_per_worker=0), small)
    with pytest.raises(NanorayError, match=r"1 GPUs on one node, .* room for 8 of 9"):
        fleet.check_places(needs(num_workers=9, cpus_per_worker=1, gpus_per_worker=1), small)
    fleet.check_places(needs(num_workers=9, cpus_per_worker=0.5, gpus_per_worker=0), small)
    tenths = needs(num_workers=10, cpus_per_worker=0.1, gpus_per_worker=0)
    fleet.check_places(tenths, [{"Resources": {"CPU": 1.0}}])


@pytest.mark.slow
def test_the_cluster_is_compared_within_ten_seconds(ray_session: None, tmp_path: Path) -> None:
    start = time.monotonic()
    fleet.preflight(needs(paths=(str(tmp_path),)))
    with pytest.raises(NanorayError, match=r"200 workers .* but the cluster has"):
        fleet.preflight(needs(num_workers=200))
    assert time.monotonic() - start < 10


@pytest.mark.slow
def test_the_board_hands_on_records_once_and_keeps_an_error(ray_session: None) -> None:
    board = fleet.Board.remote()  # type: ignore[attr-defined]
    watch = fleet.StopWatch(board, period_s=0.02)
    for step in range(3):
        board.post.remote({"step": step})
    assert ray.get(board.drain.remote()) == ([{"step": 0}, {"step": 1}, {"step": 2}], {})
    assert ray.get(board.drain.remote()) == ([], {})
    assert watch() == ""
    assert ray.get(board.unheard_s.remote()) == 0, "nobody is to stop"
    board.stop.remote("SIGTERM")
    board.conclude.remote({"error": "first"})
    board.conclude.remote({"status": "finished"})
    assert ray.get(board.failed.remote())
    assert ray.get(board.drain.remote())[1] == {"error": "first"}
    deadline = time.monotonic() + 5
    while watch() != "SIGTERM":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(1)
    assert ray.get(board.unheard_s.remote()) < 1, "there is a worker that hears"
    watch.close()
    time.sleep(1.1)
    assert ray.get(board.unheard_s.remote()) >= 1, "it has heard, and is gone"
    ray.kill(board)
    lonely = fleet.StopWatch(board, period_s=0.02)
    while not lonely():
        assert time.monotonic() < deadline + 10
        time.sleep(0.02)
    assert lonely() == "the run's driver is gone"


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [("0,1", 2), ("", 0), ("-1", 0), ("NoDevFiles", 0), ("0,-1,2", 1), ("GPU-8932f937, 3", 2)],
)
def test_gpus_are_counted_as_cuda_reads_its_variable(
    visible: str, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert fleet.local_resources().get("GPU", 0) == gpus
