"""The tables of docs/variants.md: what each variant costs by arithmetic, what was measured, and what it may lose."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqa.bench.report import BenchResult
from sqa.conversion.records import Conversion, EmbeddingQuality
from sqa.cost import kv_cache_bytes, prefill_flops
from sqa.experiments.report import read_experiment
from sqa.experiments.summary import Summary
from sqa.variants import VARIANTS, preset

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
ENCODER = "larger"  # as wide and deep as BERT base
DECODER = "8b"
LENGTHS = (512, 2048, 8192, 32_768)
FOR_ENCODERS = ("mha", "gqa", "sqa", "ssqa", "xsqa")
SHOWN = ("mha", "gqa", "mqa", "sqa", "ssqa", "xsqa", "wide-gqa")


def markdown(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; all columns but the first are aligned to the right."""
    rows = ["| " + " | ".join(line) + " |" for line in (headings, *lines)]
    return "\n".join([rows[0], "|---" + "|---:" * (len(headings) - 1) + "|", *rows[1:]])


def measured(name: str, *, kind: str) -> dict[tuple[str, int], dict[str, Any]]:
    """The timed rows of a committed benchmark of this package's models, by variant and length."""
    _, *rows = (json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
    return {
        (row["variant"], row["n"]): row
        for row in rows
        if row["kind"] == kind and row["implementation"] == "sqa" and "seconds" in row
    }


def saving(shape: str, variant: str, n: int, *, against: str, causal: bool) -> float:
    """FLOPs of a forward pass (logits of the last position only) with `against`, over those with `variant`."""
    whole, part = (prefill_flops(preset(shape, name, causal=causal), n) for name in (against, variant))
    return whole / part


def on_paper(shape: str, variants: Sequence[str], *, against: str, causal: bool) -> str:
    """Forward FLOPs saved at several lengths."""
    lines = []
    for name in variants:
        layer = preset(shape, name).layers[0]
        wide = f" x{layer.head_dim}" if VARIANTS[name].head_dim_factor > 1 else ""
        cells = (f"{saving(shape, name, n, against=against, causal=causal):.2f}x" for n in LENGTHS)
        lines.append((VARIANTS[name].label, f"{layer.num_query_heads} / {layer.num_kv_heads}{wide}", *cells))
    return markdown(("variant", "query / KV heads", *(f"{n:,} tokens" for n in LENGTHS)), lines)


def caches() -> str:
    """KV cache of one sequence of the decoder at the longest length."""
    n = LENGTHS[-1]
    size = {name: kv_cache_bytes(preset(DECODER, name), n) / 2**30 for name in SHOWN}
    return markdown(
        ("variant", f"KV cache of {n:,} tokens, GiB", "vs GQA"),
        ((VARIANTS[name].label, f"{size[name]:.2f}", f"{size[name] / size['gqa']:.2f}x") for name in SHOWN),
    )


def ratios(*benches: tuple[str, str, str]) -> str:
    """Measured speed against GQA, and where each column was measured; each bench is (file, kind, words for it)."""
    columns = []
    where: dict[str, list[str]] = {}
    for name, kind, words in benches:
        rows, result = measured(name, kind=kind), BenchResult.read(RESULTS / f"{name}.jsonl")
        lengths = sorted({n for _, n in rows})
        for n in lengths:
            columns.append((f"{words}, {n:,} tokens", {v: row["ratio"] for (v, m), row in rows.items() if m == n}))
        place = f"revision {result.revision} on an {result.machine.processor.partition(' avx')[0]}"
        where.setdefault(place, []).append(f"{words} ({', '.join(f'{n:,}' for n in lengths)})")
    names = [name for name in SHOWN if any(name in column for _, column in columns)]
    cells = ((VARIANTS[name].label, *(f"{c[name]:.2f}x" if name in c else "" for _, c in columns)) for name in names)
    table = markdown(("variant", *(title for title, _ in columns)), cells)
    places = "; ".join(f"{' and '.join(parts)}: {place}" for place, parts in where.items())
    return f"{table}\n\nMeasured at these lengths: {places}."


def lost(titles: Mapping[str, str]) -> str:
    """Validation loss against GQA in committed comparisons, a column each; `titles` are by directory."""
    columns = []
    for directory, title in titles.items():
        found = {}
        for line in read_experiment([RESULTS / directory]).summaries():
            difference = line.difference
            if difference is None:
                continue
            if difference.half_width is None:
                found[line.variant] = f"{difference.mean:+.3f} (one seed) ?"
            else:
                mark = "" if difference.established else " ?"
                found[line.variant] = f"{difference.mean:+.3f} ± {difference.half_width:.3f}{mark}"
        columns.append((title, found))
    names = [name for name in SHOWN if any(name in column for _, column in columns)]
    lines = ((VARIANTS[name].label, *(column.get(name, "") for _, column in columns)) for name in names)
    return markdown(("variant", *(title for title, _ in columns)), lines)


def encoder_measured() -> str:
    """Times of a converted sentence encoder, and what is left of its embeddings."""
    found = (RESULTS / "conversion" / f"{name}.json" for name in ("minilm-speed", "minilm"))
    timed, healed = (Conversion.from_dict(json.loads(path.read_text(encoding="utf-8"))) for path in found)
    names = {"prefill": "encode", "forward and backward": "train"}
    lines = (
        (f"{names[speed.what]} {speed.n} tokens", f"{1000 * speed.before['median']:.0f} ms",
         f"{1000 * speed.after['median']:.0f} ms", f"{speed.ratio:.2f}x")
        for speed in sorted(timed.speed, key=lambda speed: list(names).index(speed.what))
    )  # fmt: skip
    quality = healed.stages[-1].quality
    assert isinstance(quality, EmbeddingQuality), "minilm.json is not of an encoder"
    return (
        f"{markdown(('', '12 heads', '6 heads', 'faster'), lines)}\n\nAfter {healed.stages[-1].tokens:,} tokens of "
        f"healing, the embeddings' cosine with the original's is {quality.cosine:.2f}, and "
        f"{quality.neighbours:.0%} of each passage's ten nearest neighbours stay."
    )


def choices() -> str:
    """What to take, with the figures that say why."""
    prefill, decode = measured("prefill", kind="prefill"), measured("decode", kind="decode")
    long, far = max(n for _, n in prefill), max(n for _, n in decode)
    narrow = decode["gqa", far]["head_dim"]

    def less(shape: str, name: str, n: int) -> str:
        encoder = shape == ENCODER
        return f"{1 - 1 / saving(shape, name, n, against='mha' if encoder else 'gqa', causal=not encoder):.0%}"

    def part(name: str, shape: str) -> str:
        layer = preset(shape, name).layers[0]
        return f"{layer.num_query_heads} query / {layer.num_kv_heads} KV heads, of {layer.num_heads}"

    lines = [
        (
            "an encoder of 2,000 tokens and more (embeddings, retrieval, classification)",
            f"`ssqa` ({part('ssqa', ENCODER)})",
            f"a forward pass of 8,192 tokens takes {less(ENCODER, 'ssqa', 8192)} fewer FLOPs than with MHA. `sqa` "
            f"saves hardly more ({less(ENCODER, 'sqa', 8192)}): an encoder has no cache that fewer KV heads would "
            f"make smaller. `xsqa` saves {less(ENCODER, 'xsqa', 8192)}. **The loss of an encoder trained with fewer "
            "query heads was not measured yet**: compare it with `mha` on your task",
        ),
        (
            "an encoder of 512 tokens",
            "`mha`, or what you have",
            f"`ssqa` takes {less(ENCODER, 'ssqa', 512)} fewer FLOPs than MHA, and nearly all of that is narrower "
            "projections. That is a small gain for a loss that was not measured",
        ),
        (
            "a decoder for long prompts with short answers (RAG, code, agents)",
            f"`sqa` ({part('sqa', DECODER)})",
            f"its cache is as small as GQA's. The small model measured here reads {long:,} tokens "
            f"{prefill['sqa', long]['ratio']:.2f}x as fast as GQA; one of 8 B takes {less(DECODER, 'sqa', 32_768)} "
            "fewer FLOPs for 32,768",
        ),
        (
            "the same, if your own comparison shows a small loss",
            f"`xsqa` ({part('xsqa', DECODER)})",
            f"{prefill['xsqa', long]['ratio']:.2f}x as fast as GQA at {long:,} tokens here, and "
            f"{less(DECODER, 'xsqa', 32_768)} fewer FLOPs at 8 B, with GQA's cache",
        ),
        (
            "a decoder that mostly generates",
            f"`gqa`, `mqa` or a window; with heads as narrow as {narrow}, `wide-gqa`",
            f"each new token reads the whole cache. After {far:,} tokens, `sqa` decodes "
            f"{decode['sqa', far]['ratio']:.2f}x as fast as GQA here, `mqa` {decode['mqa', far]['ratio']:.2f}x. "
            f"`wide-gqa` decodes {decode['wide-gqa', far]['ratio']:.2f}x as fast, and reads {long:,} tokens "
            f"{prefill['wide-gqa', long]['ratio']:.2f}x as fast, with GQA's parameters, FLOPs and cache: it has half "
            f"as many heads, of {2 * narrow} instead of {narrow}, so half the exponentials. With heads of 64 and more "
            "this was not measured",
        ),
        (
            "a comparison to run on your own text",
            "`wide-gqa` as one more variant of it",
            "it has half as many heads as GQA, each twice as wide, so GQA's parameters and FLOPs. If `sqa` differs "
            "from `gqa`, `wide-gqa` shows whether that comes from fewer heads or from a smaller model",
        ),
    ]
    return "\n".join(["| you have | take | because |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in lines)])


def verdict(name: str, *, timed: str) -> str:
    """What SQA lost against GQA in a comparison and in the same in float32, and how fast its steps are.

    `timed` is a comparison of the same models, whose timing phase gives the speed.
    """
    (line, context), (exact, _), (steps, timed_context) = map(_sqa, (name, f"{name}-fp32", timed))
    assert (line.parameters, context) == (steps.parameters, timed_context), f"{name} and {timed} differ in their models"
    differences = line.difference, exact.difference
    unknown = not any(each and each.established for each in differences)
    return (
        f"**Verdict so far**, for a model of {line.parameters / 1e6:.1f} M parameters and a context of {context:,}: "
        f"SQA's training steps are {steps.speed_vs_gqa:.2f} times as fast as GQA's, and after "
        f"{line.budget.removeprefix('tokens=').removesuffix('M')} M tokens its loss is {_beside_gqa(line)} in bf16 and "
        f"{_beside_gqa(exact)} in float32{': no difference is established' if unknown else ''}. {time_saved()}"
    )


def _beside_gqa(line: Summary) -> str:
    difference = line.difference
    assert difference is not None, f"{line.budget} has no runs of GQA to compare with"
    interval = "one seed" if difference.half_width is None else f"95 % ± {difference.half_width:.3f}, {line.runs} seeds"
    return f"{abs(difference.mean):.3f} nats {'below' if difference.mean < 0 else 'above'} GQA's ({interval})"


def time_saved() -> str:
    """The longest trainings in float32 whose effective speed-up has an interval, in words."""
    folders = [RESULTS / f"horizon-{length}-fp32" for length in ("2M", "6M", "16M")]
    lines = read_experiment(folders, RESULTS / "step-times-fp32").summaries()
    known = [each for each in lines if each.variant == "sqa" and each.effective_speedup and each.effective_speedup.low]
    found, tokens = known[-1].effective_speedup, round(known[-1].tokens / 1e6)
    assert found is not None
    interval = f"{found.low:.2f} to {found.high:.2f}, {found.runs} seeds, float32"
    return (
        f"GQA needs {found.ratio:.2f} times SQA's time ({interval}) for the loss that SQA has after {tokens} M tokens."
    )


def _sqa(name: str) -> tuple[Summary, int]:
    """The summary of SQA in a committed comparison, and the context."""
    experiment = read_experiment([RESULTS / name])
    (line,) = (line for line in experiment.summaries() if line.variant == "sqa")
    return line, experiment.plan.context
