"""`make chaos`: what it draws, what it takes for right, and a short form of the real thing."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def chaos() -> Iterator[ModuleType]:
    """``cluster/chaos.py`` as a module; its siblings are in ``sys.modules`` with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "cluster"))
        yield importlib.import_module("chaos")


@pytest.fixture(scope="module")
def stages(chaos: ModuleType) -> ModuleType:
    return sys.modules["chaos_stages"]


@pytest.fixture(scope="module")
def victims(chaos: ModuleType) -> ModuleType:
    return sys.modules["chaos_victims"]


# ---- what is drawn


def test_a_run_is_drawn_from_seed_and_number_alone(stages: ModuleType, victims: ModuleType) -> None:
    runs = [victims.draw(seed, number) for seed in (0, 1) for number in range(1, 21)]
    assert runs == [victims.draw(seed, number) for seed in (0, 1) for number in range(1, 21)]
    assert len({repr(run) for run in runs}) == len(runs)
    for run in runs:
        assert tuple(run) == stages.STAGES
        for stage, strike in run.items():
            assert strike.name in victims.KINDS[stage]
            assert 0 <= strike.moment < 0.6  # there is time left for the death to matter
            assert 0 <= strike.pick < 1


def test_twenty_runs_kill_everybody(victims: ModuleType) -> None:
    """`make chaos`, that is: workers, actors, nodes, drivers and replicas are all among them."""
    drawn = [strike for number in range(1, 21) for strike in victims.draw(0, number).values()]
    names = {strike.name for strike in drawn}
    assert names == {name for kinds in victims.KINDS.values() for name in kinds}
    before = [strike for strike in drawn if strike.moment == 0]
    assert 10 < len(before) < 30, "some die before the first step, most on the way"


@pytest.mark.parametrize(
    ("right", "killed", "missed", "well"),
    [(20, 80, 0, True), (20, 74, 6, True), (19, 80, 0, False), (20, 0, 80, False)],
)
def test_all_runs_are_right_and_something_was_killed(
    chaos: ModuleType, right: int, killed: int, missed: int, well: bool
) -> None:
    report = chaos.Report(0, right, [1.0] * 20, Counter({"sft worker": killed}), missed)
    assert report.is_well() == well


class Prey:
    """In `Ground`'s place: processes that are found by nobody's title."""

    def __init__(self, number: int) -> None:
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
        self.jobs = [subprocess.Popen(command) for _ in range(number)]

    def actors(self, class_name: str) -> list[dict[str, Any]]:
        return [{"actor_id": i, "pid": str(job.pid)} for i, job in enumerate(self.jobs)]

    def processes(self) -> dict[int, psutil.Process]:
        return {job.pid: psutil.Process(job.pid) for job in self.jobs if job.poll() is None}


def test_one_of_several_is_killed_and_nobody_else(victims: ModuleType) -> None:
    prey = Prey(3)
    try:
        strike = victims.Strike("rl", "rollout actor", moment=0.5, pick=0.5)
        strike.attempt(prey, "at step 3")
        assert strike.done == f"_RolloutActor {prey.jobs[1].pid} at step 3"
        assert prey.jobs[1].wait(10) == -signal.SIGKILL
        assert [job.poll() for job in prey.jobs] == [None, -signal.SIGKILL, None]
    finally:
        for job in prey.jobs:
            job.kill()
            job.wait()


def test_where_there_is_nobody_nothing_is_killed(victims: ModuleType) -> None:
    strike = victims.Strike("rl", "rollout actor", moment=0.5, pick=0.5)
    strike.attempt(Prey(0), "at step 3")
    assert not strike.done
    gone = Prey(1)
    (job,) = gone.jobs
    found = gone.processes()
    job.kill()
    job.wait()
    gone.processes = lambda: found  # type: ignore[method-assign]
    strike.attempt(gone, "at step 4")
    assert not strike.done, "who was dead already is no victim"


@pytest.mark.parametrize("text", ["pretrain", "pretrain,serve", "pretrain,sft,rl,serve"])
def test_stages_may_be_fewer(chaos: ModuleType, text: str) -> None:
    assert ",".join(chaos.parse_stages(text)) == text


