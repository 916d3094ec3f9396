"""Writes the tables and charts of README.md and docs/ from the committed result files; `--check` only compares.

They stand between marker lines, and nothing between them is written by hand. Charts are files of docs/assets.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path

from rich.console import Console, RenderableType
from rich.table import Table

import decision
from charts import CHARTS, HORIZONS, Chart, speed_words
from sqa.bench.report import BenchResult
from sqa.conversion.importance import METHODS
from sqa.conversion.records import Conversion, LanguageQuality
from sqa.conversion.report import quality_table, samples, speed_table
from sqa.cost import attention_flops, train_step_flops
from sqa.evaluation import Score, score_table
from sqa.experiments.directory import Directory
from sqa.experiments.report import read_experiment
from sqa.experiments.summary import Experiment, results_table
from sqa.planning import scale
from sqa.training.probes import Probe
from sqa.variants import VARIANTS, preset

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "docs" / "assets"


def text_of(renderable: RenderableType) -> str:
    """As a terminal of 80 columns shows it, in a code block."""
    console = Console(width=80, file=StringIO(), record=True)
    console.print(renderable)
    lines = (line.rstrip() for line in console.export_text().splitlines())
    return "```\n" + "\n".join(lines).strip("\n") + "\n```"


def comparison(name: str) -> str:
    """The table of a committed comparison and where it ran."""
    comparison = Directory(RESULTS / name).read()
    record, plan = comparison.record, comparison.plan
    machine = f"{record.machine['processor']}, threads: {record.machine['threads']}"
    title = f"{plan.name}: {plan.budget} a run, context {plan.context}"
    table = text_of(results_table(Experiment.join([comparison]), title=title))
    return f"{table}\n\n{machine}; torch {record.versions['torch']}; {record.git}"


def horizons(suffix: str = "") -> str:
    """The table of the complete trainings of several lengths that are committed, with those of spend.toml.

    `suffix` ends the names of their directories.
    """
    folders = [RESULTS / f"{name}{suffix}" for name in (*HORIZONS, "spend-6M")]
    times = RESULTS / f"step-times{suffix}"
    found = [folder for folder in folders if (folder / "results.jsonl").exists()]
    experiment = read_experiment(found, times if times.exists() else None)
    return text_of(results_table(experiment, title="horizon: complete trainings, context 1,024"))


def float32() -> str:
    """The table of the trainings in float32, and where they ran."""
    records = [Directory(RESULTS / f"{name}-fp32").read().record for name in HORIZONS]
    machines = {f"{each.machine['processor']}, threads: {each.machine['threads']}" for each in records}
    assert len(machines) == 1, f"the trainings in float32 ran on several machines: {machines}"
    versions = f"torch {records[0].versions['torch']}; {', '.join(dict.fromkeys(str(each.git) for each in records))}"
    return f"{horizons('-fp32')}\n\n{machines.pop()}; {versions}"


def pairs() -> str:
    """SQA's loss minus GQA's, seed by seed, for every training length and precision."""
    seeds = (0, 1, 2)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("tokens", "", *(f"seed {seed}" for seed in seeds)):
        table.add_column(heading, justify="right")
    for name, (suffix, dtype) in itertools.product(HORIZONS, (("", "bf16"), ("-fp32", "float32"))):
        losses = {result.cell: result.val.loss for result in Directory(RESULTS / f"{name}{suffix}").results()}
        both = [("sqa", seed) in losses and ("gqa", seed) in losses for seed in seeds]
        if any(both):
            cells = (
                f"{losses['sqa', s] - losses['gqa', s]:+.4f}" if there else ""
                for s, there in zip(seeds, both, strict=True)
            )
            table.add_row(name.removeprefix("horizon-"), dtype, *cells)
    return text_of(table)


def rates(*names: str) -> str:
    """Validation losses of the first seed of comparisons that differ in their learning rate, a column a variant."""
    comparisons = [Directory(RESULTS / name).read() for name in names]
    variants = list(dict.fromkeys(result.variant for c in comparisons for result in c.results))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("learning rate")
    for name in variants:
        table.add_column(VARIANTS[name].label, justify="right")
    for comparison in comparisons:
        losses = {result.variant: result.val.loss for result in comparison.results if result.seed == 0}
        cells = (f"{losses[name]:.4f}" if name in losses else "" for name in variants)
        table.add_row(f"{comparison.plan.learning_rate:g}", *cells)
    return text_of(table)


def output_rates(*names: str) -> str:
    """Losses of GQA and SQA, seed by seed, under several learning rates of attention's output projections."""
    comparisons = [Directory(RESULTS / name).read() for name in names]
    columns = sorted({(result.variant, result.seed) for comparison in comparisons for result in comparison.results})
    shared = [column for column in columns if column[1] < 2 and column[0] in ("gqa", "sqa")]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("rate of the\noutput projections", justify="right")
    for variant, seed in shared:
        table.add_column(f"{VARIANTS[variant].label}\nseed {seed}", justify="right")
    for comparison in comparisons:
        losses = {(result.variant, result.seed): f"{result.val.loss:.4f}" for result in comparison.results}
        cells = (losses.get(column, "") for column in shared)
        table.add_row(f"x {comparison.plan.output_projection_rate:g}", *cells)
    return text_of(table)


