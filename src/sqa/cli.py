"""The command line. Bad input is one sentence on standard error and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqa._version import __version__

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    help="Sparse Query Attention: fewer query heads, cheaper training and prefill.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the `sqa` command."""
    try:
        app()
    except (ValueError, ImportError, OSError) as error:
        _fail(str(error), 2)
    except MemoryError:
        _fail("out of memory", 1)
    except RuntimeError as error:
        # torch raises RuntimeError too: only what a run reports of itself, and want of memory, is one sentence
        from torch import OutOfMemoryError

        from sqa.training.loop import Interrupted, NonFiniteLoss

        if isinstance(error, Interrupted | NonFiniteLoss):
            _fail(str(error), 130 if isinstance(error, Interrupted) else 1)
        if isinstance(error, OutOfMemoryError) or "can't allocate memory" in str(error):
            _fail(f"out of memory ({str(error).splitlines()[0]})", 1)
        raise


def _fail(message: str, code: int) -> None:
    print(f"sqa: {message}", file=sys.stderr)
    sys.exit(code)


def _console() -> Console:
    from rich.console import Console

    return Console()


def _write_json(path: Path | None, value: Any) -> None:
    if path is not None:
        from sqa.files import write_json

        write_json(path, value)


def _file_path(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """Refuses what could not be written to, before figures are measured that would be lost."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        what = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise ValueError(f"{param.opts[0]} {path} {what}; name a file")
    return path


JsonPath = Annotated[Path | None, typer.Option("--json", help="Write the figures here.", callback=_file_path)]


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
        raise ValueError(f"--n must be at least 1, got {n}")
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for name in VARIANTS if all_variants else PUBLISHED_VARIANTS:
        try:
            config = model_preset(preset, name)
        except ValueError as error:
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
    from rich.table import Table

    table = Table(title=f"{preset}: one sequence of {n:,} tokens, KV cache in 16 bit", box=None, padding=(0, 2, 0, 0))
    for heading in (
        "variant",
        "Hq",
        "Hkv",
        "head\ndim",
        "parameters",
        "train\nGFLOP",
        "prefill\nGFLOP",
        "KV bytes\na token",
        "attention\nsaving",
    ):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
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
    console = _console()
    console.print(table)
    for text in left_out:
        console.print(f"left out: {text}", highlight=False, soft_wrap=True)
    _write_json(json_path, rows)


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
        changes["variants"] = tuple(name.strip() for name in changes["variants"].split(","))
    if "dtype" in changes:
        changes["dtype"] = _dtype(changes["dtype"])
    limits = [name for name in ("budget", "max_steps", "max_tokens") if name in changes]
    if len(limits) > 1:
        raise ValueError(f"budget: give one of --budget, --max-steps and --max-tokens, got {len(limits)}")
    for name, kind in (("max_steps", "steps"), ("max_tokens", "tokens")):
        if name in changes:
            changes["budget"] = f"{kind}={changes.pop(name)}"
    if "context" in changes and changes["context"] < 2:
        raise ValueError(f"--context must be at least 2, got {changes['context']}")
    return changes


def _dtype(name: str) -> str:
    return {"fp32": "float32", "bf16": "bfloat16"}.get(name, name)


def _seeds(text: str) -> tuple[int, ...]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--seeds must be a number of seeds (3) or a list (0,7,9), got {text!r}") from None
    if "," in text:
        return tuple(numbers)
    if not numbers or numbers[0] < 1:
        raise ValueError(f"--seeds must be at least 1, got {text!r}")
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
    _compare(plan, changes, out, resume, track, json_path)


def _compare(
    source: str | None,
    changes: dict[str, Any],
    out: Path | None,
    resume: Path | None,
    track: str | None,
    json_path: Path | None,
) -> None:
    from sqa.experiments.plan import Plan

    if track not in (None, "tensorboard"):
        raise ValueError(f"--track must be tensorboard, got {track!r}")
    if resume is None:
        plan = Plan.read(source or "demo").replace(**changes)
        out = out or Path("runs") / plan.name
    else:
        # torch comes with the next import, after what the plan alone can get wrong
        from sqa.experiments.compare import open_resumed

        if source is not None:
            raise ValueError(f"--resume goes on with the plan in its directory; leave out {source!r}")
        if out not in (None, resume):
            raise ValueError(f"--resume names the directory already, got --out {out} as well")
        out, plan = resume, open_resumed(resume, changes)
    from sqa.experiments import compare as comparison
    from sqa.experiments.directory import Directory
    from sqa.experiments.display import make_display
    from sqa.experiments.results import NOTES, NOTES_SEEDS, summary_rows, table

    tracker = None
    if track is not None:
        from sqa.experiments.tracking import TensorBoard

        tracker = TensorBoard
    console = _console()
    try:
        rows = comparison.compare(
            plan,
            out,
            make_display(console),
            resume=resume is not None,
            data_source=changes.get("data"),
            tracker=tracker,
        )
    except comparison.Interrupted as error:
        raise comparison.Interrupted(f"{error}; go on with: sqa compare --resume {out}") from None
    record = Directory(out).record()
    console.print()
    console.print(table(rows, plan.context, title=f"{plan.name}: {plan.budget} a run, context {plan.context}"))
    console.print(NOTES + ("\n" + NOTES_SEEDS if len(plan.seeds) > 1 else ""), style="dim", highlight=False)
    console.print(
        f"A model that knows only how often each token occurs has {record['data']['unigram_entropy']:.4f}. "
        f"Rows: {out / 'results.jsonl'}",
        highlight=False,
        soft_wrap=True,
    )
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
        _write_json(json_path, summary)


@app.command()
def train(
    plan: Annotated[str | None, typer.Argument(help="A preset (demo, published) or a TOML file; default demo.")] = None,
    variant: Annotated[str | None, typer.Option(help="Which variant; default sqa.")] = None,
    seed: Annotated[int | None, typer.Option(help="Initialisation and data order; default 0.")] = None,
    data: Data = None,
    budget: Annotated[str | None, typer.Option(help="steps=, tokens=, epochs= or flops=.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Short for --budget steps=.")] = None,
    max_tokens: Annotated[str | None, typer.Option(help="Short for --budget tokens=.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step.")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(help="Rows at a time; less memory.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens a row.")] = None,
    dtype: Dtype = None,
    compile: Annotated[bool | None, typer.Option("--compile/--no-compile", help="torch.compile the blocks.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/<plan>-<variant>.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this directory.")] = None,
    track: Track = None,
) -> None:
    """Train one variant."""
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
        device=device,
    )
    if resume is None:
        variant = variant or "sqa"
        changes |= {"variants": (variant,), "seeds": (seed or 0,), "timing_rounds": 0}
        if out is None:
            out = Path("runs") / f"{Path(plan or 'demo').stem}-{variant}"
    elif variant is not None or seed is not None:
        raise ValueError("--resume goes on with the run as it was begun; leave out --variant and --seed")
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
    from sqa.experiments import spend

    proposals = spend.propose(like, preset, budget, _names(variants) or spend.SPENDERS, n, batch_size)
    _console().print(spend.table(proposals))
    for path in spend.write_plans(proposals, out) if out else []:
        print(path)


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
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}")
    if n < 1:
        raise ValueError(f"--n must be at least 1, got {n}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
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
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("kernel", "devices", "masks", "backward", "this shape"):
        table.add_column(heading)
    for name, verdict in explain(case):
        row = KERNELS[name]
        table.add_row(name, row.devices, row.masks, row.backward, verdict)
    console = _console()
    console.print(table)
    choice = resolve(case)
    heads = f"{config.num_query_heads} query and {config.num_kv_heads} KV heads of {config.head_dim}"
    console.print(f"{heads}, {n:,} tokens, {dtype} on {device}: {choice.kernel} ({choice.reason})", highlight=False)


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="A run's directory (runs/demo/sqa-0), or a comparison with one run.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the fewest that hold this probability.")] = None,
    seed: Annotated[int, typer.Option(help="For drawing.")] = 0,
) -> None:
    """Continue a prompt with cached decoding."""
    folder = _run_folder(run)
    import torch

    from sqa.data import Tokenizer
    from sqa.model import Transformer

    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    model = Transformer.load(folder).eval()
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("--prompt must not be empty")
    tokens = model.generate(
        torch.tensor([ids]),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        end_id=tokenizer.end_id,
        generator=torch.Generator().manual_seed(seed),
    )
    print(tokenizer.decode(tokens[0].tolist()))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run, or a directory written by Transformer.save.")],
    out: Annotated[Path, typer.Argument(help="A directory that does not exist yet; for gguf a new .gguf file.")],
    format: Annotated[str, typer.Option(help="hf (no code of ours), hf-remote (our own class) or gguf.")] = "hf",
    dtype: Annotated[
        str | None, typer.Option(help="hf: float32, bfloat16, float16; gguf: f32, bf16, f16, q8_0.")
    ] = None,
) -> None:
    """Write a model for transformers or llama.cpp."""
    if format not in ("hf", "hf-remote", "gguf"):
        raise ValueError(f"--format must be hf, hf-remote or gguf, got {format!r}")
    from sqa import interop

    for note in interop.export(_run_folder(run), out, format=format, dtype=dtype):
        print(note)
    print(f"wrote {out}")


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory, a run of ours, or a name on the Hub.")],
    out: Annotated[Path, typer.Argument(help="A directory that does not exist yet; of the same kind as MODEL.")],
    query_heads: Annotated[int, typer.Option(help="Query heads a layer keeps.")],
    calibration: Annotated[str, typer.Option(help="builtin, wikipedia, or a file or folder of text.")],
    kv_heads: Annotated[int | None, typer.Option(help="KV heads a layer keeps; default: as many as it has.")] = None,
    method: Annotated[str, typer.Option(help="Which heads stay: random, weight, l2, taylor or greedy.")] = "l2",
    pooling: Annotated[str, typer.Option(help="How KV heads are joined: aligned or mean.")] = "aligned",
    sequences: Annotated[int, typer.Option(help="Rows of calibration text.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens a row.")] = 512,
    heal: Annotated[str | None, typer.Option(help="tokens=2M trains afterwards against the original.")] = None,
    layerwise: Annotated[float, typer.Option(help="Share of these that heals layer by layer.")] = 0.2,
    train: Annotated[str, typer.Option(help="What healing trains: all or attention.")] = "all",
    learning_rate: Annotated[float, typer.Option(help="Of healing.")] = 3e-4,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.")] = 8,
    control: Annotated[bool, typer.Option("--control", help="Train the original on the same tokens too.")] = False,
    evaluation_tokens: Annotated[int, typer.Option(help="Validation tokens for the verdict.")] = 16_384,
    speed_at: Annotated[str | None, typer.Option(help="Lengths to time, with commas between.")] = None,
    dtype: Annotated[str, typer.Option(help="Of healing and timing: float32 or bfloat16 (autocast).")] = "float32",
    seed: Annotated[int, typer.Option(help="For --method random.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 is PyTorch's choice.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Quality over healing: .svg, .png, .html.")] = None,
) -> None:
    """Give a pretrained model fewer query heads, and say what that cost."""
    from sqa.conversion import report
    from sqa.conversion.convert import convert as run
    from sqa.conversion.settings import Settings, prepare
    from sqa.experiments.compare import stop_flag
    from sqa.experiments.display import make_display
    from sqa.experiments.plan import Budget

    healing = None if heal is None else Budget.parse(heal)
    if healing is not None and healing.kind != "tokens":
        raise ValueError(f"--heal must be tokens=..., got {heal!r}")
    settings = Settings(
        query_heads=query_heads,
        kv_heads=kv_heads,
        method=method,
        pooling=pooling,  # type: ignore[arg-type]
        sequences=sequences,
        length=length,
        heal_tokens=0 if healing is None else round(healing.amount),
        layerwise=layerwise,
        train=train,  # type: ignore[arg-type]
        learning_rate=learning_rate,
        batch_size=batch_size,
        control=control,
        evaluation_tokens=evaluation_tokens,
        speed_at=None if speed_at is None else _numbers(speed_at, "--speed-at"),
        dtype=_dtype(dtype),  # type: ignore[arg-type]
        seed=seed,
        threads=threads,
    )
    job = prepare(model, out, calibration, settings)
    console = _console()
    console.print(report.planned(job))
    if dry_run:
        return
    with stop_flag() as stop:
        state = run(job, make_display(console), lambda: stop.signal is not None)
    console.print(report.verdict(state))
    console.print(f"wrote {out}", highlight=False, soft_wrap=True)
    _write_json(json_path, state)
    if plot_path is not None:
        report.plot(state, plot_path)


@app.command(name="import")
def import_model(
    source: Annotated[str, typer.Argument(help="A Hugging Face directory, an SQA author's, or a name on the Hub.")],
    out: Annotated[Path, typer.Argument(help="A directory that does not exist yet.")],
) -> None:
    """Read a Llama, Mistral, Qwen2, Qwen3 or SQAT model into a directory that sqa generate and export take."""
    from sqa import interop

    for note in interop.import_model(source, out):
        print(note)
    print(f"wrote {out}")


bench = typer.Typer(help="Measure side by side, in turns; correctness before speed.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Variants = Annotated[str | None, typer.Option(help="Names, or heads such as 8/4x32, with commas between.")]
Dtypes = Annotated[str, typer.Option(help="bf16, fp32, fp16, with commas between.")]
Peers = Annotated[str, typer.Option(help="hf-llama, x-transformers, with commas between.")]
Rounds = Annotated[int, typer.Option(help="Turns that each contestant takes.")]
Seconds = Annotated[str | None, typer.Option("--budget", help="Stop early: 90s, 8m.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
PlotPath = Annotated[
    Path | None, typer.Option("--plot", help="Write a plot here: .svg, .png or .html.", callback=_file_path)
]


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(name) for name in _names(text))
    except ValueError:
        raise ValueError(f"{option} must be whole numbers with commas between, got {text!r}") from None


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    from sqa.experiments.plan import Budget

    return Budget.parse(f"time={text}").amount


def _show(result: Any, json_path: Path | None, plot_path: Path | None) -> None:
    _console().print(result)
    if json_path is not None:
        result.write_json(json_path)
    if plot_path is not None:
        result.plot(plot_path)


@bench.command(name="attention")
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
        variants=_names(variants) or VARIANTS,
        lengths=_numbers(n, "--n"),
        d_model=d_model,
        num_heads=num_heads,
        batch_size=batch_size,
        dtypes=_names(dtypes),
        mask=mask,
        window=window,
        kernels=_names(kernels),
        rounds=rounds,
        device=device,
        budget=_seconds(budget),
    )
    _show(result, json_path, plot_path)


@bench.command(name="step")
def bench_step(
    preset: Annotated[str, typer.Option(help="Model shape: published or larger.")] = "published",
    variants: Variants = None,
    peers: Peers = "",
    dtypes: Dtypes = "bf16,fp32",
    batch_size: Annotated[int, typer.Option(help="Sequences a step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 1024,
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
        variants=_names(variants) or VARIANTS,
        peers=_names(peers),
        dtypes=_names(dtypes),
        batch_size=batch_size,
        length=length,
        compile=compile,
        memory=memory,
        rounds=rounds,
        device=device,
        budget=_seconds(budget),
    )
    _show(result, json_path, plot_path)


@bench.command(name="prefill")
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
        variants=_names(variants) or VARIANTS,
        peers=_names(peers),
        max_n=max_n,
        dtype=dtype,
        compile=compile,
        rounds=rounds,
        device=device,
        budget=_seconds(budget),
    )
    _show(result, json_path, plot_path)


@bench.command(name="decode")
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
        variants=_names(variants) or VARIANTS,
        lengths=_numbers(n, "--n"),
        batch_size=batch_size,
        dtype=dtype,
        rounds=rounds,
        device=device,
        budget=_seconds(budget),
    )
    _show(result, json_path, plot_path)


@bench.command(name="all")
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

        from sqa.experiments import compare as comparison
        from sqa.experiments.display import make_display
        from sqa.experiments.plan import Plan

        plan = Plan.read("demo").replace(
            variants=("gqa", "sqa"), budget=f"time={max(1, round(seconds / 3))}s", device=device, dtype="bfloat16"
        )
        with tempfile.TemporaryDirectory() as folder:
            rows = comparison.compare(plan, Path(folder) / "compare", make_display(_console()))
        return [
            {
                "kind": "compare",
                "variant": row["variant"],
                "kernel": row["kernel"],
                "dtype": plan.dtype,
                "loss": row["val"]["loss"],
                "steps": row["steps"],
                "tokens": row["tokens"],
                "seconds": row["step_s"],
            }
            for row in rows
        ]

    _show(run_all(device=device, budget=_seconds(budget) or 0.0, size=size, compare=trained), json_path, plot_path)


def _run_folder(path: Path) -> Path:
    """The directory of one finished run: `path`, or the only run inside it."""
    if (path / "model.safetensors").is_file():
        return path
    inside = sorted(item.parent for item in path.glob("*/model.safetensors"))
    if len(inside) == 1:
        return inside[0]
    if inside:
        raise ValueError(f"run: {path} holds several runs; give one of {', '.join(map(str, inside))}")
    raise ValueError(f"run: {path} holds no finished run (no model.safetensors)")
