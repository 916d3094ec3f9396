"""What every benchmark returns: rows under one header, as JSON lines, as tables for 80 columns and as plots."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group
from rich.markup import escape
from rich.table import Column, Table

from sqa.config import AttentionConfig
from sqa.errors import InputError, MissingExtraError
from sqa.files import replacing, write_text
from sqa.measure.machine import git_revision, machine, versions
from sqa.measure.timing import Budget, Timing, failure, take_turns

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

VARIANTS = ("gqa", "sqa", "ssqa", "xsqa", "wide-gqa")
"""What is measured unless told otherwise: the equal-cost baseline always takes part."""

Row = dict[str, Any]
"""One contestant in one setting: what it was, `seconds` {p20, median, p80} or a `note` why not, and ratios."""


def heads(config: AttentionConfig) -> Row:
    """The head counts of a row."""
    return {
        "num_query_heads": config.num_query_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
    }


def timed(timing: Timing) -> Row:
    """The measurement of a row."""
    return {"seconds": timing.to_dict(), "rounds": timing.rounds}


def time_rows(
    entries: Iterable[tuple[Row, Callable[[], object] | None]],
    *,
    rounds: int,
    warmup: int,
    device: torch.device,
    budget: Budget,
) -> list[Row]:
    """Each row with the time of what it describes, all taking turns, or with a note why that cannot run.

    A row with nothing to run has its note already.
    """
    rows: list[Row] = []
    contestants = {}
    for row, run in entries:
        if run is not None and (problem := failure(run, device)) is not None:
            row = row | {"note": f"cannot run: {problem}"}
        elif run is not None:
            contestants[len(rows)] = run
        rows.append(row)
    for index, timing in take_turns(contestants, rounds=rounds, warmup=warmup, device=device, budget=budget).items():
        rows[index] |= timed(timing)
    return rows


def add_ratios(rows: Iterable[Row], *, same: tuple[str, ...], baseline: str) -> None:
    """Set `ratio` to the time of the `baseline` variant over the row's own, among rows that agree in `same`."""
    rows = [row for row in rows if "seconds" in row]

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(field) for field in same)

    times = {key(row): row["seconds"]["median"] for row in rows if row["variant"] == baseline}
    for row in rows:
        if key(row) in times:
            row["ratio"], row["baseline"] = times[key(row)] / row["seconds"]["median"], baseline


