"""What a figure was measured on: machine, versions, revision. No host name, no path."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from sqa.config import unknown
from sqa.errors import InputError
from sqa.measure.timing import take_turns

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_PACKAGES = ("torch", "numpy", "tokenizers", "accelerate", "transformers", "x-transformers")


def versions() -> dict[str, str]:
    """Versions of Python, this package and those installed that a figure depends on."""
    found = {"python": platform.python_version()}
    for name in ("sparse-query-attention", *_PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine(device: str = "cpu") -> dict[str, str | int]:
    """Processor, cores, memory and threads; on CUDA the device's name and memory too."""
    described: dict[str, str | int] = {
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30)}
    return described


def find_dtype(name: str) -> torch.dtype:
    """The dtype that options and result rows call `name`. Raises ValueError for another name."""
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[name]


def find_device(name: str) -> torch.device:
    """The device. Raises ValueError when PyTorch does not know it or there is none here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: {name!r} cannot be used here ({str(error).splitlines()[0]})") from None
    return device


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the product of two square matrices, the best fifth of ten: what other shares are shares of.

    Of 2,048 rows, and on a GPU of 8,192: it would spend the smaller product waiting for the launch.
    """
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    timing = take_turns({"product": lambda: a @ b}, rounds=10, warmup=2, device=device)["product"]
    return 2 * size**3 / timing.p20


def _processor() -> str:
    """The model name, with the vector extensions that decide speed."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", "").split()
    wanted = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join([fields.get("model name", platform.machine()), *wanted])


def git_revision() -> str | None:
    """Commit of the checkout this package runs from, with "-dirty" for uncommitted changes; None outside one."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "machine.py")  # a package installed inside somebody's checkout is not it
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
