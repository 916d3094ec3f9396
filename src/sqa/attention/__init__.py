"""Attention: the oracle, the kernels behind one signature, rotary positions, the cache and the layer."""

from sqa.attention.cache import KVCache
from sqa.attention.layer import SparseQueryAttention

__all__ = ["KVCache", "SparseQueryAttention"]
