"""The command line. Bad input is one sentence on standard error and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sqa._version import __version__
from sqa.cli import models
from sqa.cli.bench import bench
from sqa.cli.options import JsonPath, is_main, long_dtype, make_console, names, numbers, save_json
from sqa.errors import InputError, MissingExtraError

app = typer.Typer(
    help="Sparse Query Attention: fewer query heads, cheaper training and prefill.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(models.app)
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of the `sqa` command."""
    try:
        app()
    except (InputError, MissingExtraError, OSError) as error:
        _fail(str(error), 2)
    except MemoryError:
        _fail("out of memory", 1)
    except RuntimeError as error:
        # torch raises RuntimeError too: only what a run reports of itself, and want of memory, is one sentence
        from torch import OutOfMemoryError

        from sqa.progress import Interrupted, NonFiniteLoss

        if isinstance(error, Interrupted | NonFiniteLoss):
            if not is_main():
                sys.exit(1)  # all processes agreed on it: said once
            _fail(str(error), 130 if isinstance(error, Interrupted) else 1)
        if isinstance(error, OutOfMemoryError) or "can't allocate memory" in str(error):
            _fail(f"out of memory ({str(error).splitlines()[0]})", 1)
        raise


def _fail(message: str, code: int) -> None:
    print(f"sqa: {message}", file=sys.stderr)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def variants(
    preset: Annotated[str, typer.Option(help="Model shape.")] = "published",
    n: Annotated[int, typer.Option("--n", help="Tokens a sequence, for the FLOPs.")] = 1024,
    all_variants: Annotated[bool, typer.Option("--all", help="Beyond the published seven too.")] = False,
    json_path: JsonPath = None,
) -> None:
    """Parameters, FLOPs and KV-cache bytes of every variant. Instant."""
    from sqa import cost
    from sqa.variants import PUBLISHED_VARIANTS, VARIANTS, shape
    from sqa.variants import preset as model_preset

    if n < 1:
        raise InputError(f"--n must be at least 1, got {n}")
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for name in VARIANTS if all_variants else PUBLISHED_VARIANTS:
        try:
            config = model_preset(preset, name)
        except InputError as error:
            shape(preset)  # an unknown preset is an error, a rule that does not fit it a note
            left_out.append(str(error))
            continue
        layer = config.layers[0]
        rows.append(
            {
                "variant": name,
                "label": VARIANTS[name].label,
                "num_query_heads": layer.num_query_heads,
                "num_kv_heads": layer.num_kv_heads,
                "head_dim": layer.head_dim,
                "parameters": cost.parameters(config),
                "n": n,
                "train_step_flops": cost.train_step_flops(config, n),
                "prefill_flops": cost.prefill_flops(config, n),
                "kv_cache_bytes_per_token": cost.kv_cache_bytes(config),
                "attention_saving": cost.attention_saving(layer, n),
            }
        )
    from rich.table import Column, Table

    figures = (
        "Hq", "Hkv", "head\ndim", "parameters", "train\nGFLOP", "prefill\nGFLOP", "KV bytes\na token",
        "attention\nsaving",
    )  # fmt: skip
    table = Table("variant", *(Column(heading, justify="right") for heading in figures), box=None, padding=(0, 2, 0, 0))
    table.title = f"{preset}: one sequence of {n:,} tokens, KV cache in 16 bit"
    for row in rows:
        table.add_row(
            str(row["label"]),
            str(row["num_query_heads"]),
            str(row["num_kv_heads"]),
            str(row["head_dim"]),
            f"{row['parameters']:,}",
            f"{row['train_step_flops'] / 1e9:,.1f}",
            f"{row['prefill_flops'] / 1e9:,.1f}",
            f"{row['kv_cache_bytes_per_token']:,}",
            f"{row['attention_saving']:.2f}x",
        )
    console = make_console()
    console.print(table)
    for text in left_out:
        console.print(f"left out: {text}", highlight=False, soft_wrap=True)
    save_json(json_path, rows)


Data = Annotated[str | None, typer.Option(help="builtin, wikipedia, or a file or folder of text.")]
Seeds = Annotated[str | None, typer.Option(help="How many (3), or which (0,7,9).")]
Dtype = Annotated[str | None, typer.Option(help="float32 or bfloat16 (autocast).")]
Track = Annotated[str | None, typer.Option(help="tensorboard: stream the curves to OUT/tensorboard.")]


