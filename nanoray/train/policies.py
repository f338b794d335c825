"""What Ray Train decides by: how many workers there may be, whether they have the GPUs that are
reserved for them, and whether a failure is beyond help.

Ray Train 2.60 has no public way to choose these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.torch.config import TorchConfig, _TorchBackend
from ray.train.v2._internal.execution.failure_handling import (
    DefaultFailurePolicy,
    FailureDecision,
)
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from nanoray import fleet
from nanoray.model.precision import check_reserved_gpu


class PlacedPolicy(ElasticScalingPolicy):
    """Elastic training that counts the places where its workers may go.

    Ray Train 2.60 counts those of all nodes, whatever their labels, and leaves no CPU for others:
    after the loss of a node it would ask for places that are not its own, or starve its own data.

    Args:
        spare: logical resources that are left to other workers.
        spare_role: of the nodes where these run.
    """

    def __init__(
        self, scaling: ScalingConfig, spare: Mapping[str, float], spare_role: fleet.Role
    ) -> None:
        super().__init__(scaling)
        self._spare, self._spare_role = spare, spare_role

    def _count_possible_workers(self, reserved: Any) -> int:
        nodes = fleet.living_nodes()
        trainers = fleet.nodes_for("trainer", nodes)
        selector = self.scaling_config.label_selector
        if selector and not fleet.label_selector("trainer"):
            return 0  # the last of them is gone, and the workers can be placed nowhere else
        others = fleet.nodes_for(self._spare_role, nodes)
        elsewhere = [node for node in others if node not in trainers]
        wanted = self.scaling_config._resources_per_worker_not_none
        places = fleet.count_places(trainers, wanted)
        for kind, amount in self._spare.items():
            if amount and wanted.get(kind) and _total(elsewhere, kind) < amount:
                left = _total(trainers, kind) - amount
                places = min(places, max(0, int(left / wanted[kind] + 1e-9)))
        return min(places, super()._count_possible_workers(reserved))


def _total(nodes: Sequence[dict[str, Any]], kind: str) -> float:
    return sum(float(node["Resources"].get(kind, 0)) for node in nodes)


class VerdictPolicy(DefaultFailurePolicy):
    """Tries again as often as Ray Train does, but not after a mistake that no restart mends.

    Args:
        board: where the workers say so, see `fleet.start_board`.
    """

    def __init__(self, config: FailureConfig, board: Any) -> None:
        super().__init__(config)
        self._board = board

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        try:
            beyond_help = ray.get(self._board.failed.remote(), timeout=10)
        except ray.exceptions.RayError:  # its driver will tell
            beyond_help = False
        if beyond_help:
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class _CheckedBackend(_TorchBackend):
    """Ray Train's, after a look at the GPUs: what NCCL says without one tells nobody anything."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if worker_group.get_resources_per_worker().get("GPU"):
            worker_group.execute(_check_gpu, backend_config.board)
        super().on_start(worker_group, backend_config)


def _check_gpu(board: Any) -> None:
    """Called in every worker."""
    with fleet.mistakes_told(board):
        check_reserved_gpu()


@dataclass
class _CheckedConfig(TorchConfig):
    board: Any = None

    @property
    def backend_cls(self) -> type[_CheckedBackend]:
        return _CheckedBackend


class Trainer(TorchTrainer):
    """Ray Train's, with what is above. ``scaling_policy``: None for a fixed number."""

    scaling_policy: PlacedPolicy | None = None

    def __init__(self, board: Any, *args: Any, **options: Any) -> None:
        super().__init__(*args, torch_config=_CheckedConfig(board=board), **options)
        self._board = board

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        given = options["failure_policy"]
        options["failure_policy"] = VerdictPolicy(given.failure_config, self._board)
        if self.scaling_policy:
            options["scaling_policy"] = self.scaling_policy
        return super()._initialize_and_run_controller(**options)
