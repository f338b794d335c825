"""``python -m jobs.status``: every run under NANORAY_HOME and every live job of the cluster."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.progress import duration
from nanoray import storage
from nanoray.config import StatusConfig, run_job
from nanoray.errors import NanorayError
from nanoray.lease import is_alive, read_lease

# In this order: what somebody may want to do something about comes first.
STATES = ("running", "starting", "lost", "failed", "stopped", "finished", "unreadable", "foreign")
_TAIL_BYTES = 65536  # of metrics.jsonl: hundreds of records
_READERS = 16  # runs read at once: an object store takes tens of milliseconds a file


@dataclass(frozen=True)
class RunStatus:
    """What a run's folder says; None (absent in JSON) for what it does not say.

    Attributes:
        run: the folder's name.
        status: one of `STATES`. lost: its process is gone without a word, and the same command
            goes on; unreadable, foreign: see ``problem``.
        age_s: since the last sign of life of its writer.
        eta_s: only while it runs.
        problem: what is wrong, in a sentence.
    """

    run: str
    status: str
    stage: str | None = None
    step: int | None = None
    num_iterations: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    age_s: float | None = None
    writer: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class LiveJob:
    """A job that the cluster of RAY_ADDRESS runs or is about to run."""

    job: str
    status: str
    age_s: float | None
    entrypoint: str


def main(argv: Sequence[str]) -> int:
    config = StatusConfig.parse(argv, "python -m jobs.status")
    home = storage.home()
    runs, problem = read_runs(home), None
    jobs: list[LiveJob] = []
    if os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_API_SERVER_ADDRESS"):
        try:
            jobs = live_jobs()
        except NanorayError as error:  # the runs can be told all the same
            problem = str(error)
    if config.json:
        found = {"home": home, "runs": [_known(r) for r in runs], "jobs": [_known(j) for j in jobs]}
        print(json.dumps(found | ({"problem": problem} if problem else {}), indent=1))
    else:
        _show(Console(highlight=False), home, runs, jobs, problem)
    return 1 if problem else 0


def read_runs(home: str) -> list[RunStatus]:
    """The runs of a home, live ones first, of the same status the last heard of first.

    Raises:
        NanorayError: the storage cannot be read.
    """
    root = storage.join(home, "runs")
    names = storage.list_names(root)
    with ThreadPoolExecutor(_READERS) as pool:
        runs = list(pool.map(lambda name: read_run(root, name), names))
    return sorted(runs, key=lambda r: (STATES.index(r.status), r.age_s or math.inf, r.run))


def read_run(root: str, name: str) -> RunStatus:
    """The status of ``root/name``, which may be anything at all."""
    folder = storage.join(root, name)
    try:
        lease = read_lease(folder)
        config = _read_object(storage.join(folder, "config.json"))
        summary = _read_object(storage.join(folder, "summary.json"))
        last = _last_record(storage.join(folder, "metrics.jsonl"))
        if lease is None and config is None:
            return RunStatus(name, "foreign", problem="no config.json: not a run of nanoray's")
        return _status(name, lease, config or {}, summary or {}, last)
    except NotADirectoryError:
        return RunStatus(name, "foreign", problem="a file, not a run")
    except Exception as error:  # every store has its own; one bad folder must not hide the others
        return RunStatus(name, "unreadable", problem=f"{type(error).__name__}: {error}"[:200])


def _status(
    name: str,
    lease: dict[str, Any] | None,
    config: dict[str, Any],
    summary: dict[str, Any],
    last: dict[str, Any],
) -> RunStatus:
    live = lease is not None and is_alive(lease)
    recorded = summary.get("status")
    if live:
        status = "running" if last else "starting"
    elif recorded == "finished" or (lease and lease.get("released") and recorded in STATES):
        status = str(recorded)
    else:
        status = "lost"
    heartbeat = _number((lease or {}).get("heartbeat"))
    step, horizon = _number(last.get("step")), _number(config.get("num_iterations"))
    tokens_per_s = _number(last.get("tokens_per_s"))
    return RunStatus(
        name,
        status,
        stage=_text(config.get("stage")),
        step=None if step is None else int(step),
        num_iterations=None if horizon is None else int(horizon),
        loss=_number(last.get("loss")),
        tokens_per_s=tokens_per_s if live else _number(summary.get("tokens_per_s")) or tokens_per_s,
        eta_s=_number(last.get("eta_s")) if live else None,
        age_s=None if heartbeat is None else max(0.0, time.time() - heartbeat),
        writer=f"{lease.get('host')}:{lease.get('pid')}" if lease and live else None,
        problem=_text(summary.get("error")) if status == "failed" else None,
    )


def live_jobs() -> list[LiveJob]:
    """What the cluster runs or is about to run, by ``ray job submit`` or by a driver.

    Raises:
        NanorayError: the cluster does not answer, or not to us.
    """
    from ray.job_submission import JobSubmissionClient

    mend = "check RAY_API_SERVER_ADDRESS, RAY_ADDRESS and the token of RAY_AUTH_TOKEN_PATH"
    with storage.explained("the cluster's jobs cannot be read", mend):
        listed = JobSubmissionClient().list_jobs()
    live = [job for job in listed if job.status in ("PENDING", "RUNNING")]
    return [
        LiveJob(
            str(job.submission_id or job.job_id),
            str(job.status.value).lower(),
            time.time() - job.start_time / 1000 if job.start_time else None,
            job.entrypoint,
        )
        for job in sorted(live, key=lambda job: job.start_time or 0)
    ]


def _read_object(uri: str) -> dict[str, Any] | None:
    """A file's JSON object, None where there is no file. Raises ValueError for anything else."""
    try:
        found = json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        return None
    if not isinstance(found, dict):
        raise ValueError(f"{uri.rsplit('/', 1)[-1]} holds no JSON object")
    return found