def _overrides(**given: Any) -> dict[str, Any]:
    """The plan fields that the command line sets, under the plan's names."""
    changes = {name: value for name, value in given.items() if value is not None}
    if "seeds" in changes:
        changes["seeds"] = _seeds(changes["seeds"])
    if "variants" in changes:
        changes["variants"] = names(changes["variants"])
    if "dtype" in changes:
        changes["dtype"] = long_dtype(changes["dtype"])
    limits = [name for name in ("budget", "max_steps", "max_tokens") if name in changes]
    if len(limits) > 1:
        raise InputError(f"budget: give one of --budget, --max-steps and --max-tokens, got {len(limits)}")
    for name, kind in (("max_steps", "steps"), ("max_tokens", "tokens")):
        if name in changes:
            changes["budget"] = f"{kind}={changes.pop(name)}"
    if "context" in changes and changes["context"] < 2:
        raise InputError(f"--context must be at least 2, got {changes['context']}")
    return changes


def _seeds(text: str) -> tuple[int, ...]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"--seeds must be a number of seeds (3) or a list (0,7,9), got {text!r}") from None
    if "," in text:
        return tuple(numbers)
    if not numbers or numbers[0] < 1:
        raise InputError(f"--seeds must be at least 1, got {text!r}")
    return tuple(range(numbers[0]))


@app.command()
def compare(
    plan: Annotated[str | None, typer.Argument(help="A preset (demo, published) or a TOML file; default demo.")] = None,
    data: Data = None,
    variants: Annotated[str | None, typer.Option(help="Names with commas between.")] = None,
    seeds: Seeds = None,
    budget: Annotated[str | None, typer.Option(help="steps=, tokens=, epochs=, flops= or time=20m, a run.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Short for --budget steps=.")] = None,
    max_tokens: Annotated[str | None, typer.Option(help="Short for --budget tokens=.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step.")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(help="Rows at a time; less memory.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens a row.")] = None,
    dtype: Dtype = None,
    compile: Annotated[bool | None, typer.Option("--compile/--no-compile", help="torch.compile the blocks.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; 0 is PyTorch's choice.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/<plan>.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the comparison in this directory.")] = None,
    only: Annotated[str | None, typer.Option(help="Runs for this process: sqa:0,gqa:0; others take the rest.")] = None,
    launcher: Annotated[
        str, typer.Option(help="local (one after another) or ray (all machines of a cluster).")
    ] = "local",
    track: Track = None,
    json_path: JsonPath = None,
) -> None:
    """Train every variant on the same text and print what is lost and what is gained."""
    changes = _overrides(
        data=data,
        variants=variants,
        seeds=seeds,
        budget=budget,
        max_steps=max_steps,
        max_tokens=max_tokens,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        context=context,
        dtype=dtype,
        compile=compile,
        device=device,
        threads=threads,
    )
    _compare(plan, changes, out, resume, track, json_path, only, launcher)


