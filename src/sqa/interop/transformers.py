"""Our attention inside transformers: `attn_implementation="sqa"`, and the Auto classes for hf-remote models."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from sqa.attention.kernels import attend
from sqa.attention.masks import Mask
from sqa.attention.reference import reference_attention
from sqa.errors import InputError
from sqa.interop.modeling_sqa import SqaConfig, SqaForCausalLM


def register() -> None:
    """Make `attn_implementation="sqa"` known to every transformers model, and model_type "sqa" to the Auto classes.

    The attention then uses our choice of kernels. In uncached calls they know of causality, window and padding, and may
    skip what these hide; other masks (static caches, packed sequences) are dense, as with `sdpa`.
    """
    AttentionInterface.register("sqa", sqa_attention)
    AttentionMaskInterface.register("sqa", sqa_mask)
    AutoConfig.register("sqa", SqaConfig, exist_ok=True)
    AutoModelForCausalLM.register(SqaConfig, SqaForCausalLM, exist_ok=True)


def sqa_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **rest: Any,  # the interface passes what every mask function may need
) -> Tensor | None:
    """None: causal (windowed if the layer is) and unpadded. (B, T) bool: that over the first T keys, True = real.

    (B, 1, T, S) bool: dense. While a graph is compiled no number of a tensor is read.
    """
    compiling = torch.compiler.is_compiling()
    first = int(q_offset) == 0 if isinstance(q_offset, int) or not compiling else False
    windowed = local_size is None or local_size == getattr(config, "sliding_window", None)  # not chunked
    if allow_is_causal_skip and first and windowed and kv_length >= q_length:
        if attention_mask is not None and (compiling or not bool(attention_mask[:, :q_length].all())):
            return attention_mask[:, :q_length].bool()
        if kv_length == q_length:
            return None
        # the rest of a static cache is empty
        device = rest.get("device") if attention_mask is None else attention_mask.device
        return torch.ones(batch_size, q_length, dtype=torch.bool, device=device)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **rest,
    )


def sqa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **rest: Any,  # the interface passes what every attention function may need
) -> tuple[Tensor, None]:
    """The attention function of the interface: query (B, Hq, T, D), key and value (B, Hkv, S, D) -> (B, T, Hq, D).

    attention_mask: as `sqa_mask` makes it. Under autocast the result has its dtype, whatever query and key have.

    Raises InputError for what our kernels cannot honour (dropout, learned sinks, position biases), and for several
    queries over more keys without a mask, which would not say where the queries stand.
    """
    for name, used in (
        ("dropout", dropout),
        ("s_aux", rest.get("s_aux") is not None),
        ("position_bias", rest.get("position_bias") is not None),
    ):
        if used:
            raise InputError(f"attention 'sqa' has no {name}; use attn_implementation='eager' or set it to nothing")
    if attention_mask is not None and attention_mask.ndim == 4:
        if softcap is None:
            out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
            return out, None
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
        return reference_attention(q, k, v, visible, scale=scale, softcap=softcap), None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    length, num_keys = query.shape[2], key.shape[2]
    if attention_mask is not None and causal:
        key, value = (x[:, :, : attention_mask.shape[1]] for x in (key, value))
    elif causal and length == 1:
        causal = False  # one new token sees all that the cache holds
    elif causal and num_keys != length:
        raise InputError(f"attention 'sqa' needs a mask for {length} queries over {num_keys} keys, got None")
    mask = Mask(causal=causal, window=sliding_window if causal else None, padding_mask=attention_mask)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return attend(q, k, v, mask, scale=scaling, softcap=softcap).contiguous(), None
