"""What a training run needs of a cluster. Apart from `ray_glue`, which takes seconds to import."""

from __future__ import annotations

from typing import TypeVar

from nanoray import fleet, storage
from nanoray.config import parse_worker_range
from nanoray.train.run_plan import RunPlan, StreamRunPlan

Plan = TypeVar("Plan", bound=RunPlan)
DATA_CPUS = 1  # at least, for tasks that tokenize and pack


def needs(plan: RunPlan) -> list[fleet.Needs]:
    """What a run's workers need of a cluster: estimates, on the high side."""
    low, _high = parse_worker_range(plan.config["num_workers"])
    model = plan.model_config
    gpus = float(plan.config["gpus_per_worker"] or 0)
    if gpus:  # the host holds a checkpoint's copy of weights and two moments, and libraries
        memory = plan.num_parameters * 4 * 3.5 + 2 * 2**30
    else:
        # Weights, gradients and two moments in fp32 with a half for what is in flight, and
        # about 40 activations of the model's width a layer and token in bf16.
        activations = plan.micro_tokens() * model.n_embd * model.n_layer * 80
        memory = plan.num_parameters * 4 * 4.5 + activations
    paths = (plan.run_dir, *plan.inputs())
    data_cpus, object_store = 0, 64 * 2**20
    if isinstance(plan, StreamRunPlan):
        data_cpus, object_store = DATA_CPUS, max(object_store, 8 * plan.unit_bytes())
    return [
        fleet.Needs(
            num_workers=low,
            cpus_per_worker=float(plan.config["cpus_per_worker"]),
            gpus_per_worker=gpus,
            other_cpus=data_cpus,
            memory_bytes_per_worker=int(memory),
            object_store_bytes=object_store,
            paths=tuple(path for path in paths if storage.is_local(path)),
            role="trainer",
            others_role="data",
        )
    ]


def with_gpus(plan: Plan, resources: dict[str, float]) -> Plan:
    """The plan with ``gpus_per_worker`` resolved: 1 where there are any GPUs."""
    if plan.config["gpus_per_worker"] is not None:
        return plan
    gpus = 1.0 if resources.get("GPU", 0) else 0.0
    return plan.with_config(gpus_per_worker=gpus)