def warm_up(*names: str) -> str:
    """GQA's and SQA's losses, and their paired difference, under several lengths of the warm-up."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("warm-up", "tokens", "warm-up\nsteps", "seeds", "GQA", "SQA", "SQA - GQA", "95 %"):
        table.add_column(heading, justify="right")
    for name in names:
        experiment = read_experiment([RESULTS / name])
        line = {line.variant: line for line in experiment.summaries()}
        gqa, sqa, plan = line["gqa"], line["sqa"], experiment.plan
        difference = sqa.difference
        assert difference is not None, f"{name} has no pair of GQA and SQA"
        table.add_row(
            f"{plan.warmup_fraction:.0%}", f"{gqa.tokens / 1e6:.0f}M", f"{plan.warmup_fraction * gqa.steps:.0f}",
            str(difference.runs), f"{gqa.loss.mean:.4f}", f"{sqa.loss.mean:.4f}", f"{difference.mean:+.4f}",
            "one seed" if difference.half_width is None else f"±{difference.half_width:.4f}",
        )  # fmt: skip
    return text_of(table)


def probes(name: str, *variants: str) -> str:
    """What the probes of a comparison's first seed found, in the order of training."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    found = {
        variant: [Probe(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        for variant in variants
        if (path := RESULTS / name / f"{variant}-0" / "probes.jsonl").exists()
    }
    bounds = next(iter(found.values()))[0].positions
    ranges = [f"{low}-\n{high}" for low, high in itertools.pairwise(bounds)]
    for heading in ("", "tokens", *ranges, "repeated\nless first"):
        table.add_column(heading, justify="right" if heading else "left")
    for variant, lines in found.items():
        for probe in lines[1::2]:
            losses = (f"{loss:.3f}" for loss in probe.loss_by_position)
            gain = f"{probe.repeated_loss - probe.unrepeated_loss:+.3f}"
            table.add_row(VARIANTS[variant].label, f"{probe.tokens / 1e6:.2f}M", *losses, gain)
    return text_of(table)


def benchmark(name: str) -> str:
    """The tables of a committed benchmark."""
    return text_of(BenchResult.read(RESULTS / f"{name}.jsonl"))


def beside_sdpa(name: str) -> str:
    """GFLOP/s of our attention and of PyTorch's on the same tensors, and PyTorch's time over ours."""
    result = BenchResult.read(RESULTS / f"{name}.jsonl")
    timed = {(row.dtype, row.what, row.head_dim, row.n, row.kernel): row for row in result.rows}
    cases = list(dict.fromkeys(key[1:4] for key in timed))
    dtypes = list(dict.fromkeys(key[0] for key in timed))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("head_dim", "N", "pass"):
        table.add_column(heading, justify="left" if heading == "pass" else "right")
    for dtype in dtypes:
        for heading in ("ours", "SDPA", "ratio"):
            table.add_column(f"{dtype}\n{heading}", justify="right")
    for what, head_dim, n in sorted(cases, key=lambda case: (case[1], case[2], case[0])):
        cells: list[str] = []
        for dtype in dtypes:
            ours, theirs = timed[dtype, what, head_dim, n, "fused"], timed[dtype, what, head_dim, n, "sdpa"]
            cells += [f"{row.flops_per_s / 1e9:,.0f}" for row in (ours, theirs)] + [f"{ours.ratio_to_sdpa:.2f}x"]
        table.add_row(str(head_dim), f"{n:,}", what.replace("+", " + "), *cells)
    where = f"{result.machine.processor}, {result.machine.threads} threads, git {result.revision}"
    heads = next(iter(timed.values()))
    peaks = "; ".join(note for note in result.notes if note.startswith(tuple(dtypes)))
    shape = f"GFLOP/s; causal, one sequence, {heads.num_query_heads} query and {heads.num_kv_heads} KV heads"
    return f"{text_of(table)}\n\n{shape}; {where}. {peaks}."


def on_paper() -> str:
    """What `sqa scale` prints, of each large shape for one number of GPUs."""
    tables: list[RenderableType] = []
    lengths = (4096, 32_768, 131_072)
    for shape, gpus in (("1.3b", 8), ("8b", 512)):
        estimates = [scale.estimate(shape, v, n, gpus) for n in lengths for v in scale.SCALE_VARIANTS]
        tables.append(scale.steps_table(shape, estimates))
        tables.append(scale.lengths_table(shape, scale.SCALE_VARIANTS))
    return "\n\n".join(text_of(part) for part in (*tables, scale.ASSUMPTIONS))


def two_rates(name: str) -> str:
    """A measured step split as `sqa scale` splits it: one rate for attention, one for all else.

    The first two variants give the rates, the others are predicted. `at peak`: all else at the rate of a large matrix
    product, attention at what that leaves of the first variant's time.
    """
    lines = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in lines if row["kind"] == "step" and row["implementation"] == "sqa"]
    measured = [row["seconds"]["median"] for row in rows]
    scores, rest = [], []
    for row in rows:
        config, n = preset(row["preset"], row["variant"]), row["n"]
        scores.append(3 * row["batch_size"] * sum(attention_flops(layer, n) for layer in config.layers))
        rest.append(train_step_flops(config, n, row["batch_size"]) - scores[-1])
    peak = (scores[0] + rest[0]) / measured[0] / rows[0]["share_of_peak"]
    # seconds a FLOP: measured[i] = scores[i] * slow + rest[i] * quick for the first two
    slow = (measured[0] * rest[1] - measured[1] * rest[0]) / (scores[0] * rest[1] - scores[1] * rest[0])
    quick = (measured[0] - scores[0] * slow) / rest[0]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in (
        "variant",
        "measured\ns",
        "two rates\ns",
        "measured\nvs GQA",
        "two rates\nvs GQA",
        "at peak\nvs GQA",
    ):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for i, (s, r, m) in enumerate(zip(scores, rest, measured, strict=True)):
        fitted, bound = s * slow + r * quick, s * (measured[0] - rest[0] / peak) / scores[0] + r / peak
        table.add_row(
            VARIANTS[rows[i]["variant"]].label, f"{m:.3f}", "given" if i < 2 else f"{fitted:.3f}",
            *(f"{measured[0] / seconds:.2f}x" for seconds in (m, fitted, bound)),
        )  # fmt: skip
    shares = f"All else runs at {1 / quick / peak:.0%} of a large product's rate, attention at {1 / slow / peak:.0%}."
    return f"{text_of(table)}\n\n{shares}"


