"""The figures of a report. Needs altair, of the extra `report`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import altair as alt
import numpy as np

from sqa.cost import attention_flops, kv_cache_bytes, parameters, train_step_flops
from sqa.experiments.curves import Row, difference_curves, probe_points, training_curves
from sqa.experiments.plan import Plan
from sqa.experiments.statistics import Estimate
from sqa.experiments.summary import Experiment, Summary
from sqa.training.probes import Probe
from sqa.variants import BASELINE

COLOURS = {
    "mha": "#808488", "gqa": "#e0585b", "mqa": "#d2761a", "sqa": "#3a86d8", "ssqa": "#279f8a", "xsqa": "#a266c8",
    "xsmqa": "#cf6ba9", "lsqa": "#3f9bd6", "rsqa": "#7f8c24", "wide-mha": "#b5754b", "wide-gqa": "#b08900",
}  # fmt: skip
"""Of medium lightness: the contrast to white and to nearly black paper is at least 3."""

_GREY = "#808488"
_ROW_HEIGHT = 30  # pixels, of charts with a row a variant
_BY_VARIANT = alt.Y("variant:N", title=None, sort=None)  # their axis


@dataclass(frozen=True, kw_only=True)
class Figure:
    """An altair chart; `hover` is laid over it in the HTML file alone. `height` in pixels, of the axes alone."""

    name: str
    title: str
    caption: str
    chart: Any
    hover: Any = None
    height: int = 300


def make_figures(experiment: Experiment, front: Sequence[str]) -> list[Figure]:
    """All figures that the results allow: curves need curve.jsonl, speed needs the timing phase.

    `front`: the variants of the Pareto front, the fastest first.
    """
    lines, plan, colours = experiment.longest(), experiment.plan, Colours(experiment)
    timed = [line for line in lines if line.step_s is not None]
    all_timed = len(timed) == len(lines)  # step times and what runs took cannot share an axis
    megabytes = {name: kv_cache_bytes(plan.model_config(name), plan.context) / 2**20 for name in experiment.names}
    found: list[Figure | None]
    if len(experiment.horizons) > 1:
        found = _horizon_figures(experiment.summaries(), colours)
    else:
        found = [_difference_by_variant(lines, colours)]
    curves = training_curves(experiment, timed=all_timed)
    found += _curve_figures(curves, plan.label(BASELINE), colours, timed=all_timed)
    if timed:
        found.append(_pareto_figure(timed, colours, front))
    if BASELINE in plan.variants and any(line.speed_vs_gqa for line in timed):
        found.append(_speed_figure(timed, plan))
    found += [
        _grid(experiment, lines),
        *_probe_figures(experiment, colours),
        _bars_figure(
            "parameters", "Parameters", "All of the model's, in millions.", lines, colours,
            {line.variant: line.parameters / 1e6 for line in lines}, "million parameters", ".2f",
        ),
        _bars_figure(
            "kv-cache", "KV cache", f"Of one sequence of {plan.context:,} tokens in 16 bit.", lines, colours,
            megabytes, "MiB", ".3~g",
        ),
    ]  # fmt: skip
    return [figure for figure in found if figure is not None]


class Colours:
    """The colour of each variant in all figures, and dashes for variants with all of their query heads."""

    def __init__(self, experiment: Experiment) -> None:
        self._labels = [experiment.plan.label(name) for name in experiment.names]
        spare = (colour for name, colour in COLOURS.items() if name not in experiment.names)
        self._range = [COLOURS.get(name) or next(spare, _GREY) for name in experiment.names]
        configs = [experiment.plan.model_config(name).layers[0] for name in experiment.names]
        self._dashes = [[5, 2] if c.query_width >= c.d_model else [1, 0] for c in configs]

    def encoding(self, data: Sequence[Row], **options: Any) -> Any:
        """The colour channel of a chart of `data`; `options` are those of altair.Color."""
        return alt.Color("variant:N", scale=self._scale(data, self._range), **options)

    def dashes(self, data: Sequence[Row]) -> Any:
        """The dash channel of a chart of `data`."""
        return alt.StrokeDash("variant:N", scale=self._scale(data, self._dashes))

    def _scale(self, data: Sequence[Row], values: Sequence[Any]) -> Any:
        """A scale whose legend names only what the chart shows, in the order of the table."""
        shown = {row["variant"] for row in data}
        pairs = [(label, value) for label, value in zip(self._labels, values, strict=True) if label in shown]
        return alt.Scale(domain=[label for label, _ in pairs], range=[value for _, value in pairs])


def _chart(data: Sequence[Row], **encodings: Any) -> Any:
    return alt.Chart(alt.Data(values=data)).encode(**encodings)


def _dots(base: Any, size: int, **encodings: Any) -> Any:
    return base.mark_point(filled=True, size=size, opacity=1).encode(**encodings)


def _log_axis(field: str, title: str, ends: Sequence[float] | None = None) -> Any:
    """A logarithmic axis, with ticks only at `ends` if they are given."""
    scale = alt.Scale(type="log", nice=False, padding=20)
    ticks = {"format": "~s", "tickCount": 4} if ends is None else {"format": ".2~s", "values": ends}
    return alt.X(f"{field}:Q", title=title, scale=scale, axis=alt.Axis(**ticks))


def _zero(axis: str) -> Any:
    """A dashed line at zero: the baseline in a chart of differences to it."""
    rule = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(strokeDash=[4, 4], color=_GREY)
    return rule.encode(**{axis: alt.datum(0)})


def _interval(value: Estimate) -> str:
    return "one seed" if value.half_width is None else f"± {value.half_width:.4f}"


def _with_interval(value: Estimate) -> Row:
    """The fields of a point that show a mean and its interval."""
    half = value.half_width or 0.0
    bounds = {"low": value.mean - half, "high": value.mean + half}
    return {"mean": round(value.mean, 5), **bounds, "interval": _interval(value)}


_TIPS = ["variant:N", alt.Tooltip("mean:Q", format="+.4f"), "interval:N"]


def _differences(lines: Sequence[Summary]) -> list[Row]:
    """A point for each line that has a difference from the baseline."""
    return [
        {"variant": line.label, "tokens": line.tokens, **_with_interval(line.difference)}
        for line in lines
        if line.difference is not None
    ]


def _difference_by_variant(lines: Sequence[Summary], colours: Colours) -> Figure | None:
    """The differences of the table with their intervals, a row for each variant."""
    if not (data := _differences(lines)):
        return None
    base = _chart(data, y=_BY_VARIANT, color=colours.encoding(data, legend=None))
    mean = alt.X("mean:Q", title="nats a token above GQA's", scale=alt.Scale(padding=14), axis=alt.Axis(tickCount=5))
    bars = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q"), x2="high:Q")
    return Figure(
        name="difference-by-variant", title="Final loss against GQA", height=_ROW_HEIGHT * len(data),
        caption="Validation loss minus GQA's with the same seed, the mean of the seeds; left of the line is better. "
        "Bars: 95 % intervals. A bar that crosses the line, or no bar (one seed), establishes nothing.",
        chart=_zero("x") + bars + _dots(base, 80, x=mean, tooltip=_TIPS),
    )  # fmt: skip


def _horizon_figures(lines: Sequence[Summary], colours: Colours) -> list[Figure | None]:
    """The final losses of complete trainings: against the baseline's, over tokens and over time."""
    note = "Each point is the end of complete trainings, the mean of the seeds."
    losses = [
        {"variant": line.label, "tokens": line.tokens, "seconds": line.seconds, **_with_interval(line.loss)}
        for line in lines
    ]
    timed = [row for row in losses if row["seconds"]]
    tokens, seconds = _log_axis("tokens", "training tokens", _ends(losses)), _log_axis("seconds", "seconds of training")
    figures = [_difference_over_tokens(lines, colours, note)]
    for what, x, data, more in (
        ("tokens", tokens, losses, ""),
        ("time", seconds, timed, " Seconds: steps times the step time of the timing phase."),
    ):
        if data:
            chart = alt.layer(*_lines_with_points(_chart(data, x=x), data, colours, x.shorthand))
            name, title = f"final-loss-over-{what}", f"Final loss over {what}"
            figures.append(Figure(name=name, title=title, caption=note + more, chart=chart))
    return figures


