"""`sqa compare`, `sqa train` and `sqa report`: runs of a plan, and what came of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from sqa.cli import options
from sqa.cli.display import is_main, make_console, make_display, speak_of
from sqa.dtypes import long_dtype
from sqa.errors import InputError, MissingExtraError
from sqa.experiments.plan import Plan
from sqa.progress import Interrupted

app = typer.Typer()

MAX_SEEDS = 1000
"""A larger number of seeds is a slip: nobody trains so many runs of one variant."""

PlanSource = Annotated[str | None, typer.Argument(metavar="PLAN", help="demo (default), published or a TOML file.")]
Resume = Annotated[Path | None, typer.Option(help="Continue what is in this directory.")]
AnyKernel = Annotated[
    bool, typer.Option("--any-kernel", help="Continue even if this machine has another attention kernel.")
]
Track = Annotated[str | None, typer.Option(help="tensorboard writes the training curves to OUT/tensorboard.")]
# these replace fields of the plan
Data = Annotated[str | None, typer.Option(help="Text to train on: builtin, wikipedia, or a file or folder.")]
Seeds = Annotated[str | None, typer.Option(help="How many seeds (3), or which ones (0,7,9).")]
Budget = Annotated[str | None, typer.Option(help="Length of a run: steps=N, tokens=5M, epochs=1, flops=1e9, time=20m.")]
MaxSteps = Annotated[int | None, typer.Option(help="The same as --budget steps=N.")]
MaxTokens = Annotated[str | None, typer.Option(help="The same as --budget tokens=N.")]
MicroBatchSize = Annotated[int | None, typer.Option(help="Sequences computed at a time; fewer take less memory.")]
Context = Annotated[int | None, typer.Option(help="Tokens in a training sequence.")]
Checkpointing = Annotated[
    bool | None,
    typer.Option(
        "--activation-checkpointing/--no-activation-checkpointing",
        help="Less memory, slower: blocks are computed twice.",
    ),
]
Sharding = Annotated[str | None, typer.Option(help="Several processes: none (whole model each, DDP) or full (FSDP2).")]


def _changes(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the plan that a command's options replace, for `Plan.read`."""
    known = {"max_steps", "max_tokens", *(item.name for item in fields(Plan))}
    changes = {name: value for name, value in given.items() if name in known and value is not None}
    if "seeds" in changes:
        changes["seeds"] = _seeds(changes["seeds"])
    if "variants" in changes:
        changes["variants"] = options.names(changes["variants"])
    if "dtype" in changes:
        changes["dtype"] = long_dtype(changes["dtype"])
    limits = [name for name in ("budget", "max_steps", "max_tokens") if name in changes]
    if len(limits) > 1:
        raise InputError(f"budget: give one of --budget, --max-steps and --max-tokens, got {len(limits)}")
    for name, kind in (("max_steps", "steps"), ("max_tokens", "tokens")):
        if name in changes:
            changes["budget"] = f"{kind}={changes.pop(name)}"
    return changes


def _seeds(text: str) -> tuple[int, ...]:
    """The seeds, given as a list or as their number."""
    try:
        numbers = [int(name) for name in options.names(text)]
    except ValueError:
        raise InputError(f"--seeds must be a number of seeds (3) or a list (0,7,9), got {text!r}") from None
    if "," in text:
        return tuple(numbers)
    if not numbers or not 1 <= numbers[0] <= MAX_SEEDS:
        raise InputError(f"--seeds must be from 1 to {MAX_SEEDS} seeds, got {text!r}")
    return tuple(range(numbers[0]))


@app.command()
def compare(
    ctx: typer.Context,
    plan: PlanSource = None,
    data: Data = None,
    variants: options.Variants = None,
    seeds: Seeds = None,
    budget: Budget = None,
    max_steps: MaxSteps = None,
    max_tokens: MaxTokens = None,
    batch_size: options.BatchSize[int | None] = None,
    micro_batch_size: MicroBatchSize = None,
    context: Context = None,
    dtype: options.Dtype[str | None] = None,
    compile: options.Compile[bool | None] = None,
    device: options.Device[str | None] = None,
    threads: options.Threads[int | None] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/PLAN.")] = None,
    resume: Resume = None,
    any_kernel: AnyKernel = False,
    only: Annotated[str | None, typer.Option(help="Run these alone, separated by commas: sqa:0,gqa:0.")] = None,
    launcher: Annotated[
        str, typer.Option(help="local (one run after another) or ray (on all machines of a Ray cluster).")
    ] = "local",
    track: Track = None,
    json_path: options.JsonPath = None,
) -> None:
    """Train every variant on the same text and print what is lost and what is gained."""
    _run(ctx.params)


