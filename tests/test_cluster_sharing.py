"""Several jobs on one cluster: what fits runs side by side, what does not is refused at once."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster_nodes import Nodes, open_nodes
from pretrain_runs import hashes, run_plan, tiny_flags, tiny_plan
from ray.util import placement_group_table

from nanoray import fleet
from nanoray.errors import NanorayError

# The room's functions have the names of these files.
connect = importlib.import_module("nanoray.fleet.connect")
turns = importlib.import_module("nanoray.fleet.turn")
pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[1]
STEPS = 600  # enough that a learner is held before its run ends


def node(name: str, role: str | None, cpus: float) -> dict[str, Any]:
    """As `ray.nodes` tells it."""
    labels = {"nanoray-role": role} if role else {}
    return {"NodeID": name, "Alive": True, "Labels": labels, "Resources": {"CPU": cpus}}


def needs(num_workers: int) -> fleet.Needs:
    return fleet.Needs(
        num_workers=num_workers,
        cpus_per_worker=1,
        gpus_per_worker=0,
        other_cpus=1,
        memory_bytes_per_worker=2**40,
        object_store_bytes=2**40,
        role="trainer",
        others_role="data",
    )


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says what is free of a cluster, look by look."""

    def say(*looks: list[dict[str, Any]]) -> None:
        left = list(looks)
        monkeypatch.setattr(connect, "free_nodes", lambda: left.pop(0) if left[1:] else left[0])
        roles = {node["Labels"].get("nanoray-role") for node in looks[0]}
        monkeypatch.setattr(connect, "label_selector", lambda role: {role} & roles)
        monkeypatch.setattr(connect, "ROOM_DEADLINE_S", 0.3)

    return say


def test_what_others_leave_is_compared(free: Callable[..., None]) -> None:
    free([node("a", None, 3)])
    connect._check_room(needs(2))
    with pytest.raises(NanorayError, match=r"^other jobs .*need 4 logical CPUs, .* has 3; lower"):
        connect._check_room(needs(3))
    free([node("a", None, 1), node("b", None, 0.5), node("c", None, 1.5)])
    connect._check_room(needs(2))
    free([node("a", "trainer", 1), node("b", "data", 2)])
    with pytest.raises(NanorayError, match=r"nanoray-role=trainer\) has 1; .* one of them ends$"):
        connect._check_room(needs(2))


def test_others_packing_tasks_make_room_by_and_by(free: Callable[..., None]) -> None:
    free([node("a", "trainer", 2), node("b", "data", 0)])  # the data nodes are for all jobs
    connect._check_room(needs(2))
    busy, idle = [node("a", None, 2)], [node("a", None, 3)]
    free(busy, busy, idle)
    connect._check_room(needs(2))


class Job:
    """``python -m jobs.pretrain`` as another user's driver on the cluster."""

    def __init__(self, corpus: str, tokenizer_dir: str, run: str, **changes: Any) -> None:
        flags = {"num_iterations": STEPS, "num_workers": 1} | changes
        self.plan = tiny_plan(corpus, tokenizer_dir, run, **flags)
        self.began = time.monotonic()
        words = tiny_flags(corpus, tokenizer_dir, run, **flags)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jobs.pretrain", *words], cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def learner(self) -> psutil.Process:
        """The process that trains, once it has made a step."""
        log = str(Path(self.plan.run_dir, "metrics.jsonl"))
        deadline = time.monotonic() + 240
        while True:
            assert self._process.poll() is None, self.end()
            if time.monotonic() > deadline:
                self._process.kill()
                pytest.fail(str(self.end()))
            for process in psutil.Process().children(recursive=True) if hashes(self.plan) else []:
                with contextlib.suppress(psutil.Error):
                    if log in [file.path for file in process.open_files()]:
                        return process
            time.sleep(0.1)

    def end(self, timeout_s: float = 240) -> tuple[int, str, float]:
        """Exit code, what it said, and seconds from its start to its end."""
        output, _ = self._process.communicate(timeout=timeout_s)
        return self._process.returncode, output, time.monotonic() - self.began


@pytest.fixture
def nodes(home: Path) -> Iterator[Nodes]:
    with open_nodes() as made:
        yield made