def _difference_over_tokens(lines: Sequence[Summary], colours: Colours, note: str) -> Figure | None:
    if not (data := _differences(lines)):
        return None
    names = list(dict.fromkeys(row["variant"] for row in data))
    for row in data:
        row["beside"] = row["tokens"] * 1.03 ** (names.index(row["variant"]) - (len(names) - 1) / 2)
    base = _chart(data, x=_log_axis("beside", "training tokens", _ends(data)))
    # a seed moves all losses alike: only differences have intervals worth a bar
    bars = base.mark_rule(strokeWidth=1.2).encode(y="low:Q", y2="high:Q", color=colours.encoding(data))
    return Figure(
        name="difference-over-tokens", title="Final loss against GQA",
        caption=f"{note} Below the line is better than GQA with the same seeds. Bars are 95 % intervals; no bar: one "
        "seed. Points at one place are set side by side.",
        chart=alt.layer(_zero("y"), bars, *_lines_with_points(base, data, colours, "tokens:Q")),
    )  # fmt: skip


def _ends(data: Sequence[Row]) -> list[int]:
    """The tokens at which trainings end."""
    return sorted({row["tokens"] for row in data})


def _lines_with_points(base: Any, data: Sequence[Row], colours: Colours, x: str) -> tuple[Any, Any]:
    """A line for each variant through its means, and points with tooltips."""
    y = alt.Y("mean:Q", title="nats a token", scale=alt.Scale(zero=False, padding=10))
    drawn = base.encode(y=y, color=colours.encoding(data))
    tips = [*_TIPS, alt.Tooltip(x, format=",.0f")]
    lines = drawn.mark_line(strokeWidth=1.6).encode(strokeDash=colours.dashes(data))
    return lines, _dots(drawn, 50, tooltip=tips)