def choose_baseline(variants: Collection[str]) -> str:
    """What ratios are taken against: gqa where it takes part, else the first variant."""
    return "gqa" if "gqa" in variants else next(iter(variants))


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Rows of one or more benchmarks and the header they share. rich prints it; see write_json and plot."""

    header: dict[str, Any]
    rows: list[Row]

    @classmethod
    def of(cls, rows: list[Row], *, device: str, settings: dict[str, Any], notes: Iterable[str] = ()) -> BenchResult:
        """Rows measured just now, on this machine."""
        header = {
            "kind": "header",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device,
            "machine": machine(device),
            "versions": versions(),
            "git": git_revision(),
            "settings": settings,
            "notes": list(notes),
        }
        return cls(header=header, rows=rows)

    def write_json(self, path: Path) -> None:
        """JSON lines: the header, then one object a row."""
        lines = (json.dumps(value, ensure_ascii=False, allow_nan=False) for value in (self.header, *self.rows))
        write_text(path, "\n".join(lines) + "\n")

    @classmethod
    def read(cls, path: Path) -> BenchResult:
        """What `write_json` wrote. Raises ValueError when that is not what the file holds."""
        try:
            header, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
            if header["kind"] != "header":
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise InputError(f"benchmark: {path.name} is no file written by sqa bench --json") from None
        return cls(header=header, rows=rows)

    @property
    def kinds(self) -> list[str]:
        """The benchmarks in the rows, in their order."""
        return list(dict.fromkeys(row["kind"] for row in self.rows))

    def tables(self) -> Iterator[Group]:
        """One table for each benchmark, width, dtype and pass."""
        parts: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            key = (row["kind"], *(row.get(field) for field in ("d_model", "dtype", "what")))
            parts.setdefault(key, []).append(row)
        for (kind, *_), rows in parts.items():
            yield _wide_table(rows) if kind == "prefill" else _table(rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        described = self.header["machine"]
        where = described.get("gpu") or f"{described['processor']}, {described['threads']} threads"
        yield f"[dim]{where}, torch {self.header['versions']['torch']}, git {str(self.header['git'])[:10]}[/dim]"
        yield from self.tables()
        for note in self.header["notes"]:
            yield f"[dim]{note}[/dim]"

    def plot(self, path: Path) -> None:
        """One chart under another: .svg, .png, .html or .json. Raises ImportError without the extra `report`."""
        if path.suffix not in (".svg", ".png", ".html", ".json"):
            raise InputError(f"plot: {path.name!r} must end in .svg, .png, .html or .json")
        chart = self.chart()
        with replacing(path) as temporary:
            chart.save(str(temporary), format=path.suffix[1:])

    def chart(self) -> Any:
        """The altair chart: time and ratio over N with their limits dashed, or bars where there is one N."""
        try:
            import altair as alt
        except ImportError:
            raise MissingExtraError("plots need altair", "report") from None
        charts = []
        for kind in self.kinds:
            rows = [row for row in self.rows if row["kind"] == kind and "seconds" in row]
            if not rows:
                continue
            over_n = len({row.get("n") for row in rows}) > 1
            data = alt.Data(values=[_record(row, rows, over_n=over_n) for row in rows])
            colour = alt.Color("series:N", title=None, sort=None)
            if not over_n:
                field, title = ("tokens_per_s", "tokens/s") if "tokens_per_s" in rows[0] else ("median", "seconds")
                bars = alt.Chart(data, width=260).mark_bar()
                bars = bars.encode(x=alt.X(f"{field}:Q", title=title), y=alt.Y("series:N", title=None, sort=None))
                charts.append(bars.encode(color=alt.Color("variant:N", title=None, sort=None)).facet(
                    alt.Facet("panel:N", title=kind), columns=2
                ))  # fmt: skip
                continue
            axis = alt.Axis(values=sorted({row["n"] for row in rows}), format="~s")
            for field, limit, title, scale in (
                ("median", "limit_seconds", "seconds", "log"),
                ("ratio", "limit", "times faster", "linear"),
            ):
                base = alt.Chart(data, width=260, height=220).encode(
                    x=alt.X("n:Q", title="N, tokens", axis=axis, scale=alt.Scale(type="log", nice=False)), color=colour
                )
                y = alt.Y(f"{field}:Q", title=title, scale=alt.Scale(type=scale, zero=False))
                measured = base.mark_line(point=True).encode(y=y)
                dashed = base.mark_line(strokeDash=[4, 3], opacity=0.6).encode(y=f"{limit}:Q")
                charts.append(alt.layer(measured, dashed).facet(alt.Facet("panel:N", title=kind), columns=2))
        if not charts:
            raise InputError("plot: there is no timed row to draw")
        return alt.vconcat(*charts).resolve_scale(color="independent")


def _record(row: Row, rows: list[Row], *, over_n: bool) -> Row:
    """A row as the plots want it: flat, with the name of its line or bar and of the panel it belongs to."""
    fields = ("preset", "d_model", "dtype", "mask", "what", "kernel", "batch_size", "implementation")
    varying = [field for field in fields if len({row.get(field) for row in rows}) > 1]
    name = [] if over_n else [field for field in varying if field in ("kernel", "implementation")]
    panel = [field for field in varying if field not in name]
    return {
        **{field: row[field] for field in ("n", "tokens_per_s", "ratio", "limit", "limit_seconds") if field in row},
        "median": row["seconds"]["median"],
        "variant": row["variant"],
        "series": ", ".join((row["variant"], *(str(row.get(field, "")) for field in name))),
        "panel": ", ".join(f"{_DESCRIBING[field]} {row.get(field)}" for field in panel) or row.get("dtype", ""),
    }


def _digits(value: float) -> str:
    """Three of them, trailing zeros too."""
    return f"{value:#.3g}".rstrip(".")


def seconds_text(value: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if value * factor >= 1:
            return f"{_digits(value * factor)} {unit}"
    return f"{_digits(value * 1e6)} µs"


def _time(row: Row) -> str:
    """Median with how far p20 and p80 are from it, or the first words of the note; `_footnotes` has the rest."""
    if "seconds" not in row:
        return f"[dim]{row['note'].split(':')[0]}[/dim]"
    seconds = row["seconds"]
    spread = max(seconds["p80"] - seconds["median"], seconds["median"] - seconds["p20"]) / seconds["median"]
    return f"{seconds_text(seconds['median'])} ±{spread:.0%}"


def _footnotes(rows: list[Row]) -> str:
    """Why rows have no time, each reason once, with whom it concerns."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if "note" in row:
            who = row.get("implementation", row["kernel"])
            reasons.setdefault(row["note"], []).append(f"{who} {row['variant']}")
    lines = [f"{', '.join(dict.fromkeys(who))}: {escape(reason)}" for reason, who in reasons.items()]
    return "\n".join(lines)


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _times(value: float) -> str:
    return f"{value:.2f}x"


def _percent(value: float) -> str:
    return f"{value:.0%}"


