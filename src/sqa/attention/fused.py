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
BACKWARD_DTYPES = DTYPES  # the others of DTYPES take the backward of blocks

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

    Query i of row b sees keys low[b, i] .. high[b, i] - 1 (int32, (B, T)). Last axes must be without gaps, dtypes in
    DTYPES and D in HEAD_DIMS: the kernel table sees to it.
    """
    out = torch.empty(q.shape, dtype=q.dtype)
    logsumexp = torch.empty(q.shape[:3], dtype=torch.float32)
    _call("sqa_attention_forward", (q, k, v), (out, logsumexp, low.contiguous(), high.contiguous()), scale)
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

    Summed in fp32, in the same order for any number of threads. Takes 8 * B * T * Hq * D bytes while it runs.
    """
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    batch_size, length, num_heads, head_dim = q.shape
    scratch = torch.empty(2, batch_size, num_heads, length, head_dim, dtype=torch.float32)
    saved = (x.contiguous() for x in (out, logsumexp, low, high))
    _call("sqa_attention_backward", (grad, q, k, v), (*saved, dq, dk, dv, scratch), scale)
    return dq, dk, dv


def _call(function: str, strided: tuple[Tensor, ...], contiguous: tuple[Tensor, ...], scale: float) -> None:
    """Calls `function` of fused.cpp; the tensors in its order, those with strides end with k and v."""
    library = _library()
    assert isinstance(library, ctypes.CDLL)
    pointers = [x.data_ptr() for x in (*strided, *contiguous)]
    strides = [stride for x in strided for stride in x.stride()[:3]]
    *_, q, k, _ = strided
    batch_size, length, num_heads, head_dim = q.shape
    failed = library[function](
        ctypes.c_int(q.dtype == torch.bfloat16),
        (ctypes.c_void_p * len(pointers))(*pointers),
        (ctypes.c_int64 * len(strides))(*strides),
        (ctypes.c_int64 * 6)(batch_size, length, num_heads, k.shape[2], head_dim, k.shape[1]),
        ctypes.c_float(scale),
        ctypes.c_int(torch.get_num_threads()),
    )
    assert not failed
