"""`sqa generate`, `sqa export` and `sqa import`: commands on one model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from sqa.cli.options import Seed, find_run
from sqa.errors import InputError

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
    seed: Seed[int] = 0,
) -> None:
    """Continue a prompt until the model ends the text; with --chat, print the answer alone."""
    import torch

    from sqa.interop import open_source

    source = open_source(find_run(model))
    text = source.read_text_side()
    if text.tokenizer is None:
        raise InputError(f"model: {source.path} has no tokenizer.json, which the prompt is encoded with")
    if not prompt:
        raise InputError("--prompt must not be empty")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # how Python keeps bytes that are no UTF-8
        raise InputError("--prompt must be UTF-8 text")
    ids = text.encode_chat(prompt) if chat else text.encode(prompt)
    tokens = (
        source.load()
        .eval()
        .generate(
            torch.tensor([ids]),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            end_id=text.special.eos,
            generator=torch.Generator().manual_seed(seed),
        )[0]
        .tolist()
    )
    print(text.decode(tokens[len(ids) if chat else 0 :]))


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


@contextmanager
def _exportable(source: str) -> Iterator[Path | str]:
    """A model to open: `source`, or for an unfinished run a temporary directory with its last checkpoint."""
    run = Path(source)
    if (run / "model.safetensors").is_file() or not (run / "checkpoints").is_dir():
        yield find_run(source)
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
