"""One signature, several kernels. The choice is made by what a kernel can do, says why, and drops nothing.

Shapes: B batch, T tokens, H heads, D head_dim; tensors are (B, T, H, D) everywhere, and only this file and the
kernels under it transpose.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sqa.attention import fused
from sqa.attention.blocks import block_attention
from sqa.attention.masks import Mask, dense_mask, document_starts, real_first, sink_keys
from sqa.attention.reference import reference_attention
from sqa.config import AttentionConfig, nearest
from sqa.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What decides the kernel: everything about a call but its numbers."""

    device: str
    dtype: torch.dtype
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    num_queries: int
    num_keys: int
    causal: bool = True
    window: int | None = None
    num_sink_tokens: int = 0
    padding: bool = False
    documents: bool = False
    cached: bool = False
    softcap: bool = False
    grad: bool = False

    @classmethod
    def of_layer(
        cls,
        config: AttentionConfig,
        *,
        length: int,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        documents: bool = False,
        padding: bool = False,
        grad: bool = True,
    ) -> Case:
        """The case of an uncached self-attention layer over `length` tokens."""
        return cls(
            device=device,
            dtype=dtype,
            num_query_heads=config.num_output_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_queries=length,
            num_keys=length,
            causal=config.causal,
            window=config.window,
            num_sink_tokens=config.num_sink_tokens,
            padding=padding,
            documents=documents,
            softcap=config.logit_softcap is not None,
            grad=grad,
        )

    @property
    def shared(self) -> bool:
        """Whether several query heads read one KV head."""
        return self.num_kv_heads < self.num_query_heads

    @property
    def windowed(self) -> bool:
        """Whether the window hides anything."""
        return self.window is not None and self.window < self.num_keys

    @property
    def masked(self) -> bool:
        """Whether anything but plain causality is masked."""
        return self.windowed or self.padding or self.documents or (self.cached and self.num_queries > 1)


