"""Means with 95 % intervals, and differences paired by seed (Student's t). One run gives no interval."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

# two-sided 95 % quantiles of Student's t for 1..30 degrees of freedom
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
    # beyond the table the first term of the Cornish-Fisher expansion, (z**3 + z) / 4, is right to 0.2 %
    quantile = _T[count - 2] if count - 2 < len(_T) else 1.95996 + 2.3723 / (count - 1)
    return Estimate(mean, quantile * statistics.stdev(values) / math.sqrt(count), count)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """values - baseline over the seeds that both have; None where they share none."""
    shared = sorted(values.keys() & baseline.keys())
    return summarise([values[seed] - baseline[seed] for seed in shared]) if shared else None


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """The baseline's time to reach a variant's loss over the variant's time, from `runs` paired seeds.

    `ratio`: the geometric mean over seeds. `low` to `high`: its 95 % interval (None from a single seed). If the ratio
    is not known it is None, and `why` is the reason. If the baseline never reaches the loss, the ratio is above
    `more_than`, by the baseline's longest runs.
    """

    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    runs: int
    why: str | None = None
    more_than: float | None = None


NEVER = "never reached"
"""The baseline's longest run ends above the loss."""

EXTRAPOLATED = "above GQA's runs"
"""The baseline's shortest run ends below the loss, so no complete training shows when the loss is reached."""

Curve = Sequence[tuple[float, float]]
"""(seconds, final loss) of complete runs, the shortest first."""


def time_to_reach(loss: float, curve: Curve) -> float | str:
    """Seconds of a run that would end at `loss`, which is taken as linear in log time between the curve's points.

    NEVER or EXTRAPOLATED if the points do not enclose it.
    """
    if loss > curve[0][1]:
        return EXTRAPOLATED
    for (start, above), (end, below) in pairwise(curve):
        if above >= loss >= below:
            share = (above - loss) / (above - below) if above > below else 0.0
            return math.exp(math.log(start) + share * math.log(end / start))
    return curve[0][0] if loss == curve[0][1] else NEVER


def effective_speedup(
    losses: Mapping[int, float], seconds: Mapping[int, float], baseline: Mapping[int, Curve]
) -> Speedup | None:
    """The speed-up of a variant that reaches `losses` in `seconds` (both by seed); None without a common seed.

    If the baseline's curve of one seed does not enclose its loss, the ratio is unknown.
    """
    shared = sorted(losses.keys() & baseline.keys())
    if not shared:
        return None
    times = [time_to_reach(losses[seed], baseline[seed]) for seed in shared]
    if count := times.count(EXTRAPOLATED):
        return Speedup(runs=len(times), why=EXTRAPOLATED + _of_seeds(count, len(times)))
    if count := times.count(NEVER):
        bounds = [
            (baseline[seed][-1][0] if time == NEVER else float(time)) / seconds[seed]
            for seed, time in zip(shared, times, strict=True)
        ]
        return Speedup(runs=len(times), why=NEVER + _of_seeds(count, len(times)), more_than=min(bounds))
    found = summarise([math.log(float(time) / seconds[seed]) for seed, time in zip(shared, times, strict=True)])
    half = found.half_width
    low, high = (None, None) if half is None else (math.exp(found.mean - half), math.exp(found.mean + half))
    return Speedup(ratio=math.exp(found.mean), low=low, high=high, runs=found.runs)


def _of_seeds(count: int, seeds: int) -> str:
    return "" if count == seeds else f" with {count} of {seeds} seeds"
