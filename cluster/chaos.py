"""Runs of the whole pipeline in each stage of which something is killed; every one must end right.

    python cluster/chaos.py                       # twenty runs, an hour on two cores
    python cluster/chaos.py --runs 1 --first 7    # the seventh of them again

One local cluster does all of it. First the pipeline runs undisturbed: that is the truth. Then what
is killed, when, and which of several is drawn from the seed and the run's number. A run is right
if its jobs finish in time, by themselves or (if the driver or what lives with it was killed) when
their command is run again; if steps, batches, losses, weights, moments and the ledger of problems
are those of the truth, bit for bit; if no client of the chat got a wrong answer; and if nothing is
left over. A line tells each run, the last line is JSON; the exit code is 1 if a run went wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from chaos_stages import (
    NUM_REPLICAS,
    ROOT,
    STAGES,
    STEPS,
    Answer,
    Clients,
    ask,
    chat_config,
    check_truth,
    differences,
    last_step,
    preparations,
    questions,
    read_outcome,
    training_command,
    wrong_answers,
)
from chaos_victims import REPLICA, Ground, Strike, WrongError, draw, wait_for
from local import ClusterError
from processes import free_port

NODES = ("trainer", "data", "rollout")
STAGE_DEADLINE_S = 600.0
RECOVERY_DEADLINE_S = 300.0
LEFTOVER_DEADLINE_S = 60.0


# ---- stages, disturbed or not


def train(ground: Ground, stage: str, name: str, strike: Strike | None) -> dict[str, Any]:
    """Run a stage of training to its end; its outcome.

    Raises:
        WrongError: it did not end, or not well.
    """
    run_dir = ground.home / "runs" / f"{name}-{stage}"
    command = training_command(stage, name, ground.home)
    deadline = time.monotonic() + STAGE_DEADLINE_S
    for start in (1, 2):
        log = ground.folder / "logs" / f"{name}-{stage}-{start}.log"
        code = _attempt(ground, command, log, run_dir, strike, deadline)
        if code == 0:
            break
        told = log.read_text(errors="replace").splitlines()
        # -9: the driver itself was killed.
        clean = code == -9 or (code == 1 and not any("Traceback" in line for line in told))
        if not (start == 1 and strike and strike.done and strike.kind.again and clean):
            raise WrongError(f"{stage} ended with {code}: {' '.join(told[-1:])} ({log.name})")
    try:
        return read_outcome(run_dir)
    except (OSError, ValueError, KeyError) as error:
        raise WrongError(f"{stage} has left no outcome: {error!r}") from error


def _attempt(
    ground: Ground,
    command: Sequence[str],
    log: Path,
    run_dir: Path,
    strike: Strike | None,
    deadline: float,
) -> int:
    """Run a job, and strike when the time has come; its exit code."""
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as output:
        job = subprocess.Popen(
            command, cwd=ROOT, env=ground.environment, stdout=output, stderr=output
        )
    due = int(strike.moment * STEPS[strike.stage]) if strike and not strike.kind.at_once else 0
    try:
        while job.poll() is None:
            if time.monotonic() > deadline:
                raise WrongError(f"{run_dir.name} did not end within {STAGE_DEADLINE_S:.0f} s")
            if strike and not strike.done and (step := last_step(run_dir)) >= due:
                strike.attempt(ground, f"at step {step}", job)
            time.sleep(0.05)
    finally:
        if job.poll() is None:
            job.kill()
            job.wait()
    return int(job.returncode)


def serve(
    ground: Ground,
    name: str,
    trained: Sequence[str],
    strike: Strike | None,
    truth: Mapping[str, str],
) -> dict[str, str]:
    """Serve the models of a pipeline; what they answer to each question.

    Raises:
        WrongError: it does not come up, does not recover, or says what is not the truth.
    """
    port = free_port("127.0.0.1")
    url, asked = f"http://127.0.0.1:{port}", questions(trained)
    ground.api("/api/serve/applications/", "PUT", json=chat_config(name, trained, port))
    try:
        wait_for(
            partial(_is_serving, ground, url, asked), STAGE_DEADLINE_S, "the chat does not serve"
        )
        if strike:
            _serve_through(ground, url, asked, strike, truth)
        answers = [ask(url, question, stream) for question in asked for stream in (False, True)]
        if failed := [answer for answer in answers if answer.error]:
            raise WrongError(f"the chat does not answer: {failed[0].error}")
        _check_answers(truth or {a.question: a.text for a in answers}, answers)
    finally:
        ground.api("/api/serve/applications/", "DELETE")
    return {answer.question: answer.text for answer in answers}


def _serve_through(
    ground: Ground, url: str, asked: Sequence[str], strike: Strike, truth: Mapping[str, str]
) -> None:
    """Kill under load, and wait until all is well again."""
    with Clients(url, asked) as clients:
        wait_for(lambda: len(clients.answers) > 5 + 50 * strike.moment, 60, "clients get no answer")
        strike.attempt(ground, f"after {len(clients.answers)} answers")
        time.sleep(2)  # Ray has not noticed before
        serving = partial(_is_serving, ground, url, asked)
        wait_for(serving, RECOVERY_DEADLINE_S, "the chat has not recovered")
    _check_answers(truth, clients.answers)
    in_vain = sum(bool(answer.error) for answer in clients.answers)
    strike.done += f" ({in_vain} of {len(clients.answers)} in vain)"


def _check_answers(truth: Mapping[str, str], answers: Sequence[Answer]) -> None:
    if wrong := wrong_answers(truth, answers):
        raise WrongError("; ".join(wrong))


def _is_serving(ground: Ground, url: str, asked: Sequence[str]) -> bool:
    """Whether Serve says so, all replicas live, and each question is answered."""
    try:
        told = ground.api("/api/serve/applications/").json()["applications"].get("chat", {})
        replicas = ground.actors(REPLICA)
    except WrongError:  # its controller was killed
        return False
    if told.get("status") != "RUNNING" or len(replicas) != NUM_REPLICAS:
        return False
    return not any(ask(url, question, stream=False).error for question in asked)


# ---- runs


@dataclass
class Report:
    """What has happened so far; ``missed``: stages in which nothing could be killed."""

    seed: int
    right: int = 0
    seconds: list[float] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    missed: int = 0

    def add(self, right: bool, seconds: float, strikes: Iterable[Strike]) -> None:
        self.right += right
        self.seconds.append(seconds)
        for strike in strikes:
            if strike.done:
                self.kills[f"{strike.stage} {strike.name}"] += 1
            else:
                self.missed += 1

    def is_well(self) -> bool:
        """All runs are right, and (nearly) all that was drawn was there to be killed."""
        return self.right == len(self.seconds) and self.missed * 10 <= self.kills.total()

    def to_dict(self) -> dict[str, Any]:
        return {
            "bench": "chaos",
            "runs": len(self.seconds),
            "right": self.right,
            "kills": dict(sorted(self.kills.items())),
            "missed": self.missed,
            "median_s": round(statistics.median(self.seconds), 1),
            "longest_s": round(max(self.seconds), 1),
            "seed": self.seed,
        }


Truths = dict[str, dict[str, Any]]


def run_pipeline(
    ground: Ground, name: str, stages: Sequence[str], strikes: Mapping[str, Strike], truths: Truths
) -> Truths:
    """All stages, one after another; their outcomes, which must be those of ``truths``, if any.

    Raises:
        WrongError: one is not right; the later ones are not run.
    """
    found: Truths = {}
    for stage in stages:
        if stage == "serve":
            truth = truths.get(stage, {})
            found[stage] = serve(ground, name, stages[:-1], strikes.get(stage), truth)
        else:
            found[stage] = train(ground, stage, name, strikes.get(stage))
            if truths and (wrong := differences(truths[stage], found[stage])):
                raise WrongError(f"{stage}: {'; '.join(wrong)}")
    wait_for(lambda: not ground.leftovers(), LEFTOVER_DEADLINE_S, "something was left over")
    return found


def run_disturbed(
    ground: Ground, number: int, stages: Sequence[str], truths: Truths, report: Report
) -> bool:
    """One run, told in a line; whether it ended right."""
    drawn = draw(report.seed, number)
    strikes = {stage: drawn[stage] for stage in stages}
    start = time.monotonic()
    verdict = "right"
    try:
        run_pipeline(ground, f"run{number:02d}", stages, strikes, truths)
    except (WrongError, ClusterError) as error:
        verdict = f"WRONG: {error}{_leftovers_told(ground)}; see {ground.folder}"
    report.add(verdict == "right", time.monotonic() - start, strikes.values())
    told = [f"{s.stage}: {s.name}, {s.done or 'never struck'}" for s in strikes.values()]
    print(f"run {number}, {report.seconds[-1]:.0f} s, {verdict}; {'; '.join(told)}", flush=True)
    return verdict == "right"


def _leftovers_told(ground: Ground) -> str:
    try:
        left = ground.leftovers()
    except WrongError as error:
        return f"; {error}"
    return f"; left over: {', '.join(left)}" if left else ""


def prepare(ground: Ground) -> None:
    """Corpus, tokenizer, conversations; and the cluster."""
    for command in preparations(ground.home):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise WrongError(f"{' '.join(command[1:])}: {done.stderr.strip()}")
    start_cluster(ground)


def start_cluster(ground: Ground) -> None:
    ground.cluster.up(())
    for role in NODES:  # together they would keep each other from joining in time on a busy machine
        ground.cluster.add(role)


def end_cluster(ground: Ground, keep_logs: str = "") -> None:
    """``keep_logs``: what is wrong; what Ray's processes said is then kept under that name."""
    if keep_logs:
        kept = ground.folder / "logs" / f"ray-{keep_logs}"
        for node in ground.cluster.nodes:
            kept.mkdir(parents=True, exist_ok=True)
            for logs in (ground.folder / "c" / node.name).glob("session_2*/logs"):
                shutil.copytree(logs, kept / node.name, ignore_dangling_symlinks=True)
            shutil.copy(ground.folder / "c" / f"{node.name}.log", kept)
    ground.cluster.down()


