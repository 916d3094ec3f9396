"""Result rows: one JSON object a finished run, appended and synced; tables are made from them and never typed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from sqa.config import ModelConfig
from sqa.cost import attention_saving
from sqa.errors import InputError
from sqa.experiments.statistics import Estimate, paired_difference, summarise
from sqa.variants import VARIANTS

BASELINE = "gqa"

Row = dict[str, Any]


def append_result(path: Path, row: Row) -> None:
    """Add one line, synced before returning; a torn line that a crash left at the end is dropped."""
    whole = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    with open(path, "ab") as file:
        file.truncate(len(whole[0]) + len(whole[1]))
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


RUN_FIELDS: dict[str, Any] = {
    "variant": str, "seed": int, "config": dict, "parameters": int, "steps": int, "dtype": str, "device": str,
    "data_fingerprint": str, "val": {"loss": float, "accuracy": float}, "step_s": {"median": float},
}  # fmt: skip
"""What tables and figures read of a run; step_s is null where steps were not timed."""

CURVE_FIELDS: dict[str, Any] = {"step": int, "tokens": int, "seconds": float, "loss": float}


def read_results(path: Path, fields: dict[str, Any] = RUN_FIELDS) -> list[Row]:
    """All whole rows; a last line torn by a crash is left out (its run is not finished).

    Raises ValueError when a line inside the file is damaged, or lacks one of the `fields`.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            what = f"lacks {', '.join(lacking)}" if (lacking := _lacking(row, fields)) else ""
        except (ValueError, RecursionError):
            what = "is damaged"
        if what:
            raise InputError(
                f"results: line {number} of {path} {what}; remove it (a run without its result trains again)"
            )
        rows.append(row)
    return rows


def _lacking(row: Any, fields: dict[str, Any], where: str = "") -> list[str]:
    """The names of those fields that are not there, or of another type."""
    if not isinstance(row, dict):
        raise ValueError
    found = []
    for name, kind in fields.items():
        value = row.get(name)
        if (name, value) == ("step_s", None):
            continue
        if isinstance(kind, dict):
            found += _lacking(value, kind, f"{name}.") if isinstance(value, dict) else [name]
        elif not isinstance(value, int | float if kind is float else kind):
            found.append(where + name)
    return found


def check_comparable(rows: Sequence[Row]) -> None:
    """Raise ValueError when rows come from different data: their losses cannot stand in one table."""
    fingerprints = sorted({row["data_fingerprint"] for row in rows})
    if len(fingerprints) > 1:
        raise InputError(
            f"results: rows come from different data (fingerprints {', '.join(f[:12] for f in fingerprints)}); "
            f"compare runs on one data set"
        )


def losses_of(rows: Sequence[Row], variant: str) -> dict[int, float]:
    """Validation loss over real tokens by seed."""
    return {row["seed"]: row["val"]["loss"] for row in rows if row["variant"] == variant}


def summary_rows(rows: Sequence[Row], context: int) -> list[dict[str, Any]]:
    """One dict a variant, in the order of VARIANTS: counts, loss with interval, difference to GQA, speed."""
    check_comparable(rows)
    variants = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
    baseline = losses_of(rows, BASELINE)
    step = {row["variant"]: row["step_s"]["median"] for row in rows if row.get("step_s")}
    summary = []
    for name in variants:
        own = [row for row in rows if row["variant"] == name]
        config = ModelConfig.from_dict(own[0]["config"])
        layer = config.layers[0]
        losses = losses_of(rows, name)
        summary.append(
            {
                "variant": name,
                "label": VARIANTS[name].label,
                "num_query_heads": layer.num_query_heads,
                "num_kv_heads": layer.num_kv_heads,
                "head_dim": layer.head_dim,
                "parameters": own[0]["parameters"],
                "steps": own[0]["steps"],
                "runs": len(own),
                "loss": summarise(list(losses.values())),
                "difference": paired_difference(losses, baseline) if name != BASELINE else None,
                "accuracy": summarise([row["val"]["accuracy"] for row in own]),
                "loss_all_positions": _mean([row["val"].get("loss_all_positions") for row in own]),
                "accuracy_all_positions": _mean([row["val"].get("accuracy_all_positions") for row in own]),
                "step_s": step.get(name),
                "speed_vs_gqa": step[BASELINE] / step[name] if {BASELINE, name} <= step.keys() else None,
                "speed_vs_mha": step["mha"] / step[name] if {"mha", name} <= step.keys() else None,
                "attention_saving": attention_saving(layer, context),
            }
        )
    return summary


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def table(rows: Sequence[Row], context: int, *, title: str | None = None) -> Table:
    """The comparison as people read it, at most 80 columns wide."""
    summary = summary_rows(rows, context)
    several = any(row["runs"] > 1 for row in summary)
    built = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), header_style="bold")
    headings = (
        "variant",
        "Hq",
        "Hkv",
        "params",
        "val\nloss",
        "loss vs\nGQA",
        "acc.\n%",
        "ms a\nstep",
        "vs\nGQA",
        "vs\nMHA",
        "theory",
    )
    for heading in headings:
        built.add_column(heading, justify="left" if heading == "variant" else "right", no_wrap=heading == "variant")
    for row in summary:
        wide = f"x{row['head_dim']}" if VARIANTS[row["variant"]].head_dim_factor > 1 else ""
        built.add_row(
            row["label"],
            f"{row['num_query_heads']}{wide}",
            str(row["num_kv_heads"]),
            f"{row['parameters'] / 1e6:.2f}M",
            _estimate(row["loss"], "", several),
            "-" if row["difference"] is None else _estimate(row["difference"], "+", several),
            f"{100 * row['accuracy'].mean:.2f}",
            "-" if row["step_s"] is None else f"{1000 * row['step_s']:.0f}",
            _times(row["speed_vs_gqa"]),
            _times(row["speed_vs_mha"]),
            _times(row["attention_saving"]),
        )
    return built


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _estimate(value: Estimate, sign: str, several: bool) -> str:
    """With several seeds the interval, and a question mark where the sign is not established."""
    text = f"{value.mean:{sign}.4f}"
    if not several:
        return text
    unsure = "?" if sign and not value.established else ""
    return f"{text}{unsure}" + ("" if value.half_width is None else f"\n±{value.half_width:.4f}")


NOTES = """\
val loss: nats a real token of the validation set, lower is better.
loss vs GQA: minus the loss of GQA's runs with the same seeds.
ms a step, vs GQA, vs MHA: training steps in turns; more than 1x is faster.
theory: attention FLOPs of MHA over this variant's.
wide GQA: the equal-cost alternative to fewer heads."""

NOTES_SEEDS = """\
±: 95 % interval (Student's t), under loss vs GQA that of paired differences.
?: not established: the interval crosses zero, or there is a single run."""
