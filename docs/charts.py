"""The figures of README.md and the site, as SVG drawn from the committed result files.

Each SVG brings its own paper and ink, light or dark as the reader's system is, so that it can be read on any page.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from sqa.experiments.figures import COLOURS
from sqa.experiments.report import read_experiment
from sqa.variants import VARIANTS, shape

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"

HORIZONS = ("horizon-2M", "horizon-6M", "horizon-16M")

_BY_LABEL = {VARIANTS[name].label: colour for name, colour in COLOURS.items()}
_IMPLEMENTATIONS = {
    "sqa": "this package", "hf-llama": "transformers Llama", "x-transformers": "x-transformers",
    "llama-cpp": "llama.cpp",
}  # fmt: skip
_COLOURS = ("#3a86d8", "#8a9096", "#b08900", "#a266c8")
"""Of the implementations, this package's first."""
_STYLE = """<style>
.paper { fill: #fff } text { fill: #24292f; font-family: system-ui, sans-serif }
.role-axis-grid line { stroke: #e3e6e8 } .role-axis-domain line, .role-axis-tick line { stroke: #8a9096 }
@media (prefers-color-scheme: dark) {
.paper { fill: #15181c } text { fill: #e4e7ea }
.role-axis-grid line { stroke: #30353b } .role-axis-domain line, .role-axis-tick line { stroke: #7d848b }
}
</style>"""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """An SVG file and what it says to somebody who cannot see it."""

    name: str
    alt: str
    svg: str


def _draw(chart: Any) -> str:
    """SVG of an altair chart; a style sheet gives text, grid and paper colours that follow the reader's system."""
    spec = (
        chart.configure_view(stroke=None)
        .configure_axis(labelFontSize=12, titleFontSize=12, titleFontWeight="normal")
        .configure_title(fontSize=13, anchor="start", fontWeight="bold", subtitleFontSize=12)
        .configure_legend(orient="bottom", title=None, labelFontSize=12)
        .properties(padding=12)
        .to_dict()
    )
    svg = vl_convert.vegalite_to_svg(spec, vl_version=".".join(alt.SCHEMA_VERSION.split(".")[:2]))
    opening = re.compile(r"(<svg[^>]*>)(<rect )")  # the rectangle is the paper
    styled, found = opening.subn(lambda match: f'{match[1]}{_STYLE}{match[2]}class="paper" ', svg, count=1)
    assert found, "vl-convert draws the paper otherwise than it did"
    return styled + "\n"


