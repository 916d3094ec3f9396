"""Masks: which keys a query sees, without an N x N tensor. Only kernels that need a dense mask get one."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from sqa.config import LONGEST, AttentionConfig
from sqa.errors import InputError, shown

KINDS = ("causal", "window", "sinks", "documents", "padding", "cache")
"""What a mask may ask of a kernel. A kernel never gets a kind that it does not name."""

_OF_CACHES = frozenset({"causal", "window", "sinks", "padding", "cache"})
"""The kinds that `_cached_mask` knows. Any other kind would be ignored silently while a model generates."""


@dataclass(frozen=True, kw_only=True)
class CachedKeys:
    """Keys from a cache, whose index differs from their position.

    query_positions (Tq,); key_positions (Tk,) or (B, Tk); near and far, bool (1 or B, Tk): whether queries may see a
    key inside their window, and outside it; for full attention both are the same. holes: whether keys may be missing
    or out of order; otherwise they are the last Tk positions in order.
    """

    query_positions: Tensor
    key_positions: Tensor
    near: Tensor
    far: Tensor
    holes: bool


class Prepared(NamedTuple):
    """A mask in the form that one kernel reads, for one batch and one length: see `sqa.attention.kernels.prepare`."""

    kernel: str
    form: Any


@dataclass(frozen=True, kw_only=True)
class Mask:
    """The mask of one attention call.

    causal: a query sees no later key. window: of the keys before it, a query sees itself and the window - 1 nearest.
    num_sink_tokens: the first real tokens of a document stay visible beyond the window. padding_mask: bool (B, Tk),
    True = real. document_ids: integers (B, T), a document being a run of equal ids. cached: for keys that
    come from a cache. prepared: for one mask that serves several calls of the same length.

    Raises InputError for a window below 1 or without causal, and for what is no tensor or of the wrong dtype.
    """

    causal: bool = True
    window: int | None = None
    num_sink_tokens: int = 0
    padding_mask: Tensor | None = None
    document_ids: Tensor | None = None
    cached: CachedKeys | None = None
    prepared: Prepared | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.causal, bool):
            raise InputError(f"attention: causal must be true or false, got {shown(repr(self.causal))}")
        if self.window is not None:
            check_whole("attention: window", self.window, 1, ", or None for no window")
        if self.window is not None and not self.causal:
            raise InputError(f"attention: a window needs causal=True, got window={self.window} and causal=False")
        check_whole("attention: num_sink_tokens", self.num_sink_tokens, 0)
        check_tensor("padding_mask", self.padding_mask, or_none=True)
        check_tensor("document_ids", self.document_ids, or_none=True)
        if self.padding_mask is not None and self.padding_mask.dtype != torch.bool:
            raise InputError(f"attention: padding_mask must be bool (True = real), got {self.padding_mask.dtype}")
        if self.cached is not None and (self.padding_mask is not None or self.document_ids is not None):
            raise InputError("attention: with keys from a cache, padding_mask and document_ids must be None")
        ids = self.document_ids
        if ids is not None and (ids.is_floating_point() or ids.is_complex()):
            raise InputError(f"attention: document_ids must be integers, got {ids.dtype}")

    @classmethod
    def of(cls, config: AttentionConfig, **given: Any) -> Self:
        """The mask of a layer; `given` are the fields that a call decides: padding_mask, document_ids and cached."""
        return cls(causal=config.causal, window=config.window, num_sink_tokens=config.num_sink_tokens, **given)

    @property
    def hides_padding(self) -> bool:
        """Whether some keys are padding, or slots of a cache that hold nothing."""
        return self.padding_mask is not None or (self.cached is not None and self.cached.holes)

    def window_over(self, num_keys: int) -> int | None:
        """The window, if it hides any of so many keys."""
        return None if self.window is None or self.window >= num_keys else self.window

    def needs(self, num_keys: int) -> frozenset[str]:
        """Which of KINDS this mask has over so many keys."""
        windowed = self.window_over(num_keys) is not None
        has = {
            "causal": self.causal,
            "window": windowed,
            "sinks": windowed and self.num_sink_tokens > 0,
            "documents": self.document_ids is not None,
            "padding": self.hides_padding,
            "cache": self.cached is not None,
        }
        return frozenset(kind for kind, needed in has.items() if needed)


def check_tensor(name: str, value: object, *, or_none: bool = False) -> None:
    """Raise InputError unless it is a dense tensor, or None where that is allowed."""
    if value is None and or_none:
        return
    if not isinstance(value, Tensor):
        wanted = "a tensor or None" if or_none else "a tensor"
        raise InputError(f"attention: {name} must be {wanted}, got {shown(repr(value))}")
    if value.layout != torch.strided:
        raise InputError(f"attention: {name} must be dense, got layout {value.layout}")


def check_whole(name: str, value: object, least: int, otherwise: str = "") -> None:
    """Raise InputError unless it is a whole number from `least` to LONGEST; `otherwise` says what else would do."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= LONGEST:
        wanted = f"a whole number from {least} to {LONGEST:,}{otherwise}"
        raise InputError(f"{name} must be {wanted}, got {shown(repr(value))}")


def document_starts(document_ids: Tensor) -> Tensor:
    """bool (B, T): True at the first token of each document."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return starts


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
    keys = cached.key_positions.unsqueeze(-2)
    if unknown := mask.needs(keys.shape[-1]) - _OF_CACHES:
        raise InputError(f"attention: keys from a cache cannot have a mask of {', '.join(sorted(unknown))}")
    distance = cached.query_positions[None, :, None] - keys
    if mask.window is None:
        visible = cached.near[:, None, :]
    else:
        visible = torch.where(distance < mask.window, cached.near[:, None, :], cached.far[:, None, :])
    return (visible & (distance >= 0))[:, None]
