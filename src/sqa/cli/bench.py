"""`sqa bench`: what is measured side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sqa.cli.display import make_console
from sqa.cli.options import JsonPath, PlotPath, names, numbers, seconds

app = typer.Typer(help="Measure side by side, in turns; correctness before speed.", no_args_is_help=True)

Variants = Annotated[str | None, typer.Option(help="Names, or heads such as 8/4x32, with commas between.")]
Dtypes = Annotated[str, typer.Option(help="bf16, fp32, fp16, with commas between.")]
Peers = Annotated[str, typer.Option(help="hf-llama, x-transformers, with commas between.")]
Rounds = Annotated[int, typer.Option(help="Turns that each contestant takes.")]
Seconds = Annotated[str | None, typer.Option("--budget", help="Stop early: 90s, 8m.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]


def _show(result: Any, json_path: Path | None, plot_path: Path | None) -> None:
    make_console().print(result)
    if json_path is not None:
        result.write_json(json_path)
    if plot_path is not None:
        result.plot(plot_path)


@app.command(name="attention")
def bench_attention(
    variants: Variants = None,
    n: Annotated[str, typer.Option("--n", help="Sequence lengths, with commas between.")] = "1024,4096",
    mask: Annotated[str, typer.Option(help="causal, none, window or documents.")] = "causal",
    window: Annotated[int, typer.Option(help="For --mask window, which times a layer with and without it.")] = 512,
    kernels: Annotated[str, typer.Option(help="auto, or names from sqa kernels.")] = "auto",
    d_model: Annotated[int, typer.Option(help="Model width.")] = 256,
    num_heads: Annotated[int, typer.Option(help="Nominal heads.")] = 16,
    batch_size: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    dtypes: Dtypes = "bf16",
    rounds: Rounds = 10,
    device: Device = "cpu",
    budget: Seconds = None,
    json_path: JsonPath = None,
    plot_path: PlotPath = None,
) -> None:
    """The operation alone, forward and backward."""
    from sqa.bench.attention import run_attention
    from sqa.bench.report import VARIANTS

    result = run_attention(
        variants=names(variants) or VARIANTS,
        lengths=numbers(n, "--n"),
        d_model=d_model,
        num_heads=num_heads,
        batch_size=batch_size,
        dtypes=names(dtypes),
        mask=mask,
        window=window,
        kernels=names(kernels),
        rounds=rounds,
        device=device,
        budget=seconds(budget),
    )
    _show(result, json_path, plot_path)


@app.command(name="step")
def bench_step(
    preset: Annotated[str, typer.Option(help="Model shape: published or larger.")] = "published",
    variants: Variants = None,
    peers: Peers = "",
    dtypes: Dtypes = "bf16,fp32",
    batch_size: Annotated[int, typer.Option(help="Sequences a step.")] = 4,
    length: Annotated[int, typer.Option("--length", "--n", help="Tokens a sequence.")] = 1024,
    compile: Annotated[bool, typer.Option("--compile/--no-compile")] = True,
    memory: Annotated[bool, typer.Option("--memory", help="Peak memory too, each in its own process.")] = False,
    rounds: Rounds = 10,
    device: Device = "cpu",
    budget: Seconds = None,
    json_path: JsonPath = None,
    plot_path: PlotPath = None,
) -> None:
    """Whole training steps: forward, loss, backward, optimiser."""
    from sqa.bench.report import VARIANTS
    from sqa.bench.step import run_step

    result = run_step(
        preset=preset,
        variants=names(variants) or VARIANTS,
        peers=names(peers),
        dtypes=names(dtypes),
        batch_size=batch_size,
        length=length,
        compile=compile,
        memory=memory,
        rounds=rounds,
        device=device,
        budget=seconds(budget),
    )
    _show(result, json_path, plot_path)


@app.command(name="prefill")
def bench_prefill(
    preset: Annotated[str, typer.Option(help="Model shape: published or larger.")] = "published",
    variants: Variants = None,
    peers: Peers = "",
    max_n: Annotated[int, typer.Option(help="Longest sequence; lengths double from 1,024.")] = 16_384,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    compile: Annotated[bool, typer.Option("--compile/--no-compile")] = True,
    rounds: Rounds = 5,
    device: Device = "cpu",
    budget: Seconds = None,
    json_path: JsonPath = None,
    plot_path: PlotPath = None,
) -> None:
    """One forward pass over a prompt, beside the preprint's ratios."""
    from sqa.bench.prefill import run_prefill
    from sqa.bench.report import VARIANTS

    result = run_prefill(
        preset=preset,
        variants=names(variants) or VARIANTS,
        peers=names(peers),
        max_n=max_n,
        dtype=dtype,
        compile=compile,
        rounds=rounds,
        device=device,
        budget=seconds(budget),
    )
    _show(result, json_path, plot_path)


@app.command(name="decode")
def bench_decode(
    preset: Annotated[str, typer.Option(help="Model shape: published or larger.")] = "published",
    variants: Variants = None,
    n: Annotated[str, typer.Option("--n", help="Tokens in the cache, with commas between.")] = "1024,8192,32768",
    batch_size: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    rounds: Rounds = 5,
    device: Device = "cpu",
    budget: Seconds = None,
    json_path: JsonPath = None,
    plot_path: PlotPath = None,
) -> None:
    """New tokens on a filled cache, where SQA wins little."""
    from sqa.bench.decode import VARIANTS, run_decode

    result = run_decode(
        preset=preset,
        variants=names(variants) or VARIANTS,
        lengths=numbers(n, "--n"),
        batch_size=batch_size,
        dtype=dtype,
        rounds=rounds,
        device=device,
        budget=seconds(budget),
    )
    _show(result, json_path, plot_path)


@app.command(name="all")
def bench_all(
    device: Device = "cuda",
    budget: Annotated[str, typer.Option(help="All of it: 480s, 8m.")] = "8m",
    size: Annotated[str, typer.Option(help="full, or tiny to try the command.")] = "full",
    json_path: JsonPath = None,
    plot_path: PlotPath = None,
) -> None:
    """Everything worth knowing of one GPU: kernels, steps, prefill, decoding, and GQA against SQA trained."""
    from sqa.bench.gpu import run_all

    def trained(seconds: float) -> list[dict[str, Any]]:
        """GQA and SQA on the built-in text, each for a third of the time; the rest is for timing and evaluation."""
        import tempfile

        from sqa.cli.display import make_display
        from sqa.experiments.compare import compare
        from sqa.experiments.plan import Plan

        plan = Plan.read("demo").replace(
            variants=("gqa", "sqa"), budget=f"time={max(1, round(seconds / 3))}s", device=device, dtype="bfloat16"
        )
        with tempfile.TemporaryDirectory() as folder:
            results = compare(plan, Path(folder) / "compare", make_display()).results
        return [
            {
                "kind": "compare",
                "variant": result.variant,
                "kernel": result.kernel,
                "dtype": plan.dtype,
                "loss": result.val.loss,
                "steps": result.steps,
                "tokens": result.tokens,
                "seconds": result.step_s and result.step_s.to_dict(),
            }
            for result in results
        ]

    _show(run_all(device=device, budget=seconds(budget) or 0.0, size=size, compare=trained), json_path, plot_path)