def conversions() -> str:
    """Loss of every method at every stage, for both targets, beside training from scratch."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    stages = ("dropped", "refitted", "layers healed", "distilled")
    for heading in ("", "method", *(name.replace(" ", "\n") for name in stages), "vs\noriginal"):
        table.add_column(heading, justify="left" if heading in ("", "method") else "right")
    original = control = 0.0
    for target, label in (("sqa", "SQA"), ("xsqa", "xSQA")):
        for method in METHODS:
            found = _losses(f"{target}-{method}")
            original, control = found["original"], found.get("control", control)
            losses = [found[stage] for stage in stages]
            cells = (f"{loss:.4f}" for loss in losses)
            table.add_row(label, method, *cells, f"{losses[-1] - original:+.4f}")
        if target == "sqa":  # as many FLOPs as training and converting the original took
            scratch = _losses("scratch-sqa")["original"]
            table.add_row(label, "from scratch", "", "", "", f"{scratch:.4f}", f"{scratch - original:+.4f}")
    table.add_row("GQA", "as it was", "", "", "", f"{original:.4f}", "")
    table.add_row("GQA", "same tokens", "", "", "", f"{control:.4f}", f"{control - original:+.4f}")
    return text_of(table)


def _conversion(name: str) -> Conversion:
    """A committed conversion.json."""
    return Conversion.from_dict(json.loads((RESULTS / "conversion" / f"{name}.json").read_text(encoding="utf-8")))


def _losses(name: str) -> dict[str, float]:
    """The last loss of each stage of a conversion."""
    return {stage.stage: stage.quality.loss for stage in _conversion(name).stages}  # type: ignore[union-attr]


def conversion(part: Callable[[Conversion], RenderableType], name: str) -> str:
    """A part of what `sqa convert` printed."""
    return text_of(part(_conversion(name)))


def pretrained(*names: str) -> str:
    """SmolLM2 at every stage of its conversions, on articles and on Python."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("heads", "allocation", "stage", "tokens", "loss", "added", "kl", "agree", "Python"):
        table.add_column(heading, justify="left" if heading in ("heads", "allocation", "stage") else "right")
    for at, name in enumerate(names):
        found = _conversion(name)
        original = _losses(name)["original"]
        for stage in found.stages:
            kept = stage.stage != "original"
            if not kept and at:
                continue
            quality, elsewhere = stage.quality, stage.elsewhere
            assert isinstance(quality, LanguageQuality)
            table.add_row(
                f"{found.settings['query_heads'] if kept else 9}",
                found.settings["allocation"] if kept else "",
                "healed" if stage.stage == "distilled" else stage.stage,
                f"{stage.tokens:,}" if stage.tokens else "",
                f"{quality.loss:.4f}",
                f"{quality.loss - original:+.4f}" if kept else "",
                f"{quality.kl:.4f}",
                f"{quality.agreement:.4f}",
                f"{elsewhere.loss:.4f}" if isinstance(elsewhere, LanguageQuality) else "",
            )
    return text_of(table)


