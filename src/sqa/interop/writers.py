"""Export of models to other software's formats, and import of other models into ours."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sqa import storage
from sqa.config import ModelConfig
from sqa.dtypes import DTYPES, dtype_name, find_dtype, long_dtype
from sqa.errors import InputError, shown
from sqa.files import write_json, write_safetensors
from sqa.interop import llama
from sqa.interop.source import ModelSource, open_source
from sqa.interop.text import TextSide
from sqa.model import Transformer


def import_model(source: str | Path, out: str | Path) -> list[str]:
    """Read a model of any kind and write our own kind of directory, with its tokenizer; returns notes to print.

    Raises InputError for anything that `load_model` refuses, for a tokenizer that is damaged, and when `out` exists.
    """
    out = Path(out)
    storage.refuse_existing(out)
    opened = open_source(source)
    storage.refuse_inside(out, opened.path)
    text = opened.read_text_side()
    model = opened.load()
    with storage.new_directory(out) as folder:
        model.save(folder)
        text.write(folder)
    return _notes(opened, text)


def export(source: str | Path, out: str | Path, *, format: str, dtype: str | None = None) -> list[str]:
    """Write a model for other software; returns notes to print.

    format is a row of FORMATS. "hf": a stock transformers class, loaded with no code of ours; "hf-remote": our class as
    one file beside the weights (trust_remote_code); "gguf": one file for llama.cpp. dtype: for gguf f32 (default), f16,
    bf16 or q8_0; for the others float32, bfloat16 or float16 (default: as stored).

    Raises InputError when `out` exists, when the format cannot hold the model (with what to change), and for anything
    `load_model` refuses. Nothing is left half-written.
    """
    if format not in FORMATS:
        raise InputError(f"export: format must be one of {', '.join(FORMATS)}, got {shown(repr(format))}")
    out = Path(out)
    storage.refuse_existing(out)
    opened = open_source(source)
    storage.refuse_inside(out, opened.path)
    text, row = opened.read_text_side(), FORMATS[format]
    if dtype is not None and dtype not in row.dtypes:
        dtype = long_dtype(dtype)  # formats of PyTorch's dtypes take their short names too
    if dtype not in (None, *row.dtypes):
        raise InputError(f"export: dtype must be one of {', '.join(row.dtypes)} for {format}, got {shown(repr(dtype))}")
    row.check(opened.config, text, out)
    row.write(opened.load(), text, out, dtype)
    return _notes(opened, text)


_REMOTE = llama.WRITTEN | {"bias", "final_norm", "num_sink_tokens", "logit_softcap"}
"""The fields of our configs that modeling_sqa.py reads. Any other must have its default."""


def write_like(model: Transformer, folder: Path, source: Path) -> None:
    """Write a directory of the kind of `source`, with its tokenizer: for transformers, or ours.

    A model that no stock class of transformers holds, such as one whose layers differ in their heads, gets our class
    (hf-remote).
    """
    opened = open_source(source)
    text = opened.read_text_side()
    if opened.for_transformers:
        stock = not llama.why_not_stock(model.config)
        _write_hugging_face(model, folder, text, stock=stock)
    else:
        model.save(folder)
        text.write(folder)


def _notes(source: ModelSource, text: TextSide) -> list[str]:
    return [] if text.tokenizer is not None else [f"{source.path} has no tokenizer.json: only the weights were written"]


def _write_hugging_face(model: Transformer, folder: Path, text: TextSide, *, stock: bool) -> None:
    tensors = model.tensors()
    if stock:
        values = llama.stock_config(model.config)
        tensors = llama.stock_state(tensors, model.config)
    else:
        values = {"model_type": storage.MODEL_TYPE, **model.config.to_dict()}
        values |= own_code(folder, "modeling_sqa", AutoConfig="SqaConfig", AutoModelForCausalLM="SqaForCausalLM")
    values["dtype"] = dtype_name(model.lm_head.weight.dtype)
    write_safetensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", values | text.special.to_dict())  # null where transformers would guess
    text.write(folder)


def _check_stock(config: ModelConfig, text: TextSide, out: Path) -> None:
    llama.stock_config(config)


def _check_remote(config: ModelConfig, text: TextSide, out: Path) -> None:
    if not config.causal:
        raise InputError("export: an encoder (causal=False) is no causal language model; nothing to export")
    if unknown := list(config.unusual(_REMOTE)):
        raise InputError(f"export: hf-remote's own class does not know {'; nor '.join(unknown)}")


def _new_hugging_face(model: Transformer, text: TextSide, out: Path, dtype: str | None, *, stock: bool) -> None:
    if dtype is not None:
        model.to(find_dtype(dtype))
    with storage.new_directory(out) as folder:
        _write_hugging_face(model, folder, text, stock=stock)


def _check_gguf(config: ModelConfig, text: TextSide, out: Path) -> None:
    from sqa.interop.gguf_writer import check_gguf

    check_gguf(config, text.tokenizer, out)


def _new_gguf(model: Transformer, text: TextSide, out: Path, dtype: str | None) -> None:
    from sqa.interop.gguf_writer import write_gguf

    write_gguf(model, text, out, dtype or "f32")


@dataclass(frozen=True, kw_only=True)
class Format:
    """A row of the table of formats.

    `check(config, text, out)` raises InputError for what the format cannot hold, before weights are read;
    `write(model, text, out, dtype)` writes `out`, whole or not at all. dtype is one of `dtypes`, or None for the
    format's default. `from_pretrained`: what transformers must be given beside the name to load it from the Hub; None
    where it cannot.
    """

    check: Callable[[ModelConfig, TextSide, Path], None]
    write: Callable[[Transformer, TextSide, Path, str | None], None]
    dtypes: tuple[str, ...] = DTYPES
    from_pretrained: str | None = None


FORMATS = {
    "hf": Format(check=_check_stock, write=partial(_new_hugging_face, stock=True), from_pretrained=""),
    "hf-remote": Format(
        check=_check_remote,
        write=partial(_new_hugging_face, stock=False),
        from_pretrained=", trust_remote_code=True",
    ),
    "gguf": Format(check=_check_gguf, write=_new_gguf, dtypes=("f32", "f16", "bf16", "q8_0")),
}


def own_code(folder: Path, module: str, **classes: str) -> dict[str, Any]:
    """Copy a module of this package into a model's `folder`; returns the fields of config.json that refer to it.

    `classes` maps each Auto class of transformers to the class in the module that it loads, the model's last.
    """
    shutil.copyfile(Path(__file__).with_name(f"{module}.py"), folder / f"{module}.py")
    *_, model_class = classes.values()
    return {
        "architectures": [model_class],
        "auto_map": {auto: f"{module}.{name}" for auto, name in classes.items()},
    }
