"""PyTorch's own attention: scaled_dot_product_attention, varlen_attn and FlexAttention, and their limits.

The limits of a GPU's fused kernels differ between PyTorch versions and GPUs, so PyTorch is asked at run time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sqa.attention.call import Call
from sqa.attention.masks import dense_mask, document_starts, sink_keys
from sqa.attention.operators import constant


def dense_form(call: Call) -> Tensor | None:
    """The dense mask, or None when it hides nothing (as for one query at the end of a cache)."""
    if call.cached and not call.masked:
        return None
    return dense_mask(call.mask, call.num_queries, call.num_keys, call.device)


def sdpa_form(call: Call) -> Tensor | None:
    """The dense mask, or None when it is plainly causal or hides nothing."""
    return None if _plain_causal(call) else dense_form(call)


def sdpa(call: Call, form: Tensor | None) -> Tensor:
    """F.scaled_dot_product_attention, which chooses one of its own kernels."""
    k, v = call.k, call.v
    if must_expand(call):
        repeats = call.q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    out = F.scaled_dot_product_attention(
        call.q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=form,
        is_causal=_plain_causal(call),
        scale=call.scale,
        enable_gqa=k.shape[2] != call.q.shape[2],
    )
    return out.transpose(1, 2)


def _plain_causal(call: Call) -> bool:
    return call.mask.causal and not call.masked and not call.cached


def cuda_backends(call: Call, *, expanded: bool = False) -> tuple[str, ...]:
    """PyTorch's CUDA kernels (flash, efficient, cudnn) that can run such a call on this machine.

    expanded: with keys and values repeated for each query head. Empty without a CUDA device.
    """
    heads = call.q.shape[2]
    kv_heads = heads if expanded else call.k.shape[2]
    return _ask(call.dtype, heads, kv_heads, call.head_dim, call.masked, _plain_causal(call), call.grad)


@constant
def _ask(*question: Any) -> tuple[str, ...]:
    return _answer(*question)


@lru_cache(maxsize=256)
def _answer(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, masked: bool, causal: bool, grad: bool
) -> tuple[str, ...]:
    """Ask PyTorch about 128 tokens; the answer holds for every length above 0."""
    if not torch.cuda.is_available():
        return ()
    length, ask = 128, torch.backends.cuda
    q, k, v = (
        torch.empty(1, length, heads, head_dim, dtype=dtype, device="cuda", requires_grad=grad).transpose(1, 2)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="cuda") if masked else None
    parameters = ask.SDPAParams(q, k, v, mask, 0.0, causal, num_heads != num_kv_heads)
    questions = {
        "flash": ask.can_use_flash_attention,
        "efficient": ask.can_use_efficient_attention,
        "cudnn": ask.can_use_cudnn_attention,
    }
    return tuple(name for name, question in questions.items() if question(parameters))


def must_expand(call: Call) -> bool:
    """Whether to repeat shared KV heads, because PyTorch would otherwise run its unfused math kernel."""
    if call.device.type != "cuda" or not call.shares_kv:
        return False
    return not cuda_backends(call) and bool(cuda_backends(call, expanded=True))


class Sequences(NamedTuple):
    """bounds: int32 (number + 1,), where each sequence starts in the flattened tokens; longest: the most tokens."""

    bounds: Tensor
    longest: int


def varlen_form(call: Call) -> Sequences:
    """The documents of the batch as sequences, or its rows."""
    batch_size, length, ids = call.q.shape[0], call.num_keys, call.mask.document_ids
    if ids is None:
        bounds = torch.arange(0, batch_size * length + 1, length, dtype=torch.int32, device=call.device)
        return Sequences(bounds, length)
    starts = document_starts(ids).flatten().nonzero().flatten()
    bounds = F.pad(starts, (0, 1), value=batch_size * length).to(torch.int32)
    return Sequences(bounds, int(bounds.diff().max()))


def varlen(call: Call, form: Sequences) -> Tensor:
    """torch.nn.attention.varlen_attn: flash attention over sequences of different lengths laid end to end."""
    attention = _varlen_attn()
    assert attention is not None
    q, k, v = (x.flatten(0, 1) for x in (call.q, call.k, call.v))
    # PyTorch counts the keys before the query's own, -1 being all of them
    before = -1 if call.window is None else call.window - 1
    out: Tensor = attention(
        q, k, v, form.bounds, form.bounds, form.longest, form.longest,
        scale=call.scale, window_size=(before, 0 if call.mask.causal else -1), enable_gqa=call.shares_kv,
    )  # fmt: skip
    return out.view(call.q.shape)


def varlen_limits(call: Call) -> str | None:
    """Why a call cannot use varlen_attn, or None."""
    if call.num_queries != call.num_keys:
        return "no cross-attention"
    if call.dtype not in (torch.float16, torch.bfloat16):
        return f"fp16 and bf16 only, got {call.dtype}"
    if call.mask.document_ids is not None and torch.compiler.is_compiling() and call.mask.prepared is None:
        return "the number of documents is not known while a whole model is compiled"
    if _varlen_attn() is None:
        return "this PyTorch has no varlen_attn with windows and shared heads"
    if "flash" not in _ask(call.dtype, call.q.shape[2], call.q.shape[2], call.head_dim, False, True, call.grad):
        return f"no flash attention for head_dim {call.head_dim} on this GPU"
    return None


@constant
def _varlen_attn() -> Callable[..., Any] | None:
    """PyTorch's function, if it exists and has the arguments that we use."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    wanted = {"scale", "window_size", "enable_gqa"}
    return varlen_attn if wanted <= set(inspect.signature(varlen_attn).parameters) else None


