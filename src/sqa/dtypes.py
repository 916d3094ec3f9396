"""Names of dtypes: PyTorch's (float32), and short ones for the tables of benchmarks (fp32)."""

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
    """PyTorch's name of the dtype with that name or short name; any other text unchanged."""
    return _LONG.get(name, name)


def short_dtype(name: str) -> str:
    """The short name of the dtype with that name or short name; any other text unchanged."""
    return _SHORT.get(name, name)


def find_dtype(name: str) -> torch.dtype:
    """The dtype with that name or short name. Raises InputError for an unknown one."""
    import torch  # takes a second, and names alone do without it

    if long_dtype(name) not in DTYPES:
        raise unknown("dtype", name, _LONG)
    found: torch.dtype = getattr(torch, long_dtype(name))
    return found


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which products with a tensor are computed: that of autocast where it is on, else its own."""
    import torch

    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # for "meta" PyTorch cannot say
        return tensor.dtype
    return torch.get_autocast_dtype(device)


def dtype_name(dtype: torch.dtype) -> str:
    """PyTorch's name of a dtype."""
    return str(dtype).removeprefix("torch.")
