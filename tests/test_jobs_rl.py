"""`python -m jobs.rl` as its users meet it: a run, its status, its loss, and every mistake."""

from __future__ import annotations

import json
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
from rl_runs import make_guesser, rl_flags, rl_plan
from sft_runs import make_base

import jobs.rl
from jobs.progress import ProgressPrinter
from nanoray.checkpoint import list_steps
from nanoray.config import UsageError
from nanoray.errors import NanorayError
from nanoray.rl.plan import RlPlan

ROOT = Path(__file__).parents[1]
STEPS = 12


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
            "--num-workers or --rollout-actors",
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


def test_status_and_scale_of_what_is_not_there(home: Path) -> None:
    for command in (["status", "--run", "nobody"], ["scale", "--run", "nobody", "--actors", "2"]):
        with pytest.raises(NanorayError, match="run nobody has no rollout pool"):
            jobs.rl.main(command)
    with pytest.raises(UsageError, match="--actors"):
        jobs.rl.main(["scale", "--run", "nobody", "--actors", "0"])


def test_events_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressPrinter(10) as printer:
        printer({"event": "rollout actor 0 is lost: [why]"})
    assert "rollouts: rollout actor 0 is lost: [why]" in capsys.readouterr().out


class Job:
    """The job in a process of its own, as a user starts it."""

    def __init__(self, flags: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs.rl", *flags],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, ready: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 120
        while not ready():
            if self.process.poll() is not None:
                pytest.fail(f"the job ended early:\n{self.end()[1]}")
            assert time.monotonic() < deadline, "not within two minutes"
            time.sleep(0.05)

    def end(self) -> tuple[int, str]:
        """Its exit code and all that it has printed."""
        output, _ = self.process.communicate(timeout=120)
        return self.process.returncode, output


@pytest.mark.slow
def test_a_run_its_status_and_the_loss_of_everything(
    home: Path,
    corpus: str,
    tokenizer_dir: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    guesser = make_guesser(corpus, tokenizer_dir, tmp_path)

    def flags(run: str) -> list[str]:
        return rl_flags(**guesser, run=run, num_iterations=STEPS, save_every=2)

    def plan(run: str) -> RlPlan:
        return rl_plan(**guesser, run=run, num_iterations=STEPS, save_every=2)

    def told(*command: str) -> str:
        capsys.readouterr()
        assert jobs.rl.main(command) == 0
        return capsys.readouterr().out

    job = Job(flags("whole"))
    status = home / "runs" / "whole" / "rl_status.json"
    job.wait_for(lambda: status.exists() and json.loads(status.read_text())["actors"])
    assert "run whole: next step" in (while_it_runs := told("status", "--run", "whole"))
    assert "in flight" in while_it_runs
    code, output = job.end()
    assert code == 0, output
    assert "run whole finished" in output
    assert "held out: pass@1" in output
    assert "Traceback" not in output
    assert "run whole (over: the rollout pool is closed)" in told("status", "--run", "whole")
    with pytest.raises(NanorayError, match=r"run whole is not running .* --rollout-actors 2"):
        jobs.rl.main(["scale", "--run", "whole", "--actors", "2"])
    assert "is finished: nothing to do" in told(*flags("whole"))

    job = Job(flags("cut"))
    cut = plan("cut")
    job.wait_for(lambda: list_steps(cut.checkpoints_dir))
    job.process.send_signal(signal.SIGKILL)
    job.end()
    assert list_steps(cut.checkpoints_dir)[-1] < STEPS, "it was killed before its end"
    code, output = Job(flags("cut")).end()
    assert code == 0, output
    assert hashes(cut) == hashes(plan("whole"))
    assert weights(cut, STEPS) == weights(plan("whole"), STEPS)


@pytest.mark.slow
def test_a_shortfall_ends_the_process_soon(base: str) -> None:
    flags = rl_flags(base, "mine", rollout_actors="500")
    # Before Ray is started, and after: 5 and 9 s where nothing else runs.
    for more, deadline_s in (["--dry-run"], 15), ([], 30):
        start = time.monotonic()
        code, output = Job([*flags, *more]).end()
        assert time.monotonic() - start < deadline_s
        assert code == 1
        error = output.splitlines()[-1]
        assert error.startswith("error: 1 workers of 1 CPUs and 500 for rollout actors need 501")
