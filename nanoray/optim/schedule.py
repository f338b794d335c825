"""What changes from step to step: learning rate, Muon's momentum, Muon's weight decay.

The rules are nanochat's. Where two phases of a short run overlap, nanochat lets the earlier one
win and then jumps; here the phases are joined by taking the smaller of the two, which is
continuous and equals nanochat's rule in every run long enough for the phases not to meet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nanoray.optim.groups import Recipe, check_recipe


def lr_multiplier(
    step: int,
    *,
    num_iterations: int,
    warmup_steps: int,
    warmdown_ratio: float,
    final_lr_frac: float,
) -> float:
    """Factor on every learning rate: linear up, constant, linear down to `final_lr_frac`.

    Step 0 takes 1/warmup_steps of the rate (never zero); the last `warmdown_ratio` of the run
    falls towards `final_lr_frac`, which step `num_iterations` (one past the last) would have.
    """
    up = (step + 1) / warmup_steps if warmup_steps > 0 else 1.0
    fraction = _warmdown_fraction(step, num_iterations, warmdown_ratio)
    down = 1.0 + fraction * (final_lr_frac - 1.0)
    return min(up, 1.0, down)


def muon_momentum(
    step: int, *, num_iterations: int, warmdown_ratio: float, recipe: Recipe
) -> float:
    """Muon's momentum. February: .85 to .95 over 300 steps, then constant.

    July: .85 to .97 over 400 steps, and .97 to .90 through the warmdown of the learning rate;
    the smaller of the two ramps counts, so a short run turns down where they cross.
    """
    if recipe == "february":
        return 0.85 + (0.95 - 0.85) * min(step / 300, 1.0)
    up = 0.85 + (0.97 - 0.85) * min(step / 400, 1.0)
    down = 0.97 + (0.90 - 0.97) * _warmdown_fraction(step, num_iterations, warmdown_ratio)
    return min(up, down)


def weight_decay_multiplier(step: int, *, num_iterations: int, recipe: Recipe) -> float:
    """Factor on Muon's weight decay: to zero along a cosine (July) or a line (February)."""
    progress = min(step / num_iterations, 1.0)
    if recipe == "february":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _warmdown_fraction(step: int, num_iterations: int, warmdown_ratio: float) -> float:
    """How far through the warmdown a step is: 0 before it, 1 at the end of the run."""
    warmdown_steps = round(warmdown_ratio * num_iterations)
    if warmdown_steps == 0:
        return 0.0
    fraction = (step - (num_iterations - warmdown_steps)) / warmdown_steps
    return min(max(fraction, 0.0), 1.0)


@dataclass(frozen=True)
class Schedule:
    """The three schedules of one run. The defaults are the July recipe's pretraining values.

    Raises:
        ValueError: a value outside its range.
    """

    num_iterations: int
    """Steps of the whole run."""
    warmup_steps: int = 40
    """Steps in which the learning rate grows to its full value; 0 for none."""
    warmdown_ratio: float = 0.65
    """Share of the run, at its end, in which the learning rate falls."""
    final_lr_frac: float = 0.05
    """Share of the learning rate that is left at the end."""
    recipe: Recipe = "july"

    def __post_init__(self) -> None:
        check_recipe(self.recipe)
        if self.num_iterations < 1 or self.warmup_steps < 0:
            raise ValueError(
                f"num_iterations must be at least 1 and warmup_steps at least 0, "
                f"not {self.num_iterations} and {self.warmup_steps}"
            )
        if not (0.0 <= self.warmdown_ratio <= 1.0 and 0.0 <= self.final_lr_frac <= 1.0):
            raise ValueError(
                f"warmdown_ratio and final_lr_frac must lie in [0, 1], "
                f"not {self.warmdown_ratio} and {self.final_lr_frac}"
            )

    def at(self, step: int) -> tuple[float, float, float]:
        """(lr_multiplier, muon_momentum, weight_decay_multiplier) of a step, counted from 0."""
        return (
            lr_multiplier(
                step,
                num_iterations=self.num_iterations,
                warmup_steps=self.warmup_steps,
                warmdown_ratio=self.warmdown_ratio,
                final_lr_frac=self.final_lr_frac,
            ),
            muon_momentum(
                step,
                num_iterations=self.num_iterations,
                warmdown_ratio=self.warmdown_ratio,
                recipe=self.recipe,
            ),
            weight_decay_multiplier(step, num_iterations=self.num_iterations, recipe=self.recipe),
        )
