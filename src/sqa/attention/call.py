"""One attention call as a record: its tensors, its mask, and the facts that decide which kernel runs it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sqa.attention.masks import CachedKeys, Mask
from sqa.config import AttentionConfig
from sqa.errors import InputError, shown


@dataclass(frozen=True, kw_only=True)
class Call:
    """q (B, Tq, Hq, D), k and v (B, Tk, Hkv, D) with Hkv dividing Hq, and the options of their attention.

    `device` is that of the tensors; in a call that is only described they are on the meta device, without values.
    grad: whether a backward pass may follow.

    Raises InputError for shapes, dtypes and devices that do not fit. Axes in another order than (B, T, H, D) must not
    pass: the result would have the right shape and wrong values.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    device: torch.device
    scale: float
    softcap: float | None = None
    grad: bool = False

    def __post_init__(self) -> None:
        q, k, v, mask = self.q, self.k, self.v, self.mask
        if q.ndim != 4 or k.ndim != 4:
            raise InputError(f"attention: q and k must be (B, T, H, D), got {tuple(q.shape)} and {tuple(k.shape)}")
        shapes = f"{tuple(q.shape)} and {tuple(k.shape)}"
        if k.shape != v.shape:
            raise InputError(f"attention: k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
        if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
            raise InputError(f"attention: q and k differ in batch or head_dim: {shapes}")
        if q.shape[2] == 0 or k.shape[2] == 0 or q.shape[3] == 0:
            raise InputError(f"attention: heads and head_dim must be at least 1, got {shapes}")
        if q.shape[2] % k.shape[2]:
            raise InputError(
                f"attention: of the head counts one must divide the other, got {q.shape[2]} and {k.shape[2]}"
            )
        if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
            raise InputError(
                f"attention: q, k and v must have one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
            )
        for name, number, none in (("scale", self.scale, "D ** -0.5"), ("softcap", self.softcap, "none")):
            if number is None and name == "softcap":
                continue
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
                wanted = f"above 0 and finite, or None for {none}"
                raise InputError(f"attention: {name} must be {wanted}, got {shown(repr(number))}")
        if mask.cached is None and q.shape[1] != k.shape[1] and (mask.causal or mask.document_ids is not None):
            what = "a causal mask without a cache needs" if mask.causal else "document_ids need"
            raise InputError(f"attention: {what} as many queries as keys, got {q.shape[1]} and {k.shape[1]}")
        for name, tensor, length in (
            ("k", k, None),
            ("v", v, None),
            ("padding_mask", mask.padding_mask, k.shape[1]),
            ("document_ids", mask.document_ids, q.shape[1]),
        ):
            if tensor is None:
                continue
            if length is not None and tensor.shape != (q.shape[0], length):
                raise InputError(f"attention: {name} must be {(q.shape[0], length)}, got {tuple(tensor.shape)}")
            if tensor.device not in (self.device, q.device):
                raise InputError(f"attention: q is on {self.device}, but {name} on {tensor.device}")

    @classmethod
    def described(
        cls, config: AttentionConfig, mask: Mask, shape: tuple[int, int, int], dtype: torch.dtype, *,
        device: torch.device, grad: bool,
    ) -> Call:  # fmt: skip
        """A call of a layer, without values; shape: (B, Tq, Tk)."""
        batch_size, num_queries, num_keys = shape
        q, k = (
            torch.empty(batch_size, length, heads, config.head_dim, dtype=dtype, device="meta")
            for length, heads in ((num_queries, config.num_output_heads), (num_keys, config.num_kv_heads))
        )
        scale = config.head_dim**-0.5 if config.scale is None else config.scale
        return cls(q=q, k=k, v=k, mask=mask, device=device, scale=scale, softcap=config.logit_softcap, grad=grad)

    @classmethod
    def of_layer(
        cls,
        config: AttentionConfig,
        *,
        length: int,
        num_queries: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        documents: bool = False,
        padding: bool = False,
        grad: bool = True,
    ) -> Call:
        """A self-attention call over `length` tokens, without values; num_queries: how many of them are not cached."""
        real = torch.empty(1, length, dtype=torch.bool, device="meta")
        positions = torch.empty(length, dtype=torch.long, device="meta")
        cached = None
        if num_queries is not None:
            cached = CachedKeys(
                query_positions=positions[:num_queries], key_positions=positions, near=real, far=real, holes=padding
            )
        mask = Mask.of(
            config,
            padding_mask=real if padding and cached is None else None,
            document_ids=positions[None] if documents else None,
            cached=cached,
        )
        shape = (1, length if num_queries is None else num_queries, length)
        return cls.described(config, mask, shape, dtype, device=torch.device(device), grad=grad)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of q, k and v."""
        return self.q.dtype

    @property
    def num_queries(self) -> int:
        """Tq, the tokens of q."""
        return self.q.shape[1]

    @property
    def num_keys(self) -> int:
        """Tk, the tokens of k and v."""
        return self.k.shape[1]

    @property
    def head_dim(self) -> int:
        """D, the width of one head."""
        return self.q.shape[3]

    @property
    def shares_kv(self) -> bool:
        """Whether several query heads read one KV head."""
        return self.k.shape[2] < self.q.shape[2]

    @property
    def cached(self) -> bool:
        """Whether the keys come from a cache."""
        return self.mask.cached is not None

    @property
    def window(self) -> int | None:
        """The window, if it hides any key."""
        return self.mask.window_over(self.num_keys)

    @property
    def sinks(self) -> int:
        """The sink tokens that stay visible beyond the window."""
        return self.mask.num_sink_tokens if self.window is not None else 0

    @property
    def masked(self) -> bool:
        """Whether anything but plain causality hides keys."""
        return bool(self.mask.needs(self.num_keys) - {"causal", "cache"}) or (self.cached and self.num_queries > 1)

    @property
    def needs(self) -> frozenset[str]:
        """What a kernel must support: kinds of masks, and "soft-capping"."""
        return self.mask.needs(self.num_keys) | ({"soft-capping"} if self.softcap is not None else set())
