"""BERT encoders, stock and with fewer heads: read strictly, given other heads, written for transformers."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sqa import storage
from sqa.config import AttentionConfig
from sqa.dtypes import dtype_name
from sqa.errors import InputError, MissingExtraError
from sqa.files import write_json, write_safetensors
from sqa.interop.text import FILES, read_text_side
from sqa.interop.writers import own_code
from sqa.records import read_json

try:
    from transformers import BertConfig, BertModel

    from sqa.interop.modeling_sqa_bert import SqaBertConfig, SqaBertModel
except ImportError:
    raise MissingExtraError("BERT models need transformers", "hf") from None

MODEL_TYPES = {"bert": (BertConfig, BertModel), "sqa_bert": (SqaBertConfig, SqaBertModel)}
SENTENCE_FILES = ("vocab.txt", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
_PLAIN: dict[str, tuple[Any, ...]] = {
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "position_embedding_type": ("absolute",),
    "quantization_config": (None,),
}
_HOW_TO_RUN = ("attn_implementation", "return_dict")  # the caller's choice, not the file's
_OURS = ("num_query_heads", "num_kv_heads", "head_dim")
_BY_HEADS = re.compile(r"\.attention\.(self\.(query|key|value)\.(weight|bias)|output\.dense\.weight)$")


def load_config(directory: Path) -> BertConfig:
    """The config of a directory that `load_bert` reads. Raises InputError for any other."""
    values = storage.read_config(directory)
    kind = values.get("model_type")
    if kind not in tuple(MODEL_TYPES):
        raise InputError(f"model: config.json has model_type {kind!r}; supported here: {', '.join(MODEL_TYPES)}")
    storage.require_values(values, _PLAIN)
    counts = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
        "max_position_embeddings", "type_vocab_size", *_OURS,
    )  # fmt: skip
    with storage.in_file(directory / "config.json"):
        storage.require_counts(values, *(name for name in counts if name in values))
    with _plain_errors(directory):
        config = MODEL_TYPES[kind][0].from_dict({key: values[key] for key in values if key not in _HOW_TO_RUN})
    _side_files(directory, values, config.vocab_size)
    return config


def _side_files(directory: Path, values: Mapping[str, Any], vocab_size: int) -> dict[str, bytes]:
    """The files that `save_bert` copies, by their path in the directory: the tokenizer's and sentence-transformers'.

    The latter has JSON files, and a folder for each further module, such as 1_Pooling. Raises InputError for a damaged
    file and for a link to another place.
    """
    read_text_side(directory, values, vocab_size=vocab_size)
    found = [directory / name for name in (*FILES, *SENTENCE_FILES) if storage.regular_file(directory / name)]
    for module in sorted(directory.glob("[0-9]_*")):
        if module.is_symlink():
            raise InputError(f"model: {module} is a link to another place; put the folder itself there")
        if not module.is_dir():
            raise InputError(f"model: {module} must be a folder, as sentence-transformers writes it")
        found += [path for path in sorted(module.rglob("*")) if not path.is_dir() and storage.regular_file(path)]
    for path in found:
        if path.suffix == ".json" and path.name != "modules.json":  # that one is a list
            read_json(path)
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


@contextmanager
def _plain_errors(directory: Path) -> Iterator[None]:
    """Raise InputError for what transformers raises, of any kind, when it cannot build a config."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"model: {directory / 'config.json'} is no BERT's: {' '.join(str(error).split())}") from None


def load_bert(directory: Path) -> BertModel:
    """A BertModel, or a SqaBertModel where `save_bert` wrote the directory, in the dtype of its file and in eval mode.

    Tensor names may start with "bert."; a pooler may be absent. Raises InputError, naming what is wrong, for anything
    missing, unknown, damaged, misshapen, pickled or quantised, and for anything but a plain encoder.
    """
    config = load_config(directory)
    tensors = {key.removeprefix("bert."): value for key, value in storage.read_tensors(directory).items()}
    for buffer in ("position_ids", "token_type_ids"):  # older files store them
        tensors.pop(f"embeddings.{buffer}", None)
    if heads := [key for key in tensors if key.startswith(("cls.", "classifier.", "qa_outputs."))]:
        raise InputError(
            f"model: {directory} has a task's head ({heads[0]}), which an encoder has no place for; write one without: "
            f"AutoModel.from_pretrained(IN).save_pretrained(OUT)"
        )
    storage.check_layers(str(directory), config.num_hidden_layers, len(tensors))
    model_class = MODEL_TYPES[config.model_type][1]
    with _plain_errors(directory):
        with torch.device("meta"):  # sizes that do not fit are found before memory is asked for
            expected = model_class(config, add_pooling_layer="pooler.dense.weight" in tensors).state_dict()
        storage.check_tensors(expected, tensors, str(directory))
        model = model_class(config, add_pooling_layer="pooler.dense.weight" in tensors)
    model.to(tensors["embeddings.word_embeddings.weight"].dtype).load_state_dict(tensors)
    return model.eval()


def attention_config(config: BertConfig) -> AttentionConfig:
    """The shape of every attention layer. Positions are learned embeddings, so there is no RoPE."""
    return AttentionConfig(
        d_model=config.hidden_size,
        num_heads=config.num_attention_heads,
        causal=False,
        qkv_bias=True,
        rope=None,
        **{name: getattr(config, name) for name in _OURS if hasattr(config, name)},
    )


def with_heads(model: BertModel, shape: AttentionConfig) -> SqaBertModel:
    """A copy of `model` with the heads of `shape`, same dtype, device and mode.

    Weights and biases of `attention.self.{query,key,value}` and `attention.output.dense.weight` are random, for the
    caller to fill. Raises ValueError for fewer query than KV heads.
    """
    ours = {name: getattr(shape, name) for name in _OURS}
    config = SqaBertConfig.from_dict(model.config.to_dict() | {"model_type": SqaBertConfig.model_type} | ours)
    config._attn_implementation = model.config._attn_implementation
    new = SqaBertModel(config, add_pooling_layer=model.pooler is not None).to(model.device, model.dtype)
    kept = {key: value for key, value in model.state_dict().items() if not _BY_HEADS.search(key)}
    new.load_state_dict(kept, strict=False)
    return new.train(model.training)


def save_bert(model: SqaBertModel, folder: Path, source: Path) -> None:
    """Write `model` into `folder`, for AutoModel with trust_remote_code; `_side_files` are copied from `source`."""
    values = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        values.pop(name, None)
    values.setdefault("tokenizer_class", "BertTokenizer")  # transformers' default for bert
    values["dtype"] = dtype_name(model.dtype)
    values |= own_code(folder, "modeling_sqa_bert", AutoConfig="SqaBertConfig", AutoModel="SqaBertModel")
    write_safetensors(folder / "model.safetensors", model.state_dict())
    write_json(folder / "config.json", values)
    for name, content in _side_files(source, storage.read_config(source), model.config.vocab_size).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def embed(model: BertModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Sentence embeddings (B, d_model), fp32 of length 1: the mean of the last hidden state over real tokens.

    input_ids and attention_mask (nonzero = real): (B, T).
    """
    hidden = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
    real = attention_mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * real).sum(1) / real.sum(1).clamp(min=1), dim=-1)