def _grid(experiment: Experiment, lines: Sequence[Summary]) -> Figure | None:
    """Loss by head counts, if the plan has all pairs of several counts with the same head_dim and parameters."""
    layers = {name: experiment.plan.model_config(name).layers[0] for name in experiment.plan.variants}
    narrow = {name: layer for name, layer in layers.items() if layer.head_dim * layer.num_heads == layer.d_model}
    pairs = {(layer.num_query_heads, layer.num_kv_heads): name for name, layer in narrow.items()}
    counts = sorted({count for pair in pairs for count in pair}, reverse=True)
    sizes = [parameters(experiment.plan.model_config(name)) for name in narrow]
    whole = {(q, kv) for q in counts for kv in counts if kv <= q} <= set(pairs)
    data = [
        {"variant": line.label, "hq": line.num_query_heads, "hkv": line.num_kv_heads, **_with_interval(line.loss)}
        for line in lines
        if line.variant in narrow
    ]
    if len(counts) < 3 or not whole or not data or max(sizes) > 1.01 * min(sizes):
        return None
    low, high = min(point["mean"] for point in data), max(point["mean"] for point in data)
    base = _chart(
        data,
        x=alt.X("hkv:O", title="KV heads", sort=counts, axis=alt.Axis(labelAngle=0)),
        y=alt.Y("hq:O", title="query heads", sort=counts),
    )
    # light colours, because the numbers are dark in both colour schemes
    shade = alt.Color("mean:Q", scale=alt.Scale(range=["#7fbcf0", "#f6e6c8"], domain=[low, high]), legend=None)
    cells = base.mark_rect(stroke=_GREY).encode(
        color=shade, tooltip=["variant:N", alt.Tooltip("mean:Q", format=".4f"), "interval:N"]
    )
    text = base.mark_text(fontSize=13, color="#1d1f21").encode(text=alt.Text("mean:Q", format=".3f"))
    return Figure(
        name="grid", title="Loss by head counts", chart=cells + text,
        caption="Validation loss at equal parameters: the feed-forward has what heads give back. Bluer is better; the "
        f"shades span {high - low:.3f} nats.",
    )  # fmt: skip


def _probe_figures(experiment: Experiment, colours: Colours) -> list[Figure]:
    """When the models of the longest horizon began to use their context, if they were probed."""
    values: list[tuple[str, str, str, Callable[[Probe], float]]] = [
        (
            "repeated-sequence", "A random sequence, repeated",
            "Loss on the second half of random tokens that repeat the first half: only attention can predict them.",
            lambda probe: probe.repeated_loss,
        ),
        (
            "late-minus-early", "Loss late minus early",
            "Loss at the last positions of a document minus that at its first 16: what a model gains from its context.",
            lambda probe: probe.loss_by_position[-1] - probe.loss_by_position[0],
        ),
    ]  # fmt: skip
    found = []
    for name, title, caption, value in values:
        if not (data := probe_points(experiment, value)):
            continue
        base = _chart(
            data,
            x=_log_axis("tokens", "training tokens"),
            y=alt.Y("value:Q", title="nats a token", scale=alt.Scale(zero=False)),
            color=colours.encoding(data),
            strokeDash=colours.dashes(data),
            tooltip=["variant:N", alt.Tooltip("tokens:Q", format=",d"), alt.Tooltip("value:Q", format=".3f")],
        )
        lines = base.mark_line(strokeWidth=1.6, point=alt.OverlayMarkDef(size=30))
        found.append(Figure(name=name, title=title, caption=f"{caption} The mean of the seeds.", chart=lines))
    return found