def parse_stages(text: str) -> tuple[str, ...]:
    """``"pretrain,sft,serve"``; raises ArgumentTypeError where one lacks what it goes on from."""
    stages = tuple(text.split(","))
    trained = tuple(stage for stage in stages if stage != "serve")
    if not trained or trained != STAGES[: len(trained)] or stages[: len(trained)] != trained:
        raise argparse.ArgumentTypeError(
            f"{text} cannot be run: take the first of {','.join(STAGES[:-1])}, and serve or not"
        )
    return stages


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python cluster/chaos.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=20, help="disturbed runs (20)")
    parser.add_argument("--first", type=int, default=1, help="number of the first one (1)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (0)")
    parser.add_argument(
        "--stages", type=parse_stages, default=STAGES, help=f"({','.join(STAGES)}), or fewer"
    )
    parser.add_argument("--keep", action="store_true", help="keep the folder of right runs, too")
    args = parser.parse_args(argv)
    set_environment()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the cluster must not outlive this
    ground = Ground(Path(tempfile.mkdtemp(prefix="nr-chaos-")))
    report = Report(args.seed)
    well, trouble = False, ""
    try:
        well = run_all(ground, args.stages, range(args.first, args.first + args.runs), report)
    except (WrongError, ClusterError) as error:
        trouble = "start"
        print(f"error: {error}; see {ground.folder}", file=sys.stderr)
    finally:
        end_cluster(ground, keep_logs=trouble)
        if well and not args.keep:
            shutil.rmtree(ground.folder)
    if report.seconds:
        print(json.dumps(report.to_dict()), flush=True)
    return 0 if well else 1


def set_environment() -> None:
    """What the cluster and the jobs get: nothing of the user's settings, a death soon noticed."""
    for name in [name for name in os.environ if name.startswith(("RAY_", "NANORAY_"))]:
        del os.environ[name]
    os.environ |= {
        "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_period_ms": "1000",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy:middlewares",
    }


def run_all(ground: Ground, stages: Sequence[str], numbers: Iterable[int], report: Report) -> bool:
    """The undisturbed run and the others; whether all are right.

    Raises:
        WrongError, ClusterError: there is no truth to compare with, or no cluster.
    """
    start = time.monotonic()
    prepare(ground)
    truths = run_pipeline(ground, "truth", stages, {}, {})
    if weak := check_truth(truths):
        raise WrongError(f"the undisturbed run is of no use: {'; '.join(weak)}")
    print(f"undisturbed, {time.monotonic() - start:.0f} s", flush=True)
    for number in numbers:
        if not run_disturbed(ground, number, stages, truths, report):
            end_cluster(ground, keep_logs=f"run{number:02d}")
            start_cluster(ground)  # in which nothing is left
    return report.is_well()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
