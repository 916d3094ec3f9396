"""The highest rates of multiply-adds that a machine reaches, to compare other rates with."""

import ctypes
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from sqa import native
from sqa.measure.machine import flags
from sqa.measure.timing import take_turns

_TURNS, _CALLS = 1 << 18, 100
"""Turns of the probe's loop in a call, which take some two milliseconds, and the number of calls."""


@dataclass(frozen=True)
class Peak:
    """FLOP/s of a large matrix product, and of independent multiply-adds; None where those were not measured."""

    product: float
    processor: float | None

    def __str__(self) -> str:
        processor = "" if self.processor is None else f", the processor's multiply-adds {self.processor / 1e9:,.0f}"
        return f"a large matrix product reaches {self.product / 1e9:,.0f} GFLOP/s{processor}"


def measure_peak(dtype: torch.dtype, device: torch.device) -> Peak:
    """Both rates for a dtype, in about a second."""
    return Peak(matmul_peak(dtype, device), processor_peak(dtype) if device.type == "cpu" else None)


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the product of two square matrices, by the 20th percentile of ten times.

    They have 2,048 rows; on a GPU 8,192, where the smaller product would mostly wait for its launch; in float16 on CPU
    256, because without instructions for it a larger product takes minutes.
    """
    size = 8192 if device.type != "cpu" else 256 if dtype == torch.float16 else 2048
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    timing = take_turns({"product": lambda: a @ b}, rounds=10, warmup=2, device=device)["product"]
    return 2 * size**3 / timing.p20


def processor_peak(dtype: torch.dtype) -> float | None:
    """FLOP/s of independent multiply-adds in registers, on PyTorch's number of threads; the best of many calls.

    In bf16 these are dot products with fp32 sums where the processor has them (AVX-512-BF16), else fp32 as well. None
    without a compiler, and for bf16 where there are matrix tiles (AMX), which the probe does not use.
    """
    half = dtype == torch.bfloat16
    library = native.load(Path(__file__).with_name("peak.cpp"))
    if isinstance(library, str) or (half and "amx_bf16" in flags()):
        return None
    library.sqa_peak.restype = ctypes.c_int64
    half = half and "avx512_bf16" in flags()
    threads = torch.get_num_threads()

    def rate() -> float:
        start = time.perf_counter()
        flops: int = library.sqa_peak(ctypes.c_int(half), ctypes.c_int64(_TURNS), ctypes.c_int(threads))
        return flops / (time.perf_counter() - start)

    return max(rate() for _ in range(_CALLS)) or None  # 0 where the compiler does not know the instructions
