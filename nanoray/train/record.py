"""What a run's folder says about it: its configuration, and how it ended."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanoray import storage
from nanoray.checkpoint import Checkpoint, DamagedCheckpointError, list_steps
from nanoray.errors import NanorayError
from nanoray.train.run_plan import RunPlan
from nanoray.train.watch import Progress

# A run resumed under its name may change these; anything else would change what it computes.
MAY_CHANGE = {
    "config", "dry_run", "device_batch_size", "eval_every", "eval_tokens", "sample_every",
    "save_every", "keep_checkpoints", "log_every", "num_workers", "cpus_per_worker",
    "gpus_per_worker", "max_failures", "wait_for_nodes", "compile_mode", "wandb", "dashboard",
    "spike_factor",
    "chatcore_every", "chatcore_tasks", "chatcore_max_cat", "chatcore_max_sample",
    "chatcore_max_tokens", "rollout_actors", "rollout_gpus", "rollout_deadline_s",
    "reward_deadline_s", "eval_examples", "eval_samples",
}  # fmt: skip
# And these, one way: what an error message offers as a mend. Where nothing is bad, both compute
# the same; back again, a run would fail at what it has skipped.
MAY_BECOME = {("on_bad_shard", "fail", "skip")}


def check_resume(plan: RunPlan) -> bool:
    """Whether the run is finished already.

    Raises:
        NanorayError: the run exists and would compute something else now (shows what).
    """
    with _readable(plan.run_dir):
        old = begun_with(plan.run_dir)
        if old is None:
            return False  # nothing that could be taken up
        lines = difference(old, plan)
        status = _read_summary(plan).get("status")
    if lines:
        raise NanorayError(
            f"run {plan.run} exists with another configuration; take another --run, or give the "
            f"old values:\n  " + "\n  ".join(lines)
        )
    return bool(status == "finished")


def begun_with(run_dir: str) -> dict[str, Any] | None:
    """The plan that a run was begun with; None where no checkpoint could be taken up.

    Where ``config.json`` is missing, that of the newest checkpoint whose ``meta.json`` is whole.

    Raises:
        NanorayError: what there is cannot be read.
    """
    root = storage.join(run_dir, "checkpoints")
    steps = list_steps(root)
    uri = storage.join(run_dir, "config.json")
    with _readable(run_dir):
        if steps and storage.exists(uri):
            config: dict[str, Any] = json.loads(storage.read_bytes(uri))
            return config
        for step in reversed(steps):
            try:
                with Checkpoint(root, step) as checkpoint:
                    saved: dict[str, Any] = checkpoint.meta["plan"]
                    return saved
            except DamagedCheckpointError:
                continue  # the one before it is what will be taken up
    return None


@contextlib.contextmanager
def _readable(run_dir: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, AttributeError) as error:
        raise NanorayError(
            f"{run_dir} holds an unreadable config.json, summary.json or checkpoint "
            f"({error}); take another --run, or remove that folder"
        ) from error


def _read_summary(plan: RunPlan) -> dict[str, Any]:
    uri = storage.join(plan.run_dir, "summary.json")
    if not storage.exists(uri):
        return {}
    summary: dict[str, Any] = json.loads(storage.read_bytes(uri))
    return summary


def difference(old: dict[str, Any], plan: RunPlan) -> list[str]:
    """What a resumed run would compute differently, one line a key."""
    lines = []
    new = plan.to_dict()
    for key in sorted(set(old["config"]) | set(new["config"])):
        before, after = old["config"].get(key), new["config"].get(key)
        allowed = key in MAY_CHANGE or (key, before, after) in MAY_BECOME
        if before != after and not allowed:
            lines.append(f"--{key.replace('_', '-')}: was {before}, is {after}")
    for key, what in plan.FIXED.items():
        # Another corpus (or mixture) is said by its flag already.
        if old.get(key) != new.get(key) and not (key in plan.FOLLOWS_FLAGS and lines):
            lines.append(f"the {what} has changed since the run began")
    return lines


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on, and the git commit where there is one."""
    found = {}
    for name in ("torch", "ray", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    # An image has no git, nor a commit.
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.run(command, capture_output=True, text=True, check=True)
        found["git"] = commit.stdout.strip()
    return found


def record_config(plan: RunPlan) -> None:
    """Write the run's ``config.json``: the resolved plan and what it runs on."""
    content = {"stage": plan.stage, **plan.to_dict(), "versions": versions(), "time": time.time()}
    uri = storage.join(plan.run_dir, "config.json")
    storage.write_text(uri, json.dumps(content, indent=1) + "\n")


def record_failure(plan: RunPlan, error: str) -> None:
    """Say in ``summary.json`` that the run failed, and why; what it had reached stays."""
    with contextlib.suppress(OSError, ValueError):
        figures = {"run": plan.run, "stage": plan.stage, **_read_summary(plan)}
        figures |= {"status": "failed", "error": error}
        record_summary(plan, figures)


def record_samples(plan: RunPlan, step: int, text: str) -> None:
    """Append to ``samples.md``; a resumed run takes the place of what it makes again."""
    uri = storage.join(plan.run_dir, "samples.md")
    before = storage.read_text(uri) if storage.exists(uri) else f"# Samples of {plan.run}\n"
    kept = before.split(f"\n## Step {step}\n")[0].rstrip("\n")
    storage.write_text(uri, f"{kept}\n\n{text}")


def summary(
    plan: RunPlan,
    progress: Progress,
    status: str,
    mfu: float,
    peak_memory_bytes: int,
    own_metrics: dict[str, Any],
) -> dict[str, Any]:
    """The figures of a run as they stand; None where there are none yet."""
    return {
        "run": plan.run,
        "stage": plan.stage,
        "status": status,
        "step": progress.step,
        "num_iterations": plan.num_iterations,
        "params": plan.num_parameters,
        "tokens": progress.tokens,
        "flops": progress.tokens * plan.flops_per_token,
        "train_s": progress.train_s,
        "tokens_per_s": progress.tokens / progress.train_s if progress.train_s else 0.0,
        "mfu": mfu,
        "peak_memory_bytes": peak_memory_bytes,
        "loss": progress.loss,
        "val_bpb": progress.val_bpb,
        "min_val_bpb": progress.min_val_bpb,
        "metrics": own_metrics,
    }


def record_summary(plan: RunPlan, figures: dict[str, Any]) -> None:
    """Write ``summary.json``; what was not measured is absent."""
    known = {key: value for key, value in figures.items() if value is not None}
    uri = storage.join(plan.run_dir, "summary.json")
    storage.write_text(uri, json.dumps(known, indent=1) + "\n")
