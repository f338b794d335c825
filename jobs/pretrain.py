"""``python -m jobs.pretrain``: pretrain a model; the same run name goes on where it stopped."""

from __future__ import annotations

from collections.abc import Sequence

from nanoray import storage
from nanoray.config import PretrainConfig, run_job
from nanoray.errors import NanorayError
from nanoray.lease import Lease, LeaseLostError
from nanoray.train.plan import PretrainPlan, make_plan
from nanoray.train.record import check_resume, record_config, record_failure


def main(argv: Sequence[str]) -> int:
    config = PretrainConfig.parse(argv, "python -m jobs.pretrain")
    plan = make_plan(config)
    finished = check_resume(plan)
    print("\n".join(plan.describe()), flush=True)
    if finished:
        print(f"run {plan.run} is finished: nothing to do (take another --run to train anew)")
        return 0
    return dry_run(plan) if config.dry_run else train(plan, config)


def dry_run(plan: PretrainPlan) -> int:
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


def train(plan: PretrainPlan, config: PretrainConfig) -> int:
    from jobs.progress import ProgressPrinter
    from nanoray import fleet
    from nanoray.train import ray_glue

    storage.check_writable(plan.run_dir)
    lease = Lease(plan.run_dir)
    try:
        fleet.connect(dashboard=config.dashboard)
        import ray

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


if __name__ == "__main__":
    run_job(main)
