"""Rotary positions: frequencies in fp32, outside the state dict; positions may start after those of a cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sqa.config import Rope


def inverse_frequencies(rope: Rope, head_dim: int, device: torch.device | None = None) -> tuple[Tensor, float]:
    """Radians a position for each rotary pair, fp32 (head_dim / 2,), and the factor on the cos and sin tables.

    Scalings follow transformers' `modeling_rope_utils` (linear, llama3, yarn).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / rope.base**exponents
    scaling = rope.scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    length = scaling.original_max_seq_len
    assert length is not None  # RopeScaling checks it
    if scaling.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        # 0 below low_freq_factor turns within the original length (interpolate), 1 above high_freq_factor (keep)
        turns = length / wavelengths
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = keep.clamp(0, 1)
        return (1 - keep) * frequencies / scaling.factor + keep * frequencies, 1.0

    def pair_with(turns: float) -> float:
        """The (fractional) pair that makes `turns` turns within the original length."""
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), head_dim - 1)
    ramp = torch.arange(head_dim // 2, dtype=torch.float32, device=device) - low
    interpolate = (ramp / max(high - low, 0.001)).clamp(0, 1)
    factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.attention_factor is None else scaling.attention_factor
    return interpolate * frequencies / scaling.factor + (1 - interpolate) * frequencies, factor


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys by their positions."""

    inverse: Tensor

    def __init__(self, rope: Rope, head_dim: int) -> None:
        super().__init__()
        self.rope, self.head_dim = rope, head_dim
        inverse, self.table_factor = inverse_frequencies(rope, head_dim)
        self.register_buffer("inverse", inverse, persistent=False)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # model.to(bfloat16) would round the frequencies and to_empty() leave them unset, so they are made anew
        super()._apply(fn, recurse)
        self.inverse, _ = inverse_frequencies(self.rope, self.head_dim, self.inverse.device)
        return self

    def tables(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 (length, 1, head_dim / 2), for positions start .. start + length - 1."""
        positions = torch.arange(start, start + length, dtype=torch.float32, device=self.inverse.device)
        angles = torch.outer(positions, self.inverse)[:, None, :]
        return angles.cos() * self.table_factor, angles.sin() * self.table_factor

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, T, Hq, D) and k (B, T, Hkv, D) rotated by the `tables` of their positions; computed in fp32."""
        return self._rotate(q, cos, sin), self._rotate(k, cos, sin)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        paired = self.rope.interleaved
        first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1) if paired else x.float().chunk(2, dim=-1)
        turned = first * cos - second * sin, second * cos + first * sin
        return (torch.stack(turned, dim=-1).flatten(-2) if paired else torch.cat(turned, dim=-1)).to(x.dtype)
