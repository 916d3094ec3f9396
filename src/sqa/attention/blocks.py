"""Attention on CPU that never computes what a window or a document boundary hides: O(N * window) time, O(N) memory.

PyTorch's fused CPU attention runs on slices: one per document, and within a window on blocks of queries with the keys
they can reach, all blocks of a document as one batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sqa.attention import operators
from sqa.attention.call import Call
from sqa.attention.masks import document_starts

QUERY_BLOCK = 64

_fused_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """`number` adjoining blocks of `size` queries of one row, the first at query `start`, computed as one batch.

    The keys of a block go from `lead` positions before its first query to its last query; before them come the first
    `sinks` keys of the document, which starts at `document`. `mask` is added to the scores; without one the block is
    causal, or sees all its keys.
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
        """View (number, ..., size) of x (B, T, ...): `size` positions of each block, from `first` in the first one."""
        return x[self.row, first : first + (self.number - 1) * self.size + size].unfold(0, size, self.size)

    def queries(self, x: Tensor) -> Tensor:
        """View (number, H, size, D) of x (B, T, H, D) at the queries' positions."""
        return self.cut(x, self.start, self.size).transpose(2, 3)

    def keys(self, x: Tensor) -> Tensor:
        """(number, H, sinks + lead + size, D): the blocks' keys, or their values, from x (B, T, H, D)."""
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
        # keys of adjoining blocks overlap; pieces of one block's size do not, so each can be added at once
        for offset in range(0, self.lead + self.size, self.size):
            piece = near[..., offset : offset + self.size]
            self.cut(total, self.start - self.lead + offset, piece.shape[-1]).add_(piece)


@lru_cache(maxsize=64)
def _band(size: int, lead: int, window: int, sinks: int, sinks_inside: int, dtype: torch.dtype) -> Tensor:
    """Additive mask (size, sinks + lead + size) of a block whose keys start `lead` before its first query.

    The first `sinks` columns are sinks before the band; the first `sinks_inside` columns of the band are sinks too.
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
            if sinks and first < stop:  # these blocks still have some sinks inside their window
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


def _without_gaps(*tensors: Tensor) -> Iterator[Tensor]:
    """The tensors with a contiguous last axis: the fused kernels read garbage otherwise, and check nothing."""
    return (x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, causal: bool, window: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = _without_gaps(q, k, v)
    out = torch.empty(q.shape, dtype=q.dtype)
    logsumexp = torch.empty(q.shape[:3], dtype=torch.float32)
    for b in _blocks(q, starts, causal, window, sinks):
        part, part_logsumexp = _fused_forward(
            b.queries(q), b.keys(k), b.keys(v), 0.0, b.causal, attn_mask=b.mask, scale=scale
        )
        b.queries(out).copy_(part)
        b.cut(logsumexp, b.start, b.size).copy_(part_logsumexp)
    return out, logsumexp


def _backward(
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
    """Gradients of k and v are summed in fp32, because blocks overlap there."""
    grad, q, k, v = _without_gaps(grad, q, k, v)
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


_attention = operators.cpu_operator("block_attention", _forward, _backward)


def prepare(call: Call) -> Tensor | None:
    """bool (B, T), True at the first token of each document; None without documents."""
    return None if call.mask.document_ids is None else document_starts(call.mask.document_ids)


def run(call: Call, starts: Tensor | None) -> Tensor:
    """Output (B, T, Hq, D)."""
    window = call.window or 0
    out: Tensor = _attention(call.q, call.k, call.v, starts, call.mask.causal, window, call.sinks, call.scale)[0]
    return out


def limits(call: Call) -> str | None:
    """Why a call cannot use attention in blocks, or None."""
    if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"fp32, fp16 and bf16 only, got {call.dtype}"
    if call.num_queries != call.num_keys:
        return "no cache or cross-attention"
    return None
