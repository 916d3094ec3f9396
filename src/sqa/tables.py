"""Tables for a terminal of 80 columns, in one look."""

from __future__ import annotations

from rich.table import Table


def make_table(*headings: str, title: str | None = None, names: int = 1, gap: int = 1) -> Table:
    """An empty table: the first `names` columns are set left, the figures after them right, `gap` spaces apart."""
    built = Table(title=title, title_justify="left", box=None, padding=(0, gap, 0, 0), header_style="bold")
    for i, heading in enumerate(headings):
        built.add_column(heading, justify="left" if i < names else "right", no_wrap=i == 0)
    return built