def _curve_figures(curves: Sequence[Row], baseline: str, colours: Colours, *, timed: bool) -> list[Figure]:
    """The training curves over tokens and over time, and their differences from the baseline's."""
    if not curves:
        return []
    note = (
        "Training loss, the mean of the seeds, a moving average over 4 % of the run; its first third is left out, "
        "so that the rest can be told apart."
    )
    minus = (
        "The training curves minus GQA's. All variants see the same batches, so most of the noise cancels. Below "
        "zero is better than GQA. Training loss: the table has validation loss and its intervals."
    )
    measured = "steps times the step time of the timing phase"
    clock = f"Seconds: {measured}." if timed else "Seconds of training alone, on whatever else the machine did."
    tokens, seconds = (
        alt.X(f"{field}:Q", title=title, axis=alt.Axis(format="~s", tickCount=5))
        for field, title in (("tokens", "training tokens"), ("seconds", "seconds"))
    )
    loss = alt.Y("loss:Q", title="nats a token", scale=alt.Scale(zero=False))
    above = alt.Y("difference:Q", title="nats a token above GQA's")
    found = [_curves(("loss-over-tokens", "Loss over tokens", note), curves, colours, x=tokens, y=loss)]
    if differences := difference_curves(curves, baseline):
        against = _curves(("loss-against-gqa", "Loss against GQA", minus), differences, colours, x=tokens, y=above)
        found.append(replace(against, chart=_zero("y") + against.chart))
    over_time = "loss-over-seconds", "Loss over time", f"{note} {clock}"
    return [*found, _curves(over_time, curves, colours, x=seconds, y=loss)]


def _curves(texts: tuple[str, str, str], data: Sequence[Row], colours: Colours, *, x: Any, y: Any) -> Figure:
    """A line for each variant, and points that show values under the pointer; texts: name, title and caption."""
    base = _chart(data, x=x, y=y, color=colours.encoding(data))
    near = alt.selection_point(
        fields=["variant", "step"], nearest=True, on="pointerover", empty=False, clear="pointerout"
    )
    # the whole datum: a tooltip of chosen fields lacks their names when the nearest point is shown (Vega-Lite 6.4)
    points = base.mark_point(filled=True, size=70, tooltip=alt.TooltipContent("data")).encode(
        opacity=alt.when(near).then(alt.value(1)).otherwise(alt.value(0))
    )
    lines = base.mark_line(strokeWidth=1.6).encode(strokeDash=colours.dashes(data))
    name, title, caption = texts
    return Figure(name=name, title=title, caption=caption, chart=lines, hover=points.add_params(near))


def _pareto_figure(timed: Sequence[Summary], colours: Colours, front: Sequence[str]) -> Figure:
    points = {line.variant: (1000 * float(line.step_s or 0), line.loss.mean) for line in timed}
    spread = np.ptp(list(points.values()), axis=0) + 1e-12
    data = []
    for line in timed:
        (x, y), half = points[line.variant], line.loss.half_width or 0.0
        others = [np.subtract(point, (x, y)) / spread for name, point in points.items() if name != line.variant]
        # the name goes to the side on which the nearest other point is not
        right = not others or bool(min(others, key=np.linalg.norm)[0] <= 0)
        data.append({
            "variant": line.label, "ms": round(x, 2), "loss": round(y, 4), "low": y - half, "high": y + half,
            "interval": _interval(line.loss), "front": line.variant in front, "right": right,
        })  # fmt: skip
    base = _chart(
        data,
        x=alt.X("ms:Q", title="ms a step", axis=alt.Axis(tickCount=6), scale=alt.Scale(zero=False, padding=62)),
        y=alt.Y("loss:Q", title="validation loss", scale=alt.Scale(zero=False, padding=14)),
        color=colours.encoding(data, legend=None),
    )
    joined = base.transform_filter("datum.front").mark_line(strokeDash=[4, 4], strokeWidth=1.2)
    bars = base.mark_rule(strokeWidth=1.2).encode(y=alt.Y("low:Q"), y2="high:Q")
    tips = ["variant:N", alt.Tooltip("loss:Q", format=".4f"), "interval:N", alt.Tooltip("ms:Q", format=",.1f")]
    names = [
        base.transform_filter(f"datum.right == {side}").mark_text(dx=dx, align=align, fontSize=12).encode(
            text="variant:N", color=alt.value("#222")
        )
        for side, dx, align in (("true", 9, "left"), ("false", -9, "right"))
    ]  # fmt: skip
    caption = (
        "Lower left is better. Dashed: the Pareto front of the means, where nothing else is both faster and better."
    )
    if any(line.loss.half_width for line in timed):
        caption += (
            " Bars: 95 % intervals of the loss; a seed moves all variants alike, so differences in the table are surer."
        )
    return Figure(
        name="loss-against-step-time",
        title="Loss against step time",
        caption=caption,
        chart=alt.layer(joined.encode(color=alt.value(_GREY)), bars, _dots(base, 80, tooltip=tips), *names),
    )


