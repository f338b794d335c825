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

_STALE_S = 15.0  # a status that is older is of a run that is over, or lost


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] == "status":
        return status(RlStatusConfig.parse(argv[1:], "python -m jobs.rl status"))
    if argv and argv[0] == "scale":
        return scale(RlScaleConfig.parse(argv[1:], "python -m jobs.rl scale"))
    config = RlConfig.parse(argv, "python -m jobs.rl")
    return carry_out(make_rl_plan(config), config, "nanoray.rl.ray_glue")


def status(config: RlStatusConfig) -> int:
    """Print what everybody is doing now."""
    found = _read_status(config.run)
    age_s = time.time() - found["time"]
    console = Console(highlight=False)
    alive = "" if age_s < _STALE_S else f" (last sign of life {age_s:,.0f} s ago)"
    if found["error"]:
        alive = f" (over: {found['error']})"
    queue, counts, learner = found["queue"], found["counts"], found["learner"]
    console.print(
        f"run {config.run}{alive}: next step {found['step']}, weights of version "
        f"{found['version']}, learner {learner['state']} for {learner['age_s']:.0f} s",
        markup=False,
    )
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
        console.print(f"{time.time() - event['time']:,.0f} s ago: {event['text']}", markup=False)
    return 0


def scale(config: RlScaleConfig) -> int:
    """Have the pool of a running job get another size."""
    from nanoray.rl.pool import write_scale

    found = _read_status(config.run)
    age_s = time.time() - found["time"]
    if found["error"] or age_s > _STALE_S:
        why = found["error"] or f"its last sign of life was {age_s:,.0f} s ago"
        raise NanorayError(
            f"run {config.run} is not running ({why}); start it with "
            f"--rollout-actors {config.actors}"
        )
    write_scale(storage.run_dir(config.run), config.actors)
    print(f"run {config.run} is told to have {config.actors} rollout actors")
    return 0


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
