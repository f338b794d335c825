"""``python -m jobs.rl``: practise a task; ``status`` and ``scale`` look after a running one."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.training import carry_out
from nanoray import storage
from nanoray.config import RlConfig, RlScaleConfig, RlStatusConfig, run_job
from nanoray.errors import NanorayError
from nanoray.rl.plan import make_rl_plan
from nanoray.train.base_run import name_after

_STALE_S = 15.0  # a status that is older is of a run that is over, or lost


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] == "status":
        flags = _flags(argv[1:], ("run",))
        return status(RlStatusConfig.parse(flags, "python -m jobs.rl status"))
    if argv and argv[0] == "scale":
        flags = _flags(argv[1:], ("run", "actors"))
        return scale(RlScaleConfig.parse(flags, "python -m jobs.rl scale"))
    config = RlConfig.parse(argv, "python -m jobs.rl")
    return carry_out(make_rl_plan(config), config, "nanoray.rl")


def _flags(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """``mine 6`` as ``--run=mine --actors=6``: the words before the first flag, by their place."""
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    named = [f"--{name}={word}" for name, word in zip(names, words[:count])]
    return [*named, *words[len(named) :]]


def status(config: RlStatusConfig) -> int:
    """Print what everybody is doing now."""
    run = _run(config)
    found = _read_status(run)
    age_s = _ago_s(found)
    console = Console(highlight=False)
    alive = "" if age_s < _STALE_S else f" (last sign of life {age_s:,.0f} s ago)"
    if found["error"]:
        alive = f" (over: {found['error']})"
    queue, counts, learner = found["queue"], found["counts"], found["learner"]
    console.print(
        f"run {run}{alive}: next step {found['step']}, weights of version "
        f"{found['version']}, learner {learner['state']} for {learner['age_s']:.0f} s",
        markup=False,
    )
    waited, trained = learner.get("waiting_s", 0.0), learner.get("training_s", 0.0)
    if waited + trained:
        console.print(f"learner: idle {waited / (waited + trained):.0%} of its time so far")
    states = [f"{number} {state.replace('_', ' ')}" for state, number in queue.items()]
    events = [f"{number} {what.replace('_', ' ')}" for what, number in counts.items()]
    console.print(f"groups: {', '.join(states)}; so far {', '.join(events)}")
    table = Table("actor", "doing", "for", "prompts", "version", "tokens", "idle")
    for actor in found["actors"]:
        spent = actor.get("idle_s", 0.0), actor.get("busy_s", 0.0)
        idle = f"{spent[0] / sum(spent):.0%}" if sum(spent) else ""
        doing = actor["state"] + (", leaving" if actor["leaving"] else "")
        table.add_row(
            f"{actor['id']} (pid {actor.get('pid', '?')})",
            doing,
            f"{actor['age_s']:.0f} s",
            actor["prompts"],
            str(actor["version"]),
            f"{actor['tokens']:,}",
            idle,
        )
    console.print(table)
    for event in found["events"][-5:]:
        console.print(f"{_ago_s(event):,.0f} s ago: {event['text']}", markup=False)
    return 0


def scale(config: RlScaleConfig) -> int:
    """Have the pool of a running job get another size."""
    from nanoray.rl.pool import write_scale

    run = _run(config)
    found = _read_status(run)
    age_s = _ago_s(found)
    if found["error"] or age_s > _STALE_S:
        why = found["error"] or f"its last sign of life was {age_s:,.0f} s ago"
        size = config.actors or "MIN:MAX"
        raise NanorayError(
            f"run {run} is not running ({why}); start it with --rollout-actors {size}"
        )
    write_scale(storage.run_dir(run), config.actors)
    what = (
        f"have {config.actors} rollout actors"
        if config.actors
        else "scale its rollout pool by itself"
    )
    print(f"run {run} is told to {what}")
    return 0


def _ago_s(written: dict[str, Any]) -> float:
    """Since something was written down, perhaps by another machine's clock."""
    return max(0.0, time.time() - float(written["time"]))


def _run(config: RlStatusConfig) -> str:
    """The run that is meant, by the rule that named it."""
    return name_after(config.from_run, config.run, "rl") if config.from_run else config.run or ""


def _read_status(run: str) -> dict[str, Any]:
    from nanoray.rl.pool import STATUS_FILE

    uri = storage.join(storage.run_dir(storage.check_name(run, "run")), STATUS_FILE)
    try:
        found: dict[str, Any] = json.loads(storage.read_text(uri))
    except FileNotFoundError:
        raise NanorayError(
            f"there is no {uri}: run {run} has no rollout pool (yet); it is written within seconds "
            f"of its start"
        ) from None
    return found


if __name__ == "__main__":
    run_job(main)