class Choice(NamedTuple):
    """The kernel for a case, and why it."""

    kernel: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A row of the kernel table. `run(q, k, v, mask, case, scale, softcap)`; `lacks(case)` names what it cannot do."""

    run: Callable[[Tensor, Tensor, Tensor, Mask, Case, float, float | None], Tensor]
    lacks: Callable[[Case], str | None]
    devices: str
    masks: str
    dtypes: str
    backward: str
    about: str


def _visible(q: Tensor, k: Tensor, mask: Mask, case: Case) -> Tensor | None:
    """The dense mask, or None when nothing is hidden (as from one query at the end of a cache)."""
    if case.cached and not case.masked:
        return None
    return dense_mask(mask, q.shape[1], k.shape[1], q.device)


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: Mask, case: Case, scale: float, softcap: float | None) -> Tensor:
    return reference_attention(q, k, v, _visible(q, k, mask, case), scale=scale, softcap=softcap)


def _must_expand(case: Case) -> bool:
    """Whether PyTorch would run shared KV heads on its unfused math kernel (CUDA: fp32, or with a dense mask)."""
    return case.shared and case.device == "cuda" and (case.masked or case.dtype == torch.float32)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask, case: Case, scale: float, softcap: float | None) -> Tensor:
    if _must_expand(case):
        repeats = case.num_query_heads // case.num_kv_heads
        k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    plain_causal = case.causal and not case.masked and not case.cached
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if plain_causal else _visible(q, k, mask, case),
        is_causal=plain_causal,
        scale=scale,
        enable_gqa=k.shape[2] != q.shape[2],
    )
    return out.transpose(1, 2)


def _lacks_sdpa(case: Case) -> str | None:
    return "no logit soft-capping" if case.softcap else None


def _run_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Mask, case: Case, scale: float, softcap: float | None) -> Tensor:
    window = mask.window if case.windowed and mask.window is not None else 0
    sinks = mask.num_sink_tokens if window else 0
    return block_attention(q, k, v, None, mask.document_ids, case.causal, window, sinks, scale, False)[0]


def _run_fused(q: Tensor, k: Tensor, v: Tensor, mask: Mask, case: Case, scale: float, softcap: float | None) -> Tensor:
    window = mask.window if case.windowed and mask.window is not None else 0
    real = mask.padding_mask if mask.cached is None else mask.cached.near
    if case.padding and real is not None:
        k, v = real_first(real, k, v)
    else:
        real = None
    return block_attention(q, k, v, real, mask.document_ids, case.causal, window, 0, scale, True)[0]


def _lacks_blocks(case: Case) -> str | None:
    if case.device != "cpu":
        return "CPU only"
    if case.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"fp32, fp16 and bf16 only, got {case.dtype}"
    if case.softcap:
        return "no logit soft-capping"
    if case.padding:
        return "no padding mask"
    if case.num_queries != case.num_keys:
        return "no cache or cross-attention"
    return None


def _lacks_fused(case: Case) -> str | None:
    # padding it can do, and without gradients any number of queries
    lack = _lacks_blocks(replace(case, padding=False, num_queries=case.num_queries if case.grad else case.num_keys))
    if lack is not None:
        return lack
    if case.cached and case.padding and case.window is not None:
        return "no padding in a rolling cache"
    if case.windowed and case.num_sink_tokens:
        return "no sinks"
    if case.dtype not in fused.DTYPES:
        return f"fp32 and bf16 only, got {case.dtype}"
    if case.head_dim not in fused.HEAD_DIMS:
        return f"head_dim must be one of {', '.join(map(str, fused.HEAD_DIMS))}, got {case.head_dim}"
    return fused.lacks()


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Mask, case: Case, scale: float, softcap: float | None) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not case.grad:  # the CPU kernel refuses what could want gradients, even under no_grad
        q, k, v = q.detach(), k.detach(), v.detach()
    # inside somebody's torch.compile the plain functions are traced; alone they would run unfused
    attend_flex, make_mask = (flex_attention, create_block_mask) if torch.compiler.is_compiling() else _compiled_flex()
    window = mask.window if case.windowed else None
    documents = None if mask.document_ids is None else document_starts(mask.document_ids).cumsum(1)
    sinks = sink_keys(mask, k.shape[1], k.device) if mask.num_sink_tokens else None
    if sinks is not None:
        sinks = sinks.expand(q.shape[0], -1).contiguous()

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = i >= j if case.causal else i == i
        if window is not None:
            near = i - j < window
            seen = seen & (near if sinks is None else near | sinks[b, j])
        if documents is not None:
            seen = seen & (documents[b, i] == documents[b, j])
        if mask.padding_mask is not None:
            seen = seen & mask.padding_mask[b, j]
        return seen

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    rows = q.shape[0] if case.documents or case.padding or sinks is not None else None
    block_mask = None
    if case.causal or case.masked:
        block_mask = make_mask(visible, rows, None, q.shape[1], k.shape[1], device=q.device)
    out = attend_flex(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        score_mod=None if softcap is None else capped,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=case.num_kv_heads != case.num_query_heads,
    )
    return out.transpose(1, 2)


def _lacks_flex(case: Case) -> str | None:
    if case.device == "cpu" and case.grad:
        return "no CPU backward"
    if case.cached:
        return "no cache"
    if case.head_dim < 16 or case.head_dim & (case.head_dim - 1):
        return f"head_dim must be a power of two from 16, got {case.head_dim}"
    if case.device not in ("cpu", "cuda"):
        return f"not for {case.device}"
    return None


KERNELS: dict[str, Kernel] = {
    "reference": Kernel(
        run=_reference, lacks=lambda case: None, devices="all", masks="all, soft-cap", dtypes="all, computed in fp32",
        backward="yes", about="the oracle; memory grows with N x N",
    ),
    "sdpa": Kernel(
        run=_sdpa, lacks=_lacks_sdpa, devices="all", masks="all, dense but for causal", dtypes="fp32, fp16, bf16",
        backward="yes", about="PyTorch's scaled_dot_product_attention",
    ),
    "blocks": Kernel(
        run=_run_blocks, lacks=_lacks_blocks, devices="cpu", masks="causal, window, sinks, documents",
        dtypes="fp32, fp16, bf16", backward="yes", about="fused attention on slices; skips what a mask hides",
    ),
    "fused": Kernel(
        run=_run_fused, lacks=_lacks_fused, devices="cpu", masks="all but sinks",
        dtypes="fp32, bf16", backward="not cached",
        about="our own (C++, needs a compiler), made for small heads; skips what a mask hides",
    ),
    "flex": Kernel(
        run=_flex, lacks=_lacks_flex, devices="cuda; cpu forward", masks="all but cached, soft-cap",
        dtypes="fp32, fp16, bf16", backward="cuda", about="PyTorch's FlexAttention, compiled; skips what a mask hides",
    ),
}  # fmt: skip

_logged: set[Choice] = set()


def resolve(case: Case, kernel: str = "auto") -> Choice:
    """The kernel for a case and the reason. Raises ValueError when a kernel asked for by name cannot do it."""
    if kernel != "auto":
        if kernel not in KERNELS:
            raise InputError(
                f"kernel: {kernel!r} is unknown{nearest(kernel, list(KERNELS))} (kernels: {', '.join(KERNELS)})"
            )
        lack = KERNELS[kernel].lacks(case)
        if lack is not None:
            raise InputError(f"kernel: {kernel} cannot do this call ({lack}); use kernel='auto' or 'sdpa'")
        return Choice(kernel, "asked for")
    if case.cached and case.num_queries == 1 and case.dtype == torch.float32 and not case.shared and not case.masked:
        return Choice("sdpa", "fused; for one fp32 query a KV head as fast as memory is read")
    if _lacks_fused(case) is None:
        return Choice("fused", "our own kernel, made for small heads; skips what a mask hides")
    skips = case.windowed or case.documents
    if case.device == "cpu" and skips and _lacks_blocks(case) is None:
        return Choice("blocks", "skips the keys that the window or the documents hide")
    if case.device == "cuda" and (skips or case.softcap) and _lacks_flex(case) is None:
        return Choice("flex", "skips the keys that the mask hides, or caps scores, in one fused kernel")
    if case.softcap:
        return Choice("reference", "no fused kernel here caps scores")
    if _must_expand(case):
        return Choice("sdpa", "K and V expanded to the query heads: no fused kernel shares them for this dtype or mask")
    return Choice("sdpa", "fused, with a dense mask" if case.masked else "fused")


def explain(case: Case) -> list[tuple[str, str]]:
    """(kernel, "yes" or what it lacks) for every kernel: which of them could do this call."""
    return [(name, kernel.lacks(case) or "yes") for name, kernel in KERNELS.items()]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Attention of q (B, Tq, Hq, D) over k, v (B, Tk, Hkv, D) under `mask`; returns (B, Tq, max(Hq, Hkv), D).

    Query head i reads KV head i // (Hq / Hkv); with Hq < Hkv each query head is repeated over Hkv / Hq KV heads.
    A query that sees no key gives zeros. `scale` defaults to D ** -0.5. Raises ValueError for shapes that do not fit
    and for a kernel that cannot do the call.
    """
    _check(q, k, v, mask)
    if q.shape[2] < k.shape[2]:
        q = q.repeat_interleave(k.shape[2] // q.shape[2], dim=2)
    case = Case(
        device=q.device.type,
        dtype=q.dtype,
        num_query_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        head_dim=q.shape[3],
        num_queries=q.shape[1],
        num_keys=k.shape[1],
        causal=mask.causal,
        window=mask.window,
        num_sink_tokens=mask.num_sink_tokens,
        padding=mask.padding_mask is not None or (mask.cached is not None and mask.cached.holes),
        documents=mask.document_ids is not None,
        cached=mask.cached is not None,
        softcap=softcap is not None,
        grad=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
    )
    if kernel == "auto" and not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        kernel = "sdpa" if softcap is None else "reference"  # our operators have no rule for torch.func's transforms
    choice = resolve(case, kernel)
    if not torch.compiler.is_compiling() and choice not in _logged:
        _logged.add(choice)
        logger.info("attention kernel %s: %s", choice.kernel, choice.reason)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return KERNELS[choice.kernel].run(q, k, v, mask, case, scale, softcap)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> None:
    """A tensor in another layout than (B, T, H, D) must not pass: the result would have the right shape."""
    if q.ndim != 4 or k.ndim != 4:
        raise InputError(f"attention: q and k must be (B, T, H, D), got {tuple(q.shape)} and {tuple(k.shape)}")
    if k.shape != v.shape:
        raise InputError(f"attention: k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise InputError(f"attention: q and k differ in batch or head_dim: {tuple(q.shape)} and {tuple(k.shape)}")
    if q.shape[2] % k.shape[2] and k.shape[2] % q.shape[2]:
        raise InputError(f"attention: of the head counts one must divide the other, got {q.shape[2]} and {k.shape[2]}")
    if mask.causal and mask.cached is None and q.shape[1] != k.shape[1]:
        raise InputError(
            f"attention: a causal mask without a cache needs as many queries as keys, got {q.shape[1]} and {k.shape[1]}"
        )
    for name, length in (("padding_mask", k.shape[1]), ("document_ids", q.shape[1])):
        given: Tensor | None = getattr(mask, name)
        if given is not None and given.shape != (q.shape[0], length):
            raise InputError(f"attention: {name} must be {(q.shape[0], length)}, got {tuple(given.shape)}")
    if mask.padding_mask is not None and mask.padding_mask.dtype != torch.bool:
        raise InputError(f"attention: padding_mask must be bool (True = real), got {mask.padding_mask.dtype}")
