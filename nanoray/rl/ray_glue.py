"""Reinforcement learning on a cluster: the learner's worker group beside the rollout pool."""

from __future__ import annotations

from functools import partial
from typing import Any

from nanoray.config import parse_worker_range
from nanoray.lease import Lease
from nanoray.rl.plan import RlPlan, bundle_deadline_s, ledger_rules, sampler_settings
from nanoray.rl.pool import PoolClient, PoolSettings, close_pool, events_told, start_pool
from nanoray.rl.worker import RlWorker
from nanoray.train import ray_glue
from nanoray.train.worker import Hooks
from nanoray.train.world import World


def fit(plan: RlPlan, lease: Lease, watch: ray_glue.Watcher) -> dict[str, Any]:
    """Start the rollout pool, run the learner until it ends, end the pool.

    Args:
        watch: gets the learner's records, and from a thread ``{"event": text}`` of the pool.

    Raises:
        NanorayError: see `nanoray.train.ray_glue.fit`, and what the pool says.
    """
    config = plan.config
    low, high = parse_worker_range(config["rollout_actors"])
    gpus = float(config["rollout_gpus"] or 0)
    # Not the cores shared among the actors: answers must not depend on how many there are.
    num_threads = max(1, int(config["rollout_cpus"]))
    pool = start_pool(
        sampler_settings(plan, num_threads).open,
        ledger_rules(plan),
        PoolSettings(low, high, bundle_deadline_s=bundle_deadline_s(plan)),
        run_dir=plan.run_dir,
        num_cpus=config["rollout_cpus"],
        num_gpus=gpus,
    )
    try:
        with events_told(pool, lambda text: watch({"event": text})):
            feeders = {"CPU": low * config["rollout_cpus"], "GPU": low * gpus}
            return ray_glue.fit(plan, lease, watch, partial(_run, pool), feeders)
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
