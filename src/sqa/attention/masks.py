"""Which keys a query sees, described without an N x N tensor; the dense form is made only for kernels that need it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CachedKeys:
    """Keys that come from a cache, so that slot and position differ.

    query_positions (Tq,); key_positions (Tk,) or (B, Tk); near and far, bool (1 or B, Tk): whether a key may be seen
    from within the window, and from beyond it. Full-attention caches have `near` for both. holes: whether keys may be
    missing or out of order; without holes they are the last Tk positions, one after the other.
    """

    query_positions: Tensor
    key_positions: Tensor
    near: Tensor
    far: Tensor
    holes: bool


@dataclass(frozen=True, kw_only=True)
class Mask:
    """The mask of one attention call.

    padding_mask: bool (B, Tk), True = real; document_ids: int (B, T), a document being a run of equal ids;
    cached: set when the keys come out of a cache. The first `num_sink_tokens` real tokens of a document stay
    visible beyond the window.
    """

    causal: bool = True
    window: int | None = None
    num_sink_tokens: int = 0
    padding_mask: Tensor | None = None
    document_ids: Tensor | None = None
    cached: CachedKeys | None = None


def document_starts(document_ids: Tensor) -> Tensor:
    """bool (B, T): True at the first token of each document."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return starts


def real_first(real: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Keys or values (B, Tk, H, D) in their order but with the padding (real (B, Tk) False) at the end of each row."""
    batch_size, length = real.shape
    order = real.argsort(dim=1, descending=True, stable=True)
    rows = (order + torch.arange(0, batch_size * length, length, device=real.device)[:, None]).flatten()
    # whole rows: a gather along the axis would take them number by number, 15 times as slow
    return [x.flatten(0, 1).index_select(0, rows).view(x.shape) for x in tensors]


def key_ranges(
    batch_size: int,
    length: int,
    num_keys: int,
    real: Tensor | None,
    document_ids: Tensor | None,
    *,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor]:
    """First key that each query sees and one past the last, int32 (B, T), on the CPU. window=0: none.

    The queries are at the end of the keys. Documents need as many keys as queries. With `real`, bool (B, Tk), the
    keys are counted as `real_first` leaves them.
    """
    positions = torch.arange(num_keys - length, num_keys, dtype=torch.int32).expand(batch_size, length)
    first, past = torch.zeros_like(positions), torch.full_like(positions, num_keys)
    if document_ids is not None:
        starts = document_starts(document_ids)
        first = torch.where(starts, positions, 0).cummax(1).values
        ends = torch.ones_like(starts)
        ends[:, :-1] = starts[:, 1:]
        past = torch.where(ends, positions + 1, length).flip(1).cummin(1).values.flip(1)
    if causal:
        past = positions + 1
    if window:
        first = torch.maximum(first, positions - window + 1)
    if real is not None:
        before = torch.nn.functional.pad(real.cumsum(1), (1, 0))
        first, past = (before.gather(1, x.long()) for x in (first, past))
    return first.to(torch.int32), past.to(torch.int32)


def sink_keys(mask: Mask, num_keys: int, device: torch.device) -> Tensor:
    """bool (1 or B, Tk): the first `num_sink_tokens` real tokens of each document."""
    real = mask.padding_mask
    if real is None:
        batch_size = 1 if mask.document_ids is None else mask.document_ids.shape[0]
        real = torch.ones(batch_size, num_keys, dtype=torch.bool, device=device)
    before = real.cumsum(1) - real.long()
    if mask.document_ids is not None:
        before = before - torch.where(document_starts(mask.document_ids), before, 0).cummax(1).values
    return real & (before < mask.num_sink_tokens)


def dense_mask(mask: Mask, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
    """bool (1 or B, 1, Tq, Tk), True where the query sees the key; None where every query sees every key."""
    if mask.cached is not None:
        return _cached_mask(mask, mask.cached)
    parts = []
    if mask.causal:
        positions = torch.arange(num_keys, device=device)
        distance = positions[:, None] - positions
        parts.append((distance >= 0)[None])
        if mask.window is not None:
            within = (distance < mask.window)[None]
            if mask.num_sink_tokens:
                within = within | sink_keys(mask, num_keys, device)[:, None, :]
            parts.append(within)
    if mask.document_ids is not None:
        documents = document_starts(mask.document_ids).cumsum(1)
        parts.append(documents[:, :, None] == documents[:, None, :])
    if mask.padding_mask is not None:
        parts.append(mask.padding_mask[:, None, :])
    if not parts:
        return None
    visible = parts[0]
    for part in parts[1:]:
        visible = visible & part
    return visible[:, None]


def _cached_mask(mask: Mask, cached: CachedKeys) -> Tensor:
    keys = cached.key_positions.reshape(-1, 1, cached.key_positions.shape[-1])
    distance = cached.query_positions[None, :, None] - keys
    if mask.window is None:
        visible = cached.near[:, None, :]
    else:
        visible = torch.where(distance < mask.window, cached.near[:, None, :], cached.far[:, None, :])
    return (visible & (distance >= 0))[:, None]
