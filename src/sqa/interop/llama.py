"""Hugging Face directories of Llama, Mistral, Qwen2 and Qwen3, both ways.

A layer with fewer query heads is a plain Llama layer with num_attention_heads = Hq and an explicit head_dim.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sqa.config import AttentionConfig, ModelConfig, Rope, RopeScaling
from sqa.errors import InputError, shown
from sqa.records import read_value
from sqa.storage import require_counts, require_values

# each model_type, and the values that transformers takes for fields that its config.json lacks
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}
MODEL_TYPES = tuple(_DEFAULTS)
# the fields of RopeScaling that each rope type has; transformers says original_max_position_embeddings for the length
_SCALING_FIELDS = {
    "linear": ("factor",),
    "llama3": ("factor", "original_max_seq_len", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_seq_len", "beta_fast", "beta_slow", "attention_factor"),
}
# fields of one meaning: their names in config.json, and ours in ModelConfig
_SIZES = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "max_seq_len",
}
_FIELDS = {**_SIZES, "rms_norm_eps": "norm_eps", "tie_word_embeddings": "tie_embeddings"}
WRITTEN = frozenset({
    *_FIELDS.values(), "attention", "d_model", "num_heads", "num_query_heads", "num_kv_heads", "head_dim", "causal",
    "window", "qkv_bias", "qk_norm", "scale", "rope", "base", "interleaved", "scaling", "kind",
    *(name for names in _SCALING_FIELDS.values() for name in names),
})  # fmt: skip
"""The fields of our configs that `stock_config` handles. Any other must have its default."""
OUTER = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
"""The layers that get a bias by our `bias`, beside the head."""
_ROTARY = re.compile(r"\.self_attn\.[qk]_(proj|norm)\.")  # tensors whose rows are rotary dimensions


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """Read a config.json of one of MODEL_TYPES. Raises InputError for features that ours does not have."""
    kind = values["model_type"]
    values = {**_DEFAULTS[kind], **values}
    optional = [name for name in ("head_dim", "num_key_value_heads") if values.get(name)]
    require_counts(values, "hidden_size", "num_attention_heads", *_SIZES, *optional)
    require_values(values, {"hidden_act": ("silu",), "quantization_config": (None,)})
    d_model, heads = values["hidden_size"], values["num_attention_heads"]
    head_dim = values.get("head_dim") or d_model // heads
    attention_bias = bool(values.get("attention_bias")) and kind in ("llama", "qwen3")
    attention = AttentionConfig(
        d_model=d_model,
        num_heads=max(heads, d_model // max(head_dim, 1)),  # the nominal count of a layer with fewer query heads
        num_query_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        qkv_bias=kind == "qwen2" or attention_bias,
        qk_norm=kind == "qwen3",
        rope=_read_rope(values),
    )
    return ModelConfig(
        **{ours: values[theirs] for theirs, ours in _SIZES.items()},
        attention=tuple(attention.replace(window=window) for window in _windows(values)),
        bias=attention_bias or (kind == "llama" and bool(values.get("mlp_bias"))),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        norm_eps=values.get("rms_norm_eps", 1e-6),
    )


def _windows(values: Mapping[str, Any]) -> list[int | None]:
    count, window = values["num_hidden_layers"], values.get("sliding_window")
    if values["model_type"] == "mistral":
        return [window] * count
    if not values.get("use_sliding_window", False) or window is None:
        return [None] * count
    first = read_value(int, values.get("max_window_layers", 28), "model: max_window_layers")
    types = values.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != count or any(kind not in known for kind in types):
        raise InputError(
            f"model: layer_types must be {count} of full_attention and sliding_attention, got {shown(repr(types))}"
        )
    return [window if kind == "sliding_attention" else None for kind in types]


def _read_rope(values: Mapping[str, Any]) -> Rope:
    """`rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of before."""
    given: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):  # of both the older one alone is read, as in transformers
        if not isinstance(values.get(name) or {}, dict):
            raise InputError(f"model: {name} must be a JSON object, got {shown(repr(values[name]))}")
        if values.get(name):
            given = {key: value for key, value in values[name].items() if value is not None}
    base = given.pop("rope_theta", None) or values.get("rope_theta") or 10_000.0
    kind = given.pop("rope_type", given.pop("type", "default"))
    partial = given.pop("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise InputError(
            f"model: partial_rotary_factor must be 1, got {shown(repr(partial))}; "
            f"rotating part of a head is not supported"
        )
    if kind == "default":
        return Rope(base=base)
    if kind not in tuple(_SCALING_FIELDS):
        raise InputError(
            f"model: rope type must be default, {', '.join(_SCALING_FIELDS)} to be read here, got {shown(repr(kind))}"
        )
    length = given.pop("original_max_position_embeddings", values["max_position_embeddings"])
    if kind != "linear":
        given["original_max_seq_len"] = length
    if unknown := set(given) - set(_SCALING_FIELDS[kind]):
        raise InputError(f"model: rope type {kind} has fields not read here: {', '.join(sorted(unknown))}")
    if "factor" not in given:
        raise InputError(f"model: rope type {kind} lacks factor")
    return Rope(base=base, scaling=RopeScaling(kind=kind, **given))


def state_from_stock(
    tensors: Mapping[str, Tensor], config: ModelConfig, values: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Their tensors under our names, which are the same. Missing biases become zero; rotary tables are dropped."""
    tensors = {key: value for key, value in tensors.items() if not key.endswith("rotary_emb.inv_freq")}
    if not config.bias:
        return tensors
    absent = [part for part in OUTER if not values.get("mlp_bias" if "mlp" in part else "attention_bias")]
    return with_zero_biases(tensors, config, absent)


def with_zero_biases(tensors: Mapping[str, Tensor], config: ModelConfig, parts: Iterable[str]) -> dict[str, Tensor]:
    """The tensors, with zeros added as biases of the head and of these parts of each layer."""
    dtype = next((tensor.dtype for tensor in tensors.values()), None)
    result = {**tensors, "lm_head.bias": torch.zeros(config.vocab_size, dtype=dtype)}
    for part in parts:
        size = config.d_ff if part in ("mlp.gate_proj", "mlp.up_proj") else config.d_model
        result |= {f"model.layers.{i}.{part}.bias": torch.zeros(size, dtype=dtype) for i in range(config.num_layers)}
    return result


def stock_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json, without dtype, of the stock class for this model: Llama, Mistral, Qwen2 or Qwen3.

    Raises InputError, with the reasons and what to change, when there is none.
    """
    layer, kind = config.layers[0], _stock_kind(config)
    windows = [each.window for each in config.layers]
    if reasons := why_not_stock(config):
        raise InputError(
            f"export: no stock Hugging Face class holds {'; nor '.join(reasons)}; "
            f"train without it, or export with format 'hf-remote', which ships the class"
        )
    assert layer.rope is not None
    values: dict[str, Any] = {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        **{theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()},
        "hidden_size": config.d_model,
        "num_attention_heads": layer.num_query_heads,
        "num_key_value_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_parameters": _write_rope(layer.rope),
    }
    if kind in ("llama", "qwen3"):
        values["attention_bias"] = False
    if kind == "llama":
        values["mlp_bias"] = False
    elif kind == "mistral":
        values["sliding_window"] = layer.window
    else:
        window = next((each for each in windows if each is not None), None)
        values |= {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows],
        }
    return values


def _stock_kind(config: ModelConfig) -> str:
    """The model_type of the plainest class that may hold this model."""
    layer = config.layers[0]
    if layer.qk_norm:
        return "qwen3"
    if layer.qkv_bias:
        return "qwen2"
    return "llama" if layer.window is None and config.d_model % layer.num_query_heads == 0 else "mistral"


def why_not_stock(config: ModelConfig) -> list[str]:
    """What no stock class of transformers holds, and in parentheses what to change; empty if one holds the model."""
    layers = config.layers
    first = replace(layers[0], window=None, num_sink_tokens=0)
    unlike = any(replace(each, window=None, num_sink_tokens=0) != first for each in layers)
    windows = {each.window for each in layers}
    mixed = len(windows) > 1 and _stock_kind(config) in ("llama", "mistral")
    checks = [
        (
            not config.causal,
            "an encoder (causal=False): it is no causal language model, keep it as Transformer.save wrote it",
        ),
        (unlike, "layers with different head counts (one AttentionConfig for all)"),
        (first.num_query_heads < first.num_kv_heads, "fewer query than KV heads (num_query_heads >= num_kv_heads)"),
        (len(windows - {None}) > 1, "windows of several sizes (one window)"),
        (mixed, "windows on some layers only (without QK-norm; use one window on all layers)"),
        (first.scale not in (None, first.head_dim**-0.5), "another attention scale (scale=None)"),
        (first.rope is None, "attention without rotary positions (rope=Rope())"),
        (first.qk_norm and first.qkv_bias, "QK-norm together with qkv_bias (one of them)"),
    ]  # fmt: skip
    return [*(reason for applies, reason in checks if applies), *config.unusual(WRITTEN)]


def _write_rope(rope: Rope) -> dict[str, Any]:
    if rope.scaling is None:
        return {"rope_type": "default", "rope_theta": rope.base}
    values = {"rope_type": rope.scaling.kind, "rope_theta": rope.base}
    for name in _SCALING_FIELDS[rope.scaling.kind]:
        if (value := getattr(rope.scaling, name)) is not None:
            values[name.replace("max_seq_len", "max_position_embeddings")] = value
    return values


def stock_state(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors, with rotary pairs in Llama's order."""
    rope, head_dim = config.layers[0].rope, config.layers[0].head_dim
    return repaired(tensors, head_dim, interleaved=False) if rope is not None and rope.interleaved else tensors


def repaired(tensors: Mapping[str, Tensor], head_dim: int, *, interleaved: bool) -> dict[str, Tensor]:
    """Reorder the rotary pairs of queries and keys: (j, j + head_dim/2) to (2j, 2j+1) if `interleaved`, or back."""
    shape = (-1, 2, head_dim // 2) if interleaved else (-1, head_dim // 2, 2)
    return {
        key: value.unflatten(0, shape).transpose(1, 2).flatten(0, 2).contiguous() if _ROTARY.search(key) else value
        for key, value in tensors.items()
    }