def _run(given: Mapping[str, Any], single: tuple[str, int] | None = None) -> None:
    """Run `sqa compare` or `sqa train` with the given options; `single` is the variant and seed of the latter."""
    launcher, track, only = given.get("launcher", "local"), given["track"], given.get("only")
    out, resume = given["out"], given["resume"]
    source, changes = given["plan"], _changes(given)
    if track not in (None, "tensorboard"):
        raise InputError(f"--track must be tensorboard, got {track!r}")
    if launcher not in ("local", "ray"):
        raise InputError(f"--launcher must be local or ray, got {launcher!r}")
    if resume is None:
        source = source or "demo"
        plan = Plan.read(source, changes) if single is None else Plan.read_single(source, *single, changes)
        out = out or Path("runs") / "-".join([plan.name, *(plan.variants if single else ())])
    else:
        if source is not None:
            raise InputError(f"--resume goes on with the plan in its directory; leave out {source!r}")
        if out not in (None, resume):
            raise InputError(f"--resume names the directory already, got --out {out} as well")
        from sqa.experiments.directory import Directory  # imports torch: after the checks that do without

        out, plan = resume, Directory(resume).resumed(changes)
    cells = None if only is None else plan.find_cells(options.names(only))
    import torch

    from sqa.experiments.compare import compare as run
    from sqa.experiments.launch import LOCAL, RAY
    from sqa.experiments.report import read_experiment, write_report
    from sqa.experiments.summary import comparison_text

    try:
        with make_display() as display:
            comparison = run(
                plan,
                out,
                display,
                resume=resume is not None,
                data_source=changes.get("data"),
                only=cells,
                launcher=RAY if launcher == "ray" else LOCAL,
                track=track is not None,
                any_kernel=given["any_kernel"],
            )
    except Interrupted as error:
        if not (out / "plan.json").exists():
            raise type(error)(f"{error} before a run had begun; the same command starts again") from None
        same = (f" --only {only}" if only else "") + (" --launcher ray" if launcher == "ray" else "")
        raise type(error)(f"{error}; go on with: sqa compare --resume {out}{same}") from None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not is_main():
        return
    console = make_console()
    console.print()
    console.print(comparison_text(comparison))
    experiment = read_experiment([out])
    notes = [f"Rows: {out / 'results.jsonl'}"]
    if not comparison.missing:
        try:
            with speak_of("sqa.experiments.report"):
                notes.append(f"Report: {write_report(experiment)[0]}")
        except MissingExtraError as error:  # a finished comparison does not fail because a plotting library is missing
            notes.append(f"No report: {error}")
    if single and not comparison.missing and len(plan.cells) == 1:  # train may go on with a comparison of several
        notes.append(f"Try it: sqa generate {out} --prompt 'The'")
    if plan.name == "demo":
        notes.append("Minutes of training decide nothing: what long trainings say is in docs/results.md.")
    for text in notes:
        console.print(text, soft_wrap=True)
    options.save_json(given.get("json_path"), experiment.summaries())


@app.command()
def train(
    ctx: typer.Context,
    plan: PlanSource = None,
    variant: options.VariantName[str | None] = None,
    seed: options.Seed[int | None] = None,
    data: Data = None,
    budget: Budget = None,
    max_steps: MaxSteps = None,
    max_tokens: MaxTokens = None,
    batch_size: options.BatchSize[int | None] = None,
    micro_batch_size: MicroBatchSize = None,
    context: Context = None,
    dtype: options.Dtype[str | None] = None,
    compile: options.Compile[bool | None] = None,
    activation_checkpointing: Checkpointing = None,
    sharding: Sharding = None,
    device: options.Device[str | None] = None,
    threads: options.Threads[int | None] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/PLAN-VARIANT.")] = None,
    resume: Resume = None,
    any_kernel: AnyKernel = False,
    track: Track = None,
) -> None:
    """Train one variant; started by torchrun or accelerate launch, on several devices."""
    if resume is not None and (variant is not None or seed is not None):
        raise InputError("--resume goes on with the run as it was begun; leave out --variant and --seed")
    _run(ctx.params, single=(variant or "sqa", seed or 0))


@app.command()
def report(
    directories: Annotated[
        list[Path], typer.Argument(help="Run directories of one experiment; different budgets are its horizons.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report. Default: report/ in the last directory.")
    ] = None,
    step_times: Annotated[
        Path | None, typer.Option(help="Take the step times from the timing phase of this run directory.")
    ] = None,
    json_path: options.JsonPath = None,
) -> None:
    """Write the report of a comparison: one HTML file, and PNG and SVG of each figure."""
    from sqa.experiments.report import read_experiment, write_report
    from sqa.experiments.summary import results_table

    experiment = read_experiment(directories, step_times)
    if len(directories) > 1:
        make_console().print(results_table(experiment))
    with speak_of("sqa.experiments.report"):
        written = write_report(experiment, out)
    for path in written:
        print(path)
    options.save_json(json_path, experiment.summaries())
