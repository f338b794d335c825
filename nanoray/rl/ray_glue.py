"""Reinforcement learning on a cluster: the learner's worker group beside the rollout pool."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from nanoray import fleet
from nanoray.config import parse_worker_range
from nanoray.lease import Lease
from nanoray.rl.plan import RlPlan, ledger_rules, sampler_settings
from nanoray.rl.pool import PoolClient, PoolSettings, close_pool, events_told, start_pool
from nanoray.rl.worker import RlWorker
from nanoray.train import ray_glue
from nanoray.train.worker import Hooks
from nanoray.train.world import World

_SAMPLER_BYTES = 2**30  # libraries of a rollout actor
_FLAGS = "--num-workers or --rollout-actors"


def with_gpus(plan: RlPlan, resources: dict[str, float]) -> RlPlan:
    """The plan with the GPUs of workers and rollout actors resolved: 1 where there are any."""
    plan = ray_glue.with_gpus(plan, resources)
    if plan.config["rollout_gpus"] is not None:
        return plan
    return plan.with_config(rollout_gpus=1.0 if resources.get("GPU", 0) else 0.0)


def needs(plan: RlPlan) -> list[fleet.Needs]:
    """What the learner's workers and the rollout actors need; estimates, on the high side."""
    config = plan.config
    actors, _high = parse_worker_range(config["rollout_actors"])
    cpus, gpus = float(config["rollout_cpus"]), float(config["rollout_gpus"] or 0)
    (learner,) = ray_glue.needs(plan)
    own = replace(
        learner,
        other_cpus=actors * cpus,
        other_gpus=actors * gpus,
        others="rollout actors",
        flags=_FLAGS,
    )
    rollouts = fleet.Needs(
        num_workers=actors,
        cpus_per_worker=cpus,
        gpus_per_worker=gpus,
        other_cpus=learner.num_workers * learner.cpus_per_worker,
        # The weights, a version that comes in, keys and values.
        memory_bytes_per_worker=plan.num_parameters * 4 * 3 + _SAMPLER_BYTES,
        object_store_bytes=max(64 * 2**20, plan.num_parameters * 4 * 3),
        paths=learner.paths,
        other_gpus=learner.num_workers * learner.gpus_per_worker,
        others="the learner",
        flags=_FLAGS,
    )
    return [own, rollouts]


def fit(plan: RlPlan, lease: Lease, watch: ray_glue.Watcher) -> dict[str, Any]:
    """Start the rollout pool, run the learner until it ends, end the pool.

    Args:
        watch: gets the learner's records, and from a thread ``{"event": text}`` of the pool.

    Raises:
        NanorayError: see `nanoray.train.ray_glue.fit`, and what the pool says.
    """
    config = plan.config
    low, high = parse_worker_range(config["rollout_actors"])
    # Not the cores shared among the actors: answers must not depend on how many there are.
    num_threads = max(1, int(config["rollout_cpus"]))
    pool = start_pool(
        sampler_settings(plan, num_threads).open,
        ledger_rules(plan),
        PoolSettings(low, high, bundle_deadline_s=config["rollout_deadline_s"]),
        run_dir=plan.run_dir,
        num_cpus=config["rollout_cpus"],
        num_gpus=float(config["rollout_gpus"] or 0),
    )
    try:
        with events_told(pool, lambda text: watch({"event": text})):
            return ray_glue.fit(plan, lease, watch, partial(_run, pool))
    finally:
        close_pool(pool)


def _run(pool: Any, plan: RlPlan, world: World, hooks: Hooks, start_step: int) -> dict[str, Any]:
    """What Ray Train runs in every worker of the learner."""
    attempt = world.gather(hooks.attempt)[0]
    worker = RlWorker(plan, world, hooks, start_step, PoolClient(pool, attempt))
    try:
        return worker.run()
    finally:
        worker.close()
