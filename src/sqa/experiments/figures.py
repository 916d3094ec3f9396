"""The figures of a report. Needs altair, of the extra `report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np

from sqa.config import ModelConfig
from sqa.cost import attention_flops, kv_cache_bytes, train_step_flops
from sqa.experiments.directory import Directory
from sqa.experiments.plan import Plan
from sqa.experiments.results import BASELINE, CURVE_FIELDS, Row, read_results
from sqa.variants import VARIANTS

CURVE_POINTS = 300

INTERVALS = "Bars: 95 % intervals of the loss; a seed moves all variants alike, so differences in the table are surer."

# of middle lightness, to be told apart on white and on black
_COLOURS = {
    "mha": "#8a8a8a", "gqa": "#e15759", "mqa": "#f28e2b", "sqa": "#2f7fd0", "ssqa": "#2ca58d", "xsqa": "#a05fc4",
    "xsmqa": "#d67bb1", "lsqa": "#63b3e8", "rsqa": "#8c9a2b", "wide-mha": "#b5754b", "wide-gqa": "#c79b00",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Figure:
    """An altair chart; `hover` is laid over it in the HTML file alone."""

    name: str
    title: str
    caption: str
    chart: Any
    hover: Any = None


def make_figures(
    held: Directory, rows: Sequence[Row], summary: Sequence[Row], plan: Plan, front: Sequence[str]
) -> list[Figure]:
    """Those that the results have figures for: no curves without curve.jsonl, no speed without the timing phase.

    `summary` is summary_rows of `rows`; `front` holds the variants of the Pareto front, the fastest first.
    """
    timed = [row for row in summary if row["step_s"] is not None]
    curves = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        seeds = [row["seed"] for row in rows if row["variant"] == name]
        runs = [
            run for seed in seeds if (run := read_results(held.run_folder(name, seed) / "curve.jsonl", CURVE_FIELDS))
        ]
        curves += curve(VARIANTS[name].label, runs) if runs else []
    found = []
    if curves:
        note = (
            "Training loss, the mean of the seeds, a moving average over 4 % of the run; its first tenth is left out."
        )
        clock = " Seconds of training alone; variants trained one after another, so step times below are the surer."
        found += [
            _curves_figure("loss-over-tokens", "Loss over tokens", note, curves, "tokens", "training tokens", plan),
            _curves_figure("loss-over-seconds", "Loss over time", note + clock, curves, "seconds", "seconds", plan),
        ]
    if timed:
        found.append(_pareto_figure(timed, plan, front))
    if any(row["speed_vs_gqa"] for row in timed):
        found.append(_speed_figure(rows, timed, plan))
    cache = {row["variant"]: kv_cache_bytes(plan.model_config(row["variant"]), plan.context) for row in summary}
    return [
        *found,
        _bars_figure(
            "parameters", "Parameters", "All of the model's, in millions.", summary, plan,
            {row["variant"]: row["parameters"] / 1e6 for row in summary}, "million parameters", ".2f",
        ),
        _bars_figure(
            "kv-cache", "KV cache", f"Of one sequence of {plan.context:,} tokens in 16 bit.", summary, plan,
            {name: size / 2**20 for name, size in cache.items()}, "MiB", ".3~g",
        ),
    ]  # fmt: skip


def curve(label: str, runs: Sequence[Sequence[Row]]) -> list[Row]:
    """One line of a figure: the mean of a variant's runs step by step, smoothed and thinned."""
    steps = min(len(run) for run in runs)
    values = [[(row["tokens"], row["seconds"], row["loss"]) for row in run[:steps]] for run in runs]
    tokens, seconds, loss = np.array(values, dtype=float).mean(axis=0).T
    shown = np.unique(np.linspace(steps // 10, steps - 1, CURVE_POINTS).round().astype(int))
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


def _colour(plan: Plan, **options: Any) -> Any:
    scale = alt.Scale(domain=[VARIANTS[n].label for n in plan.variants], range=[_COLOURS[n] for n in plan.variants])
    return alt.Color("variant:N", scale=scale, **options)


def _curves_figure(name: str, title: str, caption: str, data: list[Row], x: str, axis: str, plan: Plan) -> Figure:
    # dashed: no fewer query heads than heads
    whole = [VARIANTS[n].label for n in plan.variants if VARIANTS[n].query * VARIANTS[n].head_dim_factor == 1]
    labels = [VARIANTS[n].label for n in plan.variants]
    dashes = alt.Scale(domain=labels, range=[[5, 2] if label in whole else [1, 0] for label in labels])
    base = alt.Chart(alt.Data(values=data)).encode(
        x=alt.X(f"{x}:Q", title=axis, axis=alt.Axis(format="~s", tickCount=5)),
        y=alt.Y("loss:Q", title="nats a token", scale=alt.Scale(zero=False)),
        color=_colour(plan),
    )
    lines = base.mark_line(strokeWidth=1.6).encode(strokeDash=alt.StrokeDash("variant:N", scale=dashes))
    near = alt.selection_point(
        fields=["variant", "step"], nearest=True, on="pointerover", empty=False, clear="pointerout"
    )
    # all of the datum: a tooltip of chosen fields misses the names where the nearest point counts (Vega-Lite 6.4)
    points = base.mark_point(filled=True, size=70, tooltip=alt.TooltipContent("data")).encode(
        opacity=alt.when(near).then(alt.value(1)).otherwise(alt.value(0))
    )
    return Figure(name=name, title=title, caption=caption, chart=lines, hover=points.add_params(near))


def _pareto_figure(timed: Sequence[Row], plan: Plan, front: Sequence[str]) -> Figure:
    points = {row["variant"]: (1000 * row["step_s"], row["loss"].mean) for row in timed}
    spread = np.ptp(list(points.values()), axis=0) + 1e-12
    data = []
    for row in timed:
        (x, y), half = points[row["variant"]], row["loss"].half_width or 0.0
        others = [np.subtract(point, (x, y)) / spread for name, point in points.items() if name != row["variant"]]
        # the name goes to the side on which the nearest other point is not
        right = not others or bool(min(others, key=np.linalg.norm)[0] <= 0)
        data.append({
            "variant": row["label"], "ms": round(x, 2), "loss": round(y, 4), "low": y - half, "high": y + half,
            "interval": f"± {half:.4f}" if half else "one seed", "front": row["variant"] in front, "right": right,
        })  # fmt: skip
    base = alt.Chart(alt.Data(values=data)).encode(
        x=alt.X("ms:Q", title="ms a step", scale=alt.Scale(zero=False, padding=55)),
        y=alt.Y("loss:Q", title="validation loss", scale=alt.Scale(zero=False, padding=14)),
        color=_colour(plan, legend=None),
    )
    line = base.transform_filter("datum.front").mark_line(strokeDash=[4, 4], strokeWidth=1.2)
    bars = base.mark_rule(strokeWidth=1.2).encode(y=alt.Y("low:Q"), y2="high:Q")
    dots = base.mark_point(filled=True, size=80, opacity=1).encode(
        tooltip=["variant:N", alt.Tooltip("loss:Q", format=".4f"), "interval:N", alt.Tooltip("ms:Q", format=",.1f")]
    )
    names = [
        base.transform_filter(f"datum.right == {side}").mark_text(dx=dx, align=align, fontSize=12).encode(
            text="variant:N", color=alt.value("#222")
        )
        for side, dx, align in (("true", 9, "left"), ("false", -9, "right"))
    ]  # fmt: skip
    several = any(row["loss"].half_width for row in timed)
    return Figure(
        name="loss-against-step-time",
        title="Loss against step time",
        caption="Lower left is better. Dashed: the Pareto front of the means, where nothing else is both faster and "
        "better." + (f" {INTERVALS}" if several else ""),
        chart=alt.layer(line.encode(color=alt.value("#8a8a8a")), bars, dots, *names),
    )


def _speed_figure(rows: Sequence[Row], timed: list[Row], plan: Plan) -> Figure:
    configs = {row["variant"]: ModelConfig.from_dict(row["config"]) for row in rows}

    def attention(name: str) -> int:
        return sum(attention_flops(layer, plan.context) for layer in configs[name].layers)

    data = [
        {"variant": row["label"], "what": what, "ratio": round(ratio, 3)}
        for row in timed
        for what, ratio in (
            ("step, measured", row["speed_vs_gqa"]),
            ("step, in theory", _step_flops(configs[BASELINE], plan) / _step_flops(configs[row["variant"]], plan)),
            ("attention, in theory", attention(BASELINE) / attention(row["variant"])),
        )
    ]
    kinds = ["step, measured", "step, in theory", "attention, in theory"]
    colours = alt.Scale(domain=kinds, range=["#2f7fd0", "#f28e2b", "#8a8a8a"])
    shapes = alt.Scale(domain=kinds, range=["circle", "triangle-up", "diamond"])
    base = alt.Chart(alt.Data(values=data)).encode(y=alt.Y("variant:N", title=None, sort=None))
    span = base.mark_rule(strokeWidth=1, color="#8a8a8a", opacity=0.5).encode(
        x="min(ratio):Q",
        x2="max(ratio):Q",
    )
    dots = base.mark_point(filled=True, size=90, opacity=1).encode(
        x=alt.X("ratio:Q", title="times as fast as GQA", scale=alt.Scale(zero=False, padding=14)),
        color=alt.Color("what:N", scale=colours, legend=alt.Legend(symbolType="circle", columns=2)),
        shape=alt.Shape("what:N", scale=shapes),
        tooltip=["variant:N", "what:N", alt.Tooltip("ratio:Q", format=".2f")],
    )
    return Figure(
        name="speed-against-theory",
        title="Speed against theory",
        caption=f"A training step of {plan.context:,} tokens a row against GQA's: all variants timed in turns, beside "
        "the ratio of FLOPs of the whole step and of attention alone. Wide heads need the FLOPs of narrow ones, "
        "but fewer exponentials.",
        chart=alt.layer(span, dots),
    )


def _step_flops(config: ModelConfig, plan: Plan) -> int:
    return train_step_flops(config, plan.context, plan.batch_size)


def _bars_figure(
    name: str, title: str, caption: str, summary: Sequence[Row], plan: Plan,
    values: dict[str, float], axis: str, number: str,
) -> Figure:  # fmt: skip
    data = [{"variant": row["label"], "value": values[row["variant"]]} for row in summary]
    base = alt.Chart(alt.Data(values=data)).encode(
        x=alt.X("value:Q", title=axis, scale=alt.Scale(domainMax=1.2 * max(values.values()))),
        y=alt.Y("variant:N", title=None, sort=None),
        tooltip=["variant:N", alt.Tooltip("value:Q", format=number)],
    )
    bars = base.mark_bar().encode(color=_colour(plan, legend=None))
    text = base.mark_text(align="left", dx=4, fontSize=12).encode(text=alt.Text("value:Q", format=number))
    return Figure(name=name, title=title, caption=caption, chart=bars + text)


def laid_out(chart: Any, width: int | str) -> Any:
    """The look that all figures share."""
    return (
        chart.properties(width=width, height=300)
        .configure_view(stroke=None)
        .configure_legend(orient="bottom", columns=4, title=None, symbolType="stroke", labelFontSize=12)
        .configure_axis(labelFontSize=12, titleFontSize=12, titleFontWeight="normal")
    )


def for_page(figure: Figure) -> Any:
    """The chart as the HTML file has it: as wide as its place, no paper of its own, values under the pointer."""
    chart = figure.chart if figure.hover is None else figure.chart + figure.hover
    autosize = {"type": "fit-x", "contains": "padding"}
    return laid_out(chart, width="container").properties(background="transparent", autosize=autosize)
