"""What every training job does with its plan: check it, run it, tell how it ended."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from nanoray import storage
from nanoray.config import TrainConfig
from nanoray.errors import NanorayError
from nanoray.lease import Lease, LeaseLostError
from nanoray.train.record import check_resume, record_config, record_failure
from nanoray.train.run_plan import RunPlan

if TYPE_CHECKING:
    from nanoray.fleet import Needs

Plan = TypeVar("Plan", bound=RunPlan)
Watcher = Callable[[dict[str, Any]], None]


class Glue(Protocol[Plan]):
    """A module that brings a kind of plan onto a cluster."""

    def with_gpus(self, plan: Plan, resources: dict[str, float]) -> Plan:
        """The plan with what depends on the cluster's GPUs settled."""

    def needs(self, plan: Plan) -> list[Needs]:
        """What it needs of the cluster."""

    def fit(self, plan: Plan, lease: Lease, watch: Watcher) -> dict[str, Any]:
        """Run it; the summary."""


def carry_out(plan: Plan, config: TrainConfig, glue_module: str = "nanoray.train.ray_glue") -> int:
    """Carry out a plan, or with ``--dry-run`` check all that can be checked; the exit code.

    Args:
        glue_module: a `Glue`, by name: it costs seconds to import.

    Raises:
        NanorayError: see `check_resume`, `fleet.preflight` and `ray_glue.fit`.
    """
    finished = check_resume(plan)
    print("\n".join(plan.describe()), flush=True)
    if finished:
        print(f"run {plan.run} is finished: nothing to do (take another --run to train anew)")
        return 0
    return _dry_run(plan, glue_module) if config.dry_run else _train(plan, config, glue_module)


def _dry_run(plan: Plan, glue_module: str) -> int:
    from nanoray import fleet

    glue: Glue[Plan] = importlib.import_module(glue_module)
    storage.check_writable(plan.run_dir)
    if fleet.on_cluster():
        fleet.connect()
        _preflight(plan, glue)
    else:
        have = fleet.local_resources()
        for needs in glue.needs(glue.with_gpus(plan, have)):
            fleet.check_resources(needs, have, "this machine")
    print("dry run: configuration, data and resources are fine")
    return 0


def _preflight(plan: Plan, glue: Glue[Plan]) -> Plan:
    """The plan for the connected cluster, which has what it needs."""
    import ray

    from nanoray import fleet

    plan = glue.with_gpus(plan, ray.cluster_resources())
    for needs in glue.needs(plan):
        fleet.preflight(needs)
    return plan


def _train(plan: Plan, config: TrainConfig, glue_module: str) -> int:
    from jobs.progress import ProgressPrinter
    from nanoray import fleet

    storage.check_writable(plan.run_dir)
    lease = Lease(plan.run_dir)
    try:
        plan.prepare()
        # Seconds of imports, while Ray's own processes start.
        imports = threading.Thread(target=importlib.import_module, args=(glue_module,))
        imports.start()
        fleet.connect(dashboard=config.dashboard)
        imports.join()
        glue: Glue[Plan] = importlib.import_module(glue_module)
        plan = _preflight(plan, glue)
        record_config(plan)
        with ProgressPrinter(plan.num_iterations) as printer:
            summary = glue.fit(plan, lease, printer)
    except LeaseLostError:
        raise  # the run is another's: its folder is not ours to write
    except NanorayError as error:
        record_failure(plan, str(error))
        raise
    finally:
        lease.release()
    print(f"run {plan.run} {summary['status']}: {plan.run_dir}")
    return 0 if summary["status"] == "finished" else 1