def _last_record(uri: str) -> dict[str, Any]:
    """The last step's record of a metrics file; empty where there is none."""
    try:
        with storage.open_read(uri) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:  # torn: the first by the cut, the last by a crash
            continue
        if isinstance(record, dict) and "loss" in record:
            return record
    return {}


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if known else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _known(row: RunStatus | LiveJob) -> dict[str, Any]:
    return {key: value for key, value in asdict(row).items() if value is not None}


def _show(
    console: Console,
    home: str,
    runs: Sequence[RunStatus],
    jobs: Sequence[LiveJob],
    problem: str | None,
) -> None:
    if runs:
        console.print(_table(runs))
    else:
        console.print(f"no runs under {home}", markup=False)
    for run in runs:
        if run.problem:
            console.print(f"{_printable(run.run)}: {_printable(run.problem)}", markup=False)
    for job in jobs:
        age = f" for {duration(job.age_s)}" if job.age_s is not None else ""
        what = _printable(job.entrypoint)
        console.print(f"job {job.job} {job.status}{age}: {what}", markup=False)
    if problem:
        console.print(f"error: {problem}", markup=False)


def _table(runs: Sequence[RunStatus]) -> Table:
    table = Table("run", "stage", "status", "step", "loss", "tok/s", "eta", "last seen")
    for run in runs:
        step = "" if run.step is None else f"{run.step:,}/{run.num_iterations or 0:,}"
        table.add_row(
            Text(_printable(run.run)),  # not markup
            Text(_printable(run.stage or "")),
            run.status,
            step,
            "" if run.loss is None else f"{run.loss:.4f}",
            "" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f}",
            "" if run.eta_s is None else duration(run.eta_s),
            "" if run.age_s is None else f"{duration(run.age_s)} ago",
        )
    return table


def _printable(text: str) -> str:
    """Without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else "�" for c in text)


if __name__ == "__main__":
    run_job(main)
