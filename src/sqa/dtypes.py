"""What dtypes are called: by PyTorch's names, and by the short ones of benchmark tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqa.config import unknown

if TYPE_CHECKING:
    import torch

_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_LONG = {short: name for name, short in _SHORT.items()}
DTYPES = tuple(_SHORT)
"""PyTorch's names of the dtypes that models are computed and stored in."""


def long_dtype(name: str) -> str:
    """PyTorch's name of a dtype, for its short one too; anything else as it is."""
    return _LONG.get(name, name)


def short_dtype(name: str) -> str:
    """The name of a dtype in tables of benchmarks, for PyTorch's own too; anything else as it is."""
    return _SHORT.get(name, name)


def find_dtype(name: str) -> torch.dtype:
    """The dtype of either name. Raises InputError for another one."""
    import torch  # takes a second, and names alone do without it

    if long_dtype(name) not in DTYPES:
        raise unknown("dtype", name, _LONG)
    found: torch.dtype = getattr(torch, long_dtype(name))
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """PyTorch's name of a dtype."""
    return str(dtype).removeprefix("torch.")
