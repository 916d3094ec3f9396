"""The report of made-up results: the right figures and words, and a page that a browser draws without complaint."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sqa.cost import parameters
from sqa.experiments.curves import CURVE_POINTS, curve, difference_curves
from sqa.experiments.figures import COLOURS, make_figures
from sqa.experiments.plan import Plan
from sqa.experiments.report import pareto_front, read_experiment, write_report
from sqa.progress import StepReport
from sqa.variants import VARIANTS

LOSSES = {"mha": 2.40, "gqa": 2.42, "mqa": 2.46, "sqa": 2.43, "ssqa": 2.425, "xsqa": 2.47, "xsmqa": 2.50}
SECONDS = {"mha": 0.75, "gqa": 0.70, "mqa": 0.69, "sqa": 0.48, "ssqa": 0.49, "xsqa": 0.38, "xsmqa": 0.36}
FIGURES = [
    "difference-by-variant",
    "loss-over-tokens",
    "loss-against-gqa",
    "loss-over-seconds",
    "loss-against-step-time",
    "speed-against-theory",
    "parameters",
    "kv-cache",
]


def make_directory(folder: Path, *, seeds: int = 3, steps: int = 700, **fields: Any) -> Path:
    """What `sqa compare` leaves, made up: sqa differs from gqa steadily, ssqa by less than seeds do."""
    given = {"shape": "published", "context": 1024, "budget": f"steps={steps}", **fields}
    plan = Plan(name="made-up", seeds=tuple(range(seeds)), **given)
    variants, timed = plan.variants, plan.timing_rounds > 0
    step_s = {name: {q: SECONDS.get(name, 0.6) for q in ("p20", "median", "p80")} for name in variants if timed}
    record = {
        "plan": plan.to_dict(),
        "steps": dict.fromkeys(variants, steps),
        "step_s": step_s,
        "kernel": dict.fromkeys(variants, "blocks"),
        "machine": {"system": "Linux", "processor": "made </script> & up", "cores": 2, "threads": 2},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "git": None,
        "data": {
            "name": "builtin",
            "fingerprint": "f00dfeed" * 4,
            "train_documents": 10,
            "train_tokens": 2_846_311,
            "validation_documents": 2,
            "validation_tokens": 1000,
            "unigram_entropy": 6.5,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(record))
    rows = []
    for number, name in enumerate(variants):
        config = plan.model_config(name)
        for seed in plan.seeds:
            wobble = 0.01 * math.sin(9 * number + 5 * seed) if name == "ssqa" else 0.0005 * math.sin(number + seed)
            loss = LOSSES.get(name, 2.41) + 0.02 * seed + wobble
            run = folder / f"{name}-{seed}"
            run.mkdir(exist_ok=True)
            points = [
                {
                    "step": i + 1,
                    "loss": loss + 6 * math.exp(-9 * i / steps) + 0.1 * math.sin(i * (1 + i)),
                    "tokens": 7000 * (i + 1),
                    "seconds": SECONDS.get(name, 0.6) * (i + 1),
                }
                for i in range(steps)
            ]
            (run / "curve.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
            rows.append(
                {
                    "variant": name,
                    "seed": seed,
                    "config": config.to_dict(),
                    "parameters": parameters(config),
                    "steps": steps,
                    "tokens": 7000 * steps,
                    "wall_s": 100.0,
                    "step_s": step_s.get(name),
                    "val": {
                        "loss": loss,
                        "perplexity": math.exp(loss),
                        "bits_per_byte": loss / 3,
                        "tokens": 1000,
                        "accuracy": 0.5 - loss / 100,
                        "loss_all_positions": loss / 2,
                        "accuracy_all_positions": 0.77,
                    },
                    "kernel": "blocks",
                    "device": "cpu",
                    "dtype": "float32",
                    "versions": record["versions"],
                    "git": None,
                    "data_fingerprint": "f00dfeed" * 4,
                }
            )
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html.split("<script>")[0]).split())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The full report: eight variants, three seeds."""
    return write_report(read_experiment([make_directory(tmp_path_factory.mktemp("runs") / "full")]))