def _compare(
    source: str | None,
    changes: dict[str, Any],
    out: Path | None,
    resume: Path | None,
    track: str | None,
    json_path: Path | None,
    only: str | None = None,
    launcher: str = "local",
) -> None:
    from sqa.experiments.plan import Plan

    if track not in (None, "tensorboard"):
        raise InputError(f"--track must be tensorboard, got {track!r}")
    if launcher not in ("local", "ray"):
        raise InputError(f"--launcher must be local or ray, got {launcher!r}")
    if track is not None and launcher == "ray":
        raise InputError("--track follows runs in this process only; leave it out with --launcher ray")
    if resume is None:
        plan = Plan.read(source or "demo", changes)
        out = out or Path("runs") / plan.name
    else:
        # torch comes with the next import, after what the plan alone can get wrong
        from sqa.experiments.compare import open_resumed

        if source is not None:
            raise InputError(f"--resume goes on with the plan in its directory; leave out {source!r}")
        if out not in (None, resume):
            raise InputError(f"--resume names the directory already, got --out {out} as well")
        out, plan = resume, open_resumed(resume, changes)
    cells = None if only is None else plan.find_cells(names(only))
    import torch

    from sqa.cli.display import make_display
    from sqa.experiments import compare as comparison
    from sqa.experiments.directory import Directory
    from sqa.experiments.results import NOTES, NOTES_SEEDS, summary_rows, table
    from sqa.progress import Interrupted

    tracker = None
    if track is not None:
        from sqa.experiments.tracking import TensorBoard

        tracker = TensorBoard
    console = make_console()
    try:
        rows = comparison.compare(
            plan,
            out,
            make_display(console),
            resume=resume is not None,
            data_source=changes.get("data"),
            only=cells,
            launcher="ray" if launcher == "ray" else "local",
            tracker=tracker,
        )
    except Interrupted as error:
        same = (f" --only {only}" if only else "") + (" --launcher ray" if launcher == "ray" else "")
        raise Interrupted(f"{error}; go on with: sqa compare --resume {out}{same}") from None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not is_main():
        return
    directory = Directory(out)
    record, missing = directory.record(), directory.missing(plan.cells)
    console.print()
    console.print(table(rows, plan.context, title=f"{plan.name}: {plan.budget} a run, context {plan.context}"))
    console.print(NOTES + ("\n" + NOTES_SEEDS if len(plan.seeds) > 1 else ""), style="dim", highlight=False)
    console.print(
        f"A model that knows only how often each token occurs has {record['data']['unigram_entropy']:.4f}.\n"
        f"Rows: {out / 'results.jsonl'}",
        highlight=False,
        soft_wrap=True,
    )
    if missing:
        console.print(f"Missing: {', '.join(f'{name}:{seed}' for name, seed in missing)}", highlight=False)
    else:
        try:
            from sqa.experiments.report import write_report

            console.print(f"Report: {write_report(out)[0]}", highlight=False, soft_wrap=True)
        except ImportError as error:  # a finished comparison does not fail for want of a plotting library
            console.print(f"No report: {error}", highlight=False, soft_wrap=True)
    if json_path is not None:
        from dataclasses import asdict, is_dataclass

        summary = [
            {key: asdict(value) if is_dataclass(value) else value for key, value in row.items()}  # type: ignore[arg-type]
            for row in summary_rows(rows, plan.context)
        ]
        save_json(json_path, summary)


@app.command()
def train(
    plan: Annotated[str | None, typer.Argument(help="A preset (demo, published) or a TOML file; default demo.")] = None,
    variant: Annotated[str | None, typer.Option(help="Which variant; default sqa.")] = None,
    seed: Annotated[int | None, typer.Option(help="Initialisation and data order; default 0.")] = None,
    data: Data = None,
    budget: Annotated[str | None, typer.Option(help="steps=, tokens=, epochs=, flops= or time=20m.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Short for --budget steps=.")] = None,
    max_tokens: Annotated[str | None, typer.Option(help="Short for --budget tokens=.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step.")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(help="Rows at a time; less memory.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens a row.")] = None,
    dtype: Dtype = None,
    compile: Annotated[bool | None, typer.Option("--compile/--no-compile", help="torch.compile the blocks.")] = None,
    activation_checkpointing: Annotated[
        bool | None,
        typer.Option("--activation-checkpointing/--no-activation-checkpointing", help="Less memory, slower."),
    ] = None,
    sharding: Annotated[str | None, typer.Option(help="Of several processes: none (DDP) or full (FSDP2).")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/<plan>-<variant>.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this directory.")] = None,
    track: Track = None,
) -> None:
    """Train one variant, on as many devices as torchrun or accelerate launch starts processes for."""
    changes = _overrides(
        data=data,
        budget=budget,
        max_steps=max_steps,
        max_tokens=max_tokens,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        context=context,
        dtype=dtype,
        compile=compile,
        activation_checkpointing=activation_checkpointing,
        sharding=sharding,
        device=device,
    )
    if resume is None:
        variant = variant or "sqa"
        changes |= {"variants": (variant,), "seeds": (seed or 0,)}
        if not (budget or "").startswith("time="):
            changes["timing_rounds"] = 0
        if out is None:
            out = Path("runs") / f"{Path(plan or 'demo').stem}-{variant}"
    elif variant is not None or seed is not None:
        raise InputError("--resume goes on with the run as it was begun; leave out --variant and --seed")
    _compare(plan, changes, out, resume, track, None)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="A comparison, finished or not.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the files; default DIRECTORY/report.")] = None,
) -> None:
    """Write the report of a comparison: one HTML file, and PNG and SVG of each figure."""
    from sqa.experiments.report import write_report

    for path in write_report(directory, out):
        print(path)


