"""The checkpoints of the SQA authors (ReactiveAI/SQAT-m and its siblings): config.json and safetensors.

Their rotary pairs are (2j, 2j+1), kept as such; `fc1` holds the up projection above the gate.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sqa.attention.rope import inverse_frequencies
from sqa.config import AttentionConfig, ModelConfig, Rope

_NEEDED = ("num_layers", "vocab_size", "embed_dim", "ff_dim", "att_heads", "seq_len", "att_type")
# fields that change the computation, and the value that this reader implements
_FIXED: dict[str, tuple[Any, ...]] = {
    "use_moe_ff": (False, None),
    "use_moe_att": (False, None),
    "use_gated": (True,),
    "ff_activation": ("swish", "silu"),
    "use_rms_norm": (True,),
    "use_head_norm": (False, None),
}
_NAMES = {
    "model.embedding.weight": "model.embed_tokens.weight",
    "model.head.weight": "lm_head.weight",
    "model.head.bias": "lm_head.bias",
}
_LAYER_NAMES = {
    "attention.q_proj.weight": "self_attn.q_proj.weight",
    "attention.k_proj.weight": "self_attn.k_proj.weight",
    "attention.v_proj.weight": "self_attn.v_proj.weight",
    "attention.out_proj.weight": "self_attn.o_proj.weight",
    "attention.out_proj.bias": "self_attn.o_proj.bias",
    "ff.fc2.weight": "mlp.down_proj.weight",
    "ff.fc2.bias": "mlp.down_proj.bias",
    "norm1.weight": "input_layernorm.weight",
    "norm2.weight": "post_attention_layernorm.weight",
}


def is_reactive(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this format."""
    return "att_type" in values and "embed_dim" in values


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """Read their config.json. Raises ValueError for mixtures of experts and other shapes that are not published."""
    if absent := [name for name in _NEEDED if name not in values]:
        raise ValueError(f"model: config.json (ReactiveAI) lacks {', '.join(absent)}")
    if values.get("use_moe_ff") or values.get("use_moe_att"):
        raise ValueError(
            "model: this ReactiveAI checkpoint is a mixture of experts, which is not supported; "
            "the dense ones are (SQAT-m, sSQAT-m, xSQAT-m, xSMQAT-m and their MHA, GQA and MQA references)"
        )
    for name, allowed in _FIXED.items():
        if values.get(name, allowed[0]) not in allowed:
            raise ValueError(f"model: {name} must be {allowed[0]!r} to be read here, got {values[name]!r}")
    heads, kind = values["att_heads"], values["att_type"]
    groups, queries = values.get("att_groups"), values.get("att_num_query_groups")
    counts = {"mha": (heads, heads), "gqa": (heads, groups), "mqa": (heads, 1), "sqa": (queries, groups)}
    if kind not in counts:
        raise ValueError(f"model: att_type must be one of {', '.join(counts)}, got {kind!r}")
    num_query_heads, num_kv_heads = counts[kind]
    if num_query_heads is None or num_kv_heads is None:
        raise ValueError(f"model: att_type {kind} needs att_groups{' and att_num_query_groups' * (kind == 'sqa')}")
    if values.get("use_flash_attention"):
        warnings.warn(
            "use_flash_attention is set in this checkpoint's config: that path of the authors' library attended across "
            "heads and mixed no tokens; this model attends across tokens, so its outputs differ from those",
            stacklevel=2,
        )
    return ModelConfig(
        vocab_size=values["vocab_size"],
        num_layers=values["num_layers"],
        d_ff=values["ff_dim"],
        max_seq_len=values["seq_len"],
        attention=AttentionConfig(
            d_model=values["embed_dim"],
            num_heads=heads,
            num_query_heads=num_query_heads,
            num_kv_heads=num_kv_heads,
            rope=Rope(interleaved=True),
        ),
        bias=True,
        final_norm=False,
        norm_eps=torch.finfo(torch.float32).eps,
    )


def state_from_reactive(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors from theirs, every one used or checked. Raises ValueError for a name or rotary table not expected."""
    head_dim = config.layers[0].head_dim
    frequencies, _ = inverse_frequencies(Rope(), head_dim)
    result = {}
    for key, value in tensors.items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", key)
        name = layer[2] if layer else ""
        prefix = f"model.layers.{layer[1]}." if layer else ""
        if key in _NAMES:
            result[_NAMES[key]] = value
        elif name in _LAYER_NAMES:
            result[prefix + _LAYER_NAMES[name]] = value
        elif name in ("ff.fc1.linear.weight", "ff.fc1.linear.bias"):
            if value.shape[0] != 2 * config.d_ff:
                raise ValueError(f"model: {key} has {value.shape[0]} rows, expected {2 * config.d_ff} (twice ff_dim)")
            up, gate = value.chunk(2)
            suffix = name.rpartition(".")[2]
            result[f"{prefix}mlp.up_proj.{suffix}"], result[f"{prefix}mlp.gate_proj.{suffix}"] = up, gate
        elif name == "attention.rope.inv_freq":
            if value.shape != frequencies.shape or not torch.allclose(value.float(), frequencies, rtol=1e-2):
                raise ValueError(f"model: {key} is not the rotary table of base 10,000 and head_dim {head_dim}")
        elif name != "attention.rope.cache":  # cos and sin of the same frequencies
            raise ValueError(f"model: unknown tensor {key} in a ReactiveAI checkpoint")
    return result