def at_a_glance(**conversions: str) -> str:
    """What SmolLM2's conversions (by the names of their models in the timings) lose and gain, a column for each."""
    found = {model: _conversion(name) for model, name in conversions.items()}
    first = next(iter(found.values()))
    columns = [first.stages[0], *(conversion.last("distilled") for conversion in found.values())]
    heads = ["9 heads (original)", *(f"{c.settings['query_heads']} heads a layer" for c in found.values())]
    scores = json.loads((RESULTS / "conversion" / "smollm2-choice-500.json").read_text(encoding="utf-8"))["scores"]
    losses = [(stage.quality, stage.elsewhere) for stage in columns]
    rows = [
        ["loss on articles", *(f"{quality.loss:.4f}" for quality, _ in losses)],  # type: ignore[union-attr]
        ["loss on Python", *(f"{elsewhere.loss:.4f}" for _, elsewhere in losses)],  # type: ignore[union-attr]
        ["right next paragraph, of four", *(f"{score['accuracy']:.1%}" for score in scores)],
        ["tokens of healing", *(f"{stage.tokens:,}" for stage in columns)],
    ]
    timed = BenchResult.read(RESULTS / "prefill-converted.jsonl").rows
    names = {"sqa": "here", "hf-llama": "in transformers", "llama-cpp": "in llama.cpp"}
    for n, implementation in dict.fromkeys((row.n, row.implementation) for row in timed):
        ratios = {row.variant: row.ratio for row in timed if (row.n, row.implementation) == (n, implementation)}
        values = (ratios.get(model) for model in ("source", *conversions))
        cells = ("" if ratio is None else f"{ratio:.2f}x" for ratio in values)
        rows.append([f"speed of reading {n:,} tokens, {names[str(implementation)]}", *cells])
    lines = [["", *heads], ["---"] * (1 + len(heads)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pretrained_words(name: str, model: str) -> str:
    """A sentence or two about a conversion of SmolLM2; `model`: its name in the timings."""
    done = _conversion(name)
    before, after = done.stages[0], done.last("distilled")
    added, elsewhere = (getattr(after, part).loss - getattr(before, part).loss for part in ("quality", "elsewhere"))
    speeds = {
        row.n: f"{row.ratio:.2f}"
        for row in BenchResult.read(RESULTS / "prefill-converted.jsonl").rows
        if (row.variant, row.implementation) == (model, "hf-llama") and row.ratio is not None
    }
    longest, heads = max(speeds), done.settings["query_heads"]  # type: ignore[type-var]
    return (
        f"**A pretrained model:** SmolLM2-135M-Instruct with {heads} query heads a layer instead of 9, healed with "
        f"{after.tokens:,} tokens of Wikipedia articles, loses {added:.2f} nats on other articles and "
        f"{elsewhere:.2f} on Python code. transformers then reads a prompt of {longest:,} tokens {speeds[longest]} "
        "times as fast."
    )


def kept_heads(name: str) -> str:
    """How many query heads each layer of a conversion has."""
    return ", ".join(str(len(layer.kept)) for layer in _conversion(name).layers)


def trials() -> str:
    """SmolLM2 with heads chosen in two ways, and healed in three."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("heads by", "trains", "rate", "tokens", "added", "kl", "agree"):
        table.add_column(heading, justify="left" if heading in ("heads by", "trains") else "right")
    for name, stage in (
        ("taylor", "refitted"),
        ("trains-all", "refitted"),
        ("trains-all", "distilled"),
        ("trains-attention", "distilled"),
        ("trains-attention-1e-3", "distilled"),
    ):
        found, losses = _conversion(f"smollm2-{name}"), _losses(f"smollm2-{name}")
        last, healed = found.last(stage), stage == "distilled"
        assert isinstance(last.quality, LanguageQuality)
        table.add_row(
            found.settings["method"],
            found.settings["train"] if healed else "",
            f"{found.settings['learning_rate']:g}" if healed else "",
            f"{last.tokens:,}" if healed else "",
            f"{losses[stage] - losses['original']:+.4f}",
            f"{last.quality.kl:.4f}",
            f"{last.quality.agreement:.4f}",
        )
    return text_of(table)


def choice() -> str:
    """The four-way choice of SmolLM2, before and after, and how the harness answered it in an earlier run."""
    found, earlier = (
        json.loads((RESULTS / "conversion" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("smollm2-choice-500", "smollm2-choice")
    )
    table = score_table([Score.from_dict(values) for values in found["scores"]])
    harness = earlier["harness"]
    return (
        f"{text_of(table)}\n\n{len(found['scores'][0]['right'])} items, {found['dtype']} autocast. In an "
        f"earlier run the harness (lm_eval {harness['version']}, which installs beside the pinned packages without "
        f"changing one) answered the first {harness['items']} as the original did here: {harness['same']} of "
        f"{harness['items']} alike."
    )


def imported() -> str:
    """Loss of the imported GGUF file, here and in transformers."""
    found = json.loads((RESULTS / "conversion" / "smollm2-import.json").read_text(encoding="utf-8"))
    ours, theirs = (found[name]["perplexity"] for name in ("ours", "transformers"))
    return (
        f"On the first 512 tokens of {found['articles']} validation articles the imported model has perplexity "
        f"{ours:.4f}, and what transformers dequantises of the same file {theirs:.4f}; no logit differs by more than "
        f"{found['largest_logit_difference']:.1e}."
    )


def healing_speed() -> str:
    """Healing with and without `--compile`, in one sentence."""
    found = json.loads((RESULTS / "conversion" / "smollm2-healing-speed.json").read_text(encoding="utf-8"))
    eager, compiled = (f"{min(found[name]):.0f} to {max(found[name]):.0f}" for name in ("eager", "compiled"))
    return (
        f"A core heals {eager} tokens a second of its time, and {compiled} with `--compile` (a few steps each, beside "
        f"other work; {found['processor']})."
    )


def surgeries() -> str:
    """What was compared before healing, at as many query heads in all."""
    found = json.loads((RESULTS / "conversion" / "smollm2-surgery.json").read_text(encoding="utf-8"))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("query heads", "surgery", "loss", "kl", "agreement"):
        table.add_column(heading, justify="right" if heading in ("loss", "kl", "agreement") else "left")
    for row in found["rows"]:
        table.add_row(row["heads"], row["surgery"], *(f"{row[name]:.4f}" for name in ("loss", "kl", "agreement")))
    return f"{text_of(table)}\n\n{found['text']}"


SECTIONS = {
    "demo table": lambda: comparison("demo"),
    "articles": lambda: comparison("articles"),
    "small tokens": lambda: comparison("small-tokens"),
    "small time": lambda: comparison("small-time"),
    "horizons": horizons,
    "float horizons": float32,
    "sweep": lambda: rates("sweep-1e-3", "sweep-2e-3", "sweep-4e-3", "sweep-8e-3"),
    "pairs": pairs,
    "warm up": lambda: warm_up("horizon-2M", "warmup-2M", "horizon-16M"),
    "output rates": lambda: output_rates("output-rate-0.5", "output-rate-1", "output-rate-2"),
    "output rates long": lambda: output_rates("output-rate-16M", "horizon-16M"),
    "probes": lambda: probes("horizon-16M", "gqa", "sqa"),
    "steps": lambda: "\n\n".join(benchmark(name) for name in ("step-bf16", "step-fp32", "step-fp32-xeon")),
    "prefill": lambda: benchmark("prefill"),
    "prefill pretrained": lambda: benchmark("prefill-smollm2"),
    "step long": lambda: "\n\n".join(benchmark(name) for name in ("step-long", "step-long-xeon")),
    "step larger": lambda: benchmark("step-larger"),
    "window": lambda: benchmark("window"),
    "decode": lambda: benchmark("decode"),
    "beside sdpa": lambda: beside_sdpa("attention"),
    "beside sdpa older": lambda: beside_sdpa("attention-xeon"),
    "converted prefill": lambda: benchmark("prefill-converted"),
    "on paper": on_paper,
    "conversion": conversions,
    "encoder": lambda: conversion(quality_table, "minilm"),
    "encoder at eight": lambda: conversion(quality_table, "minilm-8"),
    "encoder speed": lambda: conversion(speed_table, "minilm-speed"),
    "surgeries": surgeries,
    "pretrained": lambda: pretrained("smollm2-6-attention", "smollm2-3-attention", "smollm2-3-kv"),
    "pretrained at a glance": lambda: at_a_glance(heal7="smollm2-6-attention", heal3b="smollm2-3-attention"),
    "pretrained words": lambda: pretrained_words("smollm2-6-attention", "heal7"),
    "pretrained all": lambda: pretrained("smollm2-6", "smollm2-6-measured", "smollm2-3"),
    "pretrained heads": lambda: f"Query heads of the layers, in order: {kept_heads('smollm2-6-attention')}.",
    "pretrained continues": lambda: conversion(samples, "smollm2-6-attention"),
    "trials": trials,
    "choice": choice,
    "imported": imported,
    "healing speed": healing_speed,
    "converted speed": lambda: conversion(speed_table, "llama-135m"),
    "two rates": lambda: two_rates("step-bf16"),
    "verdict": lambda: decision.verdict(HORIZONS[-1], timed="step-times"),
    "speed words": speed_words,
    "choices": decision.choices,
    "lost": lambda: decision.lost(
        {
            name: f"{name.removeprefix('horizon-').removesuffix('M')} M tokens, the whole training"
            for name in HORIZONS
            if (RESULTS / name / "results.jsonl").exists()
        }
    ),
    "lost early": lambda: decision.lost(
        {
            "small-tokens": "small shape, first 300,000 tokens",
            "articles": "published shape, first million",
        }
    ),
    "encoder on paper": lambda: decision.on_paper(decision.ENCODER, decision.FOR_ENCODERS, against="mha", causal=False),
    "decoder on paper": lambda: decision.on_paper(decision.DECODER, decision.SHOWN, against="gqa", causal=True),
    "encoder measured": decision.encoder_measured,
    "caches": decision.caches,
    "measured prefill": lambda: decision.ratios(("prefill", "prefill", "prompt")),
    "measured steps": lambda: decision.ratios(
        ("step-bf16", "step", "step"), ("step-long", "step", "step"), ("decode", "decode", "decoding")
    ),
}


def filled(text: str, charts: Mapping[str, Chart], assets: str) -> str:
    """`text` with what stands between each pair of markers made anew; `assets` is the way to the charts from there."""

    def replace(match: re.Match[str]) -> str:
        start, name, end = match[1], match[2], match[3]
        chart = charts.get(name.removesuffix(" chart")) if name.endswith(" chart") else None
        made = f"![{chart.alt}]({assets}/{chart.name}.svg)" if chart else SECTIONS[name]()
        return f"{start}\n{made}\n{end}"

    pattern = r"(<!-- ([a-z ]+): generated by `python docs/generate\.py` -->).*?(<!-- end of \2 -->)"
    return re.sub(pattern, replace, text, flags=re.DOTALL)


def main() -> None:
    charts = {name: draw() for name, draw in CHARTS.items()}
    made = {ASSETS / f"{name}.svg": chart.svg for name, chart in charts.items()}
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        made[path] = filled(path.read_text(encoding="utf-8"), charts, os.path.relpath(ASSETS, path.parent))
    stale = []
    for path, after in made.items():
        if not path.exists() or path.read_text(encoding="utf-8") != after:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.parent.mkdir(exist_ok=True)
                path.write_text(after, encoding="utf-8")
    print(json.dumps({"changed": stale}))
    if stale and "--check" in sys.argv:
        sys.exit(1)


if __name__ == "__main__":
    main()
