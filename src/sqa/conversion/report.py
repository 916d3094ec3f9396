"""A conversion's results for people: tables of 80 columns, and a figure of quality over healing."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sqa.bench.report import seconds_text
from sqa.charts import load_altair, save_chart
from sqa.conversion.importance import METHODS
from sqa.conversion.records import Conversion, EmbeddingQuality, LanguageQuality, Quality, Stage
from sqa.conversion.settings import Job
from sqa.cost import attention_flops, attention_parameters
from sqa.tables import make_table

WORST_LAYERS = 5

_MEANINGS: dict[type[Quality], str] = {
    LanguageQuality: "loss: nats a real token of the validation text; kl: to the original, nats a token; agreement: "
    "share of positions at which both find the same token most likely.",
    EmbeddingQuality: "cosine: of embeddings to the original's; neighbours: share of the nearest ten passages that "
    "stay.",
}


def planned(job: Job) -> Group:
    """What a conversion is going to do."""
    settings, n = job.settings, job.settings.length
    table = make_table("attention", "before", "after", names=("attention",), gap=2)
    after = job.shapes()
    for what, count in (
        ("query heads a layer", lambda layer: layer.num_query_heads / len(job.before)),
        ("KV heads a layer", lambda layer: layer.num_kv_heads / len(job.before)),
        ("parameters", attention_parameters),
        (f"MFLOP, forward, {n:,} tokens", lambda layer: attention_flops(layer, n) / 1e6),
    ):
        counts = [_counted(sum(map(count, layers))) for layers in (job.before, after)]
        if settings.allocation == "measured-kv" and what in ("KV heads a layer", "parameters"):
            counts[1] = "measured"
        table.add_row(what, *counts)
    total, first = (steps * settings.tokens_per_step for steps in (settings.steps, settings.layerwise_steps))
    healing = "healing: none"
    if total:
        healing = (
            f"healing: {total:,} tokens, {first:,} of them layer by layer; each takes a forward pass of the original "
            f"and a training step of the new model" + (", and one of the original" if settings.control else "")
        )
    lines = (
        f"calibration: {settings.sequences * n:,} tokens; heads by {settings.method}: {METHODS[settings.method]}",
        "every layer keeps the same number of query heads"
        if settings.allocation == "uniform"
        else "layers keep what their heads are worth",
        healing,
        f"verdict: {settings.evaluation_tokens:,} tokens at each stage; speed at {', '.join(map(str, job.speed_at))}",
    )
    return Group(table, *lines)


def _counted(value: float) -> str:
    """To the whole number; what is small and none, such as a mean of heads, to three digits."""
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.3g}"


def quality_table(conversion: Conversion) -> Group:
    """Quality after every stage, on text that is used for nothing else."""
    last = {stage.stage: stage for stage in conversion.stages}
    parts: list[RenderableType] = [_stages([(stage, stage.quality) for stage in last.values()])]
    if elsewhere := [(stage, stage.elsewhere) for stage in last.values() if stage.elsewhere is not None]:
        parts += [f"\non {conversion.settings['evaluate']}, the second domain:", _stages(elsewhere)]
    before, after = last["original"], [stage for stage in conversion.stages if stage.stage != "control"][-1]
    gaps = [
        f"{new.loss - old.loss:+.4f}"
        for old, new in ((before.quality, after.quality), (before.elsewhere, after.elsewhere))
        if isinstance(old, LanguageQuality) and isinstance(new, LanguageQuality)
    ]
    if gaps:
        parts.append(f"{after.stage} beside the original: {' and '.join(gaps)} nats.")
    layers = conversion.layers
    dropped, refitted = (sum(getattr(each, name) for each in layers) / len(layers) for name in ("dropped", "refitted"))
    parts += [
        _MEANINGS[type(before.quality)],
        f"attention outputs, share of energy lost, mean over layers: {dropped:.4f} dropped, {refitted:.4f} refitted.",
    ]
    if len(layers) > WORST_LAYERS:
        worst = sorted(range(len(layers)), key=lambda i: -layers[i].refitted)[:WORST_LAYERS]
        shown = ", ".join(f"{i} ({layers[i].refitted:.3f})" for i in worst)
        parts.append(f"layers that lost most, refitted: {shown}.")
    return Group(*parts)


def _stages(measured: Sequence[tuple[Stage, Quality]]) -> Table:
    fields = [name for name, value in vars(measured[0][1]).items() if value is not None]
    table = make_table("stage", "tokens", *fields, names=("stage",), gap=2)
    for stage, quality in measured:
        table.add_row(stage.stage, f"{stage.tokens:,}", *(f"{getattr(quality, name):,.4f}" for name in fields))
    return table


def speed_table(conversion: Conversion) -> Group:
    """Time and size before and after."""
    table = make_table("", "N", "before", "after", "faster", names=("",), gap=2)
    for speed in conversion.speed:
        times = (seconds_text(seconds["median"]) for seconds in (speed.before, speed.after))
        table.add_row(speed.what, f"{speed.n:,}", *times, f"{speed.ratio:.2f}x")
    if conversion.parameters is None or conversion.wall_s is None:
        return Group(table)
    before, after = conversion.parameters
    peak = conversion.peak_bytes
    memory = "" if peak is None else f" and {peak / 2**30:.1f} GiB at the peak"
    return Group(table, f"parameters {before:,} -> {after:,}; converting took {conversion.wall_s:,.0f} s{memory}")


def samples(conversion: Conversion) -> Group:
    """Continuations by the original and by the converted model."""
    lines = [
        Text(f"{name:>9}: {' '.join(text.split())}")
        for sample in conversion.samples
        for name, text in vars(sample).items()
    ]
    return Group(*lines)


def plot(conversion: Conversion, path: Path) -> None:
    """Plot loss (cosine for an encoder) over tokens of healing, beside the original's: .svg, .png, .html or .json.

    Raises InputError for another kind of file, and MissingExtraError without the extra `report`.
    """
    alt = load_altair()
    rows = [stage.to_dict() for stage in conversion.stages if stage.stage not in ("original", "dropped")]
    measured = "loss" if "loss" in rows[0] else "cosine"
    original = conversion.last("original").to_dict()
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
    save_chart(lines + line, path)
