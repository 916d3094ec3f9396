"""`sqa evaluate`: a four-way choice from articles."""

from __future__ import annotations

from typing import Annotated

import typer

from sqa.cli.display import make_console, make_display
from sqa.cli.options import Device, Dtype, ItemsPath, JsonPath, Seed, Threads, at_least_one, find_run, save_json
from sqa.dtypes import long_dtype

app = typer.Typer()


@app.command()
def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Runs, model directories, .gguf files or Hub names; the first is the baseline.")
    ],
    data: Annotated[str, typer.Option(help="Articles (validation split): builtin, wikipedia, or a file or folder.")],
    items: Annotated[int, typer.Option(help="Number of questions, each from an article of its own.")] = 500,
    items_file: ItemsPath = None,
    dtype: Dtype[str] = "float32",
    device: Device[str] = "cpu",
    seed: Seed[int] = 0,
    threads: Threads[int] = 0,
    json_path: JsonPath = None,
) -> None:
    """Test models, without training them for it: which of four paragraphs continues an article?"""
    import json
    from dataclasses import asdict

    import torch

    from sqa import evaluation
    from sqa.data import open_corpus
    from sqa.files import write_text
    from sqa.measure.machine import git_revision, machine, versions
    from sqa.progress import stop_flag

    at_least_one("--items", items)
    dtype = long_dtype(dtype)
    if threads:
        torch.set_num_threads(threads)
    with make_display() as display, stop_flag():
        corpus, sources = open_corpus(data), [find_run(name) for name in models]
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
    save_json(json_path, found)
