"""Results are read whole or refused; tables and intervals are made from them, and those that do not belong together
are refused."""

import json
import math
import os
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scipy import stats

from sqa.cost import parameters, train_step_flops
from sqa.errors import InputError
from sqa.experiments.directory import Directory
from sqa.experiments.plan import Plan
from sqa.experiments.results import Comparison, Record, RunResult
from sqa.experiments.statistics import (
    effective_speedup,
    paired_difference,
    summarise,
    time_to_reach,
)
from sqa.experiments.summary import Experiment, Summary, comparison_text, notes, results_table
from sqa.measure.timing import Timing
from sqa.records import read_value, to_json
from sqa.training.loop import Evaluation
from sqa.variants import DEFAULT_VARIANTS

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = sorted(path.parent for path in (ROOT / "benchmarks" / "results").glob("*/plan.json"))
STEP = {"mha": 1.2, "gqa": 1.0}


def as_dict(record: object) -> dict[str, Any]:
    """What a file holds of it."""
    return dict(json.loads(json.dumps(record, default=to_json)))


def comparison(plan: Plan, losses: dict[tuple[str, int], float], fingerprint: str = "f" * 32) -> Comparison:
    """Made-up results: `losses` by variant and seed, steps of half a second but for STEP."""
    timings = {
        name: Timing(p20=0.9, median=STEP.get(name, 0.5), p80=1.1) for name in plan.variants if plan.timing_rounds
    }
    record: dict[str, Any] = {
        "plan": plan.to_dict(),
        "steps": plan.steps(batches_per_epoch=100, step_seconds=STEP),
        "step_s": {name: timing.to_dict() for name, timing in timings.items()},
        "kernel": dict.fromkeys(plan.variants, "blocks"),
        "machine": {"processor": "made up", "threads": 1},
        "versions": {"torch": "2.13.0"},
        "git": None,
        "data": {
            "name": "text", "fingerprint": fingerprint, "train_documents": 1, "train_tokens": 1,
            "validation_documents": 1, "validation_tokens": 1, "unigram_entropy": 7.0,
        },
    }  # fmt: skip
    results = [
        RunResult(
            variant=name,
            seed=seed,
            config=plan.model_config(name),
            parameters=parameters(plan.model_config(name)),
            steps=record["steps"][name],
            tokens=record["steps"][name] * plan.batch_size * plan.context,
            wall_s=1.0,
            step_s=timings.get(name),
            val=Evaluation(loss=loss, perplexity=2.0, accuracy=0.3, bits_per_byte=1.0, tokens=100),
            kernel="blocks",
            device="cpu",
            dtype="float32",
            versions={},
            git=None,
            data_fingerprint=fingerprint,
        )
        for (name, seed), loss in losses.items()
    ]
    return Comparison(record=read_value(Record, record, "record"), results=results)


def one(plan: Plan, losses: dict[tuple[str, int], float]) -> dict[str, Summary]:
    return {line.variant: line for line in Experiment.join([comparison(plan, losses)]).summaries()}


def shown(renderable: object, width: int = 80) -> str:
    console = Console(width=width, record=True, file=StringIO())
    console.print(renderable)
    return console.export_text()


# --- statistics


