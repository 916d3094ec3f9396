"""The report of a comparison: one HTML file that needs no network, and every figure as PNG and SVG."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from sqa.errors import InputError, MissingExtraError
from sqa.experiments.directory import Directory
from sqa.experiments.results import Record
from sqa.experiments.statistics import Estimate, Speedup
from sqa.experiments.summary import Experiment, Summary
from sqa.files import replacing, write_text
from sqa.tables import known
from sqa.variants import BASELINE

logger = logging.getLogger(__name__)

PUBLISHED_SOURCE = "arXiv 2510.01817: one run a variant, padding counted, one epoch of 22,500 steps"
PUBLISHED = {
    # validation loss, accuracy, seconds a step
    "mha": (1.1976, 0.7735, 0.7173),
    "gqa": (1.2177, 0.7712, 0.6877),
    "mqa": (1.2497, 0.7664, 0.6947),
    "sqa": (1.2272, 0.7697, 0.6417),
    "ssqa": (1.2201, 0.7705, 0.6468),
    "xsqa": (1.2428, 0.7674, 0.6251),
    "xsmqa": (1.2815, 0.7622, 0.6250),
}


def read_experiment(directories: Sequence[Path], step_times: Path | None = None) -> Experiment:
    """The comparisons in the directories, joined; `step_times` is one whose timing phase gives all step times.

    Raises InputError when one has no finished run, when they do not fit together, or when nothing was timed.
    """
    held = [Directory(path) for path in directories]
    comparisons = [directory.read() for directory in held]
    for path, comparison in zip(directories, comparisons, strict=True):
        if not comparison.results:
            raise InputError(f"report: no run of {path} has finished yet")
    timed = None if step_times is None else Directory(step_times).record()
    if timed is not None and not timed.step_s:
        raise InputError(f"report: {step_times} has no step times (timing_rounds = 0)")
    return Experiment.join(comparisons, timed, held)


def write_report(experiment: Experiment, out: Path | None = None) -> list[Path]:
    """Write report.html and NAME.png, NAME.svg of each figure to `out` (default: report/ in the last directory).

    An unfinished comparison is reported as far as it has run. Returns the paths, the HTML file first. Raises
    MissingExtraError without the extra `report`.
    """
    try:
        import altair as alt
        import jinja2
        import vl_convert

        from sqa.experiments.figures import for_page, laid_out, make_figures
    except ImportError:
        raise MissingExtraError("reports need altair", "report") from None
    longest = experiment.longest()
    front = pareto_front({line.variant: (line.step_s, line.loss.mean) for line in longest if line.step_s})
    logger.info("preparing the figures of the report")
    figures = make_figures(experiment, front)
    template = (files("sqa.experiments") / "report.html").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    plan = experiment.plan
    tables = [_results_table(experiment)]
    if plan.shape == "published" and not plan.model:
        tables.append(_published_table(longest))
    text = page.render(
        name=" and ".join(dict.fromkeys(record.plan.name for record in experiment.records)),
        headlines=[_headline(record, experiment) for record in experiment.records],
        findings=_findings(experiment, front),
        tables=tables,
        figures=figures,
        facts=_facts(experiment.records),
        library=vl_convert.javascript_bundle(
            "window.vegaEmbed = vegaEmbed", vl_version=".".join(alt.SCHEMA_VERSION.split(".")[:2])
        ),
        # a "<" in a text could begin a comment or close our script element
        specs=json.dumps({f.name: for_page(f).to_dict() for f in figures}).replace("<", "\\u003c"),
    )
    out = out or experiment.directories[-1].path / "report"
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "report.html"]
    write_text(written[0], text)
    for figure in figures:
        logger.info("drawing %s", figure.name)
        chart = laid_out(figure, width=560).properties(title=figure.title)
        for kind in ("png", "svg"):
            written.append(out / f"{figure.name}.{kind}")
            with replacing(written[-1]) as temporary:
                chart.save(str(temporary), format=kind, scale_factor=2 if kind == "png" else 1)
    return written


def pareto_front(points: dict[str, tuple[float, float]]) -> list[str]:
    """The names for which no other has both lower seconds and lower loss, the fastest first."""
    front: list[str] = []
    for name in sorted(points, key=lambda name: points[name]):
        if not front or points[name][1] < points[front[-1]][1]:
            front.append(name)
    return front


_Cell = str | tuple[str, str]
"""A text, or a text and a remark below it."""

_Columns = dict[str, Callable[[Summary], _Cell]]
"""By heading: the cell of a variant."""


def _table(name: str, title: str, caption: str, columns: _Columns, lines: Sequence[Summary]) -> dict[str, Any]:
    """A table of the page, without the columns of things that were not measured."""
    cells = {heading: [cell(line) for line in lines] for heading, cell in columns.items()}
    filled = {heading: column for heading, column in cells.items() if any(column)}
    rows = list(zip(*filled.values(), strict=True))
    return {"name": name, "title": title, "caption": caption, "headings": list(filled), "rows": rows}


def _facts(records: Sequence[Record]) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """By heading and field: the value that all comparisons share, or each one's own with the comparison's name."""
    groups: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for record in records:
        plan = {name: value for name, value in record.plan.to_dict().items() if name != "name" and value != {}}
        runs = {"steps": _shared(record.steps), "kernel": _shared(record.kernel), "revision": record.git or "unknown"}
        parts = ("Plan", plan), ("Runs", runs), ("Data", asdict(record.data))
        for heading, fields in (*parts, ("Machine", record.machine), ("Versions", record.versions)):
            for name, value in fields.items():
                held = groups.setdefault(heading, {}).setdefault(name.replace("_", " "), [])
                held.append((f"{record.plan.name}: ", _said(value)))
    for fields in groups.values():
        for name, held in fields.items():
            if len(held) == len(records) and len({text for _, text in held}) == 1:
                fields[name] = [("", held[0][1])]
    return groups


def _shared(by_variant: Mapping[str, Any]) -> Any:
    """The one value of all variants, or the table if they differ."""
    values = list(by_variant.values())
    return values[0] if all(value == values[0] for value in values) else by_variant


def _said(value: Any) -> str:
    """A field's value, for people to read."""
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.5g}"
        case Mapping():
            nested = any(isinstance(of, Mapping) for of in value.values())
            return ("; " if nested else ", ").join(f"{name} {_said(of)}" for name, of in value.items())
        case list() | tuple():
            return ", ".join(map(_said, value))
    return str(value)


