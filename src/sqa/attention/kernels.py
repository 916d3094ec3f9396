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

from sqa.attention import blocks, pytorch, ranges
from sqa.attention.call import Call
from sqa.attention.masks import Mask, Prepared
from sqa.attention.reference import reference_attention
from sqa.config import unknown
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
    backward: str = "yes"


def _reference(call: Call, form: Tensor | None) -> Tensor:
    return reference_attention(call.q, call.k, call.v, form, scale=call.scale, softcap=call.softcap)


KERNELS: dict[str, Kernel] = {
    # the oracle; memory grows with N x N
    "reference": Kernel(
        run=_reference, prepare=pytorch.visible, lacks=lambda call: None, devices="all", masks="all, soft-cap"
    ),
    "sdpa": Kernel(
        run=pytorch.sdpa, prepare=pytorch.sdpa_form, lacks=pytorch.lacks_sdpa, devices="all",
        masks="all, dense but for causal",
    ),
    # this one and those below skip what a mask hides
    "blocks": Kernel(
        run=blocks.run, prepare=blocks.prepare, lacks=blocks.lacks, devices="cpu",
        masks="causal, window, sinks, documents",
    ),
    "fused": Kernel(
        run=ranges.run, prepare=ranges.prepare, lacks=ranges.lacks, devices="cpu", masks="all but sinks",
        backward="not cached",
    ),
    "varlen": Kernel(
        run=pytorch.varlen, prepare=pytorch.varlen_form, lacks=pytorch.lacks_varlen, devices="cuda",
        masks="causal, window, documents",
    ),
    "flex": Kernel(
        run=pytorch.flex, prepare=pytorch.flex_form, lacks=pytorch.lacks_flex, devices="cuda; cpu forward",
        masks="all but cached, soft-cap", backward="cuda",
    ),
}  # fmt: skip

_logged: set[Choice] = set()


def check_kernel(kernel: str) -> None:
    """Raise InputError unless `kernel` is "auto" or in the table."""
    if kernel != "auto" and kernel not in KERNELS:
        raise unknown("kernel", kernel, ("auto", *KERNELS))


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
    if ranges.lacks(call) is None:
        return Choice("fused", "our own kernel, made for small heads; skips what a mask hides")
    skips = call.window is not None or call.documents
    if skips and blocks.lacks(call) is None:
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
    if scale is None:
        scale = max((1, *q.shape[3:])) ** -0.5
    call = Call(
        q=q,
        k=k,
        v=v,
        mask=mask,
        device=q.device,
        scale=scale,
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
