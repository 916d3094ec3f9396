"""Attention on CPU that never computes what a window or a document boundary hides: O(N * window) time, O(N) memory.

PyTorch's fused CPU attention runs on slices: one per document, and within a window on blocks of queries with the keys
they can reach, all blocks of a document as one batch. The loops depend on data, so they are custom operators that
torch.compile treats as one node.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sqa.attention.fused import BACKWARD_DTYPES, fused_backward, fused_forward
from sqa.attention.masks import document_starts, key_ranges

QUERY_BLOCK = 64

_fused_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Blocks(NamedTuple):
    """`number` blocks of `size` queries of one row, the first at q0, that look alike.

    Each reads the keys from `lead` before its first query to its last, and before them those at s0:s1 (sinks).
    """

    row: int
    q0: int
    size: int
    number: int
    lead: int
    s0: int
    s1: int
    causal: bool
    mask: Tensor | None


@lru_cache(maxsize=64)
def _band(size: int, lead: int, window: int, sinks: int, sinks_inside: int, dtype: torch.dtype) -> Tensor:
    """Additive mask (size, sinks + lead + size): the keys start `lead` before the first query.

    The first `sinks` columns are sinks from before; `sinks_inside` more lie at the start of the band itself.
    """
    key = torch.arange(lead + size)
    distance = torch.arange(size)[:, None] + lead - key
    seen = (distance >= 0) & ((distance < window) | (key < sinks_inside))
    seen = torch.cat((torch.ones(size, sinks, dtype=torch.bool), seen), 1)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)


def _blocks(q: Tensor, document_ids: Tensor | None, causal: bool, window: int, sinks: int) -> Iterator[_Blocks]:
    batch_size, length = q.shape[:2]
    bounds = [[0, length]] * batch_size
    if document_ids is not None:
        starts = document_starts(document_ids)
        bounds = [[*row.nonzero().flatten().tolist(), length] for row in starts]
    # wider blocks for wider windows: the keys of all blocks together stay within 9 times those of the row
    size = max(QUERY_BLOCK, window // 8)
    for row in range(batch_size):
        for start, stop in zip(bounds[row][:-1], bounds[row][1:], strict=True):
            whole = stop - start if window == 0 else min(window, stop - start)
            yield _Blocks(row, start, whole, 1, 0, start, start, causal, None)
            q0 = start + whole
            if sinks and q0 < stop:  # while some sinks are still among the keys within reach
                part = min(sinks, stop - q0)
                mask = _band(part, window, window, 0, sinks, q.dtype)
                yield _Blocks(row, q0, part, 1, window, start, start, False, mask)
                q0 += part
            count, rest = divmod(stop - q0, size)
            for part, repeats in ((size, count), (rest, 1)):
                if part and repeats:
                    mask = _band(part, window, window, sinks, 0, q.dtype)
                    yield _Blocks(row, q0, part, repeats, window, start, start + sinks, False, mask)
                    q0 += part * repeats


def _dense(*tensors: Tensor) -> Iterator[Tensor]:
    """The fused kernels read garbage when the last axis has gaps, and check nothing."""
    return (x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _cut(x: Tensor, first: int, size: int, step: int, count: int) -> Tensor:
    """View (count, ..., size) of x (T, ...): `size` positions from `first`, then from `step` further on, and so on."""
    return x[first : first + (count - 1) * step + size].unfold(0, size, step)


def _queries(x: Tensor, b: _Blocks) -> Tensor:
    """View (count, H, size, D) of what belongs to the queries, from (B, T, H, D)."""
    return _cut(x[b.row], b.q0, b.size, b.size, b.number).transpose(2, 3)


def _keys(x: Tensor, b: _Blocks) -> Tensor:
    """(count, H, sinks + lead + size, D): the keys or values that the blocks read, from (B, T, H, D)."""
    near = _cut(x[b.row], b.q0 - b.lead, b.lead + b.size, b.size, b.number).transpose(2, 3)
    if b.s1 == b.s0:
        return near
    far = x[b.row, b.s0 : b.s1].transpose(0, 1)
    return torch.cat((far.expand(b.number, -1, -1, -1), near), 2)


def _add_keys(total: Tensor, part: Tensor, b: _Blocks) -> None:
    """The reverse of `_keys`: add part (count, H, sinks + lead + size, D) to total (B, T, H, D)."""
    sinks = b.s1 - b.s0
    if sinks:
        total[b.row, b.s0 : b.s1] += part[:, :, :sinks].sum(0).transpose(0, 1)
    near = part[:, :, sinks:].transpose(2, 3)
    # neighbours overlap: added in pieces no longer than their distance, which do not
    for offset in range(0, b.lead + b.size, b.size):
        piece = near[..., offset : offset + b.size]
        _cut(total[b.row], b.q0 - b.lead + offset, piece.shape[-1], b.size, b.number).add_(piece)


# torch.compile's disk cache knows operators by name alone: another signature here or below needs another name here
@torch.library.custom_op("sqa::cpu_attention", mutates_args=(), device_types="cpu")
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    document_ids: Tensor | None,
    causal: bool,
    window: int,
    sinks: int,
    scale: float,
    own: bool,
) -> tuple[Tensor, Tensor]:
    """q (B, T, Hq, D), k, v (B, Tk, Hkv, D) -> output (B, T, Hq, D) and log-sum-exp (B, T, Hq). window=0: none.

    `own` takes our own kernel, which has no sinks, instead of PyTorch's on slices. It alone takes more keys than
    queries, which are the last then, and has no gradient for that; and padding: real (B, Tk), the keys as `real_first`
    leaves them.
    """
    q, k, v = _dense(q, k, v)
    if own:
        low, high = key_ranges(q.shape[0], q.shape[1], k.shape[1], real, document_ids, causal=causal, window=window)
        return fused_forward(q, k, v, low, high, scale)
    out = torch.empty(q.shape, dtype=q.dtype)
    logsumexp = torch.empty(q.shape[:3], dtype=torch.float32)
    for b in _blocks(q, document_ids, causal, window, sinks):
        part, part_logsumexp = _fused_forward(
            _queries(q, b), _keys(k, b), _keys(v, b), 0.0, b.causal, attn_mask=b.mask, scale=scale
        )
        _queries(out, b).copy_(part)
        _cut(logsumexp[b.row], b.q0, b.size, b.size, b.number).copy_(part_logsumexp)
    return out, logsumexp


@block_attention.register_fake
def _(q, k, v, real, document_ids, causal, window, sinks, scale, own):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("sqa::cpu_attention_backward", mutates_args=(), device_types="cpu")
def block_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    real: Tensor | None,
    document_ids: Tensor | None,
    causal: bool,
    window: int,
    sinks: int,
    scale: float,
    own: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; blocks overlap in k and v, so those are summed in fp32."""
    grad, q, k, v = _dense(grad, q, k, v)
    if own and q.dtype in BACKWARD_DTYPES:
        low, high = key_ranges(q.shape[0], q.shape[1], k.shape[1], real, document_ids, causal=causal, window=window)
        return fused_backward(grad, q, k, v, out, logsumexp, low, high, scale)
    if document_ids is None and window == 0:  # nothing to skip: all rows in one call
        heads = (x.transpose(1, 2) for x in (grad, q, k, v, out))
        grads = _fused_backward(*heads, logsumexp.transpose(1, 2).contiguous(), 0.0, causal, scale=scale)
        dq, dk, dv = (x.transpose(1, 2).contiguous() for x in grads)
        return dq, dk, dv
    dq = torch.empty(q.shape, dtype=q.dtype)
    dk, dv = torch.zeros(k.shape, dtype=torch.float32), torch.zeros(v.shape, dtype=torch.float32)
    for b in _blocks(q, document_ids, causal, window, sinks):
        part_dq, part_dk, part_dv = _fused_backward(
            _queries(grad, b),
            _queries(q, b),
            _keys(k, b),
            _keys(v, b),
            _queries(out, b),
            _cut(logsumexp[b.row], b.q0, b.size, b.size, b.number).contiguous(),
            0.0,
            b.causal,
            attn_mask=b.mask,
            scale=scale,
        )
        _queries(dq, b).copy_(part_dq)
        _add_keys(dk, part_dk, b)
        _add_keys(dv, part_dv, b)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@block_attention_backward.register_fake
def _(grad, q, k, v, out, logsumexp, real, document_ids, causal, window, sinks, scale, own):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, real, document_ids, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, real, document_ids, *output)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    q, k, v, real, document_ids, out, logsumexp = ctx.saved_tensors
    dq, dk, dv = block_attention_backward(grad, q, k, v, out, logsumexp, real, document_ids, *ctx.options)
    return dq, dk, dv, *(None for _ in range(7))


block_attention.register_autograd(_backward, setup_context=_save)
