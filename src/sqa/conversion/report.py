"""What a conversion cost, as people read it: a table for 80 columns and a figure of quality over healing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sqa.bench.report import seconds_text
from sqa.conversion.importance import METHODS
from sqa.conversion.records import Conversion, EmbeddingQuality, LanguageQuality, Quality, Stage
from sqa.conversion.settings import Job
from sqa.cost import attention_flops, attention_parameters
from sqa.errors import MissingExtraError
from sqa.files import replacing

WORST_LAYERS = 5

_MEANINGS: dict[type[Quality], str] = {
    LanguageQuality: "loss: nats a real token of the validation text; kl: to the original, nats a token; agreement: "
    "share of positions at which both find the same token most likely.",
    EmbeddingQuality: "cosine: of embeddings to the original's; neighbours: share of the nearest ten passages that "
    "stay.",
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
    after = [layer for layer, _ in job.plans(job.counts())]
    for what, count in (
        ("query heads a layer", lambda layer: layer.num_query_heads / len(job.before)),
        ("KV heads a layer", lambda layer: layer.num_kv_heads / len(job.before)),
        ("parameters", attention_parameters),
        (f"MFLOP, forward, {n:,} tokens", lambda layer: attention_flops(layer, n) / 1e6),
    ):
        table.add_row(what, *(f"{sum(map(count, layers)):,.0f}" for layers in (job.before, after)))
    total, first = (steps * settings.tokens_per_step for steps in (settings.steps, settings.layerwise_steps))
    healing = "healing: none"
    if total:
        healing = (
            f"healing: {total:,} tokens, {first:,} of them layer by layer; each takes a forward pass of the original "
            f"and a training step of the new model" + (", and one of the original" if settings.control else "")
        )
    lines = (
        f"calibration: {settings.sequences * n:,} tokens; heads by {settings.method}: {METHODS[settings.method]}",
        "every layer keeps as many" if settings.allocation == "uniform" else "layers keep what their heads are worth",
        healing,
        f"verdict: {settings.evaluation_tokens:,} tokens at each stage; speed at {', '.join(map(str, job.speed_at))}",
    )
    return Group(table, *lines)


def quality_table(conversion: Conversion) -> Group:
    """Quality at every stage, on text used for nothing else."""
    last = {stage.stage: stage for stage in conversion.stages}
    parts: list[RenderableType] = [_stages(last, "quality")]
    if any(stage.elsewhere is not None for stage in last.values()):
        parts += [f"\non {conversion.settings['evaluate']}, the second domain:", _stages(last, "elsewhere")]
    layers = conversion.layers
    means = {name: sum(getattr(layer, name) for layer in layers) / len(layers) for name in ("dropped", "refitted")}
    worst = sorted(range(len(layers)), key=lambda i: -layers[i].refitted)[:WORST_LAYERS]
    parts += [
        _MEANINGS[type(next(iter(last.values())).quality)],
        f"attention outputs, share of energy lost, mean over layers: {means['dropped']:.4f} dropped, "
        f"{means['refitted']:.4f} refitted.",
    ]
    if (gap := _gap(conversion)) is not None:
        parts.insert(-2, gap)
    if len(layers) > WORST_LAYERS:
        shown = ", ".join(f"{i} ({layers[i].refitted:.3f})" for i in worst)
        parts.append(f"layers that lost most, refitted: {shown}.")
    return Group(*parts)


def _gap(conversion: Conversion) -> str | None:
    """What the last stage of the converted model loses beside the original; None of an encoder."""
    before, after = conversion.last("original"), [each for each in conversion.stages if each.stage != "control"][-1]
    found = []
    for old, new in ((before.quality, after.quality), (before.elsewhere, after.elsewhere)):
        if isinstance(old, LanguageQuality) and isinstance(new, LanguageQuality):
            found.append(f"{new.loss - old.loss:+.4f}")
    if not found:
        return None
    return f"{after.stage} beside the original: {' and '.join(found)} nats."


def _stages(stages: Mapping[str, Stage], domain: Literal["quality", "elsewhere"]) -> Table:
    measured = {name: getattr(stage, domain) for name, stage in stages.items() if getattr(stage, domain) is not None}
    first = asdict(next(iter(measured.values())))
    fields = [name for name in first if first[name] is not None]
    table = _table("stage", "tokens", *fields)
    for name, quality in measured.items():
        table.add_row(name, f"{stages[name].tokens:,}", *(f"{getattr(quality, field):,.4f}" for field in fields))
    return table


def speed_table(conversion: Conversion) -> Group:
    """Time and size before and after."""
    table = _table("", "N", "before", "after", "faster")
    for speed in conversion.speed:
        times = (seconds_text(seconds["median"]) for seconds in (speed.before, speed.after))
        table.add_row(speed.what, f"{speed.n:,}", *times, f"{speed.ratio:.2f}x")
    lines = []
    if conversion.parameters is not None and conversion.wall_s is not None:
        before, after = conversion.parameters
        peak = conversion.peak_bytes
        memory = "" if peak is None else f" and {peak / 2**30:.1f} GiB at the peak"
        lines = [f"parameters {before:,} -> {after:,}; converting took {conversion.wall_s:,.0f} s{memory}"]
    return Group(table, *lines)


def samples(conversion: Conversion) -> Group:
    """Continuations by the original and the converted model, one under the other."""
    lines = []
    for sample in conversion.samples:
        texts = (" ".join(text.split()) for text in (sample.prompt, sample.original, sample.converted))
        lines += [f"{name:>9}: {text}" for name, text in zip(("prompt", "original", "converted"), texts, strict=True)]
    return Group(*(Text(line) for line in lines))


def plot(conversion: Conversion, path: Path) -> None:
    """Loss (of an encoder cosine) over tokens of healing, beside the original's, as .svg, .png, .html or .json.

    Raises ImportError without the extra `report`.
    """
    try:
        import altair as alt
    except ImportError:
        raise MissingExtraError("plots need altair", "report") from None
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
    with replacing(path) as temporary:
        (lines + line).save(str(temporary), format=path.suffix[1:])
