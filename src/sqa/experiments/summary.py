"""Summaries of comparisons: a line for each variant and horizon of an experiment, and their table."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from rich.console import Group
from rich.table import Table
from rich.text import Text

from sqa.cost import attention_saving
from sqa.errors import InputError, shown
from sqa.experiments.directory import Directory
from sqa.experiments.plan import Cell, Plan
from sqa.experiments.results import Comparison, Record, RunResult
from sqa.experiments.statistics import Estimate, Speedup, effective_speedup, paired_difference, summarise
from sqa.tables import known, make_table
from sqa.variants import BASELINE, VARIANTS


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A variant at one horizon: means over its seeds, and comparisons with the baseline.

    `tokens`: targets trained on. `step_s`: the median of the timing phase. `seconds`: steps times `step_s`. Runs of one
    budget differ in steps only where the budget is in time and they come from several comparisons.
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


_SHARED = (
    "layout", "padding_in_loss", "context", "batch_size", "evaluation_tokens", "dtype", "train_fraction",
    "validation_fraction", "warmup_fraction", "output_projection_rate", "weight_decay", "clip_norm",
)  # fmt: skip
"""Fields that comparisons of one experiment must share. Budget, variants, seeds and (see `join`) rates may differ."""

_TIMED = ("layout", "padding_in_loss", "context", "batch_size", "micro_batch_size", "dtype", "compile")
"""Fields that the time of a step depends on."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Comparisons of the same models on the same data, joined. Those with the same budget are one horizon.

    `plan`: with the variants, shapes and seeds of all. `horizons`: the runs by budget, the shortest first.
    `step_seconds`: of a single timing phase, so that changes of the machine between comparisons do not matter.
    `directories`: where the curves and probes of the runs are.
    """

    plan: Plan
    records: Sequence[Record]
    horizons: dict[str, list[RunResult]]
    step_seconds: dict[str, float]
    directories: Sequence[Directory] = ()

    @classmethod
    def join(
        cls, comparisons: Sequence[Comparison], timed: Record | None = None, directories: Sequence[Directory] = ()
    ) -> Self:
        """Join one comparison or more; a run that two of them have counts once.

        Step times are those of `timed`, or of the longest comparison that has a timing phase. Raises InputError for
        comparisons of different data, models or recipes.
        """
        plans = [comparison.plan for comparison in comparisons]
        merged = plans[0].replace(
            variants=tuple(dict.fromkeys(name for plan in plans for name in plan.variants)),
            seeds=tuple(dict.fromkeys(seed for plan in plans for seed in plan.seeds)),
            shapes={name: given for plan in reversed(plans) for name, given in plan.shapes.items()},
            learning_rates={},
        )
        first = comparisons[0].record
        by_budget: dict[str, dict[Cell, RunResult]] = {}
        rates: dict[tuple[str, str], float] = {}
        for comparison in comparisons:
            other, plan = comparison.record, comparison.plan
            if first.data.fingerprint != other.data.fingerprint:
                raise InputError(
                    f"report: comparisons must be of the same data, got {first.plan.name} "
                    f"({first.data.fingerprint[:12]}) and {plan.name} ({other.data.fingerprint[:12]})"
                )
            _check_same(merged, plan, _SHARED)
            for name in {result.variant for result in comparison.results}:
                if (rate := rates.setdefault((plan.budget, name), plan.rate(name))) != plan.rate(name):
                    raise InputError(
                        f"report: {name} must have one learning rate at {plan.budget}, "
                        f"got {rate}, and {plan.rate(name)} in {plan.name}"
                    )
            runs = by_budget.setdefault(plan.budget, {})
            runs |= {result.cell: result for result in comparison.results if result.cell not in runs}
        if timed is not None:
            _check_same(merged, timed.plan, _TIMED)
        longest = {budget: max((run.tokens for run in runs.values()), default=0) for budget, runs in by_budget.items()}
        longest_first = sorted(comparisons, key=lambda comparison: longest[comparison.plan.budget], reverse=True)
        phases = [timed] if timed is not None else [comparison.record for comparison in longest_first]
        return cls(
            plan=merged,
            records=[comparison.record for comparison in comparisons],
            horizons={budget: list(by_budget[budget].values()) for budget in sorted(longest, key=longest.__getitem__)},
            step_seconds=next((record.step_seconds for record in phases if record.step_s), {}),
            directories=directories,
        )

    @property
    def names(self) -> list[str]:
        """The variants with finished runs, in the order of VARIANTS, each followed by the plan's shapes of it."""
        have = {result.variant for results in self.horizons.values() for result in results}
        bases = [*VARIANTS, None]
        found = [name for name in self.plan.variants if name in have]
        return sorted(found, key=lambda name: (bases.index(self.plan.base(name)), name not in VARIANTS))

    def summaries(self) -> list[Summary]:
        """A line for each variant and horizon, the shortest horizon first."""
        return [
            self._summary(name, budget) for budget in self.horizons for name in self.names if self.runs(name, budget)
        ]

    def longest(self) -> list[Summary]:
        """The lines of the longest horizon."""
        return [line for line in self.summaries() if line.budget == list(self.horizons)[-1]]

    def runs(self, name: str, budget: str | None = None) -> list[RunResult]:
        """The runs of a variant at one horizon, by default the longest."""
        results = self.horizons[list(self.horizons)[-1] if budget is None else budget]
        return [result for result in results if result.variant == name]

    def _losses(self, name: str, budget: str) -> dict[int, float]:
        return {result.seed: result.val.loss for result in self.runs(name, budget)}

    def _summary(self, name: str, budget: str) -> Summary:
        own = self.runs(name, budget)
        layer, losses, step = own[0].config.layers[0], self._losses(name, budget), self.step_seconds

        def speed_against(other: str) -> float | None:
            return step[other] / step[name] if {other, name} <= step.keys() else None

        seconds = {run.seed: run.steps * step[name] for run in own if name in step}
        return Summary(
            variant=name,
            label=self.plan.label(name),
            budget=budget,
            num_query_heads=layer.num_query_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            wide=layer.head_dim * layer.num_heads != layer.d_model,
            parameters=own[0].parameters,
            steps=round(sum(result.steps for result in own) / len(own)),
            tokens=round(sum(result.tokens for result in own) / len(own)),
            runs=len(own),
            loss=summarise(list(losses.values())),
            difference=None if name == BASELINE else paired_difference(losses, self._losses(BASELINE, budget)),
            accuracy=summarise([result.val.accuracy for result in own]),
            loss_all_positions=_mean(result.val.loss_all_positions for result in own),
            accuracy_all_positions=_mean(result.val.accuracy_all_positions for result in own),
            step_s=step.get(name),
            seconds=_mean(seconds.values()),
            speed_vs_gqa=speed_against(BASELINE),
            speed_vs_mha=speed_against("mha"),
            attention_saving=attention_saving(layer, self.plan.context),
            effective_speedup=self._speedup(name, losses, seconds),
        )

    def _speedup(self, name: str, losses: dict[int, float], seconds: dict[int, float]) -> Speedup | None:
        if name == BASELINE or not seconds or BASELINE not in self.step_seconds or len(self.horizons) < 2:
            return None
        curves: dict[int, list[tuple[float, float]]] = {}
        for budget in self.horizons:
            for run in self.runs(BASELINE, budget):
                curves.setdefault(run.seed, []).append((run.steps * self.step_seconds[BASELINE], run.val.loss))
        # horizons are in the order of their longest runs, which need not be that of the baseline's
        known = {seed: sorted(curve) for seed, curve in curves.items() if len(curve) > 1}
        return effective_speedup(losses, seconds, known)


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
    """The table of an experiment, at most 80 columns wide; with several horizons it has the effective speed-up."""
    columns = _SEVERAL_HORIZONS if len(experiment.horizons) > 1 else _ONE_HORIZON
    built = make_table(*columns, title=title)
    lines = experiment.summaries()
    for i, line in enumerate(lines):
        if i and line.budget != lines[i - 1].budget:
            built.add_row()
        built.add_row(*(cell(line) for cell in columns.values()))
    return built


