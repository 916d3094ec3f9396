"""Our own CPU kernel as a PyTorch operator. Each query sees one range of keys, which says all but sinks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sqa.attention.blocks import without_gaps
from sqa.attention.fused import fused_backward, fused_forward
from sqa.attention.masks import Mask, document_starts


class KeyRanges(NamedTuple):
    """Query i of row b sees keys first[b, i] .. past[b, i] - 1, both int32 (B, Tq).

    order: where padding is hidden, int64 (B * Tk,): the rows of keys and values, flattened over B and Tk, that put the
    padding of each sequence at its end. The ranges count the keys in that order.
    """

    first: Tensor
    past: Tensor
    order: Tensor | None


def key_ranges(mask: Mask, batch_size: int, num_queries: int, num_keys: int) -> KeyRanges:
    """The ranges of a mask on the CPU, which has no sinks within reach of its window.

    The queries are the last of the keys' positions. Documents need as many keys as queries.
    """
    positions = torch.arange(num_keys - num_queries, num_keys, dtype=torch.int32).expand(batch_size, num_queries)
    first, past = torch.zeros_like(positions), torch.full_like(positions, num_keys)
    if mask.document_ids is not None:
        starts = document_starts(mask.document_ids)
        first = torch.where(starts, positions, 0).cummax(1).values
        ends = torch.ones_like(starts)
        ends[:, :-1] = starts[:, 1:]
        past = torch.where(ends, positions + 1, num_keys).flip(1).cummin(1).values.flip(1)
    if mask.causal:
        past = positions + 1
    if mask.window is not None and mask.window < num_keys:
        first = torch.maximum(first, positions - mask.window + 1)
    real, order = mask.padding_mask, None
    if mask.cached is not None and mask.cached.holes:
        real = mask.cached.near
    if real is not None:
        before = torch.nn.functional.pad(real.cumsum(1), (1, 0))
        first, past = (before.gather(1, x.long()) for x in (first, past))
        order = real.argsort(dim=1, descending=True, stable=True)
        order = (order + torch.arange(0, batch_size * num_keys, num_keys)[:, None]).flatten()
    return KeyRanges(first.to(torch.int32).contiguous(), past.to(torch.int32).contiguous(), order)


def range_attention(q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges, scale: float) -> Tensor:
    """q (B, Tq, Hq, D), k, v (B, Tk, Hkv, D) on the CPU -> (B, Tq, Hq, D)."""
    if ranges.order is not None:
        # whole rows: a gather along the axis would take them number by number, 15 times as slow
        k, v = (x.flatten(0, 1).index_select(0, ranges.order).view(x.shape) for x in (k, v))
    out: Tensor = _attention(q, k, v, ranges.first, ranges.past, scale)[0]
    return out


# torch.compile's disk cache knows operators by name alone: another signature here or below needs another name here
@torch.library.custom_op("sqa::range_attention", mutates_args=(), device_types="cpu")
def _attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor, past: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The output (B, Tq, Hq, D) and the log-sum-exp of the scores (B, Tq, Hq), fp32."""
    q, k, v = without_gaps(q, k, v)
    return fused_forward(q, k, v, first, past, scale)


@_attention.register_fake
def _(q, k, v, first, past, scale):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("sqa::range_attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    first: Tensor,
    past: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    grad, q, k, v = without_gaps(grad, q, k, v)
    return fused_backward(grad, q, k, v, out, logsumexp, first, past, scale)


@_attention_backward.register_fake
def _(grad, q, k, v, out, logsumexp, first, past, scale):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    q, k, v, first, past, out, logsumexp = ctx.saved_tensors
    return *_attention_backward(grad, q, k, v, out, logsumexp, first, past, ctx.scale), None, None, None


_attention.register_autograd(_backward, setup_context=_save)
