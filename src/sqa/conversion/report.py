"""What a conversion cost, as people read it: a table for 80 columns and a figure of quality over healing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from sqa.conversion.importance import METHODS
from sqa.conversion.settings import Job
from sqa.cost import parameters, prefill_flops, train_step_flops
from sqa.files import replacing
from sqa.interop import load_config

State = dict[str, Any]


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right")
    return table


def planned(job: Job) -> Group:
    """What a conversion would do, before it does it."""
    settings, before = job.settings, load_config(job.source)
    after = before.replace(attention=job.attention)
    old, new = before.layers[0], after.layers[0]
    table = _table("", "before", "after")
    table.add_row("query heads", str(old.num_query_heads), str(new.num_query_heads))
    table.add_row("KV heads", str(old.num_kv_heads), str(new.num_kv_heads))
    table.add_row("parameters", f"{parameters(before):,}", f"{parameters(after):,}")
    n = settings.length
    for what, count in (("prefill", prefill_flops), ("training step", train_step_flops)):
        table.add_row(f"{what}, GFLOP at {n:,}", f"{count(before, n) / 1e9:,.1f}", f"{count(after, n) / 1e9:,.1f}")
    tokens = settings.sequences * n
    method = METHODS[settings.method]
    work = 2 * parameters(before) * tokens + settings.steps * settings.tokens_per_step * (
        2 * parameters(before) + 6 * parameters(after)
    )
    lines = [
        f"calibration: {tokens:,} tokens; heads by {settings.method} ({method.about}), which takes {method.cost} more",
        f"healing: {settings.steps * settings.tokens_per_step:,} tokens, "
        f"{settings.layerwise_steps * settings.tokens_per_step:,} of them layer by layer",
        f"verdict: {settings.evaluation_tokens:,} tokens; in all about {work / 1e12:,.1f} TFLOP and the verdict",
    ]
    return Group(table, *lines)


def verdict(state: State) -> Group:
    """Quality at every stage, then speed and size before and after."""
    quality = _table("stage", "tokens", "loss", "perplexity", "KL")
    last = {row["stage"]: row for row in state["stages"]}
    for row in last.values():
        quality.add_row(
            row["stage"], f"{row['tokens']:,}", f"{row['loss']:.4f}", f"{row['perplexity']:.2f}", f"{row['kl']:.4f}"
        )
    speed = _table("", "N", "before", "after", "faster")
    for row in state["speed"]:
        times = (f"{1000 * row[name]['median']:,.0f} ms" for name in ("before", "after"))
        speed.add_row(row["what"], f"{row['n']:,}", *times, f"{row['ratio']:.2f}x")
    before, after = state["cost"]["before"], state["cost"]["after"]
    errors = [(layer["dropped"], layer["refitted"]) for layer in state["layers"]]
    dropped, refitted = (sum(column) / len(errors) for column in zip(*errors, strict=True))
    return Group(
        quality,
        "loss: nats a real token of the validation text; KL: to the original, a token.",
        f"attention outputs, share of energy lost, mean over layers: {dropped:.4f} dropped, {refitted:.4f} refitted.",
        "",
        speed,
        f"parameters {before['parameters']:,} -> {after['parameters']:,}",
    )


def plot(state: State, path: Path) -> None:
    """Loss over tokens of healing, beside the original's, as .svg, .png, .html or .json.

    Raises ImportError without the extra `report`.
    """
    try:
        import altair as alt
    except ImportError:
        raise ImportError("plots need altair: pip install 'sparse-query-attention[report]'") from None
    rows = [row for row in state["stages"] if row["stage"] not in ("original", "dropped")]
    original = next(row for row in state["stages"] if row["stage"] == "original")
    lines = (
        alt.Chart(alt.Data(values=rows), width=420, height=260)
        .mark_line(point=True)
        .encode(
            x=alt.X("tokens:Q", title="tokens of healing", axis=alt.Axis(format="~s")),
            y=alt.Y("loss:Q", title="nats a real token", scale=alt.Scale(zero=False)),
            color=alt.Color("stage:N", title=None, sort=None),
        )
    )
    line = alt.Chart(alt.Data(values=[original])).mark_rule(strokeDash=[4, 3]).encode(y="loss:Q")
    with replacing(path) as temporary:
        (lines + line).save(str(temporary), format=path.suffix[1:])