def _speed_figure(timed: Sequence[Summary], plan: Plan) -> Figure:
    configs = {name: plan.model_config(name) for name in (BASELINE, *(line.variant for line in timed))}
    step = {name: train_step_flops(config, plan.context) for name, config in configs.items()}
    attention = {
        name: sum(attention_flops(layer, plan.context) for layer in config.layers) for name, config in configs.items()
    }
    ratios: dict[str, Callable[[Summary], float]] = {
        "step, measured": lambda line: line.speed_vs_gqa or 0.0,
        "step, in theory": lambda line: step[BASELINE] / step[line.variant],
        "attention, in theory": lambda line: attention[BASELINE] / attention[line.variant],
    }
    data = [
        {"variant": line.label, "what": what, "ratio": round(ratio(line), 3)}
        for line in timed
        for what, ratio in ratios.items()
    ]
    colours = alt.Scale(domain=list(ratios), range=["#3a86d8", "#d2761a", _GREY])
    shapes = alt.Scale(domain=list(ratios), range=["circle", "triangle-up", "diamond"])
    base = _chart(data, y=_BY_VARIANT)
    span = base.mark_rule(strokeWidth=1, color=_GREY, opacity=0.5).encode(x="min(ratio):Q", x2="max(ratio):Q")
    dots = _dots(
        base,
        90,
        x=alt.X("ratio:Q", title="times as fast as GQA", scale=alt.Scale(zero=False, padding=14)),
        color=alt.Color("what:N", scale=colours, legend=alt.Legend(symbolType="circle", symbolSize=100, columns=2)),
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


def _bars_figure(
    name: str, title: str, caption: str, lines: Sequence[Summary], colours: Colours,
    values: Mapping[str, float], axis: str, number: str,
) -> Figure:  # fmt: skip
    data = [{"variant": line.label, "value": values[line.variant]} for line in lines]
    base = _chart(
        data,
        x=alt.X(
            "value:Q", title=axis, scale=alt.Scale(domainMax=1.2 * max(values.values())), axis=alt.Axis(tickCount=5)
        ),
        y=_BY_VARIANT,
        tooltip=["variant:N", alt.Tooltip("value:Q", format=number)],
    )
    bars = base.mark_bar().encode(color=colours.encoding(data, legend=None))
    text = base.mark_text(align="left", dx=4, fontSize=12).encode(text=alt.Text("value:Q", format=number))
    return Figure(name=name, title=title, caption=caption, chart=bars + text, height=_ROW_HEIGHT * len(data))


def laid_out(figure: Figure, width: int | str, *, hover: bool = False) -> Any:
    """The chart in the look that all figures share."""
    chart = figure.chart + figure.hover if hover and figure.hover is not None else figure.chart
    return (
        chart.properties(width=width, height=figure.height)
        .configure_view(stroke=None)
        .configure_legend(orient="bottom", columns=4, title=None, symbolType="stroke", symbolSize=300, labelFontSize=12)
        .configure_axis(labelFontSize=12, titleFontSize=12, titleFontWeight="normal")
    )


def for_page(figure: Figure) -> Any:
    """The chart for the HTML file: as wide as its container, transparent, with values under the pointer."""
    autosize = {"type": "fit-x", "contains": "padding"}
    return laid_out(figure, width="container", hover=True).properties(background="transparent", autosize=autosize)
