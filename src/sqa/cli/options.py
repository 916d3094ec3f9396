"""Options and helpers that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqa.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console


def is_main() -> bool:
    """Whether this process prints and writes: the first of those that torchrun or `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def make_console() -> Console:
    """Standard output, of the first process alone."""
    from rich.console import Console

    return Console(quiet=not is_main())


def save_json(path: Path | None, value: Any) -> None:
    """What --json asks for, if it is given."""
    if path is not None:
        from sqa.files import write_json

        write_json(path, value)


def _file_path(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """Refuses what could not be written to, before figures are measured that would be lost."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        what = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise InputError(f"{param.opts[0]} {path} {what}; name a file")
    return path


JsonPath = Annotated[Path | None, typer.Option("--json", help="Write the figures here.", callback=_file_path)]
PlotPath = Annotated[
    Path | None, typer.Option("--plot", help="Write a plot here: .svg, .png or .html.", callback=_file_path)
]


def long_dtype(name: str) -> str:
    """PyTorch's name of a dtype, for its short one too."""
    return {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(name, name)


def names(text: str | None) -> tuple[str, ...]:
    """What stands between the commas."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def numbers(text: str, option: str) -> tuple[int, ...]:
    """The whole numbers between the commas; `option` is named when they are none."""
    try:
        return tuple(int(name) for name in names(text))
    except ValueError:
        raise InputError(f"{option} must be whole numbers with commas between, got {text!r}") from None


def seconds(text: str | None) -> float | None:
    """Of `90s`, `8m` or `1h`."""
    if text is None:
        return None
    from sqa.experiments.plan import Budget

    return Budget.parse(f"time={text}").amount