def _speedup(value: Speedup | None) -> str:
    if value is None:
        return "-"
    if value.ratio is None:
        return str(value.why).replace(" with ", "\nwith ")
    return f"{value.ratio:.2f}x" + ("" if value.low is None else f"\n{value.low:.2f}-{value.high:.2f}")


def _estimate(value: Estimate | None, sign: str = "") -> str:
    """A mean, its interval if there are several seeds, and a question mark after a difference of unclear sign."""
    if value is None:
        return "-"
    unsure = "?" if sign and not value.established else ""
    return f"{value.mean:{sign}.4f}{unsure}" + ("" if value.half_width is None else f"\n±{value.half_width:.4f}")


_Columns = dict[str, Callable[[Summary], str]]

_MODEL: _Columns = {
    "variant": lambda line: line.label,
    "Hq": lambda line: f"{line.num_query_heads}x{line.head_dim}" if line.wide else str(line.num_query_heads),
    "Hkv": lambda line: str(line.num_kv_heads),
    "params": lambda line: f"{line.parameters / 1e6:.2f}M",
}
_LOSS: _Columns = {
    "val\nloss": lambda line: _estimate(line.loss),
    "loss vs\nGQA": lambda line: _estimate(line.difference, "+"),
}
_ONE_HORIZON: _Columns = {
    **_MODEL,
    **_LOSS,
    "acc.\n%": lambda line: f"{100 * line.accuracy.mean:.2f}",
    "ms a\nstep": lambda line: "-" if line.step_s is None else f"{1000 * line.step_s:.0f}",
    "vs\nGQA": lambda line: known("{:.2f}x", line.speed_vs_gqa, "-"),
    "vs\nMHA": lambda line: known("{:.2f}x", line.speed_vs_mha, "-"),
    "theory": lambda line: f"{line.attention_saving:.2f}x",
}
_SEVERAL_HORIZONS: _Columns = {
    **_MODEL,
    "tokens": lambda line: f"{line.tokens / 1e6:.1f}M",
    "time\ns": lambda line: known("{:,.0f}", line.seconds, "-"),
    **_LOSS,
    "effective\nspeed-up": lambda line: _speedup(line.effective_speedup),
}


def notes(experiment: Experiment) -> str:
    """The meaning of the table's columns."""
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
    """What `sqa compare` prints: the table, the meaning of its columns, and the missing runs."""
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
