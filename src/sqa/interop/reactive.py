"""The checkpoints of the SQA authors (ReactiveAI/SQAT-m and its siblings): config.json and safetensors.

Their rotary pairs are (2j, 2j+1), kept as such; `fc1` holds the up projection above the gate.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sqa.attention.rope import inverse_frequencies
from sqa.config import AttentionConfig, ModelConfig, Rope
from sqa.errors import InputError, shown
from sqa.storage import require_counts, require_values

# fields that change what a model computes, and the values that this reader supports
_FIXED: dict[str, tuple[Any, ...]] = {
    "use_gated": (True,),
    "ff_activation": ("swish", "silu"),
    "use_rms_norm": (True,),
    "use_head_norm": (False, None),
}
# sizes, theirs and ours
_SIZES = {"vocab_size": "vocab_size", "num_layers": "num_layers", "ff_dim": "d_ff", "seq_len": "max_seq_len"}
# parts of tensor names, theirs and ours
_NAMES = {
    "model.embedding.": "model.embed_tokens.",
    "model.head.": "lm_head.",
    ".attention.out_proj.": ".self_attn.o_proj.",
    ".attention.": ".self_attn.",
    ".ff.fc2.": ".mlp.down_proj.",
    ".norm1.": ".input_layernorm.",
    ".norm2.": ".post_attention_layernorm.",
}


def is_reactive(values: Mapping[str, Any]) -> bool:
    """Whether a config.json has this format."""
    return "att_type" in values and "embed_dim" in values


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """Read their config.json. Raises InputError for mixtures of experts and other unsupported shapes."""
    require_counts(values, *_SIZES, "embed_dim", "att_heads")
    if values.get("use_moe_ff") or values.get("use_moe_att"):
        raise InputError(
            "model: this ReactiveAI checkpoint is a mixture of experts, which is not supported; "
            "the dense ones are (SQAT-m, sSQAT-m, xSQAT-m, xSMQAT-m and their MHA, GQA and MQA references)"
        )
    require_values(values, _FIXED)
    heads, kind = values["att_heads"], values["att_type"]
    groups, queries = values.get("att_groups"), values.get("att_num_query_groups")
    counts = {"mha": (heads, heads), "gqa": (heads, groups), "mqa": (heads, 1), "sqa": (queries, groups)}
    if kind not in tuple(counts):
        raise InputError(f"model: att_type must be one of {', '.join(counts)}, got {shown(repr(kind))}")
    num_query_heads, num_kv_heads = counts[kind]
    if num_query_heads is None or num_kv_heads is None:
        raise InputError(f"model: att_type {kind} needs att_groups{' and att_num_query_groups' * (kind == 'sqa')}")
    if values.get("use_flash_attention"):
        warnings.warn(
            "use_flash_attention is set in this checkpoint's config: that path of the authors' library attended across "
            "heads and mixed no tokens; this model attends across tokens, so its outputs differ from those",
            stacklevel=2,
        )
    return ModelConfig(
        **{ours: values[theirs] for theirs, ours in _SIZES.items()},
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
    """Their tensors under our names. Unknown names are kept, for `Transformer.from_tensors` to refuse.

    Raises InputError for an unexpected rotary table or number of rows of `fc1`.
    """
    head_dim = config.layers[0].head_dim
    frequencies, _ = inverse_frequencies(Rope(), head_dim)
    result = {}
    for key, value in tensors.items():
        layer, found, kind = key.partition(".ff.fc1.linear.")
        if found:
            if value.ndim == 0 or value.shape[0] != 2 * config.d_ff:
                raise InputError(
                    f"model: {key} is {tuple(value.shape)}, expected {2 * config.d_ff} rows (twice ff_dim)"
                )
            result[f"{layer}.mlp.up_proj.{kind}"], result[f"{layer}.mlp.gate_proj.{kind}"] = value.chunk(2)
        elif key.endswith(".attention.rope.inv_freq"):
            if value.shape != frequencies.shape or not torch.allclose(value.float(), frequencies, rtol=1e-2):
                raise InputError(f"model: {key} is not the rotary table of base 10,000 and head_dim {head_dim}")
        elif not key.endswith(".attention.rope.cache"):  # cos and sin of the same frequencies
            for theirs, ours in _NAMES.items():
                key = key.replace(theirs, ours)
            result[key] = value
    return result
