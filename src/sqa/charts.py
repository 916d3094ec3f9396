"""altair, which the extra `report` installs, and its charts as files."""

from pathlib import Path
from typing import Any

from sqa.errors import InputError, load_extra
from sqa.files import replacing

_SUFFIXES = (".svg", ".png", ".html", ".json")


def check_plot_path(path: Path) -> None:
    """Raise InputError unless the suffix names a format of plots."""
    if path.suffix not in _SUFFIXES:
        raise InputError(f"plot: {path.name!r} must end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}")


def load_altair() -> Any:
    """The module. Raises MissingExtraError where it is missing."""
    return load_extra("altair", "plots need altair", "report")


def save_chart(chart: Any, path: Path) -> None:
    """Write a chart, whole or not at all. Raises InputError as `check_plot_path` does."""
    check_plot_path(path)
    with replacing(path) as temporary:
        chart.save(str(temporary), format=path.suffix[1:])
