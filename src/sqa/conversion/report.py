"""What a conversion cost, as people read it: a table for 80 columns and a figure of quality over healing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from sqa.bench.report import seconds_text
from sqa.conversion.importance import METHODS
from sqa.conversion.settings import Job
from sqa.cost import attention_flops, attention_parameters
from sqa.errors import MissingExtraError
from sqa.files import replacing

State = dict[str, Any]

_MEANINGS = {
    "loss": "loss: nats a real token of the validation text; kl: to the original, nats a token.",
    "cosine": "cosine: of embeddings to the original's; neighbours: share of the nearest ten passages that stay.",
}


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right")
    return table


def planned(job: Job) -> Group:
    """What a conversion would do, before it does it."""
    settings, n = job.settings, job.settings.length
    table = _table("attention", "before", "after")
    for what, count in (
        ("query heads a layer", lambda layer: layer.num_query_heads / len(job.before)),
        ("KV heads a layer", lambda layer: layer.num_kv_heads / len(job.before)),
        ("parameters", attention_parameters),
        (f"MFLOP, forward, {n:,} tokens", lambda layer: attention_flops(layer, n) / 1e6),
    ):
        table.add_row(what, *(f"{sum(map(count, layers)):,.0f}" for layers in (job.before, job.after)))
    total, first = (steps * settings.tokens_per_step for steps in (settings.steps, settings.layerwise_steps))
    healing = "healing: none"
    if total:
        healing = (
            f"healing: {total:,} tokens, {first:,} of them layer by layer; each takes a forward pass of the original "
            f"and a training step of the new model" + (", and one of the original" if settings.control else "")
        )
    lines = (
        f"calibration: {settings.sequences * n:,} tokens; heads by {settings.method}: {METHODS[settings.method]}",
        healing,
        f"verdict: {settings.evaluation_tokens:,} tokens at each stage; speed at {', '.join(map(str, job.speed_at))}",
    )
    return Group(table, *lines)


def quality_table(state: State) -> Group:
    """Quality at every stage, on text used for nothing else."""
    last = {row["stage"]: row for row in state["stages"]}
    measured = [name for name in next(iter(last.values())) if name not in ("stage", "tokens")]
    quality = _table("stage", "tokens", *measured)
    for row in last.values():
        quality.add_row(row["stage"], f"{row['tokens']:,}", *(f"{row[name]:,.4f}" for name in measured))
    errors = [(layer["dropped"], layer["refitted"]) for layer in state["layers"]]
    dropped, refitted = (sum(column) / len(errors) for column in zip(*errors, strict=True))
    return Group(
        quality,
        _MEANINGS[measured[0]],
        f"attention outputs, share of energy lost, mean over layers: {dropped:.4f} dropped, {refitted:.4f} refitted.",
    )


def speed_table(state: State) -> Group:
    """Time and size before and after."""
    speed = _table("", "N", "before", "after", "faster")
    for row in state["speed"]:
        times = (seconds_text(row[name]["median"]) for name in ("before", "after"))
        speed.add_row(row["what"], f"{row['n']:,}", *times, f"{row['ratio']:.2f}x")
    before, after = (state["cost"][name]["parameters"] for name in ("before", "after"))
    peak = state["peak_bytes"]
    memory = "" if peak is None else f" and {peak / 2**30:.1f} GiB at the peak"
    return Group(speed, f"parameters {before:,} -> {after:,}; converting took {state['wall_s']:,.0f} s{memory}")


def plot(state: State, path: Path) -> None:
    """Loss (of an encoder cosine) over tokens of healing, beside the original's, as .svg, .png, .html or .json.

    Raises ImportError without the extra `report`.
    """
    try:
        import altair as alt
    except ImportError:
        raise MissingExtraError("plots need altair", "report") from None
    rows = [row for row in state["stages"] if row["stage"] not in ("original", "dropped")]
    measured = "loss" if "loss" in rows[0] else "cosine"
    original = next(row for row in state["stages"] if row["stage"] == "original")
    lines = (
        alt.Chart(alt.Data(values=rows), width=420, height=260)
        .mark_line(point=True)
        .encode(
            x=alt.X("tokens:Q", title="tokens of healing", axis=alt.Axis(format="~s")),
            y=alt.Y(f"{measured}:Q", scale=alt.Scale(zero=False)),
            color=alt.Color("stage:N", title=None, sort=None),
        )
    )
    line = alt.Chart(alt.Data(values=[original])).mark_rule(strokeDash=[4, 3]).encode(y=f"{measured}:Q")
    with replacing(path) as temporary:
        (lines + line).save(str(temporary), format=path.suffix[1:])
