"""Means over seeds with 95 % intervals, and differences paired by seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval by Student's t; the interval of a single value is NaN."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def half_width(self) -> float:
        """The distance from the mean to either end."""
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


def mean(values: Sequence[float]) -> Estimate:
    """The mean of the values, one per seed.

    Raises
    ------
    ValueError
        There is no value.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        raise ValueError("a mean needs at least one value, got none")
    centre = float(x.mean())
    if x.size == 1:
        return Estimate(centre, float("nan"), float("nan"), 1)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, x.size - 1) * stats.sem(x))
    return Estimate(centre, centre - half, centre + half, int(x.size))


def paired_difference(by_seed: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate:
    """The mean of value − baseline over the seeds that both have.

    Effects that the runs of a seed share (initial network, batches, data) cancel in it, so variants are compared by it.

    Raises
    ------
    ValueError
        They have no seed in common.
    """
    seeds = sorted(by_seed.keys() & baseline.keys())
    if not seeds:
        raise ValueError("a paired difference needs a seed that both sides have, got none")
    return mean([by_seed[seed] - baseline[seed] for seed in seeds])
