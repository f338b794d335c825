"""What the rollout pool and those who use it agree on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nanoray.rl.groups import Group


@dataclass(frozen=True)
class PoolSettings:
    """Sizes and deadlines.

    Attributes:
        low, high: the range in which the pool scales itself; it begins with `low`.
        bundle_deadline_s: an actor that takes longer for a bundle is taken for lost.
        start_deadline_s: likewise for its start; another start is tried then.
        place_deadline_s: how long places are waited for where no actor has one.
        window_s: how long the idle times are watched, at least, before the pool is scaled.
    """

    low: int
    high: int
    bundle_deadline_s: float = 600.0
    start_deadline_s: float = 300.0
    place_deadline_s: float = 3600.0
    window_s: float = 20.0


@dataclass(frozen=True)
class Taken:
    """What a step trains on.

    Attributes:
        groups: equally many samples each; the same, in the same order, for every worker. None
            where the learner is to stop.
        figures: of the pool, for the log.
    """

    groups: Sequence[Group]
    figures: Mapping[str, float]
