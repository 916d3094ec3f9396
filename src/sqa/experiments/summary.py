"""What comparisons say: a line a variant, at one horizon or at several of one experiment, and the table of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from rich.console import Group
from rich.table import Table
from rich.text import Text

from sqa.cost import attention_saving
from sqa.errors import InputError, shown
from sqa.experiments.plan import Plan
from sqa.experiments.results import Comparison, Record, RunResult
from sqa.experiments.statistics import Curve, Estimate, Speedup, effective_speedup, paired_difference, summarise
from sqa.tables import make_table
from sqa.variants import VARIANTS

BASELINE = "gqa"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A variant at one horizon: means over its seeds, and what they are against the baseline's.

    `tokens` are targets trained on; `seconds` of training are steps times `step_s`, the median of the timing phase.
    `effective_speedup` needs several horizons of the baseline.
    """

    variant: str
    label: str
    budget: str
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    wide: bool
    parameters: int
    steps: int
    tokens: int
    runs: int
    loss: Estimate
    difference: Estimate | None
    accuracy: Estimate
    loss_all_positions: float | None
    accuracy_all_positions: float | None
    step_s: float | None
    seconds: float | None
    speed_vs_gqa: float | None
    speed_vs_mha: float | None
    attention_saving: float
    effective_speedup: Speedup | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


_SHARED = (
    "layout", "padding_in_loss", "context", "batch_size", "evaluation_tokens", "dtype", "train_fraction",
    "validation_fraction", "warmup_fraction", "output_projection_rate", "weight_decay", "clip_norm",
)  # fmt: skip
"""Fields that comparisons of one experiment must have alike. Budget, variants, seeds and rates may differ."""

