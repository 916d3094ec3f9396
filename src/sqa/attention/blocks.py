"""Attention on CPU that never computes what a window or a document boundary hides: O(N * window) time, O(N) memory.

PyTorch's fused CPU attention runs on slices: one per document, and within a window on blocks of queries with the keys
they can reach, all blocks of a document as one batch. The loops depend on data, so they are custom operators that
torch.compile treats as one node.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

QUERY_BLOCK = 64

_fused_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """`number` blocks of `size` queries of one row, the first at query `start`, that look alike.

    Each reads the keys from `lead` before its first query to its last, and before them the `sinks` first keys from
    `document` on. `mask` is added to the scores; without one the block is causal, or sees all its keys.
    """

    row: int
    start: int
    size: int
    number: int = 1
    lead: int = 0
    document: int = 0
    sinks: int = 0
    causal: bool = False
    mask: Tensor | None = None

    def cut(self, x: Tensor, first: int, size: int) -> Tensor:
        """View (number, ..., size) of x (B, T, ...): `size` positions from `first`, then a block further on, ..."""
        return x[self.row, first : first + (self.number - 1) * self.size + size].unfold(0, size, self.size)

    def queries(self, x: Tensor) -> Tensor:
        """View (number, H, size, D) of what belongs to the queries, from (B, T, H, D)."""
        return self.cut(x, self.start, self.size).transpose(2, 3)

    def keys(self, x: Tensor) -> Tensor:
        """(number, H, sinks + lead + size, D): the keys or values that the blocks read, from (B, T, H, D)."""
        near = self.cut(x, self.start - self.lead, self.lead + self.size).transpose(2, 3)
        if not self.sinks:
            return near
        far = x[self.row, self.document : self.document + self.sinks].transpose(0, 1)
        return torch.cat((far.expand(self.number, -1, -1, -1), near), 2)

    def add_keys(self, total: Tensor, part: Tensor) -> None:
        """The reverse of `keys`: add part (number, H, sinks + lead + size, D) to total (B, T, H, D)."""
        if self.sinks:
            far = part[:, :, : self.sinks].sum(0).transpose(0, 1)
            total[self.row, self.document : self.document + self.sinks] += far
        near = part[:, :, self.sinks :].transpose(2, 3)
        # neighbours overlap: added in pieces no longer than their distance, which do not
        for offset in range(0, self.lead + self.size, self.size):
            piece = near[..., offset : offset + self.size]
            self.cut(total, self.start - self.lead + offset, piece.shape[-1]).add_(piece)


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


def _blocks(q: Tensor, starts: Tensor | None, causal: bool, window: int, sinks: int) -> Iterator[_Blocks]:
    batch_size, length = q.shape[:2]
    bounds = [[0, length]] * batch_size
    if starts is not None:
        bounds = [[*row.nonzero().flatten().tolist(), length] for row in starts]
    # wider blocks for wider windows: the keys of all blocks together stay within 9 times those of the row
    size = max(QUERY_BLOCK, window // 8)
    for row in range(batch_size):
        for start, stop in zip(bounds[row][:-1], bounds[row][1:], strict=True):
            whole = stop - start if window == 0 else min(window, stop - start)
            yield _Blocks(row=row, start=start, size=whole, causal=causal)
            first = start + whole
            if sinks and first < stop:  # while some sinks are still among the keys within reach
                part = min(sinks, stop - first)
                yield _Blocks(
                    row=row, start=first, size=part, lead=window, mask=_band(part, window, window, 0, sinks, q.dtype)
                )
                first += part
            count, rest = divmod(stop - first, size)
            for part, number in ((size, count), (rest, 1)):
                if part and number:
                    mask = _band(part, window, window, sinks, 0, q.dtype)
                    yield _Blocks(
                        row=row, start=first, size=part, number=number, lead=window,
                        document=start, sinks=sinks, mask=mask,
                    )  # fmt: skip
                    first += part * number


def without_gaps(*tensors: Tensor) -> Iterator[Tensor]:
    """The fused kernels read garbage when the last axis has gaps, and check nothing."""
    return (x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


# torch.compile's disk cache knows operators by name alone: another signature here or below needs another name here
@torch.library.custom_op("sqa::block_attention", mutates_args=(), device_types="cpu")
def block_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, causal: bool, window: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    """q (B, T, Hq, D), k, v (B, T, Hkv, D) -> output (B, T, Hq, D) and log-sum-exp (B, T, Hq).

    starts: bool (B, T), True at the first token of each document. window=0: none.
    """
    q, k, v = without_gaps(q, k, v)
    out = torch.empty(q.shape, dtype=q.dtype)
    logsumexp = torch.empty(q.shape[:3], dtype=torch.float32)
    for b in _blocks(q, starts, causal, window, sinks):
        part, part_logsumexp = _fused_forward(
            b.queries(q), b.keys(k), b.keys(v), 0.0, b.causal, attn_mask=b.mask, scale=scale
        )
        b.queries(out).copy_(part)
        b.cut(logsumexp, b.start, b.size).copy_(part_logsumexp)
    return out, logsumexp


@block_attention.register_fake
def _(q, k, v, starts, causal, window, sinks, scale):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("sqa::block_attention_backward", mutates_args=(), device_types="cpu")
def _block_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    starts: Tensor | None,
    causal: bool,
    window: int,
    sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; blocks overlap in k and v, so those are summed in fp32."""
    grad, q, k, v = without_gaps(grad, q, k, v)
    dq = torch.empty(q.shape, dtype=q.dtype)
    dk, dv = torch.zeros(k.shape, dtype=torch.float32), torch.zeros(v.shape, dtype=torch.float32)
    for b in _blocks(q, starts, causal, window, sinks):
        part_dq, part_dk, part_dv = _fused_backward(
            b.queries(grad),
            b.queries(q),
            b.keys(k),
            b.keys(v),
            b.queries(out),
            b.cut(logsumexp, b.start, b.size).contiguous(),
            0.0,
            b.causal,
            attn_mask=b.mask,
            scale=scale,
        )
        b.queries(dq).copy_(part_dq)
        b.add_keys(dk, part_dk)
        b.add_keys(dv, part_dv)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@_block_attention_backward.register_fake
def _(grad, q, k, v, out, logsumexp, starts, causal, window, sinks, scale):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, starts, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, starts, *output)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    q, k, v, starts, out, logsumexp = ctx.saved_tensors
    dq, dk, dv = _block_attention_backward(grad, q, k, v, out, logsumexp, starts, *ctx.options)
    return dq, dk, dv, *(None for _ in range(5))


block_attention.register_autograd(_backward, setup_context=_save)
