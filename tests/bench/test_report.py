import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sqa.bench.measurement import Measurement, choose_baseline, with_ratios
from sqa.bench.prefill import PREPRINT_SECONDS, preprint_ratio
from sqa.bench.report import BenchResult, seconds_text
from sqa.measure.timing import Timing

ROOT = Path(__file__).resolve().parents[2]


def step_row(variant: str, median: float, **changes: Any) -> Measurement:
    known: dict[str, Any] = {
        "kind": "step", "preset": "published", "implementation": "sqa", "batch_size": 4, "n": 1024, "dtype": "bf16",
        "kernel": "sdpa", "setting": "compiled", "tokens_per_s": 4096 / median,
        "seconds": Timing(p20=0.9 * median, median=median, p80=1.2 * median, rounds=3),
    }  # fmt: skip
    return Measurement(variant=variant, **(known | changes))


def missing(variant: str, note: str) -> Measurement:
    changes: dict[str, Any] = {"seconds": None, "tokens_per_s": None, "setting": None}
    return step_row(variant, 1.0, implementation="hf-llama", note=note, **changes)


def result(*rows: Measurement) -> BenchResult:
    return BenchResult.of(rows, device="cpu", settings={"rounds": 3}, notes=("A note.",))


def printed(result: BenchResult, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(result)
    return console.export_text()


def test_ratios_are_baseline_over_own_time_within_a_setting() -> None:
    rows = [step_row("gqa", 2.0), step_row("sqa", 1.0), step_row("sqa", 3.0, dtype="fp32"), missing("sqa", "not there")]
    found = with_ratios(rows, same=lambda m: (m.dtype, m.implementation), baseline="gqa")
    assert [m.ratio for m in found] == [1.0, 2.0, None, None]
    assert found[1].baseline == "gqa"


def test_gqa_is_the_baseline_where_it_takes_part() -> None:
    assert choose_baseline(["sqa", "gqa"]) == "gqa"
    assert choose_baseline(["sqa", "xsqa"]) == "sqa"


def test_a_file_holds_the_header_and_every_row(tmp_path: Path) -> None:
    written = result(step_row("gqa", 2.0), missing("gqa", "not installed:\u2028pip install it"))
    written.write_json(tmp_path / "step.jsonl")
    assert (tmp_path / "step.jsonl").read_text().count("\n") == 3
    assert BenchResult.read(tmp_path / "step.jsonl") == written
    header = json.loads((tmp_path / "step.jsonl").read_text().splitlines()[0])
    assert set(header) == {"kind", "date", "device", "machine", "versions", "git", "settings", "notes"}


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")), ids=lambda path: path.stem)
def test_committed_files_are_read_and_nothing_of_them_is_lost(path: Path, tmp_path: Path) -> None:
    result = BenchResult.read(path)
    result.write_json(tmp_path / "again.jsonl")

    def values(path: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [{name: value for name, value in line.items() if value is not None} for line in lines]

    assert values(tmp_path / "again.jsonl") == values(path)


@pytest.mark.parametrize("text", ["", "{}\n", "[1]\n", "no json"])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"x\.jsonl is no file written by sqa bench"):
        BenchResult.read(tmp_path / "x.jsonl")


def test_the_table_fits_80_columns_and_loses_nothing() -> None:
    wide = {"ratio": 12.34, "baseline": "gqa", "ratio_to_peer": 1.41, "share_of_peak": 0.5, "share_of_processor": 0.4}
    rows = [
        step_row("gqa", 2.0, **wide),
        step_row("wide-gqa", 1.0, implementation="x-transformers", checked=False, **wide),
    ]
    rows += [missing("gqa", "not installed; run pip install -e '.[hf]'")]
    text = printed(result(*rows, step_row("sqa", 0.5, setting="eager", **wide, checked=True)))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    assert "preset published, batch 4, N 1,024, dtype bf16, kernel sdpa" in text
    assert "hf-llama gqa: not installed; run pip install -e '.[hf]'" in text
    line = next(line for line in text.splitlines() if line.startswith("x-transformers"))
    assert " ".join(line.split()) == "x-transformers wide-gqa compiled no 1.00 s ±20% 4,096 50% 40% 12.34x 1.41x"
    assert "A note." in text


def test_prefill_has_variants_as_columns_and_the_ratios_below_each_other() -> None:
    rows = [
        step_row(name, seconds, kind="prefill", n=n, ratio=2 / seconds, limit=1.9)
        for n in (1024, 4096)
        for name, seconds in (("gqa", 2.0), ("sqa", 1.0))
    ]
    rows[3] = replace(rows[3], preprint_ratio=1.37)
    rows.append(step_row("sqa", 1.5, kind="prefill", n=4096, ratio=1.0, implementation="hf-llama", setting="eager"))
    lines = printed(result(*rows)).splitlines()
    table = [line.split() for line in lines if line.strip()]
    assert ["N", "gqa", "sqa"] in table
    assert ["1,024", "seconds", "2.00", "s", "1.00", "s"] in table
    assert ["ratio", "1.00x", "2.00x"] in table
    assert ["FLOPs", "1.90x", "1.90x"] in table
    assert ["preprint", "1.37x"] in table
    peer = [["hf-llama", "1.50", "s"], ["ratio", "1.00x"], ["over", "ours", "1.50x"], ["run", "eager"]]
    assert table[table.index(peer[0]) :][:4] == peer


def test_a_table_that_is_too_wide_folds_names_and_cuts_no_figure() -> None:
    rows = [
        Measurement(
            kind="attention", variant=name, num_query_heads=8, num_kv_heads=4, head_dim=128, n=n, mask=mask,
            kernel=kernel, what="forward", seconds=Timing(p20=1.0, median=1.5, p80=2.0), flops_per_s=123e9,
            share_of_peak=0.5, share_of_processor=0.4, ratio=12.34, share_of_limit=1.23, ratio_to_full=23.45,
            ratio_to_sdpa=34.56, baseline="gqa",
        )
        for name, n, mask, kernel in (("gqa", 64, "causal", "fused"), ("8/4x128", 131_072, "window", "sdpa:efficient"))
    ]  # fmt: skip
    text = printed(result(*rows))
    assert "…" not in text
    assert all(text.count(figure) == 2 for figure in ("12.34x", "23.45x", "34.56x", "123%", "1.50 s ±33%"))


def test_a_revision_with_uncommitted_changes_says_so() -> None:
    commit = "0e05c75608" + "a" * 30
    assert "git 0e05c75608-dirty" in printed(replace(result(), git=f"{commit}-dirty"))
    assert replace(result(), git=commit).revision == "0e05c75608"


def test_the_preprints_ratios_are_those_it_prints() -> None:
    assert preprint_ratio("xsqa", "gqa", 32_768) == pytest.approx(2.698, abs=1e-3)
    assert preprint_ratio("wide-gqa", "gqa", 32_768) is None
    assert preprint_ratio("sqa", "gqa", 2048) is None
    assert all(set(row) == {"mha", "gqa", "mqa", "sqa", "ssqa", "xsqa"} for row in PREPRINT_SECONDS.values())


def test_plots_have_a_mark_for_every_measurement(tmp_path: Path) -> None:
    over_n = [step_row("sqa", n / 1000, kind="attention", n=n, ratio=1.5, limit=2.0) for n in (1000, 2000, 4000)]
    drawn = result(*over_n, step_row("gqa", 2.0), step_row("sqa", 1.0), missing("sqa", "not installed: x"))
    specification = drawn.chart().to_dict()
    marks = [layer["mark"]["type"] for chart in specification["vconcat"][:2] for layer in chart["spec"]["layer"]]
    assert marks == ["line"] * 4
    assert specification["vconcat"][2]["spec"]["mark"]["type"] == "bar"
    drawn.plot(tmp_path / "all.svg")
    svg = (tmp_path / "all.svg").read_text()
    assert svg.count('aria-roledescription="bar"') == 2
    assert svg.count('aria-roledescription="point"') == 6
    with pytest.raises(ValueError, match=r"'all.gif' must end in \.svg"):
        drawn.plot(tmp_path / "all.gif")
    with pytest.raises(ValueError, match="no timed row"):
        result(missing("sqa", "not installed: x")).plot(tmp_path / "none.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["all.svg"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1234.5, "1,230 s"), (99.96, "100 s"), (0.9999, "1.00 s"), (0.1234, "123 ms"), (0.0009996, "1.00 ms"),
        (2.5e-7, "0.250 µs"),
    ],
)  # fmt: skip
def test_times_have_three_digits_and_no_exponent(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_the_processor_is_named_above_every_result() -> None:
    measured = result(step_row("gqa", 2.0))
    assert printed(measured, 300).startswith(f"{measured.machine.processor}, {measured.machine.threads} threads, torch")
