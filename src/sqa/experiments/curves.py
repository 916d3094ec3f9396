"""Points of figures from the files of runs: training curves, differences of curves, and probes."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from sqa.experiments.directory import Directory
from sqa.experiments.plan import Cell
from sqa.experiments.summary import Experiment
from sqa.progress import StepReport
from sqa.training.probes import Probe

CURVE_POINTS = 300

Row = dict[str, Any]
"""A point of a figure."""

Kept = TypeVar("Kept", StepReport, Probe)


def kept(experiment: Experiment, name: str, read: Callable[[Directory, Cell], list[Kept]]) -> list[list[Kept]]:
    """A list of records for each of a variant's longest runs. Runs without a record of their last step are left out."""
    found = []
    for result in experiment.runs(name):
        records = (read(directory, result.cell) for directory in experiment.directories)
        found += [run for run in records if run and run[-1].step == result.steps][:1]
    return found


def training_curves(experiment: Experiment, *, timed: bool) -> list[Row]:
    """The curves of the longest horizon's runs that are still there. `timed`: with the step time of each variant."""
    points = []
    for name in experiment.names:
        if runs := kept(experiment, name, Directory.curve):
            points += curve(experiment.plan.label(name), runs, experiment.step_seconds[name] if timed else None)
    return points


def curve(label: str, runs: Sequence[Sequence[StepReport]], step_seconds: float | None = None) -> list[Row]:
    """One line of a figure: the mean of a variant's runs at each step, smoothed and thinned out.

    Its time is that of so many steps of `step_seconds`, or without it what the runs took.
    """
    steps = min(len(run) for run in runs)
    values = [[(report.tokens, report.seconds, report.loss) for report in run[:steps]] for run in runs]
    tokens, seconds, loss = np.array(values, dtype=float).mean(axis=0).T
    if step_seconds is not None:
        seconds = step_seconds * np.arange(1, steps + 1)
    shown = np.unique(np.linspace(steps // 3, steps - 1, CURVE_POINTS).round().astype(int))
    first, last = np.maximum(shown - steps // 50, 0), np.minimum(shown + steps // 50, steps - 1)
    sums = np.concatenate([[0.0], loss.cumsum()])
    smooth = (sums[last + 1] - sums[first]) / (last + 1 - first)
    return [
        {
            "variant": label,
            "step": int(i) + 1,
            "tokens": int(tokens[i]),
            "seconds": round(seconds[i], 2),
            "loss": round(value, 4),
        }
        for i, value in zip(shown, smooth, strict=True)
    ]


def difference_curves(curves: Sequence[Row], baseline: str) -> list[Row]:
    """Each line minus the baseline's at the same number of tokens, as far as both go."""
    own = np.array([(row["tokens"], row["loss"]) for row in curves if row["variant"] == baseline]).reshape(-1, 2)
    tokens, loss = own.T
    return [
        {
            "variant": row["variant"],
            "step": row["step"],
            "tokens": row["tokens"],
            "difference": round(row["loss"] - float(np.interp(row["tokens"], tokens, loss)), 4),
        }
        for row in curves
        if row["variant"] != baseline and len(tokens) and tokens[0] <= row["tokens"] <= tokens[-1]
    ]


def probe_points(experiment: Experiment, value: Callable[[Probe], float]) -> list[Row]:
    """A value of each probe of the longest horizon's runs, as the mean of the seeds."""
    points = []
    for name in experiment.names:
        for same in zip(*kept(experiment, name, Directory.probes), strict=False):  # of the same step
            points.append({
                "variant": experiment.plan.label(name),
                "tokens": round(np.mean([probe.tokens for probe in same])),
                "value": float(np.mean([value(probe) for probe in same])),
            })  # fmt: skip
    return points
