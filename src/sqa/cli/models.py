"""Commands on one model: continue a prompt, convert, export, import."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from sqa.cli.options import JsonPath, PlotPath, long_dtype, make_console, numbers, save_json
from sqa.errors import InputError

app = typer.Typer()


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
    from sqa.interop import load_model

    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    model = load_model(folder).eval()
    ids = tokenizer.encode(prompt)
    if not ids:
        raise InputError("--prompt must not be empty")
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
    run: Annotated[Path, typer.Argument(help="A run, finished or not, or a directory written by Transformer.save.")],
    out: Annotated[Path, typer.Argument(help="A directory that does not exist yet; for gguf a new .gguf file.")],
    format: Annotated[str, typer.Option(help="hf (no code of ours), hf-remote (our own class) or gguf.")] = "hf",
    dtype: Annotated[
        str | None, typer.Option(help="hf: float32, bfloat16, float16; gguf: f32, bf16, f16, q8_0.")
    ] = None,
) -> None:
    """Write a model for transformers or llama.cpp."""
    from sqa import interop

    if dtype is not None and format != "gguf":
        dtype = long_dtype(dtype)
    with _model_folder(run) as folder:
        for note in interop.export(folder, out, format=format, dtype=dtype):
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
    length: Annotated[int, typer.Option("--length", "--n", help="Tokens a row.")] = 512,
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
    json_path: JsonPath = None,
    plot_path: PlotPath = None,
) -> None:
    """Give a pretrained model fewer query heads, and say what that cost."""
    from sqa.cli.display import make_display
    from sqa.conversion import report
    from sqa.conversion.convert import convert as run
    from sqa.conversion.settings import Settings, prepare
    from sqa.experiments.plan import Budget
    from sqa.progress import stop_flag

    if heal is not None and not heal.startswith("tokens="):
        raise InputError(f"--heal must be tokens=NUMBER, as in tokens=2M, got {heal!r}")
    healing = None if heal is None else Budget.parse(heal)
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
        speed_at=None if speed_at is None else numbers(speed_at, "--speed-at"),
        dtype=long_dtype(dtype),  # type: ignore[arg-type]
        seed=seed,
        threads=threads,
    )
    job = prepare(model, out, calibration, settings)
    console = make_console()
    console.print(report.planned(job))
    if dry_run:
        return
    with stop_flag() as stop:
        state = run(job, make_display(console), lambda: stop.signal is not None)
    console.print(report.quality_table(state), report.speed_table(state))
    console.print(f"wrote {out}", highlight=False, soft_wrap=True)
    save_json(json_path, state)
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


@contextmanager
def _model_folder(run: Path) -> Iterator[Path]:
    """The directory of a run's model; for an unfinished run one that passes, written from its last checkpoint."""
    if (run / "model.safetensors").is_file() or not (run / "checkpoints").is_dir():
        yield _run_folder(run)
        return
    import tempfile

    from sqa.storage import copy_tokenizer
    from sqa.training.checkpoint import read_model

    model, step = read_model(run / "checkpoints")
    print(f"unfinished: the model after step {step}")
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        copy_tokenizer(run, Path(folder))
        yield Path(folder)


def _run_folder(path: Path) -> Path:
    """The directory of one finished run: `path`, or the only run inside it."""
    if (path / "model.safetensors").is_file():
        return path
    inside = sorted(item.parent for item in path.glob("*/model.safetensors"))
    if len(inside) == 1:
        return inside[0]
    if inside:
        raise InputError(f"run: {path} holds several runs; give one of {', '.join(map(str, inside))}")
    raise InputError(f"run: {path} holds no finished run (no model.safetensors)")
