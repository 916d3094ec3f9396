"""Our own attention on CPU, forward and backward: fused.cpp, compiled on first use."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sqa import native
from sqa.attention.operators import constant

HEAD_DIMS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16)
_MOST_TOKENS = 2**31 - 1024  # positions are int32, and tiles reach past the end


@constant
def lacks() -> str | None:
    """Why this machine has no compiled library; None when it has one. The first call compiles it."""
    library = _library()
    return library if isinstance(library, str) else None


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    return native.load(Path(__file__).with_name("fused.cpp"))


class Need(NamedTuple):
    """What a call needs: the number of tasks for its threads, and the bytes beside its results."""

    tasks: int
    scratch_bytes: int


def fused_need(
    dtype: torch.dtype, q_shape: Sequence[int], k_shape: Sequence[int], *, backward: bool, threads: int
) -> Need:
    """For q (B, T, Hq, D) and k (B, Tk, Hkv, D), as `fused_forward` and `fused_backward` take them."""
    need = (ctypes.c_int64 * 2)()
    _native().sqa_attention_need(
        ctypes.c_int(backward), ctypes.c_int(dtype == torch.bfloat16), _sizes(q_shape, k_shape),
        ctypes.c_int(threads), need,
    )  # fmt: skip
    return Need(*need)


def fused_forward(q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, T, Hq, D), k, v (B, Tk, Hkv, D) -> output (B, T, Hq, D); log-sum-exp in base 2, fp32 (B, T, Hq).

    Query i of row b sees keys low[b, i] .. high[b, i] - 1 (int32, (B, T)); one that sees none gives zeros. q, k and v
    have one dtype of DTYPES, D is in HEAD_DIMS, Hkv divides Hq; any strides. The result does not depend on the number
    of threads. Raises ValueError for anything else, and MemoryError.
    """
    strided, (low, high) = _checked({"q": q, "k": k, "v": v}, {"low": low, "high": high})
    out, logsumexp = _empty(q.shape, q.dtype), _empty(q.shape[:3], torch.float32)
    _call(False, strided, (out, logsumexp, low, high), scale)
    return out, logsumexp


def fused_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    low: Tensor,
    high: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given that of the output (B, T, Hq, D), and `fused_forward`'s inputs and results.

    Tk must be T. Sums are in fp32; the result does not depend on the number of threads. Raises ValueError and
    MemoryError as `fused_forward` does.
    """
    if k.shape[1:2] != q.shape[1:2]:
        raise ValueError(f"fused attention: gradients need as many queries as keys, got {_described(q, k)}")
    strided, saved = _checked(
        {"q": q, "k": k, "v": v, "grad": grad}, {"out": out, "logsumexp": logsumexp, "low": low, "high": high}
    )
    dq, dk, dv = (_empty(x.shape, x.dtype) for x in (q, k, v))
    _call(True, strided, (*saved, dq, dk, dv), scale)
    return dq, dk, dv


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as error:  # what PyTorch's allocator raises
        raise MemoryError(f"fused attention: no memory for {tuple(shape)} {dtype}") from error


def _checked(strided: dict[str, Tensor], contiguous: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Check the tensors, and copy those that native code cannot read: it takes pointers and checks nothing.

    `strided` begins with q, k and v; these need a contiguous last axis only.
    """
    q, k = strided["q"], strided["k"]
    if q.dtype not in DTYPES or q.ndim != 4 or q.shape[3] not in HEAD_DIMS:
        raise ValueError(f"fused attention: q must be fp32 or bf16 with head_dim in {HEAD_DIMS}, got {_described(q)}")
    batch_size, length, num_heads, head_dim = q.shape
    if k.ndim != 4 or not k.shape[2] or not num_heads or num_heads % k.shape[2]:
        raise ValueError(f"fused attention: of k's heads q has a multiple, got {_described(q, k)}")
    if max(length, k.shape[1]) > _MOST_TOKENS:
        raise ValueError(f"fused attention: at most {_MOST_TOKENS} tokens, got {length} and {k.shape[1]}")
    keys = (batch_size, k.shape[1], k.shape[2], head_dim)
    shapes = {"k": keys, "v": keys, "logsumexp": q.shape[:3], "low": q.shape[:2], "high": q.shape[:2]}
    dtypes = {"logsumexp": torch.float32, "low": torch.int32, "high": torch.int32}
    for name, x in (strided | contiguous).items():
        shape, dtype = shapes.get(name, q.shape), dtypes.get(name, q.dtype)
        if x.dtype != dtype or x.shape != shape or x.layout != torch.strided or not x.is_cpu:
            raise ValueError(f"fused attention: {name} must be {tuple(shape)} {dtype} on cpu, got {_described(x)}")
        # a storage that was resized and a wrapper around other tensors have no memory
        if x.numel() and (not x.data_ptr() or _end(x) * x.itemsize > x.untyped_storage().nbytes()):
            raise ValueError(f"fused attention: {name} has no memory of its own: {_described(x)}")
    rows = [x if x.stride(3) == 1 else x.contiguous() for x in map(Tensor.resolve_neg, strided.values())]
    return rows, [x.resolve_neg().contiguous() for x in contiguous.values()]


def _end(x: Tensor) -> int:
    """The index after the last element of x in its storage."""
    offset = int(x.storage_offset())
    if x.is_contiguous():  # nearly always, and three times as fast
        return offset + x.numel()
    return offset + 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))


def _described(*tensors: Tensor) -> str:
    return " and ".join(f"{tuple(x.shape)} {x.dtype} {x.layout} on {x.device}" for x in tensors)


def _sizes(q_shape: Sequence[int], k_shape: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    batch_size, length, num_heads, head_dim = q_shape
    return (ctypes.c_int64 * 6)(batch_size, length, num_heads, k_shape[2], head_dim, k_shape[1])


def _native() -> ctypes.CDLL:
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(f"fused attention: {library}")
    return library


def _call(backward: bool, strided: list[Tensor], contiguous: tuple[Tensor, ...], scale: float) -> None:
    """Call the forward or backward of fused.cpp; the tensors are checked and in its order."""
    q, k, *_ = strided
    threads = torch.get_num_threads()
    need = fused_need(q.dtype, q.shape, k.shape, backward=backward, threads=threads)
    scratch = _empty((need.scratch_bytes + 64,), torch.uint8)
    pointers = [x.data_ptr() for x in (*strided, *contiguous)]
    strides = [stride for x in strided for stride in x.stride()[:3]]
    outside = _native().sqa_attention(
        ctypes.c_int(backward),
        ctypes.c_int(q.dtype == torch.bfloat16),
        (ctypes.c_void_p * len(pointers))(*pointers),
        (ctypes.c_int64 * len(strides))(*strides),
        _sizes(q.shape, k.shape),
        ctypes.c_float(scale),
        ctypes.c_int(threads),
        ctypes.c_void_p((scratch.data_ptr() + 63) // 64 * 64),
    )
    if outside:
        raise ValueError(f"fused attention: low and high must lie in 0 .. {k.shape[1]}, the number of keys")
