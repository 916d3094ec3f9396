"""`sqa convert`: a pretrained model with fewer query heads."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from sqa.cli.display import make_console, make_display
from sqa.cli.options import (
    BatchSize,
    Compile,
    Device,
    Dtype,
    JsonPath,
    Length,
    PlotPath,
    Seed,
    Threads,
    find_run,
    numbers,
    save_json,
)
from sqa.dtypes import long_dtype
from sqa.errors import InputError

app = typer.Typer()


@app.command()
def convert(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="The model: a directory, a .gguf file, a run, or a name on the Hub.")],
    out: Annotated[Path, typer.Argument(help="A directory that does not exist yet; it gets MODEL's format.")],
    query_heads: Annotated[int, typer.Option(help="Query heads to keep in each layer.")],
    calibration: Annotated[str, typer.Option(help="Text to convert with: builtin, wikipedia, or a file or folder.")],
    evaluate: Annotated[str, typer.Option(help="A second text to measure on, as --calibration; or none.")] = "builtin",
    kv_heads: Annotated[
        int | None,
        typer.Option(
            help="KV heads to keep in each layer. Default: all; in multi-head attention as many as query heads."
        ),
    ] = None,
    allocation: Annotated[
        str,
        typer.Option(
            help="uniform: as many query heads in each layer; measured: more where they matter, the same total."
        ),
    ] = "uniform",
    method: Annotated[str, typer.Option(help="How to choose heads: random, weight, l2, taylor or greedy.")] = "l2",
    pooling: Annotated[str, typer.Option(help="How to merge KV heads: aligned (rotated first) or mean.")] = "aligned",
    sequences: Annotated[int, typer.Option(help="Sequences of calibration text.")] = 128,
    length: Length = 512,
    heal: Annotated[str | None, typer.Option(help="Tokens to train on to match the original: tokens=2M.")] = None,
    layerwise: Annotated[
        float, typer.Option(help="Share of --heal, 0 to 1, that trains each layer alone first.")
    ] = 0.2,
    train: Annotated[str, typer.Option(help="Weights that healing trains: attention or all.")] = "attention",
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate of healing.")] = 3e-4,
    batch_size: BatchSize[int] = 8,
    control: Annotated[bool, typer.Option("--control", help="Also train the original on the same tokens.")] = False,
    evaluation_tokens: Annotated[int, typer.Option(help="Validation tokens to measure on, of each text.")] = 16_384,
    speed_at: Annotated[str | None, typer.Option(help="Lengths to time, separated by commas; or none.")] = None,
    dtype: Dtype[str] = "float32",
    compile: Compile[bool] = False,
    device: Device[str] = "cpu",
    seed: Seed[int] = 0,
    threads: Threads[int] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    json_path: JsonPath = None,
    plot_path: PlotPath = None,
) -> None:
    """Give a pretrained model fewer query heads, and measure what that costs."""
    from sqa.conversion import report
    from sqa.conversion.run import run
    from sqa.conversion.settings import Settings, prepare
    from sqa.experiments.plan import Budget
    from sqa.progress import stop_flag

    if heal is not None and not heal.startswith("tokens="):
        raise InputError(f"--heal must be tokens=NUMBER, as in tokens=2M, got {heal!r}")
    given = {item.name: ctx.params[item.name] for item in fields(Settings) if item.name in ctx.params}
    lengths: tuple[int, ...] | None = None  # as the kind of model has them
    if speed_at is not None:
        lengths = () if speed_at == "none" else numbers(speed_at, "--speed-at")
    settings = Settings(
        **given
        | {
            "heal_tokens": 0 if heal is None else round(Budget.parse(heal).amount),
            "speed_at": lengths,
            "dtype": long_dtype(dtype),
        }
    )
    second = None if evaluate == "none" else evaluate
    job = prepare(find_run(model), out, settings, calibration=calibration, evaluate=second)
    console = make_console()
    console.print(report.planned(job))
    if dry_run:
        return
    with make_display() as display, stop_flag() as stop:
        conversion = run(job, display, stop)
    console.print(report.quality_table(conversion), report.samples(conversion), report.speed_table(conversion))
    console.print(f"serve it: {conversion.serve}", soft_wrap=True)
    save_json(json_path, conversion)
    if plot_path is not None:
        report.plot(conversion, plot_path)
