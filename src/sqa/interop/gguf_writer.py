"""Writer of GGUF files for llama.cpp, with weights, tokenizer and metadata, by the `gguf` package."""

import errno
import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor

from sqa.config import ModelConfig
from sqa.errors import InputError, load_extra
from sqa.files import replacing
from sqa.interop.gguf_reader import INTERLEAVED, their_names
from sqa.interop.gguf_tokenizer import pre_of
from sqa.interop.llama import WRITTEN, repaired, stock_config, stock_state
from sqa.interop.text import TextSide
from sqa.model import Transformer

gguf = load_extra("gguf", "GGUF needs the gguf package", "gguf")
_WRITTEN = WRITTEN - {"window", "qkv_bias", "scaling"}


def check_gguf(config: ModelConfig, tokenizer: Any, out: Path) -> None:
    """Raise InputError, which says what to change, for what no file of architecture llama, deci or qwen3 can hold."""
    if out.suffix != ".gguf":
        raise InputError(f"export: gguf is one file whose name ends in .gguf, got {out.name}")
    for layer in set(config.layers):  # the counts of each, given to all, must make a stock model
        counts = {"num_query_heads": layer.num_query_heads, "num_kv_heads": layer.num_kv_heads}
        stock_config(config.replace(attention=tuple(each.replace(**counts) for each in config.layers)))
    layer = config.layers[0]
    if layer.qk_norm and len(set(config.layers)) > 1:
        raise InputError(
            "export: llama.cpp has no architecture with QK-norm whose layers differ in their heads; export as hf-remote"
        )
    elsewhere = "export as hf, which llama.cpp's convert_hf_to_gguf.py reads"
    if left_out := list(config.unusual(_WRITTEN)):
        raise InputError(f"export: gguf is written without {'; nor '.join(left_out)}; {elsewhere}")
    if tokenizer is not None and pre_of(tokenizer) is None:
        raise InputError(
            f"export: gguf is written for byte-level BPE that has merges and splits text as GPT-2, SmolLM, Llama 3, "
            f"Qwen2, Tekken or GPT-4o do, this tokenizer does not; {elsewhere}"
        )


def write_gguf(model: Transformer, text: TextSide, out: Path, dtype: str) -> None:
    """Write `out`, whole or not at all, after check_gguf. Norms and some odd rows keep a wider dtype (`_quantized`)."""
    config, layer = model.config, model.config.layers[0]
    query_heads: Any = [each.num_query_heads for each in config.layers]
    kv_heads: Any = [each.num_kv_heads for each in config.layers]
    if len(set(config.layers)) > 1:
        arch = "deci"  # a llama whose layers have head counts of their own
    else:
        arch, query_heads, kv_heads = "qwen3" if layer.qk_norm else "llama", query_heads[0], kv_heads[0]
    tensors = stock_state(model.float().tensors(), config)
    if arch in INTERLEAVED:
        tensors = repaired(tensors, layer.head_dim, interleaved=True)
    kind, names = gguf.GGMLQuantizationType[dtype.upper()], their_names(config)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary, closing(gguf.GGUFWriter(temporary, arch)) as writer:
        writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if dtype == 'f32' else 'MOSTLY'}_{dtype.upper()}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_seq_len)
        writer.add_embedding_length(config.d_model)
        writer.add_block_count(config.num_layers)
        writer.add_feed_forward_length(config.d_ff)
        writer.add_head_count(query_heads)
        writer.add_head_count_kv(kv_heads)
        writer.add_key_length(layer.head_dim)
        writer.add_value_length(layer.head_dim)
        writer.add_rope_dimension_count(layer.head_dim)
        assert layer.rope is not None  # check_gguf
        writer.add_rope_freq_base(layer.rope.base)
        writer.add_layer_norm_rms_eps(config.norm_eps)
        if text.tokenizer is not None:
            _add_tokenizer(writer, text.tokenizer, text, config.vocab_size)
        else:
            writer.add_tokenizer_model("no_vocab")  # llama.cpp then reads token ids
        for key, tensor in tensors.items():
            data, stored = _quantized(tensor, kind)
            writer.add_tensor(names[key], data, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        try:
            writer.write_tensors_to_file()
        except OSError as error:
            if error.errno is not None:
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None  # numpy counts bytes instead


def _quantized(tensor: Tensor, kind: Any) -> tuple[np.ndarray, Any]:
    """The data and dtype of one tensor: F32 for vectors, F16 for rows that blocks do not divide."""
    data = tensor.numpy()
    block_size, _ = gguf.GGML_QUANT_SIZES[kind]
    if data.ndim == 1:
        kind = gguf.GGMLQuantizationType.F32
    elif data.shape[-1] % block_size:
        kind = gguf.GGMLQuantizationType.F16
    return gguf.quants.quantize(data, kind), kind


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, text: TextSide, vocab_size: int) -> None:
    values = json.loads(tokenizer.to_str())
    added = {
        entry["id"]: gguf.TokenType.CONTROL if entry["special"] else gguf.TokenType.USER_DEFINED
        for entry in values["added_tokens"]
    }
    tokens = [f"<|unused{i}|>" for i in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for token, index in tokenizer.get_vocab().items():
        tokens[index] = token
        types[index] = added.get(index, gguf.TokenType.NORMAL)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in values["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_of(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(tokenizer.encode("").ids[:1] == [text.special.bos])
    if text.special.bos is not None:
        writer.add_bos_token_id(text.special.bos)
    ends = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, end_id in zip(ends, text.special.eos, strict=False):
        add(end_id)
    if text.special.pad is not None:
        writer.add_pad_token_id(text.special.pad)
    if text.chat_template is not None:
        writer.add_chat_template(text.chat_template)
