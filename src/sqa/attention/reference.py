"""The oracle: attention in fp32, written to be checked by eye. Every kernel is tested against it."""

import torch
from torch import Tensor


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, *, scale: float, softcap: float | None = None
) -> Tensor:
    """softmax(scale * q k^T) v in fp32, whatever the input dtype; a query that sees no key gives zeros.

    q (B, Tq, Hq, D); k, v (B, Tk, Hkv, D) with Hkv dividing Hq, query head i reading KV head i // (Hq / Hkv);
    visible: bool, broadcastable to (B, 1, Tq, Tk), True where the query sees the key, or None for all.
    Returns (B, Tq, Hq, D) in q's dtype.
    """
    with torch.autocast(q.device.type, enabled=False):  # it would multiply in low precision
        repeats = q.shape[2] // k.shape[2]
        keys = k.float().repeat_interleave(repeats, dim=2)
        values = v.float().repeat_interleave(repeats, dim=2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if visible is not None:
            # -inf would turn a row with no visible key into nan, in the gradient too
            scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1)
        if visible is not None:
            weights = weights * visible
        return torch.einsum("bhqk,bkhd->bqhd", weights, values).to(q.dtype)
