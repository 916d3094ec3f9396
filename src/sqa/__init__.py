"""Sparse Query Attention: a Transformer layer with fewer query heads, and what is needed to judge it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sqa._version import __version__
from sqa.config import AttentionConfig, ModelConfig, Rope, RopeScaling, window_pattern
from sqa.errors import InputError
from sqa.variants import VARIANTS, preset, variant

if TYPE_CHECKING:
    from sqa.attention import KVCache, SparseQueryAttention
    from sqa.interop import export, fewer_query_heads, import_model, load_model
    from sqa.model import Transformer

__all__ = [
    "VARIANTS",
    "AttentionConfig",
    "InputError",
    "KVCache",
    "ModelConfig",
    "Rope",
    "RopeScaling",
    "SparseQueryAttention",
    "Transformer",
    "__version__",
    "export",
    "fewer_query_heads",
    "import_model",
    "load_model",
    "preset",
    "variant",
    "window_pattern",
]

# torch takes a second to import; configs, variants and costs do without it
_NEEDS_TORCH = {
    "KVCache": "sqa.attention",
    "SparseQueryAttention": "sqa.attention",
    "Transformer": "sqa.model",
    "export": "sqa.interop",
    "fewer_query_heads": "sqa.interop",
    "import_model": "sqa.interop",
    "load_model": "sqa.interop",
}


def __getattr__(name: str) -> Any:
    if name in _NEEDS_TORCH:
        return getattr(importlib.import_module(_NEEDS_TORCH[name]), name)
    raise AttributeError(f"module 'sqa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
