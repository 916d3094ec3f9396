"""Our own attention on CPU, forward and backward: fused.cpp, compiled on first use and kept in the cache folder.

A plain shared library called through ctypes: it compiles in seconds where PyTorch's headers take a minute.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sqa.files import default_cache_dir, replacing, write_text

logger = logging.getLogger(__name__)

HEAD_DIMS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16)
_MOST_TOKENS = 2**31 - 1024  # positions are int32, and tiles reach past the end

_SOURCE = Path(__file__).with_name("fused.cpp")
# no -ffast-math: it would reorder sums, and linked into a library it flushes denormals in the whole process
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared", "-std=c++17")


@torch.compiler.assume_constant_result
def lacks() -> str | None:
    """Why there is no compiled library on this machine; None when there is one. The first call compiles."""
    library = _library()
    return library if isinstance(library, str) else None


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | str:
    """The library, or in words why there is none."""
    if platform.system() != "Linux":
        return "built on Linux only"
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler"
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        logger.warning("%s could not compile the attention kernel; PyTorch's is used: %s", compiler, error)
        return "did not compile"
    return library


def _compiled(compiler: str) -> Path:
    """The library in the cache, compiled there when source, compiler or processor are new."""
    command = shlex.split(compiler)  # CXX="ccache g++" is usual
    version = subprocess.run([*command, "--version"], capture_output=True, check=True).stdout
    target = subprocess.run(  # what -march=native means here
        [*command, "-march=native", "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, check=True
    ).stdout
    key = hashlib.sha256(b"\0".join((_SOURCE.read_bytes(), version, target, " ".join(_FLAGS).encode()))).hexdigest()
    path = default_cache_dir() / "kernels" / f"attention-{key[:16]}.so"
    seal = path.with_suffix(".sha256")  # loading a library cut short would kill the process
    if not (path.exists() and seal.exists() and seal.read_text() == hashlib.sha256(path.read_bytes()).hexdigest()):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            subprocess.run([*command, *_FLAGS, str(_SOURCE), "-o", str(temporary)], capture_output=True, check=True)
        write_text(seal, hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def fused_forward(q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, T, Hq, D), k, v (B, Tk, Hkv, D) -> output (B, T, Hq, D) and log-sum-exp (B, T, Hq), fp32 inside.

    Query i of row b sees keys low[b, i] .. high[b, i] - 1 (int32, (B, T)); one that sees none gives zeros. q, k and v
    are of one dtype of DTYPES, D is one of HEAD_DIMS, Hkv divides Hq; any strides. Raises ValueError for all else.
    """
    strided, (low, high) = _checked({"q": q, "k": k, "v": v}, {"low": low, "high": high})
    out, logsumexp = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:3], dtype=torch.float32)
    _call("sqa_attention_forward", strided, (out, logsumexp, low, high), scale)
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
    """Gradients of q, k and v from that of the output (B, T, Hq, D) and from what `fused_forward` took and gave.

    Tk must be T. Summed in fp32, in the same order for any number of threads. Takes 8 * B * T * Hq * D bytes while it
    runs. Raises ValueError for what `fused_forward` refuses.
    """
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"fused attention: gradients need as many queries as keys, got {q.shape[1]} and {k.shape[1]}")
    strided, saved = _checked(
        {"q": q, "k": k, "v": v, "grad": grad}, {"out": out, "logsumexp": logsumexp, "low": low, "high": high}
    )
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    batch_size, length, num_heads, head_dim = q.shape
    scratch = torch.empty(2, batch_size, num_heads, length, head_dim, dtype=torch.float32)
    _call("sqa_attention_backward", strided, (*saved, dq, dk, dv, scratch), scale)
    return dq, dk, dv


def _checked(strided: dict[str, Tensor], contiguous: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors as native code may read them, copied where it cannot: it takes pointers and checks no memory.

    `strided` begins with q, k and v; only their last axes are made contiguous.
    """
    q, k = strided["q"], strided["k"]
    if q.dtype not in DTYPES or q.ndim != 4 or q.shape[3] not in HEAD_DIMS:
        raise ValueError(f"fused attention: q must be fp32 or bf16 with head_dim in {HEAD_DIMS}, got {_described(q)}")
    batch_size, length, num_heads, head_dim = q.shape
    if k.ndim != 4 or not k.shape[2] or not num_heads or num_heads % k.shape[2]:
        raise ValueError(f"fused attention: of k's heads q has a multiple, got {_described(q)} and {_described(k)}")
    if max(length, k.shape[1]) > _MOST_TOKENS:
        raise ValueError(f"fused attention: at most {_MOST_TOKENS} tokens, got {length} and {k.shape[1]}")
    keys = (batch_size, k.shape[1], k.shape[2], head_dim)
    shapes = {"k": keys, "v": keys, "logsumexp": q.shape[:3], "low": q.shape[:2], "high": q.shape[:2]}
    dtypes = {"logsumexp": torch.float32, "low": torch.int32, "high": torch.int32}
    for name, x in (strided | contiguous).items():
        shape, dtype = shapes.get(name, q.shape), dtypes.get(name, q.dtype)
        if x.dtype != dtype or x.shape != shape or x.layout != torch.strided or not x.is_cpu:
            raise ValueError(f"fused attention: {name} must be {tuple(shape)} {dtype} on cpu, got {_described(x)}")
        # no memory: a storage that was resized, a wrapper around other tensors
        if x.numel() and (not x.data_ptr() or _end(x) * x.itemsize > x.untyped_storage().nbytes()):
            raise ValueError(f"fused attention: {name} has no memory of its own: {_described(x)}")
    rows = [x if x.stride(3) == 1 else x.contiguous() for x in map(Tensor.resolve_neg, strided.values())]
    return rows, [x.resolve_neg().contiguous() for x in contiguous.values()]


def _end(x: Tensor) -> int:
    """One past the last element of x, counted in its storage."""
    offset = int(x.storage_offset())
    if x.is_contiguous():  # nearly always, and three times as fast
        return offset + x.numel()
    return offset + 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))


def _described(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} {str(x.layout).removeprefix('torch.')} on {x.device}"


def _call(function: str, strided: list[Tensor], contiguous: tuple[Tensor, ...], scale: float) -> None:
    """Calls `function` of fused.cpp; the tensors, checked, in its order."""
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(f"fused attention: {library}")
    pointers = [x.data_ptr() for x in (*strided, *contiguous)]
    strides = [stride for x in strided for stride in x.stride()[:3]]
    q, k, *_ = strided
    batch_size, length, num_heads, head_dim = q.shape
    status = getattr(library, function)(
        ctypes.c_int(q.dtype == torch.bfloat16),
        (ctypes.c_void_p * len(pointers))(*pointers),
        (ctypes.c_int64 * len(strides))(*strides),
        (ctypes.c_int64 * 6)(batch_size, length, num_heads, k.shape[2], head_dim, k.shape[1]),
        ctypes.c_float(scale),
        ctypes.c_int(torch.get_num_threads()),
    )
    if status == 1:
        raise ValueError(f"fused attention: low and high must lie in 0 .. {k.shape[1]}, the number of keys")
    assert status == 0
