"""Models in and out of files: ours, Hugging Face's, llama.cpp's and the SQA authors'."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqa import storage
from sqa.config import ModelConfig
from sqa.errors import InputError, MissingExtraError
from sqa.files import write_json, write_safetensors
from sqa.interop import llama, reactive
from sqa.interop.hub import local_directory, push_to_hub
from sqa.interop.replace import Replacement, replace_attention
from sqa.model import Transformer

__all__ = [
    "Replacement",
    "check_like",
    "end_token",
    "export",
    "import_model",
    "load_config",
    "load_model",
    "push_to_hub",
    "replace_attention",
    "write_like",
]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_config(source: str | Path) -> ModelConfig:
    """The ModelConfig of a model directory of any kind that `load_model` reads."""
    return _read_config(local_directory(source))[0]


def load_model(source: str | Path) -> Transformer:
    """Read a model: our own directory, a Hugging Face one (Llama, Mistral, Qwen2, Qwen3) or one of the SQA authors.

    `source` is a directory or a name on the Hub ("ReactiveAI/SQAT-m"). The dtype is that of the file.
    Raises ValueError, naming what is wrong, for anything missing, unknown, damaged, misshapen or pickled.
    """
    directory = local_directory(source)
    config, to_ours = _read_config(directory)
    return Transformer.from_tensors(config, to_ours(storage.read_tensors(directory)), str(directory))


def _read_config(directory: Path) -> tuple[ModelConfig, Callable[[dict[str, Tensor]], dict[str, Tensor]]]:
    """The config of a model directory, and what makes our tensors of those in its files."""
    values = storage.read_config(directory)
    kind = values.get("model_type")
    if kind == storage.MODEL_TYPE:
        return storage.model_config(values), dict
    if kind in llama.MODEL_TYPES:
        config = llama.model_config(values)
        return config, partial(llama.state_from_stock, config=config, values=values)
    if reactive.is_reactive(values):
        config = reactive.model_config(values)
        return config, partial(reactive.state_from_reactive, config=config)
    raise InputError(
        f"model: config.json has model_type {kind!r}; supported: {storage.MODEL_TYPE}, {', '.join(llama.MODEL_TYPES)} "
        f"and ReactiveAI's SQAT format"
    )


def import_model(source: str | Path, out: Path) -> list[str]:
    """Read a model of any kind and write it as our own directory, with its tokenizer; returns notes to print."""
    storage.refuse_existing(out)
    directory = local_directory(source)
    model = load_model(directory)
    tokenizer = storage.read_tokenizer(directory, model.config.vocab_size)
    with storage.new_directory(out) as folder:
        model.save(folder)
        storage.copy_tokenizer(directory, folder)
    return _notes(directory, tokenizer)


def export(source_dir: Path, out: Path, *, format: str, dtype: str | None = None) -> list[str]:
    """Write a model for other software; returns notes to print.

    format "hf": a stock transformers class, loaded with no code of ours; "hf-remote": our class as one file beside the
    weights (trust_remote_code); "gguf": one file for llama.cpp. dtype: float32, float16 or bfloat16 (default: as
    stored), for gguf f32 (default), f16, bf16 or q8_0.

    Raises ValueError when `out` exists, when the format cannot hold the model (with what to change), and for anything
    `load_model` refuses. Nothing is left half-written.
    """
    storage.refuse_existing(out)
    config = load_config(source_dir)
    tokenizer = storage.read_tokenizer(source_dir, config.vocab_size)
    # what a format cannot hold is refused before the weights are read
    if format == "gguf":
        from sqa.interop.gguf import check_gguf, write_gguf

        check_gguf(config, tokenizer, out, dtype or "f32")
        write_gguf(load_model(source_dir), tokenizer, out, dtype or "f32")
        return _notes(source_dir, tokenizer)
    if format == "hf":
        llama.stock_config(config)
    elif format != "hf-remote":
        raise InputError(f"export: format must be one of hf, hf-remote, gguf, got {format!r}")
    elif not config.causal:
        raise InputError("export: an encoder (causal=False) is no causal language model; nothing to export")
    if dtype is not None and dtype not in _DTYPES:
        raise InputError(f"export: dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    model = load_model(source_dir)
    if dtype is not None:
        model.to(_DTYPES[dtype])
    with storage.new_directory(out) as folder:
        _write_hugging_face(model, folder, source_dir, tokenizer, stock=format == "hf")
    return _notes(source_dir, tokenizer)


def check_like(config: ModelConfig, source: Path) -> None:
    """Raise ValueError when a model of this config cannot be written as the kind of directory that `source` is."""
    if storage.read_config(source).get("model_type") in llama.MODEL_TYPES:
        llama.stock_config(config)


def write_like(model: Transformer, folder: Path, source: Path) -> None:
    """Write the kind of directory that `source` is: a stock Hugging Face one, else ours; with its tokenizer."""
    if storage.read_config(source).get("model_type") in llama.MODEL_TYPES:
        tokenizer = storage.read_tokenizer(source, model.config.vocab_size)
        _write_hugging_face(model, folder, source, tokenizer, stock=True)
    else:
        model.save(folder)
        storage.copy_tokenizer(source, folder)


def end_token(source: Path, tokenizer: Any) -> int | None:
    """The id that closes a document: what our tokenizers call so, else the first eos_token_id of config.json."""
    from sqa.data.tokenizer import END_TOKEN

    own: int | None = tokenizer.token_to_id(END_TOKEN)
    given = storage.read_config(source).get("eos_token_id") if own is None else own
    return given[0] if isinstance(given, list) else given


def _notes(source: Path, tokenizer: Any) -> list[str]:
    return [] if tokenizer is not None else [f"{source} has no tokenizer.json: only the weights were written"]


def _write_hugging_face(model: Transformer, folder: Path, source: Path, tokenizer: Any, *, stock: bool) -> None:
    tensors = model.tensors()
    if stock:
        values = llama.stock_config(model.config)
        tensors = llama.stock_state(tensors, model.config)
    else:
        values = {"model_type": storage.MODEL_TYPE, **model.config.to_dict()} | {
            "architectures": ["SqaForCausalLM"],
            "auto_map": {
                "AutoConfig": "modeling_sqa.SqaConfig",
                "AutoModelForCausalLM": "modeling_sqa.SqaForCausalLM",
            },
        }
        shutil.copyfile(Path(__file__).with_name("modeling_sqa.py"), folder / "modeling_sqa.py")
    values["dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
    write_safetensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", values | _write_tokenizer(folder, source, tokenizer, model.config))


def _write_tokenizer(folder: Path, source: Path, tokenizer: Any, config: ModelConfig) -> dict[str, Any]:
    """The tokenizer's files, and the token ids that belong into config.json (None, where transformers would guess)."""
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer is None:
        return ids
    if (source / "tokenizer_config.json").is_file():  # it came with an imported model
        storage.copy_tokenizer(source, folder)
        if (source / "generation_config.json").is_file():
            kept = storage.read_json(source / "generation_config.json")
            ids |= {name: kept.get(name) for name in ids}
        return ids
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        raise MissingExtraError("exporting a tokenizer needs transformers", "hf") from None
    from sqa.data.tokenizer import END_TOKEN, PAD_TOKEN

    end_id, pad_id = tokenizer.token_to_id(END_TOKEN), tokenizer.token_to_id(PAD_TOKEN)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TOKEN if end_id is not None else None,
        pad_token=PAD_TOKEN if pad_id is not None else None,
        model_max_length=config.max_seq_len,
        padding_side="left",
    ).save_pretrained(folder)
    return ids | {"eos_token_id": end_id, "pad_token_id": pad_id}
