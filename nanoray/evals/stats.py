"""The statistics of accuracies."""

from __future__ import annotations

import math

_Z_95 = 1.959964  # two-sided 95 % of the normal distribution


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that of k samples, drawn from these without replacement, one is right.

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374): 1 - C(n-c, k) / C(n, k).
    """
    assert 0 <= num_correct <= num_samples
    assert 1 <= k <= num_samples
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def wilson_interval(accuracy: float, num_examples: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson 1927); holds near 0 and 1, too."""
    assert 0 <= accuracy <= 1
    assert num_examples > 0
    spread = _Z_95**2 / num_examples
    middle = (accuracy + spread / 2) / (1 + spread)
    half = math.sqrt(accuracy * (1 - accuracy) * spread + spread**2 / 4) / (1 + spread)
    # Rounding must not put the share outside of its own interval.
    return min(accuracy, max(0.0, middle - half)), max(accuracy, min(1.0, middle + half))


def centered(accuracy: float, baseline: float) -> float:
    """0 is guessing, 1 is all correct."""
    return (accuracy - baseline) / (1 - baseline)
