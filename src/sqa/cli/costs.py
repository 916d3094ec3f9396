"""`sqa variants`, `sqa plan`, `sqa scale` and `sqa kernels`: what a shape costs, and which kernel it gets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sqa.cli import options
from sqa.cli.display import make_console
from sqa.dtypes import find_dtype, long_dtype
from sqa.errors import InputError
from sqa.records import at_least_one
from sqa.tables import make_table
from sqa.variants import MEASURED_VARIANTS, PUBLISHED_VARIANTS, VARIANTS
from sqa.variants import variant as variant_config

app = typer.Typer()


@app.command()
def variants(
    preset: options.Preset[str] = "published",
    n: options.Length = 1024,
    all_variants: Annotated[
        bool, typer.Option("--all", help="Show all variants, not only the seven published ones.")
    ] = False,
    json_path: options.JsonPath = None,
) -> None:
    """Show parameters, FLOPs and KV-cache bytes of every variant."""
    from sqa.cost import variant_costs

    shown = VARIANTS if all_variants else PUBLISHED_VARIANTS
    at_least_one("variants", n=n)
    rows, left_out = variant_costs(preset, n, shown)
    headings = ("variant", "Hq", "Hkv", "head\ndim", "parameters", "train\nGFLOP", "prefill\nGFLOP",
                "KV bytes\na token", "attention\nsaving")  # fmt: skip
    table = make_table(*headings, title=f"{preset}: one sequence of {n:,} tokens, KV cache in 16 bit")
    for row in rows:
        table.add_row(
            row.label,
            str(row.num_query_heads),
            str(row.num_kv_heads),
            str(row.head_dim),
            f"{row.parameters:,}",
            f"{row.train_step_flops / 1e9:,.1f}",
            f"{row.prefill_flops / 1e9:,.1f}",
            f"{row.kv_cache_bytes_per_token:,}",
            f"{row.attention_saving:.2f}x",
        )
    console = make_console()
    console.print(table)
    for text in left_out:
        console.print(f"left out: {text}", soft_wrap=True)
    options.save_json(json_path, rows)


@app.command(name="plan")
def plan_spending(
    like: Annotated[str, typer.Option(help="The variant whose cost is the budget.")] = "gqa",
    preset: options.Preset[str] = "published",
    budget: Annotated[
        str, typer.Option(help="What stays equal: equal-flops, equal-parameters or equal-time (measured).")
    ] = "equal-flops",
    variants: options.Variants = None,
    n: options.Length = 1024,
    batch_size: options.BatchSize[int] = 8,
    device: options.Device[str] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder for plans that sqa compare runs, one for each way.")] = None,
) -> None:
    """Find shapes that spend what fewer query heads save: wider, deeper, or with longer context."""
    from sqa.planning import spend

    chosen = options.names(variants) or MEASURED_VARIANTS
    proposals = spend.propose(like, preset, budget, chosen, n, batch_size, device=device)
    make_console().print(spend.table(proposals))
    for path in spend.write_plans(proposals, out) if out else []:
        print(path)


@app.command()
def scale(
    preset: options.Preset[str] = "8b",
    gpus: Annotated[str, typer.Option(help="Numbers of H100s, separated by commas.")] = "8,512",
    n: options.Lengths = "4096,32768,131072",
    variants: options.Variants = None,
    json_path: options.JsonPath = None,
) -> None:
    """Estimate the training of a large model on many GPUs: FLOPs, memory, links and time."""
    from sqa.planning import scale as paper

    chosen, lengths = options.names(variants) or paper.SCALE_VARIANTS, options.numbers(n, "--n")
    estimates = [
        [paper.estimate(preset, name, length, count) for length in lengths for name in chosen]
        for count in options.numbers(gpus, "--gpus")
    ]
    console = make_console()
    for same in estimates:
        console.print(paper.steps_table(preset, same))
    console.print(paper.lengths_table(preset, chosen))
    console.print(paper.ASSUMPTIONS, style="dim")
    options.save_json(json_path, [e for same in estimates for e in same])


@app.command()
def kernels(
    variant: options.VariantName[str] = "sqa",
    d_model: options.DModel = 256,
    num_heads: options.NumHeads = 16,
    n: options.Length = 1024,
    dtype: options.Dtype[str] = "float32",
    device: options.Device[str] = "cpu",
    window: Annotated[int | None, typer.Option(help="Tokens of a sliding window.")] = None,
    documents: Annotated[bool, typer.Option("--documents", help="Several documents in a row.")] = False,
    padding: Annotated[bool, typer.Option("--padding", help="With a padding mask.")] = False,
    causal: Annotated[bool, typer.Option("--causal/--bidirectional", help="Whether later tokens are hidden.")] = True,
    training: Annotated[bool, typer.Option("--training/--inference", help="Whether gradients are needed.")] = True,
    check: Annotated[bool, typer.Option("--check", help="Run every kernel, and compare with the table.")] = False,
) -> None:
    """Show the attention kernels, and which one a shape gets and why."""
    config = variant_config(variant, d_model=d_model, num_heads=num_heads, causal=causal, window=window)
    dtype, torch_dtype = long_dtype(dtype), find_dtype(dtype)
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu or cuda, got {device!r}")
    at_least_one("kernels", n=n)
    if check:
        _check_kernels(device)
        return
    import torch

    from sqa.attention.call import Call
    from sqa.attention.kernels import KERNELS, explain, resolve

    call = Call.of_layer(
        config,
        length=n,
        device=device,
        dtype=torch_dtype,
        documents=documents,
        padding=padding,
        grad=training,
    )
    headings = ("kernel", "devices", "masks", "backward", "this shape")
    table = make_table(*headings, names=headings, gap=2)
    for name, verdict in explain(call):
        row = KERNELS[name]
        table.add_row(name, row.devices, row.masks, row.backward, verdict)
    console = make_console()
    console.print(table)
    choice = resolve(call)
    heads = f"{config.num_query_heads} query and {config.num_kv_heads} KV heads of {config.head_dim}"
    console.print(f"{heads}, {n:,} tokens, {dtype} on {device}: {choice.kernel} ({choice.reason})")
    if device == "cuda" and not torch.cuda.is_available():
        console.print("There is no CUDA device here: this is what the rules say, nothing was tried.")


def _check_kernels(device: str) -> None:
    import torch

    from sqa.attention.check import check_kernels

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--check runs the kernels, and there is no CUDA device here")
    rows = check_kernels(device)
    headings = ("kernel", "mask", "dtype", "the table says", "forward", "backward", "")
    table = make_table(*headings, names=headings, gap=2)
    for row in rows:
        ran = row.error or row.forward, row.backward or "none"
        table.add_row(row.kernel, row.mask, row.dtype, " or ".join(row.expected), *ran, "" if row.ok else "WRONG")
    console = make_console()
    console.print(table)
    wrong = sum(not row.ok for row in rows)
    console.print(f"{len(rows) - wrong} of {len(rows)} as the table says, on {device}")
    if wrong:
        raise typer.Exit(1)
