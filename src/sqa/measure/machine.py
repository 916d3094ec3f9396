"""Where a figure was measured: machine, versions and revision, without host name or path."""

import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from sqa.errors import InputError, first_line

_PACKAGES = ("torch", "numpy", "tokenizers", "accelerate", "transformers", "x-transformers")


def versions() -> dict[str, str]:
    """Versions of Python, of this package, and of installed packages that a figure depends on."""
    found = {"python": platform.python_version()}
    for name in ("sparse-query-attention", *_PACKAGES):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Processor, cores and threads; `gpu` and its memory where one was used."""

    system: str
    processor: str
    cores: int
    threads: int
    gpu: str | None = None
    gpu_memory_gib: int | None = None

    def to_dict(self) -> dict[str, str | int]:
        """The fields that are not None, for result files."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def machine(device: str = "cpu") -> Machine:
    """This machine, with its GPU when `device` is one."""
    gpu = torch.cuda.get_device_properties(device) if torch.device(device).type == "cuda" else None
    return Machine(
        system=platform.system(),
        processor=_processor(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        gpu=gpu.name if gpu else None,
        gpu_memory_gib=round(gpu.total_memory / 2**30) if gpu else None,
    )


def find_device(name: str) -> torch.device:
    """The device of that name. Raises InputError when PyTorch does not know it or this machine has none."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: {name!r} cannot be used here ({first_line(error)})") from None
    if device.type == "meta":
        raise InputError("device: 'meta' computes nothing; use 'cpu' or 'cuda'")
    return device


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute with `count` threads inside the block; 0 leaves the number to PyTorch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _processor() -> str:
    """The model (family and number tell those of one name apart), and the vector extensions that decide speed."""
    fields = _cpuinfo()
    if not fields:
        return platform.processor() or platform.machine()
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields.get('model')})"
    return " ".join([name, *flags()])


def flags() -> list[str]:
    """Which of the vector extensions avx2, avx512f, avx512_bf16 and amx_bf16 the processor has."""
    found = _cpuinfo().get("flags", "").split()
    return [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in found]


def slow_dtype(dtype: str, device: str) -> str | None:
    """A warning where this processor lacks instructions for bfloat16 products, which then take several times as long.

    None for another dtype or device, and for a processor whose instructions are not known.
    """
    known = flags()
    if dtype != "bfloat16" or device != "cpu" or not known or {"avx512_bf16", "amx_bf16"} & {*known}:
        return None
    return "this processor has no instructions for bfloat16 products: float32 is several times as fast here"


def _cpuinfo() -> dict[str, str]:
    """/proc/cpuinfo of the last core; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def git_revision() -> str | None:
    """Commit of the checkout this package runs from, with "-dirty" for uncommitted changes; None outside one."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # this fails for a package that is installed inside another checkout
        git("ls-files", "--error-unmatch", "machine.py")
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