@pytest.mark.parametrize("count", [2, 3, 7, 31, 32, 60, 300])
def test_intervals_are_scipys(count: int) -> None:
    values = [((7 * i) % 13) / 13 for i in range(count)]
    estimate, interval = summarise(values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert estimate.runs == count
    # the table has four digits: half a unit of the last in 1.96; the expansion beyond it is right to 0.2 %
    off = 0.0005 / 1.96 if count <= 31 else 0.002
    assert estimate.half_width == pytest.approx((interval.high - interval.low) / 2, rel=off)


def test_a_single_run_has_no_interval_and_establishes_nothing() -> None:
    assert summarise([1.0]).half_width is None
    assert not summarise([1.0]).established


def test_differences_are_paired_by_seed() -> None:
    baseline = {0: 5.0, 1: 6.0, 2: 7.0}
    paired = paired_difference({0: 5.1, 1: 6.1, 2: 7.1, 9: 0.0}, baseline)
    assert paired is not None
    assert paired.mean == pytest.approx(0.1)
    assert paired.half_width == pytest.approx(0.0, abs=1e-9)  # the spread between seeds cancels
    assert paired.established
    assert paired_difference({5: 1.0}, baseline) is None


@pytest.mark.parametrize("folder", COMMITTED, ids=[path.name for path in COMMITTED])
def test_committed_statistics_are_scipys_from_the_raw_rows(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    lines = Experiment.join([Directory(folder).read()]).summaries()
    assert {line.variant for line in lines} == {row["variant"] for row in rows}
    losses: dict[str, dict[int, float]] = {}
    for row in rows:
        losses.setdefault(row["variant"], {})[row["seed"]] = row["val"]["loss"]
    for line in lines:
        own, base = losses[line.variant], losses.get("gqa", {})
        assert line.loss.mean == pytest.approx(sum(own.values()) / len(own))
        pairs = [(own[seed], base[seed]) for seed in own if seed in base]
        if line.variant == "gqa" or not pairs:  # a folder of a sweep may lack the baseline
            assert line.difference is None
            continue
        assert line.difference is not None
        assert line.difference.mean == pytest.approx(sum(a - b for a, b in pairs) / len(pairs), abs=1e-12)
        if len(pairs) > 1:
            interval = stats.ttest_rel(*zip(*pairs, strict=True)).confidence_interval(0.95)
            half = (interval.high - interval.low) / 2
            assert line.difference.half_width == pytest.approx(half, rel=0.0005 / 1.96)
            assert line.difference.established == (interval.low > 0 or interval.high < 0)


def test_the_time_to_a_loss_is_log_linear_between_horizons() -> None:
    curve = [(10.0, 3.0), (100.0, 2.0), (1000.0, 1.5)]
    assert time_to_reach(2.0, curve) == pytest.approx(100)
    assert time_to_reach(2.5, curve) == pytest.approx(10 * 10**0.5)
    assert time_to_reach(1.75, curve) == pytest.approx(100 * 10**0.5)
    assert time_to_reach(1.4, curve) == "never reached"
    assert time_to_reach(3.1, curve) == "above GQA's runs"
    assert time_to_reach(3.0, curve) == pytest.approx(10)


def test_effective_speedups_are_paired_by_seed_and_geometric() -> None:
    base = {seed: [(10.0, 3.0 + seed), (1000.0, 1.0 + seed)] for seed in range(3)}
    # the baseline needs 100 s for 2 + seed, 10 ** 1.5 s for 2.5 + seed
    fifty = dict.fromkeys(range(8), 50.0)
    same = effective_speedup({seed: 2.0 + seed for seed in range(3)}, fifty, base)
    assert same is not None
    assert (same.ratio, same.low, same.high) == pytest.approx((2.0, 2.0, 2.0))
    found = effective_speedup({0: 2.0, 1: 3.5, 2: 4.0}, fifty, base)
    assert found is not None
    # logarithms to base 10 of 100 / 50, 10 ** 1.5 / 50 and 100 / 50
    interval = stats.ttest_1samp([math.log10(2), 1.5 - math.log10(50), math.log10(2)], 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((10**interval.low, 10**interval.high), rel=1e-3)
    never = effective_speedup({0: 2.0, 1: 1.5, 2: 4.0}, fifty, base)
    assert never is not None
    assert (never.ratio, never.why, never.more_than) == (None, "never reached with 1 of 3 seeds", pytest.approx(2.0))
    outside = effective_speedup(dict.fromkeys(range(3), 9.0), fifty, base)
    assert outside is not None
    assert (outside.ratio, outside.why, outside.more_than) == (None, "above GQA's runs", None)
    assert effective_speedup({7: 2.0}, fifty, base) is None
    single = effective_speedup({0: 2.0}, fifty, base)
    assert single is not None
    assert (single.ratio, single.low) == (pytest.approx(2.0), None)


# --- tables


PUBLISHED = Plan(name="p", shape="published", context=1024, seeds=(0, 1, 2), budget="steps=10")


def test_the_table_has_every_variant_and_fits_80_columns() -> None:
    losses = {(name, seed): 2.0 + 0.01 * seed for seed in range(3) for name in DEFAULT_VARIANTS}
    experiment = Experiment.join([comparison(PUBLISHED, losses)])
    text = shown(results_table(experiment))
    for label in ("MHA", "GQA", "MQA", "SQA", "sSQA", "xSQA", "xSMQA", "wide GQA"):
        assert label in text
    assert "10.66M" in text
    assert "8x32" in text
    assert "…" not in text
    summary = one(PUBLISHED, losses)
    assert list(summary) == ["mha", "gqa", "mqa", "sqa", "ssqa", "xsqa", "xsmqa", "wide-gqa"]
    assert summary["sqa"].speed_vs_gqa == pytest.approx(2.0)
    assert summary["sqa"].speed_vs_mha == pytest.approx(2.4)
    assert summary["sqa"].attention_saving == 2.0
    assert summary["sqa"].effective_speedup is None  # one horizon is no curve
    assert summary["gqa"].difference is None
    assert summary["sqa"].difference is not None
    assert not summary["sqa"].difference.established
    assert "wide GQA: the equal-cost" in notes(experiment)


def test_a_long_label_is_broken_and_no_figure_is_cut() -> None:
    label = "a label as long as 40 characters allow.."
    plan = PUBLISHED.replace(variants=("gqa", "sqa"), shapes={"gqa": {"label": label}})
    losses = {(name, seed): 2.0 + 0.01 * seed for seed in range(3) for name in plan.variants}
    parts = [comparison(plan, losses), comparison(plan.replace(budget="steps=100"), losses)]
    for experiment in (Experiment.join(parts[:1]), Experiment.join(parts)):
        text = shown(results_table(experiment))
        assert "…" not in text
        assert all(word in text for word in label.split())
        assert "2.0100" in text


def test_a_single_seed_is_marked_and_only_what_is_there_is_explained() -> None:
    plan = PUBLISHED.replace(variants=("gqa", "sqa"), seeds=(0,), timing_rounds=0)
    text = shown(comparison_text(comparison(plan, {("gqa", 0): 2.0, ("sqa", 0): 2.5})))
    assert "+0.5000?" in text
    assert "?: not established" in text
    assert "±" not in text
    assert "wide GQA" not in text
    assert "training steps in turns" not in text
    assert "token occurs has 7.0000" in text


def test_horizons_are_joined_and_have_effective_speedups() -> None:
    """SQA ends where GQA ends after a tenth of its steps: half a second a step against one."""
    short, long = (PUBLISHED.replace(variants=("gqa", "sqa"), budget=f"steps={n}") for n in (100, 1000))
    losses = {("gqa", seed): 4.0 + 0.01 * seed for seed in range(3)} | {("sqa", 0): 4.25}
    ended = {("gqa", seed): 3.0 + 0.01 * seed for seed in range(3)} | {("sqa", s): 3.5 + 0.01 * s for s in range(3)}
    parts = [comparison(long, ended), comparison(short, losses)]
    experiment = Experiment.join(parts)
    assert list(experiment.horizons) == ["steps=100", "steps=1000"]
    lines = {(line.variant, line.budget): line for line in experiment.summaries()}
    found = lines["sqa", "steps=1000"].effective_speedup
    assert found is not None
    assert found.ratio == pytest.approx(1000 * 0.1**0.5 / 500)
    assert lines["sqa", "steps=1000"].seconds == 500
    gaps = [lines["sqa", budget].difference for budget in experiment.horizons]  # each to GQA at the same horizon
    assert [(gap.mean, gap.runs) for gap in gaps if gap is not None] == [(0.25, 1), (pytest.approx(0.5), 3)]
    text = shown(results_table(experiment))
    assert "0.63x" in text
    assert "…" not in text
    # a quiet machine's timing phase replaces the comparison's own
    quiet = comparison(long.replace(name="quiet"), {}).record
    quiet.step_s["sqa"] = Timing(p20=0.1, median=0.25, p80=0.3)
    again = Experiment.join(parts, quiet).longest()[1].effective_speedup
    assert again is not None
    assert again.ratio == pytest.approx(2 * found.ratio)


def test_the_baselines_runs_are_ordered_by_their_own_length() -> None:
    """At equal FLOPs SQA's run is the longest of all, and GQA's the shorter one of its two."""
    by_steps = PUBLISHED.replace(variants=("gqa", "sqa"), seeds=(0,), budget="steps=1000")
    flops = 950 * train_step_flops(by_steps.model_config("gqa"), by_steps.context, by_steps.batch_size)
    by_flops = by_steps.replace(budget=f"flops={flops:.0f}")
    parts = [comparison(by_steps, {("gqa", 0): 3.0}), comparison(by_flops, {("gqa", 0): 4.0, ("sqa", 0): 3.5})]
    experiment = Experiment.join(parts)
    assert [run.steps for runs in experiment.horizons.values() for run in runs if run.variant == "gqa"] == [1000, 950]
    found = experiment.longest()[1].effective_speedup
    assert found is not None
    assert found.ratio == pytest.approx((1000 * 950) ** 0.5 / (experiment.horizons[by_flops.budget][1].steps * 0.5))


def test_a_line_has_the_means_of_its_runs() -> None:
    made = comparison(PUBLISHED.replace(seeds=(0, 1)), {("sqa", 0): 2.0, ("sqa", 1): 3.0})
    results = [
        replace(result, val=replace(result.val, accuracy=a, loss_all_positions=5 * a, accuracy_all_positions=2 * a))
        for result, a in zip(made.results, (0.25, 0.375), strict=True)
    ]
    (line,) = Experiment.join([Comparison(record=made.record, results=results)]).summaries()
    assert (line.loss.mean, line.accuracy.mean) == (2.5, 0.3125)
    assert (line.loss_all_positions, line.accuracy_all_positions) == (1.5625, 0.625)


def test_a_budget_in_time_gives_each_comparison_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a second machine a step takes twice as long, so that runs of its seed have half the steps."""

    def horizons(seed: int) -> list[Comparison]:
        plan = PUBLISHED.replace(variants=("mha", "gqa"), seeds=(seed,))
        short, long = (plan.replace(budget=f"time={seconds}s") for seconds in (12, 120))
        return [comparison(short, {("gqa", seed): 4.0}), comparison(long, {("gqa", seed): 3.0, ("mha", seed): 3.5})]

    parts = horizons(0)
    for name, seconds in STEP.items():
        monkeypatch.setitem(STEP, name, 2 * seconds)
    mha = Experiment.join(parts + horizons(1)).longest()[0]
    assert (mha.variant, mha.steps, mha.seconds) == ("mha", 75, pytest.approx(90))
    found = mha.effective_speedup
    assert found is not None
    assert (found.ratio, found.low, found.high) == pytest.approx((0.1**0.5, 0.1**0.5, 0.1**0.5))


def test_what_does_not_belong_together_is_refused() -> None:
    plan = PUBLISHED.replace(variants=("gqa",), seeds=(0,))
    first = comparison(plan, {("gqa", 0): 2.0})
    for other, message in (
        (comparison(plan, {("gqa", 0): 2.0}, "0" * 32), "of the same data"),
        (comparison(plan.replace(context=512), {("gqa", 0): 2.0}), "the same context, got 1024, and 512"),
        (comparison(plan.replace(model={"d_ff": 96}), {("gqa", 0): 2.0}), "gqa must be the same model"),
        (comparison(plan.replace(seeds=(1,), learning_rate=1e-3), {("gqa", 1): 2.0}), "gqa must have one learning"),
    ):
        with pytest.raises(InputError, match=message):
            Experiment.join([first, other])
    with pytest.raises(InputError, match="rows come from different data"):
        Comparison(
            record=comparison(PUBLISHED, {}).record,
            results=[*comparison(PUBLISHED, {("gqa", 0): 2.0}).results,
                     *comparison(PUBLISHED, {("sqa", 0): 2.0}, "0" * 32).results],
        )  # fmt: skip
    with pytest.raises(InputError, match="sqa with seed 0 is there though it is not in the plan"):
        Comparison(record=first.record, results=comparison(PUBLISHED, {("sqa", 0): 2.0}).results)
    for field, value, message in (
        ("steps", 11, "must have the 10 steps of the plan, got 11"),
        ("config", plan.model_config("mha"), "must have the plan's config of gqa, got another one"),
        ("variant", "\n\x1b" + "x" * 999, r"results: \\n\\x1bx{90,96}\.\.\. with seed 0 is there though it is not"),
    ):
        with pytest.raises(InputError, match=message):
            Comparison(record=first.record, results=[replace(first.results[0], **{field: value})])
    with pytest.raises(InputError, match="gqa with seed 0 is there twice"):
        Comparison(record=first.record, results=[*first.results, *first.results])


# --- files


@pytest.fixture
def result() -> RunResult:
    return comparison(PUBLISHED, {("sqa", 0): 2.0}).results[0]


def test_a_result_and_the_name_of_its_file_are_synced(
    tmp_path: Path, result: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    Directory(tmp_path).finish(result)
    assert synced == [str(tmp_path / "results.jsonl"), str(tmp_path)]


def test_a_torn_last_line_is_left_out_and_a_damaged_one_inside_named(tmp_path: Path, result: RunResult) -> None:
    path = tmp_path / "results.jsonl"
    directory = Directory(tmp_path)
    assert directory.results() == []
    directory.finish(result)
    with open(path, "a") as file:
        file.write('{"a": ')
    assert directory.results() == [result]
    directory.finish(result)
    assert directory.results() == [result, result]
    (tmp_path / "out" / "results.jsonl").mkdir(parents=True)
    with pytest.raises(InputError, match=r"results\.jsonl must be a regular file; remove it"):
        Directory(tmp_path / "out").results()
    for damaged in (b'{"a": ', b'{"a": "\xff"}', b"[" * 200_000):
        path.write_bytes(damaged + b"\n" + json.dumps(result, default=to_json).encode() + b"\n")
        with pytest.raises(InputError, match=r"line 1 of .*results.jsonl is damaged; remove it"):
            directory.results()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("parameters", "many", r"line 1 of .*results\.jsonl\.parameters must be a whole number, got 'many'; remove it"),
        ("steps", 0, r"line 1 of .*results\.jsonl\.steps must be at least 1, got 0; remove it"),
        ("tokens", 10**400, r"tokens must be below 2\*\*63, got 1000"),
        ("parameters", -1, "parameters must be at least 1, got -1"),
        ("wall_s", -0.5, "wall_s must be at least 0, got -0.5"),
        ("val.tokens", -1, r"val\.tokens must be 0 or more, got -1"),
        ("val.accuracy", 1.5, r"val\.accuracy must be from 0 to 1, got 1.5"),
        ("val.loss", 10**400, r"val\.loss must be a finite number, got 1000"),
        ("val.loss", float("nan"), r"val\.loss must be a finite number, got nan"),
        ("val.accuracy", None, r"val\.accuracy must be a finite number, got None"),
        ("step_s.median", 0, r"step_s\.median must be above 0, got 0"),
        ("config", [], "config must be a table, got"),
        ("config.d_ff", -1, "d_ff must be a positive whole number, got -1"),
        ("versions", {"torch": 2}, r"versions\.torch must be text, got 2"),
        ("seed", -1, "seed must be at least 0, got -1"),
        ("kernel", "fast", r"kernel must be of reference, .*, got 'fast'"),
        ("kernel", "", r"kernel must be of reference, .*, got ''"),
        ("device", "tpu9", "device must be a type of device that PyTorch knows, got 'tpu9'"),
        ("device", "cpu:0", "device must be a type of device that PyTorch knows, got 'cpu:0'"),
        ("dtype", "int8", r"dtype must be one of 'float32', 'bfloat16', got 'int8'"),
    ],
)
def test_a_row_that_is_wrong_is_named(
    tmp_path: Path, result: RunResult, field: str, value: object, message: str
) -> None:
    row = as_dict(result)
    inner = row
    *above, last = field.split(".")
    for name in above:
        inner = inner[name]
    inner[last] = value
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=message):
        Directory(tmp_path).results()
    del inner[last]
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=f"lacks {last}"):
        Directory(tmp_path).results()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", {"gqa": "x"}, r"plan\.json\.steps\.gqa must be a whole number"),
        ("steps", {"gqa": 10}, "steps must be of the variants"),
        ("steps", dict.fromkeys(DEFAULT_VARIANTS, 11), "must be 10, which budget steps=10 gives, got 11"),
        ("kernel", 3, r"plan\.json\.kernel must be a table, got 3"),
        ("data", "builtin", r"plan\.json\.data must be a table"),
        ("data", {"name": "x"}, r"plan\.json\.data lacks fingerprint"),
        ("versions", [], r"plan\.json\.versions must be a table"),
        ("git", 3, r"plan\.json\.git must be text, got 3"),
        ("data.train_tokens", -5, r"plan\.json\.data\.train_tokens must be at least 1, got -5"),
        ("data.unigram_entropy", -1.0, r"plan\.json\.data\.unigram_entropy must be at least 0, got -1"),
        ("kernel", dict.fromkeys(DEFAULT_VARIANTS, "fast"), r"kernel\.mha must be of reference, .*, got 'fast'"),
        ("machine", None, r"plan\.json\.machine must be a table, got None"),
        ("plan", {"name": "p", "batch_size": {}}, "batch_size must be a whole number, got {}"),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, field: str, value: object, message: str) -> None:
    record = comparison(PUBLISHED, {}).record
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(record, default=to_json))
    assert Record.read(path) == record
    field, _, inner = field.partition(".")
    value = {**as_dict(record)[field], inner: value} if inner else value
    path.write_text(json.dumps(as_dict(record) | {field: value}))
    with pytest.raises(InputError, match=rf"plan\.json is damaged: .*{message}"):
        Record.read(path)
    without = as_dict(record)
    del without[field]
    path.write_text(json.dumps(without))
    with pytest.raises(InputError, match=rf"plan\.json is damaged: plan\.json lacks {field}"):
        Record.read(path)


def test_a_time_budget_needs_the_times_of_steps() -> None:
    values = as_dict(comparison(PUBLISHED, {}).record)
    values["plan"]["budget"], values["step_s"] = "time=1h", {}
    with pytest.raises(InputError, match=r"step_s must be of the variants \['mha', .*got \[\]"):
        read_value(Record, values, "plan.json")


def test_processes_of_a_record_are_counted_from_1(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(as_dict(comparison(PUBLISHED, {}).record) | {"processes": -2}))
    with pytest.raises(InputError, match=r"plan\.json is damaged: plan\.json\.processes must be at least 1, got -2"):
        Record.read(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("name", "read", "line"),
    [
        ("curve", Directory.curve, {"step": -3, "loss": 1.0, "tokens": 1, "seconds": 1.0}),
        ("curve", Directory.curve, {"step": 1, "loss": 1.0, "tokens": -1, "seconds": 1.0}),
        ("probes", Directory.probes, {"step": 0, "tokens": 1, "positions": [], "loss_by_position": [],
                                      "repeated_loss": 1.0, "unrepeated_loss": 1.0}),
    ],
)  # fmt: skip
def test_counts_below_zero_in_a_curve_are_named(tmp_path: Path, name: str, read: Any, line: dict[str, object]) -> None:
    (tmp_path / "sqa-0").mkdir()
    (tmp_path / "sqa-0" / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=rf"line 1 of .*{name}\.jsonl\.(step|tokens) must be at least [01], got -?\d"):
        read(Directory(tmp_path), ("sqa", 0))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": NaN, "b"}', "[" * 200_000, "\xff"])
def test_a_record_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"plan\.json (is damaged|must hold a JSON object)"):
        Record.read(tmp_path / "plan.json")
