"""`python -m jobs.rl` as its users meet it: a run, its status, its loss, and every mistake."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pretrain_runs import hashes, weights
from rl_pools import World
from rl_runs import make_guesser, rl_flags, rl_plan, run_alone
from sft_runs import make_base

import jobs.rl
from jobs.progress import ProgressPrinter
from nanoray import fleet
from nanoray.checkpoint import list_steps
from nanoray.config import UsageError
from nanoray.errors import NanorayError
from nanoray.rl.pool import read_scale, write_status

ROOT = Path(__file__).parents[1]
STEPS = 20


@pytest.fixture(scope="module")
def trained(corpus: str, tokenizer_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small base run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANORAY_HOME", str(tmp_path_factory.mktemp("base")))
        return make_base(corpus, tokenizer_dir, "base", num_iterations=1, max_seq_len=128)


@pytest.fixture
def base(home: Path, trained: str) -> str:
    """Its copy, the run ``base`` of the test's own home."""
    shutil.copytree(trained, home / "runs" / "base")
    return "base"


def files_under(home: Path) -> set[str]:
    return {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}


def test_a_dry_run_prints_the_plan_and_leaves_nothing(
    base: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_under(home)
    assert jobs.rl.main([*rl_flags(base, "mine"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "base/checkpoints/step_000001: depth 2, width 32" in printed
    assert "20,000 of arithmetic" in printed
    assert "3 steps of 4 problems x 4 answers of at most 12 tokens, reinforce" in printed
    assert "in step with the learner" in printed
    assert "dry run: configuration, data and resources are fine" in printed
    assert files_under(home) == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"from_run": None}, UsageError, "give the chat model: --from-run NAME"),
        ({"rollout_actors": "0"}, UsageError, "--rollout-actors: .*1 <= MIN <= MAX"),
        ({"algorithm": "ppo"}, UsageError, "--algorithm"),
        ({"from_step": 7}, NanorayError, "no complete checkpoint of step 7; there are 1"),
        (
            {"rollout_actors": "500"},
            NanorayError,
            "500 for rollout actors need 501 logical CPUs, but this machine has .*; lower "
            "--num-workers, --rollout-actors, --cpus-per-worker or --rollout-cpus",
        ),
        ({"task": "gsm8k", "data_dir": "nowhere"}, NanorayError, "no train .*--data-dir"),
    ],
)
def test_mistakes_are_named(
    base: str, home: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = files_under(home)
    with pytest.raises(error, match=message) as raised:
        jobs.rl.main([*rl_flags(base, "mine", **changes), "--dry-run"])
    assert "\n" not in str(raised.value)
    assert files_under(home) == before


def test_a_problem_longer_than_the_context_is_told_before_a_start(
    base: str, tmp_path: Path
) -> None:
    rows = [{"question": f"{i}: how many?", "answer": "#### 5"} for i in range(12)]
    data = tmp_path / "gsm8k"
    data.mkdir()
    (data / "test.jsonl").write_text(json.dumps(rows[0]) + "\n")
    rows[3]["question"] = "why? " * 60
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = {"task": "gsm8k", "data_dir": str(tmp_path)}
    with pytest.raises(NanorayError, match=r"^example 3 of gsm8k is \d+ tokens .* context 128;"):
        rl_plan(base, "long", **places)
    asked = rl_plan(base, "short", **places, num_iterations=1, questions_per_step=1)
    assert asked.num_iterations == 1, "a problem that is not asked does not matter"


@pytest.mark.parametrize(
    ("command", "run"),
    [
        ("status --run nobody", "nobody"),
        ("status nobody", "nobody"),
        ("status --from-run d12-sft", "d12-sft-rl"),
        ("status --from-run /elsewhere/d12-sft/checkpoints/step_000002", "d12-sft-rl"),
        ("scale --run nobody --actors 2", "nobody"),
        ("scale nobody 2", "nobody"),
        ("scale nobody --actors=2", "nobody"),
        ("scale --from-run d12-sft --actors 2", "d12-sft-rl"),
    ],
)
def test_status_and_scale_of_what_is_not_there(home: Path, command: str, run: str) -> None:
    with pytest.raises(NanorayError, match=f"run {run} has no rollout pool"):
        jobs.rl.main(command.split())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("scale nobody 0", "--actors: .*greater than or equal to 1"),
        ("scale nobody", "--actors: Field required"),
        ("status", "give the run: --run NAME, or --from-run NAME"),
    ],
)
def test_a_command_that_lacks_something(home: Path, command: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        jobs.rl.main(command.split())


def test_status_and_scale_find_the_run_that_its_chat_model_names(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both read what the pool writes: here one that was left in mid-run, a clock ahead of ours."""
    folder = home / "runs" / "chatty-rl"
    world = World()
    events = world.supervisor.journal
    events.tell("rollout actor 0 is lost: [why]")
    status = world.supervisor.status() | {"time": time.time() + 100}
    write_status(status, str(folder))
    assert jobs.rl.main(["status", "--from-run", "chatty"]) == 0
    printed = capsys.readouterr().out
    assert "run chatty-rl: next step 0" in printed
    assert "rollout actor 0 is lost: [why]" in printed
    assert jobs.rl.main(["scale", "--from-run", "chatty", "--actors", "3"]) == 0
    assert read_scale(str(folder)) == 3
    assert jobs.rl.main(["scale", "chatty-rl", "auto"]) == 0
    assert read_scale(str(folder)) is None
    write_status(status | {"time": time.time() - 100}, str(folder))
    with pytest.raises(NanorayError, match="its last sign of life was 100 s ago"):
        jobs.rl.main(["scale", "chatty-rl", "3"])


def test_events_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressPrinter(10) as printer:
        printer({"event": "rollout actor 0 is lost: [why]"})
    assert "rollouts: rollout actor 0 is lost: [why]" in capsys.readouterr().out


class Job:
    """The job in a process of its own, as a user starts it."""

    def __init__(self, flags: list[str], **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs.rl", *flags],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, ready: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 240
        while not ready():
            if self.process.poll() is not None:
                pytest.fail(f"the job ended early:\n{self.end()[1]}")
            assert time.monotonic() < deadline, "not within four minutes"
            time.sleep(0.05)

    def end(self) -> tuple[int, str]:
        """Its exit code and all that it has printed."""
        output, _ = self.process.communicate(timeout=240)
        return self.process.returncode, output


@pytest.fixture
def one_core(tmp_path: Path) -> dict[str, str]:
    """An environment in which every process believes so: a learner's sums are as in this one."""
    folder = tmp_path / "one_core"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import os\nos.sched_getaffinity = lambda pid: {0}\n")
    return {"PYTHONPATH": str(folder)}


@pytest.mark.slow
def test_a_job_its_status_and_the_loss_of_everything(
    home: Path,
    corpus: str,
    tokenizer_dir: str,
    tmp_path: Path,
    one_core: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    guesser = make_guesser(corpus, tokenizer_dir, tmp_path)
    shape = {"num_iterations": STEPS, "save_every": 2}
    flags = rl_flags(**guesser, run="mine", **shape)
    calm, mine = (rl_plan(**guesser, run=run, **shape) for run in ("calm", "mine"))
    run_alone(calm)

    def told(*command: str) -> str:
        capsys.readouterr()
        assert jobs.rl.main(command) == 0
        return capsys.readouterr().out

    job = Job(flags, **one_core)
    status = home / "runs" / "mine" / "rl_status.json"
    job.wait_for(lambda: status.exists() and json.loads(status.read_text())["actors"])
    while_it_runs = told("status", "mine")
    assert "run mine: next step" in while_it_runs
    assert "in flight" in while_it_runs
    for size in (3, 1):
        assert f"told to have {size} rollout actors" in told("scale", "mine", str(size))
        job.wait_for(lambda size=size: len(json.loads(status.read_text())["actors"]) == size)
    assert "from 3 to 1 rollout actors" in told("status", "mine")
    assert "to scale its rollout pool by itself" in told("scale", "mine", "auto")
    job.wait_for(lambda: list_steps(mine.checkpoints_dir))
    job.process.send_signal(signal.SIGKILL)
    job.end()
    assert list_steps(mine.checkpoints_dir)[-1] < STEPS, "it was killed before its end"

    code, output = Job(flags, **one_core).end()
    assert code == 0, output
    assert "run mine finished" in output
    assert "held out: pass@1" in output
    assert "rollouts: going on at step" in output
    assert "Traceback" not in output
    assert hashes(mine) == hashes(calm)
    assert weights(mine, STEPS) == weights(calm, STEPS)
    assert "run mine (over: the rollout pool is closed)" in told("status", "mine")
    with pytest.raises(NanorayError, match=r"run mine is not running .* --rollout-actors 2"):
        jobs.rl.main(["scale", "mine", "2"])
    assert "is finished: nothing to do" in told(*flags)


def test_a_shortfall_is_told_before_ray_is_started(
    base: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_under(home)
    monkeypatch.setattr(fleet, "connect", lambda **_: pytest.fail("Ray is started"))
    with pytest.raises(NanorayError, match=r"500 for rollout actors need 501 .* this machine has"):
        jobs.rl.main(rl_flags(base, "mine", rollout_actors="500"))
    assert files_under(home) == before


@pytest.mark.slow
def test_a_shortfall_ends_the_process_soon(base: str) -> None:
    before = cpu_seconds_of_children()
    code, output = Job(rl_flags(base, "mine", rollout_actors="500")).end()
    # Not of the clock, which other work on the machine would count into; a start of Ray costs more.
    assert cpu_seconds_of_children() - before < 8
    assert code == 1
    error = output.splitlines()[-1]
    assert error.startswith("error: 1 workers of 1 CPUs and 500 for rollout actors need 501")


def cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