@pytest.mark.parametrize("text", ["", "serve", "sft", "pretrain,rl", "sft,pretrain", "pretrain,x",
                                  "serve,pretrain", "pretrain,serve,sft"])  # fmt: skip
def test_a_stage_needs_the_one_before(chaos: ModuleType, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="take the first of"):
        chaos.parse_stages(text)


# ---- what is right


def write_run(folder: Path, steps: list[int], status: str = "finished") -> Path:
    """A run's folder as training leaves it."""
    checkpoint = folder / "checkpoints" / f"step_{steps[-1]:06d}"
    checkpoint.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    records = [
        {"step": step, "loss": 1 / (step + 1), "reward": 0.5, "batch_hash": f"{step:x}"}
        for step in steps
    ]
    lines = [json.dumps(record) for record in [*records, {"step": steps[-1], "val_bpb": 2.0}]]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9, "lo']))
    (folder / "summary.json").write_text(json.dumps({"status": status, "loss": 0.25}))
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    counts = {"trained": 4 * len(steps), "dropped": 0, "filtered": 0, "dispatched": 99}
    ledger = {"next_number": 4 * len(steps), "open": [], "counts": counts}
    (checkpoint / "meta.json").write_text(json.dumps({"ledger": ledger}))
    (checkpoint / "manifest.json").write_text("{}")
    (folder / "checkpoints" / "step_000099").mkdir()  # without a manifest: it does not count
    return folder


def test_a_run_is_read(stages: ModuleType, tmp_path: Path) -> None:
    found = stages.read_outcome(write_run(tmp_path / "run", [1, 2, 3]))
    assert found["steps"] == [1, 2, 3]
    assert found["losses"] == [1 / 2, 1 / 3, 1 / 4]
    assert found["checkpoint"] == "step_000003"
    assert list(found["tensors"]) == ["model.safetensors"]
    assert found["ledger"] == {
        "minted": 12, "open": [], "trained": 12, "dropped": 0, "filtered": 0
    }  # fmt: skip
    assert stages.last_step(tmp_path / "run") == 3
    assert stages.last_step(tmp_path / "no run") == -1


def test_equal_runs_do_not_differ_and_others_do(stages: ModuleType, tmp_path: Path) -> None:
    truth = stages.read_outcome(write_run(tmp_path / "a", [1, 2, 3]))
    assert (
        stages.differences(truth, stages.read_outcome(write_run(tmp_path / "b", [1, 2, 3]))) == []
    )
    twice = stages.read_outcome(write_run(tmp_path / "c", [1, 2, 2, 3]))
    told = "\n".join(stages.differences(truth, twice))
    assert "steps are [2] instead of [3] (the first 2 are equal, 4 of 3)" in told
    assert "ledger" in told
    stopped = stages.read_outcome(write_run(tmp_path / "d", [1, 2], "stopped"))
    told = "\n".join(stages.differences(truth, stopped))
    assert "status are stopped instead of finished" in told
    assert "steps are [] instead of [3]" in told


@given(st.data())
def test_no_change_goes_unnoticed(stages: ModuleType, data: st.DataObject) -> None:
    floats = st.floats(allow_nan=False)
    lists = st.lists(floats, min_size=1, max_size=6)
    truth = {"losses": data.draw(lists), "tensors": {"model": data.draw(st.text())}}
    found = copy.deepcopy(truth)
    place = data.draw(st.integers(0, len(truth["losses"]) - 1))
    change = data.draw(st.sampled_from(["one", "cut", "more", "tensor", "key"]))
    if change == "one":
        found["losses"][place] = data.draw(floats.filter(lambda x: x != truth["losses"][place]))
    elif change == "cut":
        del found["losses"][place:]
    elif change == "more":
        found["losses"].append(0.0)
    elif change == "tensor":
        found["tensors"]["model"] += "x"
    else:
        found["new"] = 1
    assert len(stages.differences(truth, found)) == 1
    assert stages.differences(truth, copy.deepcopy(truth)) == []


