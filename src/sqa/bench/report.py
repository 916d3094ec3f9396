"""The result of a benchmark: measurements with a header, as JSON Lines, as tables of 80 columns and as plots."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Column, Table
from rich.text import Text

from sqa.bench.measurement import Measurement
from sqa.charts import load_altair, save_chart
from sqa.errors import InputError
from sqa.files import write_text
from sqa.measure.machine import Machine, git_revision, machine, versions
from sqa.tables import known


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Measurements of one or more benchmarks, and when and where they were made. rich prints it.

    `settings`: the options that no measurement repeats. `versions`: those of the libraries that figures depend on.
    """

    date: str
    device: str
    machine: Machine
    versions: Mapping[str, str]
    git: str | None
    settings: Mapping[str, Any]
    notes: tuple[str, ...]
    rows: tuple[Measurement, ...]

    @classmethod
    def of(
        cls, rows: Iterable[Measurement], *, device: str, settings: Mapping[str, Any], notes: Iterable[str] = ()
    ) -> Self:
        """The result of measurements made now, on this machine."""
        return cls(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            device=device,
            machine=machine(device),
            versions=versions(),
            git=git_revision(),
            settings=settings,
            notes=tuple(notes),
            rows=tuple(rows),
        )

    def write_json(self, path: Path) -> None:
        """JSON lines: the header, then one object a measurement."""
        header = {"kind": "header"} | vars(self) | {"machine": self.machine.to_dict()}
        del header["rows"]
        values = (header, *(row.to_dict() for row in self.rows))
        lines = (json.dumps(value, ensure_ascii=False, allow_nan=False) for value in values)
        write_text(path, "\n".join(lines) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file of `write_json`. Raises InputError for any other file."""
        try:
            with path.open(encoding="utf-8") as file:  # splitlines() would cut within texts, too
                header, *rows = map(json.loads, file)
            if header.pop("kind") != "header":
                raise ValueError
            header |= {"machine": Machine(**header["machine"]), "notes": tuple(header["notes"])}
            return cls(**header, rows=tuple(map(Measurement.from_dict, rows)))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"benchmark: {path.name} is no file written by sqa bench --json") from None

    @property
    def revision(self) -> str:
        """The first ten digits of the commit, with "-dirty" where there were uncommitted changes."""
        commit, dash, dirty = str(self.git).partition("-")
        return commit[:10] + dash + dirty

    @property
    def kinds(self) -> list[str]:
        """The benchmarks of the measurements, in their order."""
        return list(dict.fromkeys(row.kind for row in self.rows))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        where = self.machine.gpu or f"{self.machine.processor}, {self.machine.threads} threads"
        yield Text(f"{where}, torch {self.versions['torch']}, git {self.revision}", style="dim")
        tables: dict[tuple[Any, ...], list[Measurement]] = {}
        for row in self.rows:
            tables.setdefault((row.kind, row.d_model, row.dtype, row.what), []).append(row)
        for (kind, *_), rows in tables.items():
            yield _wide_table(rows) if kind == "prefill" else _table(rows)
        for note in self.notes:
            yield Text(note, style="dim")

    def plot(self, path: Path) -> None:
        """Write all charts to one file: .svg, .png, .html or .json. Raises MissingExtraError without altair."""
        save_chart(self.chart(), path)

    def chart(self) -> Any:
        """The altair chart: time and ratio over N with their limits dashed, or bars where there is one N."""
        alt = load_altair()
        charts = []
        for kind in self.kinds:
            rows = [row for row in self.rows if row.kind == kind and row.seconds is not None]
            if not rows:
                continue
            over_n = len({row.n for row in rows}) > 1
            data = alt.Data(values=[_record(row, rows, over_n=over_n) for row in rows])
            panels = alt.Facet("panel:N", title=kind)
            if not over_n:
                field, title = ("median", "seconds") if rows[0].tokens_per_s is None else ("tokens_per_s", "tokens/s")
                bars = alt.Chart(data, width=260).mark_bar().encode(
                    x=alt.X(f"{field}:Q", title=title), y=alt.Y("series:N", title=None, sort=None),
                    color=alt.Color("variant:N", title=None, sort=None),
                )  # fmt: skip
                charts.append(bars.facet(panels, columns=2))
                continue
            axis = alt.Axis(values=sorted({row.n for row in rows if row.n is not None}), format="~s")
            base = alt.Chart(data, width=260, height=220).encode(
                x=alt.X("n:Q", title="N, tokens", axis=axis, scale=alt.Scale(type="log", nice=False)),
                color=alt.Color("series:N", title=None, sort=None),
            )
            for field, limit, title, scale in (
                ("median", "limit_seconds", "seconds", "log"),
                ("ratio", "limit", "times faster", "linear"),
            ):
                y = alt.Y(f"{field}:Q", title=title, scale=alt.Scale(type=scale, zero=False))
                measured = base.mark_line(point=True).encode(y=y)
                dashed = base.mark_line(strokeDash=[4, 3], opacity=0.6).encode(y=f"{limit}:Q")
                charts.append(alt.layer(measured, dashed).facet(panels, columns=2))
        if not charts:
            raise InputError("plot: there is no timed row to draw")
        return alt.vconcat(*charts).resolve_scale(color="independent")


def _record(row: Measurement, rows: Sequence[Measurement], *, over_n: bool) -> dict[str, Any]:
    """A measurement as a row of a plot's data, with the name of its line or bar and of its panel."""
    fields = ("preset", "d_model", "dtype", "mask", "what", "kernel", "batch_size", "implementation")
    varying = [field for field in fields if len({getattr(row, field) for row in rows}) > 1]
    name = [] if over_n else [field for field in varying if field in ("kernel", "implementation")]
    panel = [field for field in varying if field not in name]
    drawn = ("n", "variant", "tokens_per_s", "ratio", "limit", "limit_seconds")
    return {field: getattr(row, field) for field in drawn} | {
        "median": row.median,
        "series": ", ".join((row.variant, *(str(getattr(row, field)) for field in name))),
        "panel": ", ".join(f"{_DESCRIBING[field]} {getattr(row, field)}" for field in panel) or row.dtype,
    }


def seconds_text(value: float) -> str:
    """A time with three digits, in s, ms or µs."""
    value = float(f"{value:.3g}")  # before a unit is chosen: 999.9 ms are 1.00 s
    unit, factor = ("s", 1.0) if value >= 1 else ("ms", 1e3) if value >= 1e-3 else ("µs", 1e6)
    number = f"{value:,.0f}" if value >= 1000 else f"{value * factor:#.3g}".rstrip(".")
    return f"{number} {unit}"


def _time(row: Measurement) -> str | Text:
    """The median with the larger distance of p20 and p80, or the first words of the note, which a footnote repeats."""
    if row.seconds is None:
        return Text((row.note or "").split(":")[0].split(";")[0], style="dim")
    spread = max(row.seconds.p80 - row.median, row.median - row.seconds.p20) / row.median
    return f"{seconds_text(row.median)} ±{spread:.0%}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


_DESCRIBING = {
    "preset": "preset", "d_model": "d_model", "implementation": "by", "variant": "variant", "heads": "heads",
    "batch_size": "batch", "n": "N", "dtype": "dtype", "mask": "mask", "window": "window", "kernel": "kernel",
    "what": "what", "setting": "run", "checked": "same",
}  # fmt: skip
"""The fields that say what was measured, and their headings."""

_MEASURED = {
    "tokens_per_s": ("tokens\n/s", 1, "{:,.0f}"),
    "flops_per_s": ("GFLOP/s", 1e9, "{:,.0f}"),
    "share_of_peak": ("of\nGEMM", 1, "{:.0%}"),
    "share_of_processor": ("of\nCPU", 1, "{:.0%}"),
    "ratio": ("vs\n{baseline}", 1, "{:.2f}x"),
    "share_of_limit": ("limit", 1, "{:.0%}"),
    "ratio_to_full": ("vs\nfull", 1, "{:.2f}x"),
    "ratio_to_sdpa": ("vs\nsdpa", 1, "{:.2f}x"),
    "ratio_to_peer": ("vs\npeer", 1, "{:.2f}x"),
    "cache_bytes": ("cache\nMiB", 2**20, "{:,.1f}"),
    "peak_bytes": ("peak\nMiB", 2**20, "{:,.0f}"),
    "memory_to_peer": ("vs\npeer", 1, "{:.2f}x"),
    "loss": ("loss", 1, "{:.4f}"),
    "steps": ("steps", 1, "{:,.0f}"),
}
"""The fields with results: their headings, their units and the format of a value."""


def _figure(row: Measurement, field: str) -> str:
    value, (_, unit, text) = getattr(row, field), _MEASURED[field]
    return "" if value is None else text.format(value / unit)


def _titled(table: Table, rows: Sequence[Measurement], facts: Sequence[str]) -> Group:
    """A table, with the facts that hold for all of it above, and the reasons for missing times below."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.note is not None:
            reasons.setdefault(row.note, []).append(f"{row.implementation or row.kernel} {row.variant}")
    footnotes = (Text(f"{', '.join(dict.fromkeys(who))}: {reason}") for reason, who in reasons.items())
    return Group(Text.assemble((rows[0].kind, "bold"), ": ", (", ".join(facts), "dim")), table, *footnotes)


def _table_of(*columns: Column | str) -> Table:
    return Table(*columns, box=None, pad_edge=False, padding=(0, 1, 0, 0))


def _table(rows: Sequence[Measurement]) -> Group:
    """A row for each measurement. What all have in common goes into the title."""
    shown = {field: {_shown(getattr(row, field)) for row in rows} - {""} for field in _DESCRIBING}
    if rows[0].kind not in ("attention", "decode"):
        del shown["heads"]
    constant = [field for field, values in shown.items() if field != "variant" and len(values) == 1]
    varying = [field for field, values in shown.items() if field not in constant and values]
    measured = [field for field in _MEASURED if any(getattr(row, field) is not None for row in rows)]
    has_times = any(row.seconds is not None or row.note is not None for row in rows)
    baseline = next((row.baseline for row in rows if row.baseline is not None), "")
    right = ("n", "batch_size", "window")
    table = _table_of(  # where it is too wide, names are folded, and figures stay whole
        *(Column(_DESCRIBING[f], justify="right" if f in right else "left", overflow="fold") for f in varying),
        *([Column("time", justify="right", no_wrap=True)] if has_times else []),
        *(Column(_MEASURED[f][0].format(baseline=baseline), justify="right", no_wrap=True) for f in measured),
    )
    for row in rows:
        described, figures = [_shown(getattr(row, f)) for f in varying], [_figure(row, f) for f in measured]
        table.add_row(*described, *([_time(row)] if has_times else []), *figures)
    return _titled(table, rows, [f"{_DESCRIBING[field]} {next(iter(shown[field]))}" for field in constant])


def _wide_table(rows: Sequence[Measurement]) -> Group:
    """Prefill as in the preprint: a column for each variant, and some rows for each N and implementation."""
    names = list(dict.fromkeys(row.variant for row in rows))
    first = rows[0]
    facts = [f"preset {first.preset}", f"dtype {first.dtype}", "one sequence, last logits only"]
    table = _table_of(Column("N", justify="right"), "", *(Column(name, justify="right") for name in names))
    ours = {(row.n, row.variant): row for row in rows if row.implementation == "sqa" and row.seconds is not None}

    def over_ours(row: Measurement) -> str:
        own = ours.get((row.n, row.variant))
        return "" if row.seconds is None or own in (None, row) else f"{row.median / own.median:.2f}x"

    lines: dict[str, Callable[[Measurement], str | Text]] = {
        "seconds": lambda row: _time(row) if row.seconds is None else seconds_text(row.median),
        "ratio": lambda row: "" if len(names) == 1 else known("{:.2f}x", row.ratio),
        "over ours": over_ours,
        "FLOPs": lambda row: known("{:.2f}x", row.limit),
        "preprint": lambda row: known("{:.2f}x", row.preprint_ratio),
        "run": lambda row: row.setting or "" if row.implementation != "sqa" and row.seconds is not None else "",
    }
    blocks: dict[tuple[int | None, str | None], dict[str, Measurement]] = {}
    for row in rows:
        blocks.setdefault((row.n, row.implementation), {})[row.variant] = row
    shown = None
    for (n, implementation), block in blocks.items():
        for label, cell in lines.items():
            cells = [cell(block[name]) if name in block else "" for name in names]
            if any(cells):
                name = implementation if label == "seconds" and implementation != "sqa" else label
                table.add_row("" if n == shown else f"{n:,}", name, *cells)
                shown = n
    return _titled(table, rows, facts)