def _read(name: str) -> list[dict[str, Any]]:
    _, *rows = (json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
    return rows


def speed() -> Chart:
    """Training step against peers, and prefill over the length of the prompt."""
    steps = [row for row in _read("step-bf16") if row["kind"] == "step" and "seconds" in row]
    prefill = [row for row in _read("prefill") if "seconds" in row and row["variant"] in ("gqa", "sqa", "xsqa")]
    bars_data = [
        {
            "variant": VARIANTS[row["variant"]].label,
            "by": _IMPLEMENTATIONS[row["implementation"]],
            "tokens": row["tokens_per_s"],
        }
        for row in steps
    ]
    by = list(dict.fromkeys(row["by"] for row in bars_data))
    base = alt.Chart(alt.Data(values=bars_data)).encode(
        x=alt.X("tokens:Q", title="tokens a second", axis=alt.Axis(format="~s", tickCount=5)),
        y=alt.Y("by:N", title=None, sort=by, axis=None),
    )
    bars = base.mark_bar().encode(color=alt.Color("by:N", scale=alt.Scale(domain=by, range=_COLOURS[: len(by)])))
    text = base.mark_text(align="left", dx=4, fontSize=12).encode(text=alt.Text("tokens:Q", format=",.0f"))
    step = (
        alt.layer(bars, text)
        .properties(width=300, height=26 * len(by))
        .facet(
            row=alt.Row(
                "variant:N", title=None, sort=None,
                header=alt.Header(labelAngle=0, labelAlign="left", labelFontSize=12),
            ),
            title=alt.Title("Training step", subtitle="4 x 1,024 tokens, bf16"),
        )
        .properties(spacing=14)
    )  # fmt: skip
    lines_data = [
        {
            "variant": VARIANTS[row["variant"]].label,
            "by": _IMPLEMENTATIONS[row["implementation"]],
            "n": row["n"],
            "tokens": row["tokens_per_s"],
        }
        for row in prefill
    ]
    labels = list(dict.fromkeys(row["variant"] for row in lines_data))
    lengths = sorted({row["n"] for row in lines_data})
    colour = alt.Color(
        "variant:N", scale=alt.Scale(domain=labels, range=[_BY_LABEL[label] for label in labels]), legend=None
    )
    base = alt.Chart(alt.Data(values=lines_data)).encode(
        x=alt.X(
            "n:Q", title="tokens in the prompt", axis=alt.Axis(values=lengths, format=",d"),
            scale=alt.Scale(type="log", domain=[lengths[0], 1.5 * lengths[-1]], nice=False),
        ),
        y=alt.Y(
            "tokens:Q", title="tokens a second",
            axis=alt.Axis(format="~s", values=[5000, 10_000, 20_000, 50_000]),
            scale=alt.Scale(type="log", nice=False, padding=12),
        ),
    )  # fmt: skip
    read_by = list(dict.fromkeys(row["by"] for row in lines_data))
    dashes = {}
    if len(read_by) > 1:  # peers have the colour of their variant, and dashes
        scale = alt.Scale(domain=read_by, range=[[1, 0], [6, 3], [2, 2], [8, 2, 2, 2]][: len(read_by)])
        legend = alt.Legend(symbolType="stroke", symbolSize=400, symbolStrokeColor="#8a9096")
        dashes = {"strokeDash": alt.StrokeDash("by:N", scale=scale, legend=legend)}
    lines = base.mark_line(strokeWidth=2).encode(color=colour, detail="by:N", **dashes)
    points = base.mark_point(filled=True, opacity=1).encode(color=colour)
    names = (
        base.transform_filter(f"datum.n == {lengths[-1]} && datum.by == '{_IMPLEMENTATIONS['sqa']}'")
        .mark_text(align="left", dx=8, fontSize=12, fontWeight="bold")
        .encode(text="variant:N", color=colour)
    )
    reading = alt.layer(lines, points, names).properties(
        width=300, height=250, title=alt.Title("Reading a prompt", subtitle="one sequence, bf16")
    )
    ours = {row["variant"]: row["tokens_per_s"] for row in steps if row["implementation"] == "sqa"}
    peer = {row["variant"]: row["tokens_per_s"] for row in steps if row["implementation"] == "hf-llama"}
    at_last = {
        (row["implementation"], row["variant"]): row["tokens_per_s"] for row in prefill if row["n"] == lengths[-1]
    }
    times = {name: at_last["sqa", name] / at_last["sqa", "gqa"] for name in ("sqa", "xsqa")}
    beside = "".join(
        f" {_IMPLEMENTATIONS[peer]} reads {value:,.0f} tokens a second with GQA's heads, this package "
        f"{at_last['sqa', 'gqa']:,.0f}."
        for (peer, variant), value in at_last.items()
        if peer != "sqa" and variant == "gqa"
    )
    words = "; ".join(
        f"{VARIANTS[name].label} {value:,.0f} tokens a second here and {peer[name]:,.0f} with transformers"
        for name, value in ours.items()
        if name in peer
    )
    return Chart(
        name="speed",
        alt=f"Two charts. Training step: {words}. Reading a prompt of {lengths[-1]:,} tokens: SQA is "
        f"{times['sqa']:.2f} times as fast as GQA, xSQA {times['xsqa']:.2f} times.{beside}",
        svg=_draw(alt.hconcat(step, reading, spacing=40).resolve_scale(color="independent", strokeDash="independent")),
    )


def verdict() -> Chart:
    """Loss against GQA at the end of complete trainings of several lengths, in bf16 and in float32."""
    variants = ("sqa", "ssqa", "xsqa", "wide-gqa")
    data, colours = [], {}
    for suffix, said in (("", ""), ("-fp32", ", float32")):
        found = [RESULTS / f"{name}{suffix}" for name in HORIZONS]
        for line in read_experiment([path for path in found if (path / "results.jsonl").exists()]).summaries():
            if line.variant not in variants or line.difference is None:
                continue
            mean, half = line.difference.mean, line.difference.half_width or 0.0
            tokens, label = round(line.tokens, -5), f"{line.label}{said}"
            colours[label] = COLOURS[line.variant]
            beside = variants.index(line.variant) - 2 if not said else 2.5
            data.append({
                "variant": label, "tokens": tokens, "mean": mean, "low": mean - half, "high": mean + half,
                "dash": [5, 4] if said else [1, 0],
                "x": tokens * 1.03**beside,  # so that intervals do not hide one another
            })  # fmt: skip
    lengths = sorted({row["tokens"] for row in data})
    colour = alt.Color("variant:N", scale=alt.Scale(domain=list(colours), range=list(colours.values())), legend=None)
    base = alt.Chart(alt.Data(values=data)).encode(
        x=alt.X(
            "x:Q", title="tokens of the whole training", axis=alt.Axis(values=lengths, format="~s"),
            scale=alt.Scale(type="log", domain=[0.85 * lengths[0], 1.9 * lengths[-1]], nice=False),
        ),
        color=colour,
    )  # fmt: skip
    dash = alt.StrokeDash("dash:N", scale=None, legend=None)
    y_title = "loss minus GQA's, nats a token (lower is better)"
    lines = base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=70)).encode(
        y=alt.Y("mean:Q", title=y_title), strokeDash=dash
    )
    bars = base.mark_rule(strokeWidth=1.5).encode(y="low:Q", y2="high:Q", strokeDash=dash)
    # lines are named beside their last point, none of the names over another
    ends = sorted({row["variant"]: row for row in data}.values(), key=lambda row: -row["mean"])
    above = math.inf
    for row in ends:
        above = min(row["mean"], above - 0.024)
        row["named"] = above
    names = (
        base.transform_filter("isValid(datum.named)")
        .mark_text(align="left", fontSize=12, fontWeight="bold")
        .encode(x=alt.datum(1.13 * lengths[-1]), y="named:Q", text="variant:N")
    )
    zero = alt.Chart(alt.Data(values=[{"y": 0}])).mark_rule(strokeDash=[4, 3], color="#8a9096").encode(y="y:Q")
    words = "; ".join(
        f"{row['variant']} at {row['tokens'] / 1e6:.0f} M {row['mean']:+.4f} "
        + (f"± {row['high'] - row['mean']:.4f}" if row["high"] > row["mean"] else "(one seed)")
        for row in sorted(data, key=lambda row: row["tokens"])
    )
    return Chart(
        name="verdict",
        alt=f"Validation loss minus GQA's with 95 % intervals, by the tokens of the training: {words}.",
        svg=_draw(alt.layer(zero, bars, lines, names).properties(width=520, height=300)),
    )