def test_one_page_and_two_files_a_figure(written: list[Path]) -> None:
    page, *images = written
    assert page.name == "report.html"
    assert sorted(p.name for p in page.parent.iterdir()) == sorted(p.name for p in written)
    assert [p.name for p in images] == [f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")]
    assert page.stat().st_size < 3_000_000
    for path in images:
        start = path.read_bytes()[:4]
        assert start == (b"\x89PNG" if path.suffix == ".png" else b"<svg")
    svg = {path.stem: path.read_text() for path in images if path.suffix == ".svg"}
    assert svg["loss-over-tokens"].count('aria-roledescription="line mark"') == 8
    assert svg["loss-against-step-time"].count('aria-roledescription="point"') == 8
    assert svg["speed-against-theory"].count('aria-roledescription="point"') == 24
    assert svg["difference-by-variant"].count('aria-roledescription="point"') == 7
    assert svg["kv-cache"].count('aria-roledescription="bar"') == 8


def test_the_page_loads_nothing(written: list[Path]) -> None:
    page = written[0].read_text()
    assert "default-src 'none'" in page  # the browser itself refuses to
    outside_of_scripts = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"https?:|\s(src|href)=", outside_of_scripts)
    assert page.count("<script") == page.count("<script>")


def test_the_words_say_what_is_established_and_what_is_not(written: list[Path]) -> None:
    text = text_of(written[0].read_text())
    established, unsure = re.findall(r"loss against GQA of ([^.]*(?:\.\d+[^.]*)*)\.", text)
    assert "SQA +0.0094 ± 0.0006" in established
    assert re.search(r"\bsSQA", unsure)
    assert not re.search(r"\bsSQA", established)
    row = re.search(r"sSQA 8 8 16 10,917,648 700 (.*?) xSQA", text)
    assert row is not None
    assert "not established" in row[1]
    assert "One seed" not in text
    assert "both faster and by its mean better: xSMQA, xSQA, SQA, sSQA" in text
    # the published figures beside ours: SQA 1.2272, and 0.6877 / 0.6417 the speed of its step
    assert re.search(r" SQA 1\.2272 1\.\d{4} 76\.97% 77\.00% 1\.07× 1\.46×", text)
    assert "f00dfeed" in text
    assert "made &lt;/script&gt; &amp; up" in text


def test_a_label_cannot_end_the_script_that_holds_it(tmp_path: Path) -> None:
    label = "<!--<script>"
    shapes = {"sqa": {"label": label}}
    folder = make_directory(
        tmp_path, seeds=1, steps=30, variants=("gqa", "sqa"), shapes=shapes, shape="demo", timing_rounds=0
    )
    page = write_report(read_experiment([folder]))[0].read_text()
    assert label not in page
    assert "\\u003c!--\\u003cscript>" in page
    assert "&lt;!--&lt;script&gt;" in page


def test_one_seed_has_no_interval_and_the_report_says_so(tmp_path: Path) -> None:
    folder = make_directory(tmp_path / "r", seeds=1, steps=30, variants=("gqa", "sqa"), shape="demo", timing_rounds=0)
    out = tmp_path / "elsewhere" / "r"
    paths = write_report(read_experiment([folder]), out)
    figures = {
        "difference-by-variant",
        "loss-over-tokens",
        "loss-against-gqa",
        "loss-over-seconds",
        "parameters",
        "kv-cache",
    }
    assert {path.stem for path in paths[1:]} == figures
    assert {path.parent for path in paths} == {out}
    text = text_of(paths[0].read_text())
    assert "One seed has no interval: no difference to GQA is established for SQA." in text
    assert "Steps were not timed" in text
    assert "published table" not in text
    assert "±" not in text.split("Loss in nats")[0]


def test_curves_are_the_mean_of_the_seeds_smoothed_and_thinned() -> None:
    runs = [
        [StepReport(step=i + 1, tokens=10 * i, seconds=i * speed, loss=base) for i in range(5000)]
        for base, speed in ((2.0, 1.0), (4.0, 3.0))
    ]
    points = curve("SQA", runs)
    assert len(points) <= CURVE_POINTS
    assert {point["loss"] for point in points} == {3.0}
    assert (points[0]["step"], points[-1]["step"]) == (1667, 5000)
    assert points[-1]["seconds"] == pytest.approx(2 * 4999)
    assert curve("SQA", runs, 0.25)[-1]["seconds"] == 0.25 * 5000
    # a loss that falls by 1 a step is left where it is by an average over both sides
    falling = curve("SQA", [[StepReport(step=i + 1, tokens=i, seconds=i, loss=float(-i)) for i in range(1000)]])
    assert falling[100]["loss"] == pytest.approx(-falling[100]["tokens"])
    assert len(curve("SQA", [runs[0][:1]])) == 1


