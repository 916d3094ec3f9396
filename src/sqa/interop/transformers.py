"""Our attention inside transformers: `attn_implementation="sqa"`, and the Auto classes for hf-remote models."""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as capped_attention

from sqa.attention.kernels import attend
from sqa.attention.masks import Mask
from sqa.errors import InputError
from sqa.interop.modeling_sqa import SqaConfig, SqaForCausalLM

_UNKNOWN: Any = object()
_NOT_HONOURED = ("s_aux", "sinks", "position_bias", "indices", "block_indices")
"""What a model may pass beside queries, keys and values, and what would be wrong to pass over."""


def register() -> None:
    """Make `attn_implementation="sqa"` known to every transformers model, and model_type "sqa" to the Auto classes.

    The attention then uses our choice of kernels. In uncached calls they know of causality, window and padding, and may
    skip what these hide; other masks (static caches, packed sequences) are dense, as with `sdpa`.
    """
    AttentionInterface.register("sqa", sqa_attention)
    AttentionMaskInterface.register("sqa", sqa_mask)
    AutoConfig.register("sqa", SqaConfig, exist_ok=True)
    AutoModelForCausalLM.register(SqaConfig, SqaForCausalLM, exist_ok=True)
    SqaConfig.register_for_auto_class()  # save_pretrained then copies the class beside the weights
    SqaForCausalLM.register_for_auto_class("AutoModelForCausalLM")


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

    Raises InputError for a model that does not hand its attention to an implementation.
    """
    _check_model(type(config))
    compiling = torch.compiler.is_compiling()
    first = int(q_offset) == 0 if isinstance(q_offset, int) or not compiling else False
    windowed = local_size is None or local_size == getattr(config, "sliding_window", None)  # not chunked
    # a mask of as many keys, and more than the queries, is for keys of a cache, or is wrong
    fits = attention_mask is None or not q_length < attention_mask.shape[1] == kv_length
    if allow_is_causal_skip and first and windowed and fits and kv_length >= q_length:
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


@torch.compiler.assume_constant_result
def _check_model(config_class: type) -> None:
    """Raise InputError for models that say they take no other attention: they would read our masks as other masks.

    transformers refuses sdpa for them, but no implementation that was registered.
    """
    name = config_class.__module__.replace("configuration_", "modeling_")
    classes: list[Any] = [each for each in vars(sys.modules.get(name, object)).values() if isinstance(each, type)]
    models = [each for each in classes if issubclass(each, PreTrainedModel) and each.__module__ == name]
    if models and not any(each._supports_sdpa or each._supports_attention_backend for each in models):
        raise InputError(
            f"attention 'sqa' cannot run in models of {config_class.__name__}, whose attention transformers cannot "
            f"exchange; use attn_implementation='eager'"
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
    sliding_window: int | None = _UNKNOWN,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **rest: Any,  # the interface passes what every attention function may need
) -> tuple[Tensor, None]:
    """The attention function of the interface: query (B, Hq, T, D), key and value (B, Hkv, S, D) -> (B, T, Hq, D).

    attention_mask: as `sqa_mask` makes it. Under autocast the result has its dtype, whatever query and key have.

    Raises InputError for what our kernels cannot honour (dropout, learned sinks, position biases, chosen keys), for
    several queries over more keys without a mask, which would not say where the queries stand, and for a layer that
    does not say whether it has the window of its config.
    """
    for name, used in (("dropout", dropout), *((name, rest.get(name) is not None) for name in _NOT_HONOURED)):
        if used:
            raise InputError(f"attention 'sqa' has no {name}; use attn_implementation='eager' or set it to nothing")
    if attention_mask is not None and attention_mask.ndim == 4:
        if softcap is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)[0], None
        if attention_mask.dtype == torch.bool:  # it adds a mask to the scores
            lowest = torch.finfo(query.dtype).min
            attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, lowest)
        return capped_attention(module, query, key, value, attention_mask, scaling=scaling, softcap=softcap)[0], None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    length, num_keys = query.shape[2], key.shape[2]
    if attention_mask is not None and causal:
        key, value = (x[:, :, : attention_mask.shape[1]] for x in (key, value))
    elif causal and length == 1:
        causal = False  # one new token sees all that the cache holds
    elif causal and num_keys != length:
        raise InputError(f"attention 'sqa' needs a mask for {length} queries over {num_keys} keys, got None")
    window = None
    if causal:
        window = _stated_window(module, length) if sliding_window is _UNKNOWN else sliding_window
    mask = Mask(causal=causal, window=window, padding_mask=attention_mask)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    width, scale = v.shape[-1], q.shape[-1] ** -0.5 if scaling is None else scaling
    if width != q.shape[-1]:  # our kernels know one head_dim: zeros change neither scores nor values
        widest = max(width, q.shape[-1])
        q, k, v = (F.pad(t, (0, widest - t.shape[-1])) for t in (q, k, v))
    return attend(q, k, v, mask, scale=scale, softcap=softcap)[..., :width].contiguous(), None


def _stated_window(module: nn.Module, length: int) -> int | None:
    """The window of a layer that passes none on: its own attribute.

    Raises InputError where only the config has one, and it would hide keys: some layers of it may be without.
    """
    window: int | None = getattr(module, "sliding_window", None)
    of_config = getattr(getattr(module, "config", None), "sliding_window", None)
    if window is None and of_config and of_config < length:
        raise InputError(
            f"attention 'sqa': {type(module).__name__} does not say whether it has the window of its config "
            f"({of_config}); use attn_implementation='sdpa'"
        )
    return window