def flex_form(call: Call) -> Any:
    """The BlockMask, or None when it hides nothing."""
    if not call.mask.causal and not call.masked:
        return None
    mask, window = call.mask, call.window
    documents = None if mask.document_ids is None else document_starts(mask.document_ids).cumsum(1)
    sinks = None
    if call.sinks:
        sinks = sink_keys(mask, call.num_keys, call.device).expand(call.q.shape[0], -1).contiguous()

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        result = i >= j if mask.causal else i == i
        if window is not None:
            near = i - j < window
            result = result & (near if sinks is None else near | sinks[b, j])
        if documents is not None:
            result = result & (documents[b, i] == documents[b, j])
        if mask.padding_mask is not None:
            result = result & mask.padding_mask[b, j]
        return result

    rows = call.q.shape[0] if documents is not None or mask.hides_padding or call.sinks else None
    make = _flex("create_block_mask", call.device.type)
    return make(seen, rows, None, call.num_queries, call.num_keys, device=call.device)


def flex(call: Call, form: Any) -> Tensor:
    """torch.nn.attention.flex_attention, compiled."""
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    if not call.grad:  # the CPU kernel refuses what could want gradients, even under no_grad
        q, k, v = q.detach(), k.detach(), v.detach()
    softcap = call.softcap

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    out: Tensor = _flex("flex_attention", call.device.type)(
        q, k, v, score_mod=None if softcap is None else capped, block_mask=form, scale=call.scale,
        enable_gqa=call.shares_kv,
    )  # fmt: skip
    return out.transpose(1, 2)


def flex_limits(call: Call) -> str | None:
    """Why a call cannot use FlexAttention, or None."""
    if call.device.type == "cpu" and call.grad:
        return "no CPU backward"
    if call.head_dim < 16 or call.head_dim & (call.head_dim - 1):
        return f"head_dim must be a power of two from 16, got {call.head_dim}"
    if call.device.type not in ("cpu", "cuda"):
        return f"not for {call.device.type}"
    return None


def _flex(name: str, device: str) -> Callable[..., Any]:
    """A function of torch.nn.attention.flex_attention, compiled, because only then it runs fused."""
    from torch.nn.attention import flex_attention as module

    plain: Callable[..., Any] = getattr(module, name)
    # inside somebody's torch.compile it is traced with the rest
    return plain if torch.compiler.is_compiling() else _compiled(plain, device)


@lru_cache(maxsize=4)
def _compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    # one compilation for all lengths; on CPU one for each, as PyTorch 2.13's C++ for dynamic lengths does not compile
    return torch.compile(function, dynamic=device == "cuda")
