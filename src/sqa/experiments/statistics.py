"""Means with 95 % intervals, and differences paired by seed (Student's t). One run gives no interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# two-sided 95 % quantiles of Student's t for 1..30 degrees of freedom; beyond, the normal's is 2 % off at most
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; `half_width` of its 95 % interval, None from a single seed."""

    mean: float
    half_width: float | None
    runs: int

    @property
    def established(self) -> bool:
        """Whether the interval leaves out zero; never from a single seed."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def summarise(values: Sequence[float]) -> Estimate:
    """Mean and interval of at least one value."""
    count = len(values)
    mean = statistics.fmean(values)
    if count < 2:
        return Estimate(mean, None, count)
    quantile = _T[count - 2] if count - 2 < len(_T) else 1.96
    return Estimate(mean, quantile * statistics.stdev(values) / math.sqrt(count), count)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """values - baseline over the seeds that both have; None where they share none."""
    shared = sorted(values.keys() & baseline.keys())
    return summarise([values[seed] - baseline[seed] for seed in shared]) if shared else None
