"""One signature, several kernels. The choice is made by what a kernel can do, says why, and drops nothing.

Shapes: B batch, T tokens, H heads, D head_dim; tensors are (B, T, H, D) everywhere, and only the kernels transpose.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sqa.attention import fused, pytorch
from sqa.attention.blocks import block_attention
from sqa.attention.call import Call
from sqa.attention.masks import Mask, Prepared, document_starts
from sqa.attention.ranges import KeyRanges, key_ranges, range_attention
from sqa.attention.reference import reference_attention
from sqa.config import nearest
from sqa.errors import InputError

logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    """The kernel for a call, and why it."""

    kernel: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A row of the kernel table.

    `lacks(call)` names what it cannot do of a call, `prepare(call)` puts the mask into the form that the kernel reads,
    and `run(call, form)` computes.
    """

    run: Callable[[Call, Any], Tensor]
    prepare: Callable[[Call], Any]
    lacks: Callable[[Call], str | None]
    devices: str
    masks: str
    dtypes: str
    backward: str
    about: str


def _reference(call: Call, form: Tensor | None) -> Tensor:
    return reference_attention(call.q, call.k, call.v, form, scale=call.scale, softcap=call.softcap)


def _lacks_sdpa(call: Call) -> str | None:
    return None if call.softcap is None else "no logit soft-capping"


def _blocks_form(call: Call) -> Tensor | None:
    return None if call.mask.document_ids is None else document_starts(call.mask.document_ids)


def _blocks(call: Call, form: Tensor | None) -> Tensor:
    out: Tensor = block_attention(
        call.q, call.k, call.v, form, call.mask.causal, call.window or 0, call.sinks, call.scale
    )[0]
    return out


def _lacks_blocks(call: Call) -> str | None:
    if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"fp32, fp16 and bf16 only, got {call.dtype}"
    if call.padding:
        return "no padding mask"
    if call.num_queries != call.num_keys:
        return "no cache or cross-attention"
    return _lacks_on_cpu(call)


def _lacks_on_cpu(call: Call) -> str | None:
    if call.device.type != "cpu":
        return "CPU only"
    return None if call.softcap is None else "no logit soft-capping"


def _fused_form(call: Call) -> KeyRanges:
    return key_ranges(call.mask, call.q.shape[0], call.num_queries, call.num_keys)


def _fused(call: Call, form: KeyRanges) -> Tensor:
    return range_attention(call.q, call.k, call.v, form, call.scale)


def _lacks_fused(call: Call) -> str | None:
    if call.grad and call.num_queries != call.num_keys:
        return "no cache or cross-attention"
    if call.cached and call.padding and call.mask.window is not None:
        return "no padding in a rolling cache"
    if call.sinks:
        return "no sinks"
    if call.dtype not in fused.DTYPES:
        return f"fp32 and bf16 only, got {call.dtype}"
    if call.head_dim not in fused.HEAD_DIMS:
        return f"head_dim must be one of {', '.join(map(str, fused.HEAD_DIMS))}, got {call.head_dim}"
    return _lacks_on_cpu(call) or fused.lacks()


KERNELS: dict[str, Kernel] = {
    "reference": Kernel(
        run=_reference, prepare=pytorch.visible, lacks=lambda call: None, devices="all", masks="all, soft-cap",
        dtypes="all, computed in fp32", backward="yes", about="the oracle; memory grows with N x N",
    ),
    "sdpa": Kernel(
        run=pytorch.sdpa, prepare=pytorch.sdpa_form, lacks=_lacks_sdpa, devices="all",
        masks="all, dense but for causal", dtypes="fp32, fp16, bf16", backward="yes",
        about="PyTorch's scaled_dot_product_attention",
    ),
    "blocks": Kernel(
        run=_blocks, prepare=_blocks_form, lacks=_lacks_blocks, devices="cpu", masks="causal, window, sinks, documents",
        dtypes="fp32, fp16, bf16", backward="yes", about="fused attention on slices; skips what a mask hides",
    ),
    "fused": Kernel(
        run=_fused, prepare=_fused_form, lacks=_lacks_fused, devices="cpu", masks="all but sinks",
        dtypes="fp32, bf16", backward="not cached",
        about="our own (C++, needs a compiler), made for small heads; skips what a mask hides",
    ),
    "varlen": Kernel(
        run=pytorch.varlen, prepare=pytorch.varlen_form, lacks=pytorch.lacks_varlen, devices="cuda",
        masks="causal, window, documents", dtypes="fp16, bf16", backward="yes",
        about="PyTorch's varlen_attn (flash attention); skips what a mask hides",
    ),
    "flex": Kernel(
        run=pytorch.flex, prepare=pytorch.flex_form, lacks=pytorch.lacks_flex, devices="cuda; cpu forward",
        masks="all but cached, soft-cap", dtypes="fp32, fp16, bf16", backward="cuda",
        about="PyTorch's FlexAttention, compiled; skips what a mask hides",
    ),
}  # fmt: skip

