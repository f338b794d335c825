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


class Budget(Protocol[Plan]):
    """A room's module ``needs``."""

    def with_gpus(self, plan: Plan, resources: dict[str, float]) -> Plan:
        """The plan with what depends on the cluster's GPUs settled."""

    def needs(self, plan: Plan) -> list[Needs]:
        """What it needs of the cluster."""


class Glue(Protocol):
    """A room's module ``ray_glue``, which brings a kind of plan onto a cluster."""

    def fit(self, plan: Any, lease: Lease, watch: Watcher) -> dict[str, Any]:
        """Run it; the summary."""


def carry_out(plan: Plan, config: TrainConfig, room: str = "nanoray.train") -> int:
    """Carry out a plan, or with ``--dry-run`` check all that can be checked; the exit code.

    Args:
        room: holds a `Budget` and a `Glue`; by name, as they cost seconds to import.

    Raises:
        NanorayError: see `check_resume`, `fleet.preflight` and `ray_glue.fit`.
    """
    finished = check_resume(plan)
    print("\n".join(plan.describe()), flush=True)
    if finished:
        print(f"run {plan.run} is finished: nothing to do (take another --run to train anew)")
        return 0
    storage.check_writable(plan.run_dir)
    if not config.dry_run:
        return _train(plan, config, room)
    _dry_run(plan, room)
    print("dry run: configuration, data and resources are fine")
    return 0


def _dry_run(plan: RunPlan, room: str) -> None:
    from nanoray import fleet

    if not fleet.on_cluster():
        _check_machine(plan, room)
    else:
        fleet.connect()
        _plan, needs = _settle(plan, room)
        for one in needs:
            fleet.preflight(one)


def _check_machine(plan: RunPlan, room: str) -> None:
    """Refuse what this machine has not the resources for; a start of Ray would take seconds."""
    from nanoray import fleet

    budget: Budget[Any] = importlib.import_module(f"{room}.needs")
    have = fleet.local_resources()
    for needs in budget.needs(budget.with_gpus(plan, have)):
        fleet.check_resources(needs, have, "this machine")


def _settle(plan: Plan, room: str) -> tuple[Plan, list[Needs]]:
    """The plan for the connected cluster as it is now, and its needs."""
    import ray

    budget: Budget[Plan] = importlib.import_module(f"{room}.needs")
    plan = budget.with_gpus(plan, ray.cluster_resources())
    return plan, budget.needs(plan)


def _train(plan: Plan, config: TrainConfig, room: str) -> int:
    from jobs.progress import ProgressPrinter
    from nanoray import fleet

    if not fleet.on_cluster():
        _check_machine(plan, room)
    lease = Lease(plan.run_dir)
    try:
        plan.prepare()
        glue_module = f"{room}.ray_glue"
        imports = threading.Thread(target=importlib.import_module, args=(glue_module,))
        if not fleet.on_cluster():
            imports.start()  # seconds, while Ray's own processes start
        fleet.connect(dashboard=config.dashboard)
        room_found = fleet.when_there_is_room(lambda: _settle(plan, room), config.wait_for_nodes)
        with room_found as (plan, give_turn_back):
            glue: Glue = importlib.import_module(glue_module)
            lease.check()  # it may have taken long
            record_config(plan)
            with ProgressPrinter(plan.num_iterations) as printer:

                def watch(record: dict[str, Any]) -> None:
                    if "workers" in record:  # they have what they need
                        give_turn_back()
                    printer(record)

                summary = glue.fit(plan, lease, watch)
    except LeaseLostError:
        raise  # the run is another's: its folder is not ours to write
    except NanorayError as error:
        if not lease.lost:
            record_failure(plan, str(error))
        raise
    finally:
        lease.release()
    print(f"run {plan.run} {summary['status']}: {plan.run_dir}")
    return 0 if summary["status"] == "finished" else 1