def _headline(record: Record, experiment: Experiment) -> str:
    plan = record.plan
    results = experiment.horizons[plan.budget]
    planned = set(plan.cells)
    done = len([result for result in results if result.cell in planned])
    finished = f"{done} runs" if done == len(planned) else f"{done} of {len(planned)} runs finished"
    seeds = f"{len(plan.seeds)} seeds" if len(plan.seeds) > 1 else "one seed"
    return (
        f"{finished}: {len(plan.variants)} variants, {seeds}; budget {plan.budget} a run, {plan.batch_size} rows of "
        f"{plan.context:,} tokens a step, text {plan.data}, {results[0].dtype} on {results[0].device}."
    )


def _findings(experiment: Experiment, front: Sequence[str]) -> list[str]:
    """Sentences on the table's longest horizon."""
    summary = experiment.longest()
    different = [(line.label, line.difference) for line in summary if line.difference is not None]
    judged = [(label, difference) for label, difference in different if difference.half_width is not None]
    lines = []
    if len(experiment.horizons) > 1:
        lines.append(f"These sentences are about the longest runs alone: {list(experiment.horizons)[-1]}.")
    for established, words in ((True, "Established at 95 %"), (False, "Not established, the interval crosses zero")):
        if named := [f"{label} {_plus_minus(value)}" for label, value in judged if value.established is established]:
            lines.append(f"{words}: loss against GQA of {', '.join(named)}.")
    if single := [label for label, difference in different if difference.half_width is None]:
        lines.append(f"One seed has no interval: no difference to GQA is established for {', '.join(single)}.")
    if not different:
        lines.append("Without finished runs of GQA and another variant there is no difference to report.")
    if speedups := [f"{line.label} {_in_words(line.effective_speedup)}" for line in summary if line.effective_speedup]:
        lines.append(f"Effective speed-up over GQA: {', '.join(speedups)}.")
    if front:
        labels = ", ".join(experiment.plan.label(name) for name in front)
        lines.append(f"Pareto front, where nothing else is both faster and by its mean better: {labels}.")
    else:
        lines.append("Steps were not timed (timing_rounds = 0): nothing here says how fast a variant is.")
    return lines


def _in_words(value: Speedup) -> str:
    if value.ratio is not None:
        return _ratio(value)
    bound = "" if value.more_than is None else f", so more than {value.more_than:.2f}×"
    return f"unknown (its loss is {value.why}{bound})"