_TIMED = ("layout", "padding_in_loss", "context", "batch_size", "micro_batch_size", "dtype", "compile")
"""Fields that decide how long a step takes."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Comparisons of the same models on the same data, joined: those with one budget are one horizon.

    `plan` has the variants, shapes and seeds of all. `horizons` holds the runs by budget, the shortest first.
    `step_seconds` are of one timing phase, so that drifts of the machine between comparisons do not matter.
    """

    plan: Plan
    records: Sequence[Record]
    horizons: dict[str, list[RunResult]]
    step_seconds: dict[str, float]

    @classmethod
    def join(cls, comparisons: Sequence[Comparison], timed: Record | None = None) -> Self:
        """Of one comparison or more; a run that two of them have counts once.

        Step times are those of `timed`, or of the longest comparison that has a timing phase. Raises InputError for
        comparisons of different data, models or recipes.
        """
        plans = [comparison.plan for comparison in comparisons]
        merged = plans[0]
        for other in plans[1:]:
            merged = merged.replace(
                variants=_union(merged.variants, other.variants),
                seeds=_union(merged.seeds, other.seeds),
                shapes={**other.shapes, **merged.shapes},
                learning_rates={},
            )
        for comparison in comparisons:
            _check_joinable(comparisons[0].record, comparison.record)
            _check_same(merged, comparison.plan, _SHARED)
        if timed is not None:
            _check_same(merged, timed.plan, _TIMED)
        results: dict[str, list[RunResult]] = {}
        for comparison in comparisons:
            horizon = results.setdefault(comparison.plan.budget, [])
            held = {result.cell for result in horizon}
            horizon += [result for result in comparison.results if result.cell not in held]
        horizons = dict(sorted(results.items(), key=lambda item: max((r.tokens for r in item[1]), default=0)))
        by_length = sorted(comparisons, key=lambda c: list(horizons).index(c.plan.budget), reverse=True)
        phases = [record for record in [timed, *(c.record for c in by_length)] if record is not None and record.step_s]
        return cls(
            plan=merged,
            records=[comparison.record for comparison in comparisons],
            horizons=horizons,
            step_seconds=phases[0].step_seconds if phases else {},
        )

    @property
    def names(self) -> list[str]:
        """The variants that have finished runs, in the order of VARIANTS, each before the plan's shapes of it."""
        have = {result.variant for results in self.horizons.values() for result in results}
        bases = [*VARIANTS, None]
        found = [name for name in self.plan.variants if name in have]
        return sorted(found, key=lambda name: (bases.index(self.plan.base(name)), name not in VARIANTS))

    def summaries(self) -> list[Summary]:
        """A line a variant and horizon, the shortest horizon first."""
        return [
            self._summary(name, budget) for budget in self.horizons for name in self.names if self._runs(name, budget)
        ]

    def longest(self) -> list[Summary]:
        """The last horizon's alone."""
        return [line for line in self.summaries() if line.budget == list(self.horizons)[-1]]

    def last_results(self) -> list[RunResult]:
        """The runs of the last horizon."""
        return list(self.horizons.values())[-1]

    def _runs(self, name: str, budget: str) -> list[RunResult]:
        return [result for result in self.horizons[budget] if result.variant == name]

    def _losses(self, name: str, budget: str) -> dict[int, float]:
        return {result.seed: result.val.loss for result in self._runs(name, budget)}

    def _summary(self, name: str, budget: str) -> Summary:
        own = self._runs(name, budget)
        layer, losses, step = own[0].config.layers[0], self._losses(name, budget), self.step_seconds

        def speed_against(other: str) -> float | None:
            return step[other] / step[name] if {other, name} <= step.keys() else None

        seconds = own[0].steps * step[name] if name in step else None
        return Summary(
            variant=name,
            label=self.plan.label(name),
            budget=budget,
            num_query_heads=layer.num_query_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            wide=layer.head_dim * layer.num_heads != layer.d_model,
            parameters=own[0].parameters,
            steps=own[0].steps,
            tokens=round(sum(result.tokens for result in own) / len(own)),
            runs=len(own),
            loss=summarise(list(losses.values())),
            difference=None if name == BASELINE else paired_difference(losses, self._losses(BASELINE, budget)),
            accuracy=summarise([result.val.accuracy for result in own]),
            loss_all_positions=_mean(result.val.loss_all_positions for result in own),
            accuracy_all_positions=_mean(result.val.accuracy_all_positions for result in own),
            step_s=step.get(name),
            seconds=seconds,
            speed_vs_gqa=speed_against(BASELINE),
            speed_vs_mha=speed_against("mha"),
            attention_saving=attention_saving(layer, self.plan.context),
            effective_speedup=self._speedup(name, losses, seconds),
        )

    def _speedup(self, name: str, losses: dict[int, float], seconds: float | None) -> Speedup | None:
        if name == BASELINE or seconds is None or BASELINE not in self.step_seconds or len(self.horizons) < 2:
            return None
        curves: dict[int, Curve] = {}
        for results in self.horizons.values():
            for result in results:
                if result.variant == BASELINE:
                    point = (result.steps * self.step_seconds[BASELINE], result.val.loss)
                    curves[result.seed] = [*curves.get(result.seed, []), point]
        return effective_speedup(losses, seconds, {seed: curve for seed, curve in curves.items() if len(curve) > 1})


def _union(first: Iterable[Any], second: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys([*first, *second]))


def _check_joinable(first: Record, other: Record) -> None:
    if first.data.fingerprint != other.data.fingerprint:
        raise InputError(
            f"report: comparisons must be of the same data, got {first.plan.name} ({first.data.fingerprint[:12]}) "
            f"and {other.plan.name} ({other.data.fingerprint[:12]})"
        )


def _check_same(merged: Plan, other: Plan, names: Iterable[str]) -> None:
    for name in names:
        if (here := getattr(merged, name)) != (there := getattr(other, name)):
            raise InputError(
                f"report: comparisons must have the same {name}, "
                f"got {shown(repr(here))}, and {shown(repr(there))} in {other.name}"
            )
    for name in set(other.variants) & set(merged.variants):
        if other.model_config(name) != merged.model_config(name):
            raise InputError(f"report: {name} must be the same model in all comparisons, {other.name} has another")


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def results_table(experiment: Experiment, *, title: str | None = None) -> Table:
    """The experiment as people read it, at most 80 columns wide; several horizons have their effective speed-up."""
    lines = experiment.summaries()
    return _one_horizon(lines, title) if len(experiment.horizons) < 2 else _several_horizons(lines, title)


