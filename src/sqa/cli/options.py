"""Options that several commands share, and the text that they take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from sqa.charts import check_plot_path, load_altair
from sqa.errors import InputError
from sqa.experiments.plan import Budget
from sqa.files import write_json
from sqa.variants import PRESETS, VARIANTS

T = TypeVar("T")
"""The type of an option's value: some commands give None as the default, for what a plan has."""


class FileCommand(TyperCommand):
    """A command that refuses an output file that is its input or another output."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises InputError, before any work, for an output file that another option or argument names too."""
        rest = super().parse_args(ctx, args)
        for param in self.params:
            file = ctx.params[param.name] if param.name in ("json_path", "plot_path", "items_file") else None
            others = (value for name, value in ctx.params.items() if name != param.name)
            given = (each for value in others for each in (value if isinstance(value, list | tuple) else [value]))
            if file and file in (Path(os.path.realpath(each)) for each in given if isinstance(each, str | Path)):
                raise InputError(f"{param.opts[0]} {file} is named by another option too; name another file")
        return rest


def _file_path(ctx: typer.Context, param: typer.CallbackParam, path: Path | None) -> Path | None:
    """The path, with links followed. Raises InputError, before any work, if no file could be written there."""
    if path is None:
        return None
    file = Path(os.path.realpath(path))
    problems = {
        "is a folder": file.is_dir(),
        "is no regular file": (file.exists() or file.is_symlink()) and not file.is_file(),
        "is in a folder that does not exist": not file.parent.is_dir(),
        "is in a folder that you may not write to": not os.access(file.parent, os.W_OK),
    }
    if found := [problem for problem, there in problems.items() if there]:
        raise InputError(f"{param.opts[0]} {path} {found[0]}; name a file")
    return file


def _plot_path(ctx: typer.Context, param: typer.CallbackParam, path: Path | None) -> Path | None:
    """As `_file_path`; also checks that plots can be drawn."""
    if path is not None:
        check_plot_path(path)
        load_altair()
    return _file_path(ctx, param, path)


def _complete_variants(incomplete: str) -> Iterator[str]:
    """The names that begin with the text after the last comma."""
    before, comma, last = incomplete.rpartition(",")
    return (before + comma + name for name in VARIANTS if name.startswith(last))


def _complete_preset(incomplete: str) -> Iterator[str]:
    return (name for name in PRESETS if name.startswith(incomplete))


# the model
Preset = Annotated[T, typer.Option(help=f"Model shape: {', '.join(PRESETS)}.", autocompletion=_complete_preset)]
Variants = Annotated[str | None, typer.Option(help="Variants, separated by commas.", autocompletion=_complete_variants)]
VariantName = Annotated[
    T, typer.Option(help="A variant; sqa variants --all lists them.", autocompletion=_complete_variants)
]
DModel = Annotated[int, typer.Option(help="Width of the model (d_model).")]
NumHeads = Annotated[int, typer.Option(help="Nominal number of heads, of which a variant takes its share.")]

# the work
Length = Annotated[int, typer.Option("--n", "--length", help="Tokens in a sequence.")]
Lengths = Annotated[str, typer.Option("--n", help="Tokens in a sequence; several, separated by commas.")]
BatchSize = Annotated[T, typer.Option(help="Sequences in a step.")]
Seed = Annotated[T, typer.Option(help="Seed of all random choices.", min=0, max=2**63 - 1)]

# the machine
Device = Annotated[T, typer.Option(help="cpu or cuda; compare and train also take auto.")]
Threads = Annotated[T, typer.Option(help="CPU threads; 0 leaves the number to PyTorch.", min=0, max=1024)]
Dtype = Annotated[T, typer.Option(help="float32 or bfloat16; training in bfloat16 uses autocast.")]
Compile = Annotated[T, typer.Option("--compile/--no-compile", help="Compile the model's blocks with torch.compile.")]

# what is written
JsonPath = Annotated[
    Path | None, typer.Option("--json", help="Write the figures to this file, as JSON.", callback=_file_path)
]
ItemsPath = Annotated[
    Path | None,
    typer.Option(
        "--items-file", help="Write the questions here, as JSON Lines for lm-evaluation-harness.", callback=_file_path
    ),
]
PlotPath = Annotated[
    Path | None, typer.Option("--plot", help="Write a plot to this file: .svg, .png or .html.", callback=_plot_path)
]


def save_json(path: Path | None, value: Any) -> None:
    """Write the file of --json, if it is given."""
    if path is not None:
        write_json(path, value)


def names(text: str | None) -> tuple[str, ...]:
    """The names between the commas."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def numbers(text: str, option: str) -> tuple[int, ...]:
    """The whole numbers between the commas, one or more, each at least 1; `option` is named when they are not."""
    try:
        found = tuple(int(name) for name in names(text))
    except ValueError:
        raise InputError(f"{option} must be whole numbers separated by commas, got {text!r}") from None
    if min(found, default=0) < 1:
        raise InputError(f"{option} must be numbers of at least 1, got {text!r}")
    return found


def find_run(source: str) -> Path | str:
    """`source`, or the only run in it if it is the directory of a comparison."""
    path = Path(source)
    if not path.is_dir() or (path / "config.json").is_file():
        return source
    inside = sorted(item.parent for item in path.glob("*/model.safetensors"))
    if len(inside) == 1:
        return inside[0]
    if inside:
        raise InputError(f"run: {path} holds several runs; give one of {', '.join(map(str, inside))}")
    raise InputError(f"run: {path} holds no finished run and no model (no config.json)")


def seconds(text: str | None) -> float | None:
    """The seconds of `90s`, `8m` or `1h`; None without a text."""
    return None if text is None else Budget.parse(f"time={text}").amount
