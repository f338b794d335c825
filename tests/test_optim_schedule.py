"""Schedules: tables of the recipe, and continuity for every run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoray.optim.schedule import Schedule


def test_july_table_of_a_long_run() -> None:
    schedule = Schedule(num_iterations=5568)  # d24 at ratio 8; the warmdown starts at 1949
    at = {step: schedule.at(step) for step in (0, 19, 39, 200, 400, 1949, 3759, 5568)}
    assert at[0][0] == pytest.approx(1 / 40)
    assert at[19][0] == pytest.approx(0.5)
    assert at[39][0] == at[400][0] == at[1949][0] == 1.0
    progress = (3759 - 1949) / 3619
    assert at[3759][0] == pytest.approx(1 - 0.95 * progress)
    assert at[5568][0] == pytest.approx(0.05)
    assert at[0][1] == pytest.approx(0.85)
    assert at[200][1] == pytest.approx(0.91)
    assert at[400][1] == at[1949][1] == pytest.approx(0.97)
    assert at[3759][1] == pytest.approx(0.97 - 0.07 * progress)
    assert at[5568][1] == pytest.approx(0.90)
    assert at[0][2] == 1.0
    assert at[3759][2] == pytest.approx((1 + math.cos(math.pi * 3759 / 5568)) / 2)
    assert at[5568][2] == pytest.approx(0.0)


def test_february_table() -> None:
    schedule = Schedule(
        1000, warmup_steps=0, warmdown_ratio=0.5, final_lr_frac=0.0, recipe="february"
    )
    assert schedule.at(0) == pytest.approx((1.0, 0.85, 1.0))
    assert schedule.at(150) == pytest.approx((1.0, 0.90, 0.85))
    assert schedule.at(500) == pytest.approx((1.0, 0.95, 0.5))
    assert schedule.at(750) == pytest.approx((0.5, 0.95, 0.25))
    assert schedule.at(1000) == pytest.approx((0.0, 0.95, 0.0))


schedules = st.builds(
    Schedule,
    num_iterations=st.integers(1, 3000),
    warmup_steps=st.integers(0, 100),
    warmdown_ratio=st.floats(0, 1),
    final_lr_frac=st.floats(0, 1),
    recipe=st.sampled_from(["july", "february"]),
)


@given(schedules, st.integers(0, 3000))
def test_continuous_and_bounded(schedule: Schedule, step: int) -> None:
    lr, momentum, decay = schedule.at(step)
    next_lr, next_momentum, next_decay = schedule.at(step + 1)
    steps = schedule.num_iterations
    warmdown_steps = round(schedule.warmdown_ratio * steps)
    ramp = 1 / max(warmdown_steps, 1)
    assert 0.0 <= lr <= 1.0
    assert 0.85 - 1e-9 <= momentum <= 0.97 + 1e-9
    assert 0.0 <= decay <= 1.0
    assert abs(next_lr - lr) <= max(ramp, 1 / max(schedule.warmup_steps, 1)) + 1e-9
    assert abs(next_momentum - momentum) <= max(0.07 * ramp, 0.1 / 300) + 1e-9
    assert 0 <= decay - next_decay <= 1.6 / steps + 1e-9  # pi/2, the cosine's steepest slope


@given(st.integers(0, 5000))
def test_july_momentum_is_nanochats_where_phases_do_not_meet(step: int) -> None:
    num_iterations, start = 5000, 1750
    if step < 400:
        expected = 0.85 + 0.12 * step / 400
    else:
        expected = 0.97 - 0.07 * max(step - start, 0) / (num_iterations - start)
    assert Schedule(num_iterations).at(step)[1] == pytest.approx(expected)


@pytest.mark.parametrize(
    "bad",
    [
        {"num_iterations": 0},
        {"num_iterations": 5, "warmup_steps": -1},
        {"num_iterations": 5, "warmdown_ratio": 1.5},
        {"num_iterations": 5, "final_lr_frac": -0.1},
        {"num_iterations": 5, "recipe": "march"},
    ],
)
def test_bad_values_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=r"must|unknown"):
        Schedule(**bad)
