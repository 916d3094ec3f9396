"""`sqa generate`, `sqa export` and `sqa import`: commands on one model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from sqa.cli.options import long_dtype
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