_DESCRIBING = {
    "preset": "preset", "d_model": "d_model", "implementation": "by", "variant": "variant", "heads": "heads",
    "batch_size": "batch", "n": "N", "dtype": "dtype", "mask": "mask", "window": "window", "kernel": "kernel",
    "what": "what", "setting": "run", "checked": "same",
}  # fmt: skip

_MEASURED: dict[str, tuple[str, Callable[[Any], str]]] = {
    "tokens_per_s": ("tokens/s", lambda value: f"{value:,.0f}"),
    "flops_per_s": ("GFLOP/s", lambda value: f"{value / 1e9:,.0f}"),
    "share_of_peak": ("peak", _percent),
    "ratio": ("vs {baseline}", _times),
    "share_of_limit": ("limit", _percent),
    "ratio_to_full": ("vs full", _times),
    "ratio_to_peer": ("vs peer", _times),
    "cache_bytes": ("cache MiB", lambda value: f"{value / 2**20:,.1f}"),
    "peak_bytes": ("peak MiB", lambda value: f"{value / 2**20:,.0f}"),
    "memory_to_peer": ("vs peer", _times),
}


def _with_heads(row: Row) -> Row:
    return {**row, "heads": f"{row['num_query_heads']}/{row['num_kv_heads']}x{row['head_dim']}"}


def _titled(table: Table, rows: list[Row], facts: list[str]) -> Group:
    """A table under what holds for all of it and above what is missing from it; those may be wider than it is."""
    title, footnotes = f"[bold]{rows[0]['kind']}[/bold]: [dim]{', '.join(facts)}[/dim]", _footnotes(rows)
    return Group(title, table, footnotes) if footnotes else Group(title, table)


def _table_of(*columns: Column | str) -> Table:
    return Table(*columns, box=None, pad_edge=False, padding=(0, 1, 0, 0))


def _table(rows: list[Row]) -> Group:
    """A line for each row. What is the same in all of them goes into the title."""
    if rows[0]["kind"] in ("attention", "decode"):
        rows = [_with_heads(row) for row in rows]
    shown = [field for field in _DESCRIBING if any(row.get(field) is not None for row in rows)]
    values = {field: {_number(row[field]) for row in rows if row.get(field) is not None} for field in shown}
    constant = [field for field in shown if field != "variant" and len(values[field]) == 1]
    facts = [f"{_DESCRIBING[field]} {next(iter(values[field]))}" for field in constant]
    varying = [field for field in shown if field not in constant]
    has_times = any("seconds" in row or "note" in row for row in rows)
    measured = [field for field in _MEASURED if any(field in row for row in rows)]
    baseline = next((row["baseline"] for row in rows if "baseline" in row), "")
    table = _table_of(
        *(Column(_DESCRIBING[f], justify="right" if f in ("n", "batch_size", "window") else "left") for f in varying),
        *([Column("time", justify="right", no_wrap=True)] if has_times else []),
        *(Column(_MEASURED[f][0].format(baseline=baseline), justify="right") for f in measured),
    )
    for row in rows:
        cells = [_number(row[field]) if row.get(field) is not None else "" for field in varying]
        cells += [_time(row)] if has_times else []
        cells += [_MEASURED[field][1](row[field]) if field in row else "" for field in measured]
        table.add_row(*cells)
    return _titled(table, rows, facts)


def _wide_table(rows: list[Row]) -> Group:
    """Prefill as the preprint has it: variants are columns; a block of lines for each N and implementation."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    first = rows[0]
    facts = [f"preset {first['preset']}", f"dtype {first['dtype']}", "one sequence, last logits only"]
    table = _table_of(Column("N", justify="right"), "", *(Column(name, justify="right") for name in names))
    lines: dict[str, Callable[[Row], str]] = {
        "seconds": lambda row: seconds_text(row["seconds"]["median"]) if "seconds" in row else _time(row),
        "ratio": lambda row: _times(row["ratio"]) if "ratio" in row else "",
        "FLOPs": lambda row: _times(row["limit"]) if "limit" in row else "",
        "preprint": lambda row: _times(row["preprint_ratio"]) if "preprint_ratio" in row else "",
        "run": lambda row: row["setting"] if row["implementation"] != "sqa" and "seconds" in row else "",
    }
    blocks: dict[tuple[int, str], dict[str, Row]] = {}
    for row in rows:
        blocks.setdefault((row["n"], row["implementation"]), {})[row["variant"]] = row
    shown = 0
    for (n, implementation), block in blocks.items():
        for label, cell in lines.items():
            cells = [cell(block[name]) if name in block else "" for name in names]
            if any(cells):
                name = label if implementation == "sqa" or label != "seconds" else implementation
                table.add_row("" if n == shown else f"{n:,}", name, *cells)
                shown = n
    return _titled(table, rows, facts)
