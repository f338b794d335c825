"""What reinforcement learning needs of a cluster: the learner's workers and the rollout actors."""

from __future__ import annotations

from dataclasses import replace

from nanoray import fleet
from nanoray.config import parse_worker_range
from nanoray.rl.plan import RlPlan
from nanoray.train import needs as training

_SAMPLER_BYTES = 2**30  # libraries of a rollout actor
_FLAGS = "--num-workers, --rollout-actors, --{0}-per-worker or --rollout-{0}"


def with_gpus(plan: RlPlan, resources: dict[str, float]) -> RlPlan:
    """The plan with the GPUs of workers and rollout actors resolved.

    1 each where there are any. A single one is shared: half of it is for the learner, the rest for
    the rollout actors.
    """
    config, gpus = plan.config, resources.get("GPU", 0)
    if config["gpus_per_worker"] is None and config["rollout_gpus"] is None and gpus == 1:
        actors = parse_worker_range(config["rollout_actors"])[1]
        return plan.with_config(gpus_per_worker=0.5, rollout_gpus=0.5 / actors)
    plan = training.with_gpus(plan, resources)
    if config["rollout_gpus"] is not None:
        return plan
    return plan.with_config(rollout_gpus=1.0 if gpus else 0.0)


def needs(plan: RlPlan) -> list[fleet.Needs]:
    """What the learner's workers and the rollout actors need; estimates, on the high side."""
    config = plan.config
    actors, _high = parse_worker_range(config["rollout_actors"])
    cpus, gpus = float(config["rollout_cpus"]), float(config["rollout_gpus"] or 0)
    (learner,) = training.needs(plan)
    own = replace(
        learner,
        other_cpus=actors * cpus,
        other_gpus=actors * gpus,
        others="rollout actors",
        flags=_FLAGS,
        others_role="rollout",
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
        role="rollout",
        others_role="trainer",
    )
    return [own, rollouts]
