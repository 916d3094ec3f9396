"""`sqa bench`: what is measured side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sqa.cli import options
from sqa.cli.display import make_console, make_display, speak_of
from sqa.dtypes import short_dtype
from sqa.errors import InputError
from sqa.variants import MEASURED_VARIANTS

if TYPE_CHECKING:
    from sqa.bench.lineup import Models
    from sqa.bench.report import BenchResult

app = typer.Typer(
    help="Time models and kernels side by side, after checking that they are right.", no_args_is_help=True
)

Dtypes = Annotated[str, typer.Option(help="bf16, fp32 or fp16; several, separated by commas.")]
OneDtype = Annotated[str, typer.Option(help="bf16 or fp32.")]
Peers = Annotated[str, typer.Option(help="Add hf-llama, x-transformers or (prefill) llama-cpp, separated by commas.")]
Model = Annotated[
    list[str] | None,
    typer.Option(help="Measure this model: a directory, a GGUF file or a name on the Hub. Give it again for a second."),
]
Rounds = Annotated[int, typer.Option(help="Timed rounds.")]
TimeLimit = Annotated[options.T, typer.Option("--budget", help="Stop after this time: 90s, 8m.")]


@app.callback()
def _speak(ctx: typer.Context) -> None:
    ctx.with_resource(speak_of("sqa.bench"))


def _models(
    preset: str | None, variants: str | None, model: list[str] | None, default: Sequence[str] = MEASURED_VARIANTS
) -> Models:
    """The models to measure: a preset in some variants, or given models."""
    from sqa.bench.lineup import Models

    if not model:
        return Models.of_preset(preset or "published", options.names(variants) or default)
    if preset is not None or variants is not None:
        raise InputError("--model is measured as it is; leave out --preset and --variants")
    return Models.of_sources(*model)


def _show(result: BenchResult, json_path: Path | None, plot_path: Path | None) -> None:
    make_console().print(result)
    if json_path is not None:
        result.write_json(json_path)
    if plot_path is not None:
        result.plot(plot_path)


@app.command()
def attention(
    variants: Annotated[
        str | None, typer.Option(help="Variants, or heads as in 8/4x32 (query/KV x width), separated by commas.")
    ] = None,
    n: options.Lengths = "1024,4096",
    head_dims: Annotated[str, typer.Option(help="Widths of a head, separated by commas.")] = "16",
    mask: Annotated[str, typer.Option(help="causal, none, window or documents.")] = "causal",
    window: Annotated[int, typer.Option(help="Tokens of --mask window, which is timed beside full attention.")] = 512,
    kernels: Annotated[str, typer.Option(help="auto, or names from sqa kernels, separated by commas.")] = "auto",
    num_heads: options.NumHeads = 16,
    batch_size: options.BatchSize[int] = 1,
    dtypes: Dtypes = "bf16",
    rounds: Rounds = 10,
    device: options.Device[str] = "cpu",
    budget: TimeLimit[str | None] = None,
    json_path: options.JsonPath = None,
    plot_path: options.PlotPath = None,
) -> None:
    """Time the attention operation alone, forward and backward."""
    from sqa.bench.attention import run_attention

    result = run_attention(
        variants=options.names(variants) or MEASURED_VARIANTS,
        lengths=options.numbers(n, "--n"),
        head_dims=options.numbers(head_dims, "--head-dims"),
        num_heads=num_heads,
        batch_size=batch_size,
        dtypes=[short_dtype(name) for name in options.names(dtypes)],
        mask=mask,
        window=window,
        kernels=options.names(kernels),
        rounds=rounds,
        device=device,
        budget=options.seconds(budget),
    )
    _show(result, json_path, plot_path)


@app.command()
def step(
    preset: options.Preset[str | None] = None,
    variants: options.Variants = None,
    model: Model = None,
    peers: Peers = "",
    dtypes: Dtypes = "bf16,fp32",
    batch_size: options.BatchSize[int] = 4,
    length: options.Length = 1024,
    compile: options.Compile[bool] = True,
    memory: Annotated[bool, typer.Option("--memory", help="Measure peak memory too, in separate processes.")] = False,
    rounds: Rounds = 10,
    device: options.Device[str] = "cpu",
    budget: TimeLimit[str | None] = None,
    json_path: options.JsonPath = None,
    plot_path: options.PlotPath = None,
) -> None:
    """Time whole training steps: forward, loss, backward and optimiser."""
    from sqa.bench.step import run_step

    result = run_step(
        _models(preset, variants, model),
        peers=options.names(peers),
        dtypes=[short_dtype(name) for name in options.names(dtypes)],
        batch_size=batch_size,
        length=length,
        compile=compile,
        memory=memory,
        rounds=rounds,
        device=device,
        budget=options.seconds(budget),
    )
    _show(result, json_path, plot_path)


@app.command()
def prefill(
    preset: options.Preset[str | None] = None,
    variants: options.Variants = None,
    model: Model = None,
    peers: Peers = "",
    n: options.Lengths = "1024,2048,4096,8192,16384",
    dtype: OneDtype = "bf16",
    compile: options.Compile[bool] = True,
    rounds: Rounds = 5,
    device: options.Device[str] = "cpu",
    budget: TimeLimit[str | None] = None,
    json_path: options.JsonPath = None,
    plot_path: options.PlotPath = None,
) -> None:
    """Time one forward pass over a prompt, beside the preprint's ratios."""
    from sqa.bench.prefill import run_prefill

    result = run_prefill(
        _models(preset, variants, model),
        peers=options.names(peers),
        lengths=options.numbers(n, "--n"),
        dtype=short_dtype(dtype),
        compile=compile,
        rounds=rounds,
        device=device,
        budget=options.seconds(budget),
    )
    _show(result, json_path, plot_path)


@app.command()
def decode(
    preset: options.Preset[str | None] = None,
    variants: options.Variants = None,
    model: Model = None,
    n: options.Lengths = "1024,8192,32768",
    batch_size: options.BatchSize[int] = 1,
    dtype: OneDtype = "bf16",
    rounds: Rounds = 5,
    device: options.Device[str] = "cpu",
    budget: TimeLimit[str | None] = None,
    json_path: options.JsonPath = None,
    plot_path: options.PlotPath = None,
) -> None:
    """Time new tokens after a filled cache, where SQA gains little."""
    from sqa.bench.decode import DECODED_VARIANTS, run_decode

    result = run_decode(
        _models(preset, variants, model, DECODED_VARIANTS),
        lengths=options.numbers(n, "--n"),
        batch_size=batch_size,
        dtype=short_dtype(dtype),
        rounds=rounds,
        device=device,
        budget=options.seconds(budget),
    )
    _show(result, json_path, plot_path)


@app.command(name="all")
def everything(
    device: options.Device[str] = "cuda",
    budget: TimeLimit[str] = "8m",
    size: Annotated[str, typer.Option(help="full, or tiny to try the command out.")] = "full",
    json_path: options.JsonPath = None,
    plot_path: options.PlotPath = None,
) -> None:
    """Measure one GPU in minutes: kernels, steps, prefill, decoding, and training of GQA and SQA."""
    from sqa.experiments.everything import measure_everything

    with make_display() as display:
        result = measure_everything(display, device=device, budget=options.seconds(budget) or 0.0, size=size)
    _show(result, json_path, plot_path)
