"""Plots of altair, which is in the extra `report`, written to files."""

from pathlib import Path
from typing import Any

from sqa.errors import InputError, MissingExtraError
from sqa.files import replacing

_SUFFIXES = (".svg", ".png", ".html", ".json")


def check_plot_path(path: Path) -> None:
    """Raise InputError for a name that says no format."""
    if path.suffix not in _SUFFIXES:
        raise InputError(f"plot: {path.name!r} must end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}")


def load_altair() -> Any:
    """The library. Raises MissingExtraError without it."""
    try:
        import altair
    except ImportError:
        raise MissingExtraError("plots need altair", "report") from None
    return altair


def save_chart(chart: Any, path: Path) -> None:
    """Write a chart, whole or not at all. Raises InputError as `check_plot_path` does."""
    check_plot_path(path)
    with replacing(path) as temporary:
        chart.save(str(temporary), format=path.suffix[1:])