_logged: set[Choice] = set()


def check_kernel(kernel: str) -> None:
    """Raise InputError unless `kernel` is "auto" or in the table."""
    if kernel != "auto" and kernel not in KERNELS:
        raise InputError(
            f"kernel: {kernel!r} is unknown{nearest(kernel, list(KERNELS))} (kernels: auto, {', '.join(KERNELS)})"
        )


def resolve(call: Call, kernel: str = "auto") -> Choice:
    """The kernel for a call and the reason. Raises InputError when a kernel asked for by name cannot do it."""
    check_kernel(kernel)
    if kernel != "auto":
        lack = KERNELS[kernel].lacks(call)
        if lack is not None:
            raise InputError(f"kernel: {kernel} cannot do this call ({lack}); use kernel='auto' or 'sdpa'")
    if call.empty:
        return Choice("reference", "nothing to compute")
    if kernel != "auto":
        return Choice(kernel, "asked for")
    if call.cached and call.num_queries == 1 and call.dtype == torch.float32 and not call.shared and not call.masked:
        return Choice("sdpa", "fused; for one fp32 query a KV head as fast as memory is read")
    if _lacks_fused(call) is None:
        return Choice("fused", "our own kernel, made for small heads; skips what a mask hides")
    skips = call.window is not None or call.documents
    if skips and _lacks_blocks(call) is None:
        return Choice("blocks", "skips the keys that the window or the documents hide")
    if call.device.type == "cuda":
        return _resolve_cuda(call, skips)
    if call.softcap is not None:
        return Choice("reference", "no fused kernel here caps scores")
    return Choice("sdpa", "fused, with a dense mask" if call.masked else "fused")


def _resolve_cuda(call: Call, skips: bool) -> Choice:
    if skips and pytorch.lacks_varlen(call) is None:
        return Choice("varlen", "flash attention that skips what the window or the documents hide")
    if (skips or call.softcap is not None) and pytorch.lacks_flex(call) is None:
        return Choice("flex", "skips the keys that the mask hides, or caps scores, in one fused kernel")
    if call.softcap is not None:
        return Choice("reference", "no fused kernel here caps scores")
    if not torch.cuda.is_available():
        return Choice("sdpa", "PyTorch decides what runs, and without a CUDA device it cannot be asked")
    if pytorch.must_expand(call):
        return Choice("sdpa", "K and V expanded to the query heads: no fused kernel shares them for this call")
    backends = pytorch.fused_backends(call)
    return Choice("sdpa", f"fused ({' or '.join(backends)})" if backends else "not fused: PyTorch has no kernel for it")


def explain(call: Call) -> list[tuple[str, str]]:
    """(kernel, "yes" or what it lacks) for every kernel: which of them could do this call."""
    return [(name, kernel.lacks(call) or "yes") for name, kernel in KERNELS.items()]


def prepare(call: Call, kernel: str = "auto") -> Mask:
    """The mask of a call in the form that its kernel reads, for every call of the same batch and length.

    Raises InputError as `resolve` does.
    """
    name = resolve(call, kernel).kernel
    return replace(call.mask, prepared=Prepared(name, KERNELS[name].prepare(call)))


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
    A query that sees no key gives zeros. `scale` defaults to D ** -0.5. Under autocast q, k and v are cast to its
    dtype, as PyTorch's own attention is; otherwise they must have one dtype, which the result has too.

    Raises InputError for shapes, dtypes and devices that do not fit, and for a kernel that cannot do the call.
    """
    q, k, v = _autocast(q, k, v)
    if q.ndim == k.ndim == 4 and 0 < q.shape[2] < k.shape[2] and k.shape[2] % q.shape[2] == 0:
        q = q.repeat_interleave(k.shape[2] // q.shape[2], dim=2)
    call = Call(
        q=q,
        k=k,
        v=v,
        mask=mask,
        device=q.device,
        scale=q.shape[-1] ** -0.5 if scale is None and q.shape[-1] else scale or 0.0,
        softcap=softcap,
        grad=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
    )
    if kernel == "auto" and not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        kernel = "sdpa" if softcap is None else "reference"  # our operators have no rule for torch.func's transforms
    choice = resolve(call, kernel)
    if not torch.compiler.is_compiling() and choice not in _logged:
        _logged.add(choice)
        logger.info("attention kernel %s: %s", choice.kernel, choice.reason)
    row, prepared = KERNELS[choice.kernel], mask.prepared
    form = prepared.form if prepared is not None and prepared.kernel == choice.kernel else row.prepare(call)
    return row.run(call, form)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast hands them to F.scaled_dot_product_attention."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)