def test_a_truth_that_tells_nothing_is_refused(stages: ModuleType) -> None:
    steps = stages.STEPS["rl"]
    prompts = steps * stages.QUESTIONS_PER_STEP
    good = {
        "status": "finished",
        "steps": list(range(1, steps + 1)),
        "losses": [1.0, *range(2, steps + 1)],
        "rewards": [0.0, 0.5],
        "ledger": {"trained": prompts, "minted": prompts},
    }
    assert stages.check_truth({"rl": good, "serve": {"a": "b"}}) == []
    for change in (
        {"status": "stopped"},
        {"steps": [1]},
        {"losses": [1.0, 1.0]},
        {"rewards": [0, 1]},
        {"ledger": {"trained": prompts - 1, "minted": prompts}},
    ):
        assert len(stages.check_truth({"rl": good | change})) == 1


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [
        ("abcd", "", ""),
        ("ab", "event replica_lost", ""),
        ("", "HTTP 502", ""),
        ("ab", "connection (ChunkedEncodingError)", ""),
        ("abc", "", "'q' was answered 'abc' instead of 'abcd' (1 times)"),
        ("abcde", "", "'q' was answered 'abcde' instead of 'abcd' (1 times)"),
        ("ax", "HTTP 502", "'q' was answered 'ax' instead of 'abcd' (1 times)"),
        ("", "HTTP 404", "a client's error was: HTTP 404 (1 times)"),
        ("ab", "broken off without a word", "a client's error was: broken off without a word"),
    ],
)
def test_clients_may_see_errors_but_no_other_text(
    stages: ModuleType, text: str, error: str, told: str
) -> None:
    wrong = stages.wrong_answers({"q": "abcd"}, [stages.Answer("q", text, error)])
    assert len(wrong) == bool(told)
    assert told in "".join(wrong)


class Chat(BaseHTTPRequestHandler):
    """Answers by what the prompt names."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        piece = b'data: {"choices": [{"text": "ab"}]}\n\n'
        lost = b'data: {"error": {"code": "replica_lost"}}\n\n'
        streams = {"whole": piece + b"data: [DONE]\n\n", "lost": piece + lost, "mute": piece}
        self.send_response(502 if asked["prompt"] == "refused" else 200)
        if asked["prompt"] == "cut":
            self.send_header("content-length", "1000")
        self.end_headers()
        whole = b'{"choices": [{"text": "ab"}]}'
        self.wfile.write(streams.get(asked["prompt"], piece) if asked["stream"] else whole)

    def log_message(self, *_args: Any) -> None: ...


def test_a_client_tells_how_an_answer_ended(stages: ModuleType) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Chat) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        ends = {
            "whole": ("ab", ""),
            "lost": ("ab", "event replica_lost"),
            "mute": ("ab", "broken off without a word"),
            "refused": ("", "HTTP 502"),
            "cut": ("", "connection (ChunkedEncodingError)"),
        }
        for prompt, (text, error) in ends.items():
            asked = f"sft/{prompt}"
            assert stages.ask(url, asked, stream=True) == stages.Answer(asked, text, error)
        assert stages.ask(url, "sft/whole", stream=False) == stages.Answer("sft/whole", "ab", "")
        server.shutdown()
    refused = stages.ask(url, "sft/whole", stream=False)
    assert refused.error.startswith("connection ")


def test_what_is_served_is_the_shipped_configuration(stages: ModuleType) -> None:
    config = stages.chat_config("mine", ("pretrain", "sft"), 1234)
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    assert application["import_path"] == "serve.app:app"
    models = [{"name": stage, "run": f"mine-{stage}"} for stage in ("pretrain", "sft")]
    assert deployment["user_config"]["models"] == models
    assert deployment["num_replicas"] == 2
    assert config["http_options"]["host"] == "127.0.0.1"
    assert config["http_options"]["port"] == 1234


# ---- the short form


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_in_which_something_is_killed_ends_right(victims: ModuleType) -> None:
    """Pretraining on the local cluster, one worker of which is killed on the way."""
    command = [sys.executable, "cluster/chaos.py", "--runs", "1", "--stages", "pretrain"]
    done = subprocess.run(
        [*command, "--first", "1"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["runs"], told["right"], told["missed"]) == (1, 1, 0)
    assert told["kills"] == {f"pretrain {victims.draw(0, 1)['pretrain'].name}": 1}
