"""Tables and intervals are made from result rows, and rows that cannot be compared are refused."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from sqa.cost import parameters
from sqa.experiments.results import append_result, read_results, summary_rows, table
from sqa.experiments.statistics import paired_difference, summarise
from sqa.variants import DEFAULT_VARIANTS, preset


def row(variant: str, seed: int, loss: float, fingerprint: str = "f") -> dict[str, object]:
    config = preset("published", variant)
    return {
        "variant": variant,
        "seed": seed,
        "config": config.to_dict(),
        "parameters": parameters(config),
        "steps": 10,
        "step_s": {"p20": 0.9, "median": {"mha": 1.2, "gqa": 1.0}.get(variant, 0.5), "p80": 1.1},
        "val": {
            "loss": loss,
            "accuracy": 0.3,
            "perplexity": 2.0,
            "bits_per_byte": 1.0,
            "tokens": 100,
            "loss_all_positions": None,
            "accuracy_all_positions": None,
        },
        "data_fingerprint": fingerprint,
    }


def test_intervals_are_students() -> None:
    # t(0.975, 2) = 4.303, deviation 1, 3 values
    estimate = summarise([1.0, 2.0, 3.0])
    assert (estimate.mean, estimate.runs) == (2.0, 3)
    assert estimate.half_width == pytest.approx(4.303 / 3**0.5, rel=1e-6)
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


def test_the_table_has_every_variant_and_fits_80_columns() -> None:
    rows = [row(name, seed, 2.0 + 0.01 * seed) for seed in range(3) for name in DEFAULT_VARIANTS]
    console = Console(width=80, record=True, file=StringIO())
    console.print(table(rows, 1024))
    text = console.export_text()
    for label in ("MHA", "GQA", "MQA", "SQA", "sSQA", "xSQA", "xSMQA", "wide GQA"):
        assert label in text
    assert "10.66M" in text
    assert "…" not in text
    summary = {item["variant"]: item for item in summary_rows(rows, 1024)}
    assert summary["sqa"]["speed_vs_gqa"] == pytest.approx(2.0)
    assert summary["sqa"]["speed_vs_mha"] == pytest.approx(2.4)
    assert summary["sqa"]["attention_saving"] == 2.0
    assert summary["gqa"]["difference"] is None
    assert not summary["sqa"]["difference"].established


def test_rows_of_different_data_are_refused() -> None:
    with pytest.raises(ValueError, match="rows come from different data"):
        summary_rows([row("gqa", 0, 2.0), row("sqa", 0, 2.0, fingerprint="other")], 1024)


def test_a_torn_last_line_is_left_out_and_a_damaged_one_inside_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert read_results(path, {}) == []
    append_result(path, {"a": 1})
    with open(path, "a") as file:
        file.write('{"a": ')
    assert read_results(path, {}) == [{"a": 1}]
    append_result(path, {"a": 3})
    assert read_results(path, {}) == [{"a": 1}, {"a": 3}]
    for damaged in (b'{"a": ', b'{"a": "\xff"}', b"[" * 200_000):
        path.write_bytes(damaged + b"\n" + json.dumps({"a": 2}).encode() + b"\n")
        with pytest.raises(ValueError, match=r"line 1 of .*results.jsonl is damaged"):
            read_results(path, {})


def test_a_row_without_its_fields_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    whole = {**row("sqa", 0, 2.0), "dtype": "float32", "device": "cpu"}
    append_result(path, {**whole, "step_s": None})
    assert len(read_results(path)) == 1
    append_result(path, {**whole, "parameters": "many", "val": {"loss": 2.0}, "step_s": {}})
    with pytest.raises(ValueError, match=r"line 2 of .* lacks parameters, val\.accuracy, step_s\.median; remove it"):
        read_results(path)
