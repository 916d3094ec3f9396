"""A comparison to look at: one HTML file that needs no network, and every figure as PNG and SVG beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from sqa.errors import InputError, MissingExtraError
from sqa.experiments.directory import Directory
from sqa.experiments.plan import Plan
from sqa.experiments.results import BASELINE, Row, summary_rows
from sqa.experiments.statistics import Estimate
from sqa.files import replacing, write_text
from sqa.variants import VARIANTS

if TYPE_CHECKING:
    from sqa.experiments.figures import Figure

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


def write_report(directory: Path, out: Path | None = None) -> list[Path]:
    """Write report.html and NAME.png, NAME.svg of each figure to `out` (default: report/ in the directory).

    Reads what `sqa compare` left in `directory`; an unfinished comparison is reported as far as it got. Returns the
    paths, the HTML file first. Raises ValueError where no run has finished or runs saw different data, and
    ImportError without the extra `report`.
    """
    held = Directory(directory)
    record, rows = held.record(), held.rows()
    plan = Plan.from_dict(record["plan"])
    if not rows:
        raise InputError(f"report: no run of {directory} has finished yet")
    summary = summary_rows(rows, plan.context)
    try:
        import altair as alt
        import vl_convert

        from sqa.experiments.figures import for_page, laid_out, make_figures
    except ImportError:
        raise MissingExtraError("reports need altair", "report") from None
    front = pareto_front({row["variant"]: (row["step_s"], row["loss"].mean) for row in summary if row["step_s"]})
    figures = make_figures(held, rows, summary, plan, front)
    page = Template((files("sqa.experiments") / "report.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{plan.name}: a comparison of attention variants"),
        body=_body(plan, record, rows, summary, front, figures),
        library=vl_convert.javascript_bundle(
            "window.vegaEmbed = vegaEmbed", vl_version=".".join(alt.SCHEMA_VERSION.split(".")[:2])
        ),
        # a text that closes the script element would end it wherever it stands
        figures=json.dumps({f.name: for_page(f).to_dict() for f in figures}).replace("</", "<\\/"),
    )
    out = out or directory / "report"
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "report.html"]
    write_text(written[0], page)
    for figure in figures:
        chart = laid_out(figure.chart, width=560).properties(title=figure.title)
        for kind in ("png", "svg"):
            written.append(out / f"{figure.name}.{kind}")
            with replacing(written[-1]) as temporary:
                chart.save(str(temporary), format=kind, scale_factor=2 if kind == "png" else 1)
    return written


def pareto_front(points: dict[str, tuple[float, float]]) -> list[str]:
    """The names whose (seconds, loss) no other has both lower, the fastest first."""
    front: list[str] = []
    for name in sorted(points, key=lambda name: points[name]):
        if not front or points[name][1] < points[front[-1]][1]:
            front.append(name)
    return front


def _body(
    plan: Plan,
    record: Row,
    rows: Sequence[Row],
    summary: Sequence[Row],
    front: Sequence[str],
    figures: Sequence[Figure],
) -> str:
    drawn = "".join(
        f'<figure><h2>{f.title}</h2><div class="chart" id="{f.name}"></div>'
        f"<figcaption>{f.caption}</figcaption></figure>"
        for f in figures
    )
    facts = {
        "plan": ", ".join(f"{name} = {json.dumps(value)}" for name, value in record["plan"].items()),
        "steps": _pairs(record["steps"]),
        "kernels": _pairs(record["kernel"]),
        "machine": _pairs(record["machine"]),
        "versions": _pairs(record["versions"]),
        "revision": record["git"] or "unknown",
        "data": _pairs(record["data"]),
    }
    facts_rows = "".join(f"<tr><th>{name}</th><td>{escape(str(text))}</td></tr>" for name, text in facts.items())
    return "\n".join([
        f"<h1>{escape(plan.name)}</h1>",
        f'<p class="soft">{_headline(plan, rows)}</p>',
        f"<ul>{''.join(f'<li>{line}</li>' for line in _findings(summary, front))}</ul>",
        f"<h2>Results</h2>{_results_table(summary)}",
        _published_table(summary) if plan.shape == "published" and not plan.model else "",
        f'<div class="figures">{drawn}</div>',
        f'<h2>How it was made</h2><div class="wide"><table class="facts">{facts_rows}</table></div>',
    ])  # fmt: skip


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:,}" if type(value) is int else f"{name} {value}" for name, value in values.items())


def _headline(plan: Plan, rows: Sequence[Row]) -> str:
    planned = len(plan.variants) * len(plan.seeds)
    finished = f"{len(rows)} runs" if len(rows) == planned else f"{len(rows)} of {planned} runs finished"
    seeds = f"{len(plan.seeds)} seeds" if len(plan.seeds) > 1 else "one seed"
    return escape(
        f"{finished}: {len(plan.variants)} variants, {seeds}; budget {plan.budget} a run, {plan.batch_size} rows of "
        f"{plan.context:,} tokens a step, text {plan.data}, {rows[0]['dtype']} on {rows[0]['device']}."
    )


def _findings(summary: Sequence[Row], front: Sequence[str]) -> list[str]:
    """What the table says, in sentences."""
    different = [row for row in summary if row["difference"] is not None]
    judged = [row for row in different if row["difference"].half_width is not None]
    lines = []
    for established, words in ((True, "Established at 95 %"), (False, "Not established, the interval crosses zero")):
        named = [row for row in judged if row["difference"].established is established]
        if named:
            each = ", ".join(f"{row['label']} {_plus_minus(row['difference'])}" for row in named)
            lines.append(f"{words}: loss against GQA of {each}.")
    if single := [row["label"] for row in different if row["difference"].half_width is None]:
        lines.append(f"One seed has no interval: no difference to GQA is established for {', '.join(single)}.")
    if not different:
        lines.append("Without finished runs of GQA and another variant there is no difference to report.")
    if front:
        labels = ", ".join(VARIANTS[name].label for name in front)
        lines.append(f"Pareto front, where nothing else is both faster and by its mean better: {labels}.")
    else:
        lines.append("Steps were not timed (timing_rounds = 0).")
    return lines


def _plus_minus(value: Estimate, sign: str = "+") -> str:
    spread = "" if value.half_width is None else f" ± {value.half_width:.4f}"
    return f"{value.mean:{sign}.4f}{spread}".replace("-", "−")


def _difference(value: Estimate | None) -> str:
    if value is None or value.established:
        return "" if value is None else _plus_minus(value)
    why = "one seed" if value.half_width is None else "not established"
    return f'{_plus_minus(value)}<span class="unsure">{why}</span>'


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}×"


def _table(name: str, caption: str, headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join(f"<tr><th>{first}</th>{''.join(f'<td>{x}</td>' for x in rest)}</tr>" for first, *rest in lines)
    return (
        f'<div class="wide"><table id="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="soft">{caption}</p>'
    )


def _results_table(summary: Sequence[Row]) -> str:
    headings = (
        "variant", "H<sub>q</sub>", "H<sub>kv</sub>", "head dim", "parameters", "steps", "validation loss", "vs GQA",
        "accuracy", "step, ms", "speed vs GQA", "speed vs MHA", "attention saving",
    )  # fmt: skip
    lines = [
        (
            row["label"],
            str(row["num_query_heads"]),
            str(row["num_kv_heads"]),
            str(row["head_dim"]),
            f"{row['parameters']:,}",
            f"{row['steps']:,}",
            _plus_minus(row["loss"], ""),
            _difference(row["difference"]),
            f"{row['accuracy'].mean:.2%}",
            "" if row["step_s"] is None else f"{1000 * row['step_s']:,.0f}",
            _times(row["speed_vs_gqa"]),
            _times(row["speed_vs_mha"]),
            _times(row["attention_saving"]),
        )
        for row in summary
    ]
    caption = (
        "Loss in nats a token and accuracy of the next token, over real tokens of the validation set. ±: 95 % interval "
        "over seeds (Student's t), of the paired difference under “vs GQA”. Step: all variants timed in turns; more "
        "than 1× is faster. Attention saving: attention FLOPs of multi-head attention over this variant's."
    )
    return _table("results", caption, headings, lines)


def _published_table(summary: Sequence[Row]) -> str:
    """Ours in the published convention beside what was published; empty cells where there is no such figure."""
    step = PUBLISHED[BASELINE][2]
    headings = (
        "variant", "loss, published", "loss, here", "accuracy, published", "accuracy, here",
        "speed vs GQA, published", "speed vs GQA, here",
    )  # fmt: skip
    lines = []
    for row in summary:
        loss, accuracy, seconds = PUBLISHED.get(row["variant"], (None, None, None))
        ours = row["loss_all_positions"], row["accuracy_all_positions"]
        lines.append((
            row["label"],
            "" if loss is None else f"{loss:.4f}", "" if ours[0] is None else f"{ours[0]:.4f}",
            "" if accuracy is None else f"{accuracy:.2%}", "" if ours[1] is None else f"{ours[1]:.2%}",
            _times(None if seconds is None else step / seconds), _times(row["speed_vs_gqa"]),
        ))  # fmt: skip
    caption = (
        f"Published: {PUBLISHED_SOURCE}. Here: the same convention, loss and accuracy over all positions, padding "
        "included (only padded rows have it). Padding is trivial to predict: neither compares with the table above."
    )
    return f"<h2>Beside the published table</h2>{_table('published', caption, headings, lines)}"