@pytest.mark.soak  # on two cores some ten minutes: the two are in each other's way
@pytest.mark.timeout(1800)
def test_two_jobs_share_a_cluster_and_a_third_is_refused(
    nodes: Nodes, corpus: str, tokenizer_dir: str
) -> None:
    nodes.add("trainer", 2)
    nodes.add("data", 1)  # one CPU packs for both
    calm = tiny_plan(corpus, tokenizer_dir, "calm", num_iterations=STEPS)
    run_plan(calm)
    jobs = [Job(corpus, tokenizer_dir, run, num_iterations=STEPS) for run in ("one", "two")]
    held = []
    for job in jobs:  # neither ends before the third has been there
        held.append(job.learner())
        held[-1].suspend()
    code, said, seconds = Job(corpus, tokenizer_dir, "three").end()
    for process in held:
        process.resume()
    print(f"refused after {seconds:.1f} s")
    assert code == 1
    assert said.splitlines()[-1].startswith(
        "error: other jobs are using the cluster, and what they leave is not enough: 1 workers of "
        "1 CPUs and 0 for data tasks need 1 logical CPUs, but the cluster (nodes with "
        "nanoray-role=trainer) has 0; "
    )
    assert "Traceback" not in said
    assert seconds < 10
    for job in jobs:
        code, said, _seconds = job.end(900)
        assert code == 0, said
        assert hashes(job.plan) == hashes(calm)


@pytest.mark.soak
def test_of_two_that_start_at_once_and_fit_but_singly_one_trains(
    nodes: Nodes, corpus: str, tokenizer_dir: str
) -> None:
    """If both took their two workers' CPUs, none of the four would be left to pack for them."""
    nodes.add("none", 2)
    nodes.add("none", 2)
    longer = {"num_workers": 2, "num_iterations": 900}
    jobs = [Job(corpus, tokenizer_dir, run, **longer) for run in ("one", "two")]
    ends = sorted((job.end() for job in jobs), key=lambda end: end[0])
    assert [code for code, _said, _seconds in ends] == [0, 1], ends
    assert "error: other jobs are using the cluster" in ends[1][1]
    assert ends[1][2] < ends[0][2], "it is refused as soon as the first one trains"


@pytest.mark.slow
def test_a_turn_is_one_jobs_at_a_time_and_ends_with_it(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.connect()
    monkeypatch.setattr(turns, "TURN_DEADLINE_S", 1.0)
    with fleet.turn() as give_back:
        with pytest.raises(NanorayError, match=r"job has been starting .* for 1 s"), fleet.turn():
            pytest.fail("two have it")
        give_back()
        monkeypatch.setattr(turns, "TURN_DEADLINE_S", 30.0)
        with fleet.turn():
            pass
    holder = subprocess.Popen(
        [sys.executable, "-c",
         "from nanoray import fleet; fleet.connect(); taken = fleet.turn(); taken.__enter__();"
         "print('taken', flush=True); import time; time.sleep(600)"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "taken\n"
    holder.kill()
    holder.wait()
    with fleet.turn():
        pass


@pytest.mark.slow
def test_what_is_missing_is_waited_for(nodes: Nodes) -> None:
    fleet.connect()
    modest = replace(needs(1), memory_bytes_per_worker=2**20, object_store_bytes=2**20)
    with (
        pytest.raises(fleet.NoRoomError, match="need 2 logical CPUs"),
        fleet.when_there_is_room(lambda: (None, [modest])),
    ):
        pytest.fail("there is room")
    said: list[str] = []
    found: list[str] = []

    def wait() -> None:
        room = fleet.when_there_is_room(lambda: ("settled", [modest]), 120, said.append)
        with room as (settled, _give_turn_back):
            found.append(settled)

    waiting = threading.Thread(target=wait)
    waiting.start()
    nodes.add("data", 1)
    deadline = time.monotonic() + 60
    while not said and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(said) == 1
    assert said[0] == "waiting for room, 120 s at most: there is no trainer node"
    with fleet.turn():  # others may start meanwhile
        assert not found
    nodes.add("trainer", 1)
    waiting.join(60)
    assert found == ["settled"]
    assert len(said) == 1
    assert {group["state"] for group in placement_group_table().values()} == {"REMOVED"}
