"""The look of tables in a terminal of 80 columns."""

from collections.abc import Collection

from rich.table import Table


def make_table(*headings: str, title: str | None = None, names: Collection[str] = ("variant",), gap: int = 1) -> Table:
    """An empty table, columns `gap` spaces apart. Those headed by one of `names` are set left, the others right."""
    built = Table(title=title, title_justify="left", box=None, padding=(0, gap, 0, 0), header_style="bold")
    for heading in headings:
        built.add_column(heading, justify="left" if heading in names else "right")
    return built


def known(form: str, value: float | None, absent: str = "") -> str:
    """`form.format(value)`, or `absent` where the value is None."""
    return absent if value is None else form.format(value)
