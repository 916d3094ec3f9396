"""Smaller numbers of query heads for an existing shape, and configs to train such models from."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqa.config import AttentionConfig, ModelConfig
from sqa.errors import InputError
from sqa.interop import llama
from sqa.interop.source import load_config
from sqa.variants import VARIANTS

_SHARES = [VARIANTS[name].query for name in ("lsqa", "sqa", "xsqa")]


@dataclass(frozen=True, kw_only=True)
class FewerHeads:
    """One choice of head counts. `config` is a ModelConfig, or the given transformers config with these counts.

    `attention_saving`: FLOPs of scores and weighted values in the original shape over those in this one.
    """

    num_query_heads: int
    num_kv_heads: int
    attention_saving: float
    config: Any


def fewer_query_heads(source: str | Path | ModelConfig | Any) -> list[FewerHeads]:
    """Choices of about 3/4, 1/2 and 1/4 of a model's query heads, most heads first.

    `source` is a config of transformers (Llama, Mistral, Qwen2, Qwen3), a ModelConfig, a model directory, a .gguf file
    or a name on the Hub. KV heads and head_dim stay, so the number of query heads is a multiple of the KV heads; only
    multi-head attention (as many KV as query heads) gets fewer KV heads too. Llama's config refuses query heads that do
    not divide the width, so from a LlamaConfig there may be fewer choices.

    Raises InputError for a model with one query head, with layers of several kinds, or of an unknown type.

    From 9 query and 3 KV heads: 6 and 3, then 3 and 3.
    """
    if isinstance(source, str | Path):
        source = load_config(source)
    config = source if isinstance(source, ModelConfig) else _of_transformers(source)
    layer = config.layers[0]
    if len(config.head_counts) > 1:
        raise InputError("source: its layers have different head counts; choose counts for each kind of layer")
    return [
        FewerHeads(
            num_query_heads=query,
            num_kv_heads=kv,
            attention_saving=layer.num_output_heads / max(query, kv),
            config=_with_heads(source, config, query, kv),
        )
        # Llama's config is not saved with heads that do not divide the width
        for query, kv in _counts(layer, dividing=getattr(source, "model_type", None) == "llama")
    ]


def _of_transformers(source: Any) -> ModelConfig:
    values = source.to_dict() if hasattr(source, "to_dict") else {}
    if values.get("model_type") not in llama.MODEL_TYPES:
        raise InputError(
            f"source: must be a ModelConfig, a model, or a transformers config of {', '.join(llama.MODEL_TYPES)}, "
            f"got {type(source).__name__}"
        )
    return llama.model_config(values)


def _counts(layer: AttentionConfig, *, dividing: bool) -> list[tuple[int, int]]:
    """(query heads, KV heads) of each choice; `dividing`: only query heads that divide the width."""
    heads, kv_heads = layer.num_query_heads, layer.num_kv_heads
    possible = list(range(kv_heads, heads, kv_heads)) or list(range(1, heads))
    possible = [n for n in possible if not dividing or layer.d_model % n == 0]
    if not possible:
        raise InputError(f"source: {heads} query heads and {kv_heads} KV heads leave none to take away")
    nearest = {min(possible, key=lambda n: (abs(n - share * heads), -n)) for share in _SHARES}
    return [(n, min(n, kv_heads)) for n in sorted(nearest, reverse=True)]


def _with_heads(source: Any, config: ModelConfig, query: int, kv: int) -> Any:
    if isinstance(source, ModelConfig):
        layers = tuple(each.replace(num_query_heads=query, num_kv_heads=kv) for each in config.layers)
        return config.replace(attention=layers)
    changed = copy.deepcopy(source)
    changed.head_dim = config.layers[0].head_dim  # else width and heads would decide it
    changed.num_attention_heads, changed.num_key_value_heads = query, kv
    return changed