def _one_horizon(lines: Sequence[Summary], title: str | None) -> Table:
    built = make_table(
        "variant", "Hq", "Hkv", "params", "val\nloss", "loss vs\nGQA", "acc.\n%", "ms a\nstep", "vs\nGQA", "vs\nMHA",
        "theory", title=title,
    )  # fmt: skip
    for line in lines:
        built.add_row(
            *_model(line),
            _estimate(line.loss),
            "-" if line.difference is None else _estimate(line.difference, "+"),
            f"{100 * line.accuracy.mean:.2f}",
            "-" if line.step_s is None else f"{1000 * line.step_s:.0f}",
            *(_times(ratio) for ratio in (line.speed_vs_gqa, line.speed_vs_mha, line.attention_saving)),
        )
    return built


def _several_horizons(lines: Sequence[Summary], title: str | None) -> Table:
    built = make_table(
        "variant", "Hq", "Hkv", "params", "tokens", "time\ns", "val\nloss", "loss vs\nGQA", "effective\nspeed-up",
        title=title,
    )  # fmt: skip
    for i, line in enumerate(lines):
        if i and line.budget != lines[i - 1].budget:
            built.add_row()
        built.add_row(
            *_model(line),
            f"{line.tokens / 1e6:.1f}M",
            "-" if line.seconds is None else f"{line.seconds:,.0f}",
            _estimate(line.loss),
            "-" if line.difference is None else _estimate(line.difference, "+"),
            _speedup(line.effective_speedup),
        )
    return built


def _model(line: Summary) -> tuple[str, ...]:
    wide = f"x{line.head_dim}" if line.wide else ""
    return line.label, f"{line.num_query_heads}{wide}", str(line.num_kv_heads), f"{line.parameters / 1e6:.2f}M"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _speedup(value: Speedup | None) -> str:
    if value is None:
        return "-"
    if value.ratio is None:
        return str(value.why).replace(" with ", "\nwith ")
    return f"{value.ratio:.2f}x" + ("" if value.low is None else f"\n{value.low:.2f}-{value.high:.2f}")


def _estimate(value: Estimate, sign: str = "") -> str:
    """With several seeds the interval; after a difference a question mark where its sign is not established."""
    unsure = "?" if sign and not value.established else ""
    return f"{value.mean:{sign}.4f}{unsure}" + ("" if value.half_width is None else f"\n±{value.half_width:.4f}")


def notes(experiment: Experiment) -> str:
    """What the columns of the table mean, as far as it has them."""
    lines = experiment.summaries()
    several, timed = len(experiment.horizons) > 1, bool(experiment.step_seconds)
    said = {
        "val loss: nats a real token of the validation set, lower is better.": True,
        "loss vs GQA: minus the loss of GQA's runs with the same seeds.": True,
        "ms a step, vs GQA, vs MHA: training steps in turns; more than 1x is faster.": timed and not several,
        "theory: attention FLOPs of MHA over this variant's.": not several,
        "time: steps times the median of the timing phase.": timed and several,
        "effective speed-up: the time in which GQA reaches this loss over this time,\n"
        "GQA's final losses being joined linearly in log time.": timed and several,
        "wide GQA: the equal-cost alternative to fewer heads.": any(line.variant == "wide-gqa" for line in lines),
        "±: 95 % interval (Student's t), under loss vs GQA that of paired differences.": any(
            line.runs > 1 for line in lines
        ),
        "?: not established: the interval crosses zero, or there is a single run.": any(
            line.difference is not None and not line.difference.established for line in lines
        ),
    }
    return "\n".join(text for text, shown in said.items() if shown)


def comparison_text(comparison: Comparison) -> Group:
    """What `sqa compare` prints of a comparison: the table, what its columns mean, and what is missing."""
    plan, experiment = comparison.plan, Experiment.join([comparison])
    entropy = comparison.record.data.unigram_entropy
    lines = [f"A model that knows only how often each token occurs has {entropy:.4f}."]
    if comparison.missing:
        lines.append(f"Missing: {', '.join(f'{name}:{seed}' for name, seed in comparison.missing)}")
    return Group(
        results_table(experiment, title=f"{plan.name}: {plan.budget} a run, context {plan.context}"),
        Text(notes(experiment), style="dim"),
        Text("\n".join(lines)),
    )
