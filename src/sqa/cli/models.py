"""`sqa generate`, `export`, `import`, `convert` and `evaluate`: commands on models that are trained already."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated

import typer

from sqa.cli import options
from sqa.cli.display import make_console, make_display
from sqa.dtypes import long_dtype
from sqa.errors import InputError
from sqa.experiments.plan import Budget
from sqa.files import write_text
from sqa.progress import stop_flag

app = typer.Typer()


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A run, a model directory, a .gguf file, or a name on the Hub.")],
    prompt: Annotated[str, typer.Option(help="Text to continue; with --chat the user's message.")],
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to generate.")] = 100,
    temperature: Annotated[float, typer.Option(help="Randomness; 0 always takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Choose from the K likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Choose from the likeliest tokens of total probability P.")
    ] = None,
    seed: options.Seed[int] = 0,
) -> None:
    """Continue a prompt until the model ends the text; with --chat, print the answer alone."""
    import torch

    from sqa.interop import open_source

    source = open_source(options.find_run(model))
    text = source.read_text_side()
    if text.tokenizer is None:
        raise InputError(f"model: {source.path} has no tokenizer.json, which the prompt is encoded with")
    if not prompt:
        raise InputError("--prompt must not be empty")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # stands for bytes that are not UTF-8
        raise InputError("--prompt must be UTF-8 text")
    ids = text.encode_chat(prompt) if chat else text.encode(prompt)
    loaded = source.load().eval()
    tokens = loaded.generate(
        torch.tensor([ids]),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        end_id=text.special.eos,
        generator=torch.Generator().manual_seed(seed),
    )
    print(text.decode(tokens[0, len(ids) if chat else 0 :].tolist()))


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="A run, finished or not, a model directory, a .gguf file or a Hub name.")
    ],
    out: Annotated[Path, typer.Argument(help="A directory that does not exist yet; for gguf a new .gguf file.")],
    format: Annotated[
        str, typer.Option(help="hf (stock class), hf-remote (ships our class) or gguf (llama.cpp).")
    ] = "hf",
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: float32, bfloat16 or float16; for gguf f32, bf16, f16 or q8_0.")
    ] = None,
) -> None:
    """Write a model for transformers or llama.cpp."""
    from sqa import interop

    with _exportable(model) as source:
        for note in interop.export(source, out, format=format, dtype=dtype):
            print(note)
    print(f"wrote {out}")


@app.command(name="import")
def import_model(
    model: Annotated[str, typer.Argument(help="A model directory, a .gguf file, or a name on the Hub.")],
    out: Annotated[Path, typer.Argument(help="A directory that does not exist yet.")],
) -> None:
    """Turn a Llama, Mistral, Qwen2, Qwen3 or SQAT model, or a GGUF file, into a model directory of ours."""
    from sqa import interop

    for note in interop.import_model(model, out):
        print(note)
    print(f"wrote {out}")


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
            help="uniform: as many query heads in each layer; measured: more where they matter, the same total; "
            "measured-kv: KV heads may go too."
        ),
    ] = "uniform",
    method: Annotated[str, typer.Option(help="How to choose heads: random, weight, l2, taylor or greedy.")] = "l2",
    pooling: Annotated[str, typer.Option(help="How to merge KV heads: aligned (rotated first) or mean.")] = "aligned",
    sequences: Annotated[int, typer.Option(help="Sequences of calibration text.")] = 128,
    length: options.Length = 512,
    heal: Annotated[str | None, typer.Option(help="Tokens to train on to match the original: tokens=2M.")] = None,
    layerwise: Annotated[
        float, typer.Option(help="Share of --heal, 0 to 1, that trains each layer alone first.")
    ] = 0.2,
    train: Annotated[str, typer.Option(help="Weights that healing trains: attention or all.")] = "attention",
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate of healing.")] = 3e-4,
    batch_size: options.BatchSize[int] = 8,
    control: Annotated[bool, typer.Option("--control", help="Also train the original on the same tokens.")] = False,
    evaluation_tokens: Annotated[int, typer.Option(help="Validation tokens to measure on, of each text.")] = 16_384,
    speed_at: Annotated[str | None, typer.Option(help="Lengths to time, separated by commas; or none.")] = None,
    dtype: options.Dtype[str] = "float32",
    compile: options.Compile[bool] = False,
    device: options.Device[str] = "cpu",
    seed: options.Seed[int] = 0,
    threads: options.Threads[int] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    json_path: options.JsonPath = None,
    plot_path: options.PlotPath = None,
) -> None:
    """Give a pretrained model fewer query heads, and measure what that costs."""
    from sqa.conversion import report
    from sqa.conversion.run import run
    from sqa.conversion.settings import Settings, prepare

    if heal is not None and not heal.startswith("tokens="):
        raise InputError(f"--heal must be tokens=NUMBER, as in tokens=2M, got {heal!r}")
    given = {item.name: ctx.params[item.name] for item in fields(Settings) if item.name in ctx.params}
    if speed_at is not None:
        given["speed_at"] = () if speed_at == "none" else options.numbers(speed_at, "--speed-at")
    given["heal_tokens"] = 0 if heal is None else math.ceil(Budget.parse(heal).amount)
    settings = Settings(**given | {"dtype": long_dtype(dtype)})
    second = None if evaluate == "none" else evaluate
    job = prepare(options.find_run(model), out, settings, calibration=calibration, evaluate=second)
    console = make_console()
    console.print(report.planned(job))
    if dry_run:
        return
    with make_display() as display, stop_flag() as stop:
        conversion = run(job, display, stop)
    console.print(report.quality_table(conversion), report.samples(conversion), report.speed_table(conversion))
    where = "" if out.parent == Path() else f" (from {out.parent})"
    console.print(f"serve it{where}: {conversion.serve}", soft_wrap=True)
    options.save_json(json_path, conversion)
    if plot_path is not None:
        report.plot(conversion, plot_path)


@app.command()
def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Runs, model directories, .gguf files or Hub names; the first is the baseline.")
    ],
    data: Annotated[str, typer.Option(help="Articles (validation split): builtin, wikipedia, or a file or folder.")],
    items: Annotated[int, typer.Option(help="Number of questions, each from an article of its own.")] = 500,
    items_file: options.ItemsPath = None,
    dtype: options.Dtype[str] = "float32",
    device: options.Device[str] = "cpu",
    seed: options.Seed[int] = 0,
    threads: options.Threads[int] = 0,
    json_path: options.JsonPath = None,
) -> None:
    """Test models, without training them for it: which of four paragraphs continues an article?"""
    import torch

    from sqa import evaluation
    from sqa.data import open_corpus
    from sqa.measure.machine import git_revision, machine, versions

    dtype = long_dtype(dtype)
    if threads:
        torch.set_num_threads(threads)
    with make_display() as display, stop_flag():
        corpus, sources = open_corpus(data), [options.find_run(name) for name in models]
        done = evaluation.evaluate(sources, corpus, items=items, seed=seed, dtype=dtype, device=device, display=display)
    if items_file is not None:
        write_text(items_file, "".join(json.dumps(asdict(item)) + "\n" for item in done.items))
    make_console().print(evaluation.score_table(done.scores))
    found = {
        "data": corpus.name,
        "seed": seed,
        "dtype": dtype,
        "machine": machine(device).to_dict(),
        "versions": versions(),
        "git": git_revision(),
        "scores": [score.to_dict() for score in done.scores],
    }
    options.save_json(json_path, found)


@contextmanager
def _exportable(source: str) -> Iterator[Path | str]:
    """A model to open: `source`, or for an unfinished run a temporary directory with its last checkpoint."""
    run = Path(source)
    if (run / "model.safetensors").is_file() or not (run / "checkpoints").is_dir():
        yield options.find_run(source)
        return
    import tempfile

    from sqa.interop.text import read_text_side
    from sqa.training.checkpoint import read_model

    model, step = read_model(run / "checkpoints")
    print(f"unfinished: the model after step {step}")
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        text = read_text_side(run, {}, vocab_size=model.config.vocab_size, max_seq_len=model.config.max_seq_len)
        text.write(Path(folder))
        yield Path(folder)