CHARTS: dict[str, Callable[[], Chart]] = {"speed": speed, "verdict": verdict}


def speed_words() -> str:
    """How the speed chart was measured, from the headers of its files, and what a larger shape gains."""
    headers = [
        json.loads((RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[0])
        for name in ("step-bf16", "prefill")
    ]
    machine, versions = headers[0]["machine"], headers[0]["versions"]
    processor = machine["processor"].split(" avx")[0]
    rounds = " and ".join(str(header["settings"]["rounds"]) for header in headers)
    larger = json.loads((RESULTS / "step-larger.jsonl").read_text(encoding="utf-8").splitlines()[0])
    elsewhere = "" if larger["machine"] == machine else "; on another processor"
    gains = {}
    for name in ("step-bf16", "step-larger"):
        for row in _read(name):
            if (row["kind"], row["implementation"], row["variant"]) == ("step", "sqa", "sqa"):
                gains[name] = row["ratio"]
    return (
        f"The published shape ({_shape('published')}), bf16, compiled, {machine['threads']} threads of an "
        f"{processor}, PyTorch {versions['torch']}, transformers {versions['transformers']}: "
        f"medians of {rounds} rounds. SQA's training step is {gains['step-bf16']:.2f} times as fast as GQA's here. "
        f"At a larger shape ({_shape('larger')}{elsewhere}) attention is a smaller part of the step, and SQA's is "
        f"{gains['step-larger']:.2f} times as fast."
    )


def _shape(name: str) -> str:
    """A named shape in words."""
    fields = shape(name)
    width, heads = fields["d_model"], fields["num_heads"]
    return f"{width} wide, {fields['num_layers']} layers, {heads} heads of {width // heads}"