def test_differences_are_at_equal_tokens_as_far_as_both_lines_go() -> None:
    def line(label: str, tokens: range, loss: float) -> list[dict[str, Any]]:
        return [{"variant": label, "step": t, "tokens": t, "loss": loss - 0.01 * t} for t in tokens]

    curves = [*line("GQA", range(10, 100, 10), 5.0), *line("SQA", range(5, 120, 5), 4.9)]
    found = difference_curves(curves, "GQA")
    assert {row["variant"] for row in found} == {"SQA"}
    assert [row["tokens"] for row in found] == list(range(10, 95, 5))
    assert {row["difference"] for row in found} == {-0.1}
    assert difference_curves(line("SQA", range(10), 4.9), "GQA") == []


def test_every_colour_stands_out_from_white_and_from_dark_paper() -> None:
    def luminance(colour: str) -> float:
        values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for name in VARIANTS:
        for paper in ("#ffffff", "#16181b"):
            darker, lighter = sorted((luminance(COLOURS[name]), luminance(paper)))
            assert (lighter + 0.05) / (darker + 0.05) >= 3, (name, paper)  # WCAG 2.1, 1.4.11


def lower(folder: Path, by: float) -> Path:
    """Take `by` from every loss of a made-up comparison."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for row in rows:
        row["val"]["loss"] -= by
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_horizons_join_on_one_page_with_probes_and_effective_speedups(tmp_path: Path) -> None:
    folders = [
        lower(make_directory(tmp_path / str(n), steps=n, variants=("gqa", "sqa"), shape="demo"), 0.1 * i)
        for i, n in enumerate((50, 200))
    ]
    probe = {"positions": [0, 16, 1024], "loss_by_position": [3.0, 2.5], "repeated_loss": 4.0, "unrepeated_loss": 6.0}
    for folder, steps in zip(folders, ((2, 50), (3, 200)), strict=True):
        for run in ("gqa-0", "gqa-1", "sqa-0"):
            lines = [json.dumps({"step": step, "tokens": 7000 * step, **probe}) + "\n" for step in steps]
            (folder / run / "probes.jsonl").write_text("".join(lines))
    page, *images = write_report(read_experiment(list(reversed(folders))), tmp_path / "out")
    names = {path.stem for path in images}
    assert {"difference-over-tokens", "final-loss-over-tokens", "final-loss-over-time"} <= names
    assert {"repeated-sequence", "late-minus-early"} <= names
    assert "grid" not in names
    for held in (folders, folders[::-1]):  # the shorter horizon has probes too, of runs with the same names
        figures = make_figures(read_experiment(held), [])
        (shown,) = (figure.chart.data.values for figure in figures if figure.name == "repeated-sequence")
        assert {row["tokens"] for row in shown} == {21_000, 1_400_000}
    text = text_of(page.read_text())
    # SQA ends 0.01 above GQA, which fell 0.1 from 50 to 200 steps of 0.7 s: a tenth of the way back
    ratio = 0.7 * 200 * 0.25**0.1 / (0.48 * 200)
    assert re.search(rf"SQA 4 2 16 [\d,]+ 1,400,000 96 {ratio:.2f}\d?× \(\d\.\d\d to \d\.\d\d\)", text)
    assert f"Effective speed-up over GQA: SQA {ratio:.2f}×" in text
    assert "unknown above GQA&#39;s runs" in text  # of the shorter horizon
    svg = (tmp_path / "out" / "difference-over-tokens.svg").read_text()
    assert svg.count('aria-roledescription="line mark"') == 1
    quiet = make_directory(tmp_path / "q", steps=5, variants=("gqa", "sqa"), shape="demo", timing_rounds=0)
    with pytest.raises(ValueError, match="no step times"):
        read_experiment(folders, quiet)


def test_a_page_shows_what_there_is(tmp_path: Path) -> None:
    folders = [
        make_directory(tmp_path / str(n), steps=n, variants=variants, shape="demo", timing_rounds=0)
        for n, variants in ((50, ("gqa", "sqa", "xsqa")), (200, ("gqa", "sqa")))
    ]
    page, *images = write_report(read_experiment(folders), tmp_path / "out")
    html = page.read_text()
    headings = re.findall(r"<th>([^<]+)</th>", html.split("<thead>")[1].split("</thead>")[0])
    assert "validation loss" in headings
    assert not {"seconds", "effective speed-up", "step, ms", "speed vs GQA"} & set(headings)  # nothing was timed
    # xSQA has no run of the longer horizon: the legend of its curves has two names, that of final losses three
    legends = {path.stem: path.read_text() for path in images if path.suffix == ".svg"}
    assert ">xSQA</text>" not in legends["loss-over-tokens"]
    assert ">xSQA</text>" in legends["final-loss-over-tokens"]
    # a field a line: once where the comparisons agree, and of each where they do not
    fields = dict(re.findall(r"<dt>([^<]+)</dt>((?:<dd>[^<]*</dd>)+)", html))
    assert fields["batch size"] == "<dd>8</dd>"
    assert fields["steps"] == "<dd>made-up: 50</dd><dd>made-up: 200</dd>"
    assert fields["compile"] == "<dd>no</dd>"


def test_speed_is_drawn_before_gqa_has_a_run(tmp_path: Path) -> None:
    folder = make_directory(tmp_path / "r", seeds=1, steps=5, variants=("gqa", "sqa"), shape="demo")
    rows = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    (folder / "results.jsonl").write_text("".join(row for row in rows if json.loads(row)["variant"] == "sqa"))
    figures = make_figures(read_experiment([folder]), [])
    assert "speed-against-theory" in [figure.name for figure in figures]
    # without GQA in the plan there is no theory, though its time is known
    (folder / "results.jsonl").unlink()
    alone = make_directory(tmp_path / "s", seeds=1, steps=5, variants=("sqa",), shape="demo")
    figures = make_figures(read_experiment([alone], folder), [])
    assert "speed-against-theory" not in [figure.name for figure in figures]


def test_a_whole_grid_is_a_heat_map(tmp_path: Path) -> None:
    plan = Plan.read(str(Path(__file__).resolve().parents[2] / "benchmarks" / "plans" / "grid.toml"))
    same = {"variants": plan.variants, "shapes": plan.shapes, "model": plan.model, "shape": "demo", "timing_rounds": 0}
    folder = make_directory(tmp_path / "g", seeds=1, steps=5, **same)
    images = {path.name: path for path in write_report(read_experiment([folder]))}
    svg = images["grid.svg"].read_text()
    assert svg.count('aria-roledescription="rect mark"') == 10
    assert len(re.findall(r">\d\.\d{3}</text>", svg)) == 10


def test_a_grid_without_finished_runs_is_left_out(tmp_path: Path) -> None:
    plan = Plan.read(str(Path(__file__).resolve().parents[2] / "benchmarks" / "plans" / "grid.toml"))
    same = {"shapes": plan.shapes, "model": plan.model, "shape": "demo", "timing_rounds": 0}
    folder = make_directory(tmp_path / "g", seeds=1, steps=5, variants=(*plan.variants, "wide-gqa"), **same)
    rows = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    (folder / "results.jsonl").write_text("".join(row for row in rows if json.loads(row)["variant"] == "wide-gqa"))
    names = [figure.name for figure in make_figures(read_experiment([folder]), [])]
    assert "parameters" in names
    assert "grid" not in names


def test_curves_over_time_have_one_clock(tmp_path: Path) -> None:
    """The second comparison has no part in the timing phase: all curves take what the runs took."""
    parts = [
        make_directory(tmp_path / str(i), seeds=1, steps=50, variants=names, shape="demo")
        for i, names in enumerate((("gqa", "sqa"), ("xsqa",)))
    ]
    experiment = replace(read_experiment(parts), step_seconds={"gqa": 100.0, "sqa": 50.0})
    figures = {figure.name: figure for figure in make_figures(experiment, [])}
    shown = figures["loss-over-seconds"]
    assert "on whatever else the machine did" in shown.caption
    last = {row["variant"]: row["seconds"] for row in shown.chart.data.values}
    assert last == pytest.approx({"GQA": 50 * 0.70, "SQA": 50 * 0.48, "xSQA": 50 * 0.38})


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    points = {"slow": (3.0, 1.0), "bad": (2.0, 5.0), "fast": (1.0, 2.0), "same": (3.0, 2.0)}
    assert pareto_front(points) == ["fast", "slow"]


def test_what_cannot_be_reported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no comparison"):
        read_experiment([tmp_path])
    folder = make_directory(tmp_path / "r", seeds=1, steps=5, variants=("gqa", "sqa"))
    results = (folder / "results.jsonl").read_text()
    (folder / "results.jsonl").write_text(results.replace("f00dfeed", "00000000", 1))
    with pytest.raises(ValueError, match="rows come from different data"):
        write_report(read_experiment([folder]))
    (folder / "results.jsonl").unlink()
    with pytest.raises(ValueError, match=r"no run of .* has finished yet"):
        write_report(read_experiment([folder]))
    assert not (folder / "report").exists()


def test_without_altair_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_directory(tmp_path / "r", seeds=1, steps=5, variants=("gqa", "sqa"))
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(ImportError, match=r"\.\[report\]"):
        write_report(read_experiment([folder]))