def _ratio(value: Speedup) -> str:
    interval = "" if value.low is None else f" ({value.low:.2f} to {value.high:.2f})"
    return f"{value.ratio:.2f}×{interval}"


def _plus_minus(value: Estimate, sign: str = "+") -> str:
    spread = "" if value.half_width is None else f" ± {value.half_width:.4f}"
    return f"{value.mean:{sign}.4f}{spread}".replace("-", "−")


def _difference(value: Estimate | None) -> _Cell:
    if value is None:
        return ""
    if value.established:
        return _plus_minus(value)
    return _plus_minus(value), "one seed" if value.half_width is None else "not established"


def _speedup(value: Speedup | None) -> _Cell:
    if value is None:
        return ""
    if value.ratio is not None:
        return _ratio(value)
    return ("unknown" if value.more_than is None else f"more than {value.more_than:.2f}×"), str(value.why)


def _results_table(experiment: Experiment) -> dict[str, Any]:
    several = len(experiment.horizons) > 1
    horizon: _Columns = {
        "tokens": lambda line: f"{line.tokens:,}",
        "seconds": lambda line: known("{:,.0f}", line.seconds),
        "effective speed-up": lambda line: _speedup(line.effective_speedup),
    }
    columns: _Columns = {
        "variant": lambda line: line.label,
        "Hq": lambda line: str(line.num_query_heads),
        "Hkv": lambda line: str(line.num_kv_heads),
        "head dim": lambda line: str(line.head_dim),
        "parameters": lambda line: f"{line.parameters:,}",
        **(horizon if several else {"steps": lambda line: f"{line.steps:,}"}),
        "validation loss": lambda line: _plus_minus(line.loss, ""),
        "vs GQA": lambda line: _difference(line.difference),
        "accuracy": lambda line: f"{line.accuracy.mean:.2%}",
        "step, ms": lambda line: "" if line.step_s is None else f"{1000 * line.step_s:,.0f}",
        "speed vs GQA": lambda line: known("{:.2f}×", line.speed_vs_gqa),
        "speed vs MHA": lambda line: known("{:.2f}×", line.speed_vs_mha),
        "attention saving": lambda line: f"{line.attention_saving:.2f}×",
    }
    caption = (
        "Loss in nats a token and accuracy of the next token, over real tokens of the validation set. ±: 95 % interval "
        "over seeds (Student's t), of the paired difference under “vs GQA”. Attention saving: attention FLOPs of "
        "multi-head attention over this variant's."
    )
    if experiment.step_seconds:
        caption += " Step: all variants timed in turns; more than 1× is faster."
    if experiment.step_seconds and several:
        caption += (
            " Seconds: steps times the step. Effective speed-up: the time GQA needs to end at this loss (its final "
            "losses at the horizons, joined linearly in log time), over this variant's time, with its 95 % interval "
            "over seeds; unknown where GQA's own runs do not enclose the loss."
        )
    return _table("results", "Results", caption, columns, experiment.summaries())


def _published_table(summary: Sequence[Summary]) -> dict[str, Any]:
    """Our figures in the published convention beside the published ones; missing ones are empty cells."""
    step = PUBLISHED[BASELINE][2]
    published = {name: (loss, accuracy, step / seconds) for name, (loss, accuracy, seconds) in PUBLISHED.items()}

    def theirs(form: str, line: Summary, index: int) -> str:
        return form.format(published[line.variant][index]) if line.variant in published else ""

    columns: _Columns = {
        "variant": lambda line: line.label,
        "loss, published": lambda line: theirs("{:.4f}", line, 0),
        "loss, here": lambda line: known("{:.4f}", line.loss_all_positions),
        "accuracy, published": lambda line: theirs("{:.2%}", line, 1),
        "accuracy, here": lambda line: known("{:.2%}", line.accuracy_all_positions),
        "speed vs GQA, published": lambda line: theirs("{:.2f}×", line, 2),
        "speed vs GQA, here": lambda line: known("{:.2f}×", line.speed_vs_gqa),
    }
    caption = (
        f"Published: {PUBLISHED_SOURCE}. Here: the same convention, loss and accuracy over all positions, padding "
        "included (only padded rows have it). Padding is trivial to predict: neither compares with the table above."
    )
    return _table("published", "Beside the published table", caption, columns, summary)
