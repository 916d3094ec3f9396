"""Several attention kernels behind one function, which chooses one that supports the whole call and logs why.

Shapes: B batch, T tokens, H heads, D head_dim; tensors are (B, T, H, D) everywhere, and only the kernels transpose.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sqa.attention import blocks, pytorch, ranges
from sqa.attention.call import Call
from sqa.attention.masks import KINDS, Mask, Prepared, check_tensor
from sqa.attention.operators import transformed
from sqa.attention.reference import reference_attention
from sqa.config import unknown
from sqa.dtypes import product_dtype
from sqa.errors import InputError, shown

logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    """The kernel for a call, and the reason."""

    kernel: str
    reason: str


_DENSE = frozenset(KINDS)
"""What `dense_mask` can express. The other kernels have ways of their own, and name what they support."""
_PLAIN = frozenset({"causal", "window", "documents"})


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A row of the kernel table.

    `takes` has the kinds of masks that it supports, and "soft-capping"; `devices` is checked where it is "cpu"
    or "cuda" alone; `limits(call)` names anything else in a call that it cannot do. `prepare(call)` puts the mask into
    the form that the kernel reads; `run(call, form)` computes.
    """

    run: Callable[[Call, Any], Tensor]
    prepare: Callable[[Call], Any]
    takes: frozenset[str]
    devices: str
    limits: Callable[[Call], str | None] = lambda call: None
    backward: str = "yes"

    def lacks(self, call: Call) -> str | None:
        """Why a call cannot use this kernel, or None."""
        if missing := call.needs - self.takes:
            return f"no {min(missing)}"
        elsewhere = self.devices in ("cpu", "cuda") and call.device.type != self.devices
        return f"{self.devices.upper()} only" if elsewhere else self.limits(call)

    @property
    def masks(self) -> str:
        """`takes`, for people to read."""
        left = [kind for kind in KINDS if kind not in self.takes]
        taken = ", ".join(kind for kind in KINDS if kind in self.takes)
        words = taken if len(left) > 1 else f"all but {left[0]}" if left else "all"
        return f"{words}, soft-cap" if "soft-capping" in self.takes else words


KERNELS: dict[str, Kernel] = {
    # the oracle; memory grows with N x N
    "reference": Kernel(
        run=lambda call, form: reference_attention(
            call.q, call.k, call.v, form, scale=call.scale, softcap=call.softcap
        ),
        prepare=pytorch.dense_form, takes=_DENSE | {"soft-capping"}, devices="all",
    ),
    "sdpa": Kernel(run=pytorch.sdpa, prepare=pytorch.sdpa_form, takes=_DENSE, devices="all"),
    # this one and those below skip what a mask hides
    "blocks": Kernel(
        run=blocks.run, prepare=blocks.prepare, takes=_PLAIN | {"sinks"}, limits=blocks.limits, devices="cpu"
    ),
    "fused": Kernel(
        run=ranges.run, prepare=ranges.prepare, takes=_PLAIN | {"padding", "cache"}, limits=ranges.limits,
        devices="cpu", backward="not cached",
    ),
    "varlen": Kernel(
        run=pytorch.varlen, prepare=pytorch.varlen_form, takes=_PLAIN, limits=pytorch.varlen_limits, devices="cuda"
    ),
    "flex": Kernel(
        run=pytorch.flex, prepare=pytorch.flex_form, takes=_PLAIN | {"sinks", "padding", "soft-capping"},
        limits=pytorch.flex_limits, devices="cuda; cpu forward", backward="cuda",
    ),
}  # fmt: skip

_logged: set[Choice] = set()


def check_kernel(kernel: str) -> None:
    """Raise InputError unless `kernel` is "auto" or in the table."""
    if not isinstance(kernel, str) or kernel not in ("auto", *KERNELS):
        raise unknown("kernel", kernel, ("auto", *KERNELS))


def resolve(call: Call, kernel: str = "auto") -> Choice:
    """The kernel for a call and the reason. Raises InputError when a kernel asked for by name cannot do it."""
    check_kernel(kernel)
    if kernel != "auto" and (lack := KERNELS[kernel].lacks(call)) is not None:
        raise InputError(f"kernel: {kernel} cannot do this call ({lack}); use kernel='auto'")
    if call.q.shape[0] == 0 or call.num_queries == 0 or call.num_keys == 0:
        return Choice("reference", "nothing to compute")
    if kernel != "auto":
        return Choice(kernel, "asked for")
    if call.cached and call.num_queries == 1 and call.dtype == torch.float32 and not call.shares_kv and not call.masked:
        return Choice("sdpa", "PyTorch's own; for one fp32 query a KV head as fast as memory is read")
    if KERNELS["fused"].lacks(call) is None:
        return Choice("fused", "our own kernel, made for small heads; skips what a mask hides")
    skips = call.window is not None or call.mask.document_ids is not None
    if skips and KERNELS["blocks"].lacks(call) is None:
        return Choice("blocks", "skips the keys that the window or the documents hide")
    if call.device.type == "cuda":
        return _resolve_cuda(call, skips)
    if KERNELS["sdpa"].lacks(call) is not None:
        return Choice("reference", "no other kernel here caps scores")
    return Choice("sdpa", "PyTorch's own, with a dense mask" if call.masked else "PyTorch's own")


def _resolve_cuda(call: Call, skips: bool) -> Choice:
    if skips and KERNELS["varlen"].lacks(call) is None:
        return Choice("varlen", "flash attention that skips what the window or the documents hide")
    if (skips or call.softcap is not None) and KERNELS["flex"].lacks(call) is None:
        return Choice("flex", "skips the keys that the mask hides, or caps scores, in one kernel")
    if KERNELS["sdpa"].lacks(call) is not None:
        return Choice("reference", "no other kernel here caps scores")
    if not torch.cuda.is_available():
        return Choice("sdpa", "PyTorch decides what runs, and without a CUDA device it cannot be asked")
    if pytorch.must_expand(call):
        return Choice("sdpa", "K and V expanded to the query heads: of PyTorch's, only math shares them for this call")
    backends = pytorch.cuda_backends(call)
    return Choice("sdpa", f"PyTorch's own: {' or '.join(backends) or 'math, for want of a faster one'}")


def explain(call: Call) -> list[tuple[str, str]]:
    """(kernel, "yes" or what it lacks) for every kernel: which of them could do this call."""
    return [(name, kernel.lacks(call) or "yes") for name, kernel in KERNELS.items()]


def prepare(call: Call, kernel: str = "auto") -> Mask:
    """The mask of a call in the form that its kernel reads. It serves every call of the same batch and length.

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
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
    if not isinstance(mask, Mask):
        raise InputError(f"attention: mask must be a Mask, got {shown(repr(mask))}")
    # as autocast casts those of F.scaled_dot_product_attention
    q, k, v = (x.to(product_dtype(x)) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
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
    if kernel == "auto" and transformed():
        kernel = "sdpa" if softcap is None else "reference"
    choice = resolve(call, kernel)
    if not torch.compiler.is_compiling() and choice not in _logged:
        _logged.add(choice)
        logger.info("attention kernel %s: %s", choice.kernel, choice.reason)
    row, prepared = KERNELS[choice.kernel], mask.prepared
    form = prepared.form if prepared is not None and prepared.kernel == choice.kernel else row.prepare(call)
    return row.run(call, form)
