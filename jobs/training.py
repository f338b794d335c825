"""What every training job does with its plan: check it, run it, tell how it ended."""

from __future__ import annotations

import importlib
import threading

from nanoray import storage
from nanoray.config import TrainConfig
from nanoray.errors import NanorayError
from nanoray.lease import Lease, LeaseLostError
from nanoray.train.record import check_resume, record_config, record_failure
from nanoray.train.run_plan import StreamRunPlan


def run_plan(plan: StreamRunPlan, config: TrainConfig) -> int:
    """Carry out a plan, or with ``--dry-run`` check all that can be checked; the exit code.

    Raises:
        NanorayError: see `check_resume`, `fleet.preflight` and `ray_glue.fit`.
    """
    finished = check_resume(plan)
    print("\n".join(plan.describe()), flush=True)
    if finished:
        print(f"run {plan.run} is finished: nothing to do (take another --run to train anew)")
        return 0
    return _dry_run(plan) if config.dry_run else _train(plan, config)


def _dry_run(plan: StreamRunPlan) -> int:
    from nanoray import fleet
    from nanoray.train import ray_glue

    storage.check_writable(plan.run_dir)
    if fleet.on_cluster():
        fleet.connect()
        import ray

        plan = ray_glue.with_gpus(plan, ray.cluster_resources())
        fleet.preflight(ray_glue.needs(plan))
    else:
        have = fleet.local_resources()
        plan = ray_glue.with_gpus(plan, have)
        fleet.check_resources(ray_glue.needs(plan), have, "this machine")
    print("dry run: configuration, data and resources are fine")
    return 0


def _train(plan: StreamRunPlan, config: TrainConfig) -> int:
    from jobs.progress import ProgressPrinter
    from nanoray import fleet

    storage.check_writable(plan.run_dir)
    lease = Lease(plan.run_dir)
    try:
        plan.prepare()
        # Seconds of imports, while Ray's own processes start.
        imports = threading.Thread(target=importlib.import_module, args=("nanoray.train.ray_glue",))
        imports.start()
        fleet.connect(dashboard=config.dashboard)
        imports.join()
        import ray

        from nanoray.train import ray_glue

        plan = ray_glue.with_gpus(plan, ray.cluster_resources())
        fleet.preflight(ray_glue.needs(plan))
        record_config(plan)
        with ProgressPrinter(plan.num_iterations) as printer:
            summary = ray_glue.fit(plan, lease, printer)
    except LeaseLostError:
        raise  # the run is another's: its folder is not ours to write
    except NanorayError as error:
        record_failure(plan, str(error))
        raise
    finally:
        lease.release()
    print(f"run {plan.run} {summary['status']}: {plan.run_dir}")
    return 0 if summary["status"] == "finished" else 1
