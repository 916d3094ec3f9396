"""Check of the kernel table: run every kernel on small calls, and ask PyTorch's profiler what really ran.

No result shows that the table is wrong: PyTorch falls back to its slow unfused math silently.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor
from torch.autograd.profiler import profile

from sqa.attention import pytorch
from sqa.attention.call import Call
from sqa.attention.kernels import KERNELS, attend
from sqa.attention.masks import Mask
from sqa.dtypes import dtype_name
from sqa.errors import first_line

# parts of the names of operators and CUDA kernels; the first that occurs decides
SIGNS = (
    ("sqa::range_attention", "own"),
    ("sqa::block_attention", "blocks"),
    ("_varlen_attn", "varlen"),
    ("flex_attention", "flex"),
    ("Torch-Compiled Region", "flex"),
    ("CompiledFunctionBackward", "flex"),
    ("flash_attention_for_cpu", "cpu flash"),
    ("cudnn_attention", "cudnn"),
    ("native_sdpa", "cudnn"),
    ("flash_attention", "flash"),
    ("flash_fwd", "flash"),
    ("flash_bwd", "flash"),
    ("efficient_attention", "efficient"),
    ("fmha_cutlass", "efficient"),
    ("scaled_dot_product_attention_math", "math"),
    ("aten::bmm", "unfused"),
)
MASKS = ("causal", "none", "padding", "window", "documents")


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One kernel on one kind of call: what should run by the table, and what ran forward and backward.

    backward: None without a backward pass. error: why the call did not run at all.
    """

    kernel: str
    mask: str
    dtype: str
    expected: tuple[str, ...]
    forward: str = ""
    backward: str | None = None
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the table is right about this call."""
        # PyTorch differentiates its math kernel operator by operator
        backward = {*self.expected, *(("unfused",) if "math" in self.expected else ()), None}
        return self.error is None and self.forward in self.expected and self.backward in backward


def implementation(names: Iterable[str]) -> str:
    """The implementation of attention that the names of a profile's events belong to."""
    names = list(names)
    return next((what for sign, what in SIGNS if any(sign in name for name in names)), "nothing known")


def expected_implementations(call: Call, kernel: str) -> tuple[str, ...]:
    """What should run by the kernel table, in the words of `implementation`."""
    if kernel == "sdpa" and call.device.type == "cuda":
        backends = pytorch.cuda_backends(call, expanded=pytorch.must_expand(call))
        return backends or ("math",)
    known = {"reference": "unfused", "sdpa": "cpu flash", "fused": "own"}
    return (known.get(kernel, kernel),)


def check_kernels(device: str = "cpu") -> list[Checked]:
    """Run every kernel on 128 tokens with each mask and dtype that it supports on `device` ("cpu" or "cuda").

    With a backward pass where the kernel has one. FlexAttention takes long to compile on a CPU, and runs once there.
    """
    rows = []
    for kernel, dtype, mask in product(KERNELS, (torch.float32, torch.bfloat16), MASKS):
        if (kernel, device) == ("flex", "cpu") and (dtype, mask) != (torch.float32, "documents"):
            continue
        calls = (_call(mask, dtype, torch.device(device), grad=grad) for grad in (True, False))
        call = next((call for call in calls if KERNELS[kernel].lacks(call) is None), None)
        if call is not None:
            rows.append(_check(call, kernel, mask))
    return rows


def _call(kind: str, dtype: torch.dtype, device: torch.device, *, grad: bool) -> Call:
    """Four query heads and two KV heads of 64, under a mask of MASKS."""
    q, k, v = (torch.randn(2, 128, heads, 64, dtype=dtype, device=device, requires_grad=grad) for heads in (4, 2, 2))
    positions = torch.arange(128, device=device).expand(2, -1)
    mask = Mask(
        causal=kind != "none",
        window=32 if kind == "window" else None,
        padding_mask=positions >= 16 if kind == "padding" else None,
        document_ids=positions // 50 if kind == "documents" else None,
    )
    return Call(q=q, k=k, v=v, mask=mask, device=q.device, scale=64**-0.5, grad=grad)


def _check(call: Call, kernel: str, mask: str) -> Checked:
    def forward() -> Tensor:
        return attend(call.q, call.k, call.v, call.mask, kernel=kernel)

    expected, dtype = expected_implementations(call, kernel), dtype_name(call.dtype)
    checked = Checked(kernel=kernel, mask=mask, dtype=dtype, expected=expected)
    try:
        with torch.set_grad_enabled(call.grad):
            out = forward()  # compiled and warm
            names = _names(forward, call.device)
        backward = None
        if call.grad:
            inputs = (call.q, call.k, call.v)
            backward = implementation(
                _names(lambda: torch.autograd.grad(out.float().square().sum(), inputs), call.device)
            )
    except RuntimeError as problem:  # the table promises this kernel, so a failure is a finding
        return replace(checked, error=first_line(problem))
    return replace(checked, forward=implementation(names), backward=backward)


def _names(run: Callable[[], object], device: torch.device) -> list[str]:
    """Names of the operators that ran, and on a GPU of the kernels too."""
    on_gpu = device.type == "cuda"
    with _quiet(), profile(use_device="cuda" if on_gpu else None, use_kineto=on_gpu) as recorded:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    return [event.name for event in recorded.function_events or ()]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence stderr, to which PyTorch's profiler writes whenever it starts and stops."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
