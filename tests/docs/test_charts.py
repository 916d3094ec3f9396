"""Charts take what their result files hold."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def charts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return docs/charts.py, which reads copies of the committed benchmarks in `tmp_path`."""
    monkeypatch.syspath_prepend(str(DOCS))
    module = importlib.import_module("charts")
    for name in ("step-bf16", "prefill"):
        shutil.copy(module.RESULTS / f"{name}.jsonl", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_prefill_has_a_line_for_each_peer_that_was_measured(charts: Any, tmp_path: Path) -> None:
    path = tmp_path / "prefill.jsonl"
    header, *rows = map(json.loads, path.read_text().splitlines())
    ours = [row for row in rows if row["implementation"] == "sqa"]
    peers = [
        {**row, "implementation": name, "tokens_per_s": row["tokens_per_s"] * times}
        for name, times in (("hf-llama", 0.5), ("llama-cpp", 0.75))
        for row in ours
        if row["variant"] == "gqa"
    ]
    drawn = []
    for shown in (ours, [*ours, *peers]):
        path.write_text("".join(json.dumps(row) + "\n" for row in (header, *shown)))
        drawn.append(charts.speed())
    alone, beside = (chart.svg.count('aria-roledescription="line mark"') for chart in drawn)
    assert beside == alone + 2
    assert ">llama.cpp</text>" not in drawn[0].svg
    assert ">llama.cpp</text>" in drawn[1].svg
    assert "llama.cpp reads" in drawn[1].alt
    # the speed of variants is that of this package, whoever stands beside it
    assert drawn[1].alt.startswith(drawn[0].alt)
