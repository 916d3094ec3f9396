"""Our own CPU kernel. It takes one range of keys for each query, which can express every mask without sinks."""

from typing import NamedTuple

import torch
from torch import Tensor

from sqa.attention import fused, operators
from sqa.attention.call import Call
from sqa.attention.masks import document_starts


class KeyRanges(NamedTuple):
    """Query i of row b sees keys first[b, i] .. past[b, i] - 1, both int32 (B, Tq).

    order: with padding, int64 (B * Tk,): an order of the keys, flattened over B and Tk, that moves the padding of each
    sequence to its end. The ranges count the keys in that order.
    """

    first: Tensor
    past: Tensor
    order: Tensor | None


def prepare(call: Call) -> KeyRanges:
    """The ranges of a mask, whose queries stand at the last positions of the keys."""
    mask, batch_size, num_queries, num_keys = call.mask, call.q.shape[0], call.num_queries, call.num_keys
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
    if call.window is not None:
        first = torch.maximum(first, positions - call.window + 1)
    real, order = mask.padding_mask, None
    if mask.cached is not None and mask.cached.holes:
        real = mask.cached.near
    if real is not None:
        before = torch.nn.functional.pad(real.cumsum(1), (1, 0))
        first, past = (before.gather(1, x.long()) for x in (first, past))
        order = real.argsort(dim=1, descending=True, stable=True)
        order = (order + num_keys * torch.arange(batch_size)[:, None]).flatten()
    return KeyRanges(first.to(torch.int32).contiguous(), past.to(torch.int32).contiguous(), order)


_attention = operators.cpu_operator("range_attention", fused.fused_forward, fused.fused_backward)


def run(call: Call, ranges: KeyRanges) -> Tensor:
    """Output (B, Tq, Hq, D)."""
    k, v = call.k, call.v
    if ranges.order is not None:
        # whole rows: a gather along the axis would copy single numbers and is 15 times as slow
        k, v = (x.flatten(0, 1).index_select(0, ranges.order).view(x.shape) for x in (k, v))
    out: Tensor = _attention(call.q, k, v, ranges.first, ranges.past, call.scale)[0]
    return out


def limits(call: Call) -> str | None:
    """Why a call cannot use our own kernel, or None."""
    if call.grad and call.num_queries != call.num_keys:
        return "no cache or cross-attention"
    if call.mask.cached is not None and call.mask.cached.holes and call.mask.window is not None:
        return "no padding in a rolling cache"
    if call.dtype not in fused.DTYPES:
        return f"fp32 and bf16 only, got {call.dtype}"
    if call.head_dim not in fused.HEAD_DIMS:
        return f"head_dim must be one of {', '.join(map(str, fused.HEAD_DIMS))}, got {call.head_dim}"
    return fused.lacks()