@app.command(name="plan")
def plan_spending(
    like: Annotated[str, typer.Option(help="The variant whose cost may be spent.")] = "gqa",
    preset: Annotated[str, typer.Option(help="Model shape: demo, published or larger.")] = "published",
    budget: Annotated[
        str, typer.Option(help="equal-flops, equal-parameters or equal-time (measured).")
    ] = "equal-flops",
    variants: Annotated[str | None, typer.Option(help="Names with commas between.")] = None,
    n: Annotated[int, typer.Option("--n", help="Tokens a sequence.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Sequences a step.")] = 8,
    out: Annotated[Path | None, typer.Option(help="Write a plan for sqa compare here for each way.")] = None,
) -> None:
    """Shapes that spend what fewer query heads save: wider, deeper, or longer context."""
    from sqa.planning import spend

    proposals = spend.propose(like, preset, budget, names(variants) or spend.SPENDERS, n, batch_size)
    make_console().print(spend.table(proposals))
    for path in spend.write_plans(proposals, out) if out else []:
        print(path)


@app.command()
def scale(
    preset: Annotated[str, typer.Option(help="Model shape: 1.3b, 8b or a smaller one.")] = "8b",
    gpus: Annotated[str, typer.Option(help="Numbers of H100s, with commas between.")] = "8,512",
    n: Annotated[str, typer.Option("--n", help="Tokens a sequence, with commas between.")] = "4096,32768,131072",
    variants: Annotated[str | None, typer.Option(help="Names with commas between.")] = None,
    json_path: JsonPath = None,
) -> None:
    """What training a large model would take on many GPUs, on paper: FLOPs, memory, links, time."""
    from dataclasses import asdict

    from sqa.planning import scale as paper

    chosen, lengths = names(variants) or paper.SCALE_VARIANTS, numbers(n, "--n")
    estimates = [
        [paper.estimate(preset, name, length, count) for length in lengths for name in chosen]
        for count in numbers(gpus, "--gpus")
    ]
    console = make_console()
    for same in estimates:
        console.print(paper.steps_table(preset, same))
    console.print(paper.lengths_table(preset, chosen))
    console.print(paper.ASSUMPTIONS, style="dim", highlight=False)
    save_json(
        json_path,
        [
            {**asdict(e), "step_s": e.step_s, "gpu_hours_per_billion": e.gpu_hours_per_billion}
            for s in estimates
            for e in s
        ],
    )


@app.command()
def kernels(
    variant: Annotated[str, typer.Option(help="Heads of the shape asked about.")] = "sqa",
    d_model: Annotated[int, typer.Option(help="Model width.")] = 256,
    num_heads: Annotated[int, typer.Option(help="Nominal heads.")] = 16,
    n: Annotated[int, typer.Option("--n", help="Tokens.")] = 1024,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    window: Annotated[int | None, typer.Option(help="Sliding window.")] = None,
    documents: Annotated[bool, typer.Option("--documents", help="Packed documents.")] = False,
    padding: Annotated[bool, typer.Option("--padding", help="A padding mask.")] = False,
    causal: Annotated[bool, typer.Option("--causal/--bidirectional")] = True,
    training: Annotated[bool, typer.Option("--training/--inference")] = True,
) -> None:
    """The attention kernels, and which one a shape gets and why."""
    from sqa.variants import variant as variant_config

    config = variant_config(variant, d_model=d_model, num_heads=num_heads, causal=causal, window=window)
    dtype = long_dtype(dtype)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}")
    if n < 1:
        raise InputError(f"--n must be at least 1, got {n}")
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu or cuda, got {device!r}")
    import torch
    from rich.table import Table

    from sqa.attention.kernels import KERNELS, Case, explain, resolve

    case = Case.of_layer(
        config,
        length=n,
        device=device,
        dtype=getattr(torch, dtype),
        documents=documents,
        padding=padding,
        grad=training,
    )
    table = Table("kernel", "devices", "masks", "backward", "this shape", box=None, padding=(0, 2, 0, 0))
    for name, verdict in explain(case):
        row = KERNELS[name]
        table.add_row(name, row.devices, row.masks, row.backward, verdict)
    console = make_console()
    console.print(table)
    choice = resolve(case)
    heads = f"{config.num_query_heads} query and {config.num_kv_heads} KV heads of {config.head_dim}"
    console.print(f"{heads}, {n:,} tokens, {dtype} on {device}: {choice.kernel} ({choice.reason})", highlight=False)
    if device == "cuda" and not torch.cuda.is_available():
        console.print("There is no CUDA device here: this is what the rules say, nothing was tried.", highlight=False)
