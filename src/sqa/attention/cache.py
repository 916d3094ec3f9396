"""Keys and values kept between calls: made by the caller, passed by the caller."""

from __future__ import annotations

import torch
from torch import Tensor

from sqa.attention.masks import CachedKeys
from sqa.config import AttentionConfig, ModelConfig
from sqa.errors import InputError


class StaticLayerCache:
    """All keys and values of one full-attention layer, in tensors allocated once."""

    def __init__(
        self,
        config: AttentionConfig,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch_size, capacity, config.num_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.real = torch.ones(batch_size, capacity, dtype=torch.bool, device=device)
        self.padded = False
        self.length = 0

    def extend(self, k: Tensor, v: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor, CachedKeys | None]:
        """Append k, v (B, T, Hkv, D); return all keys and values and their mask (None: as without a cache)."""
        start, end = self.length, self.length + k.shape[1]
        self.keys[:, start:end], self.values[:, start:end] = k.detach(), v.detach()
        if padding_mask is not None:
            self.real[:, start:end], self.padded = padding_mask, True
        self.length = end
        if start == 0:
            return k, v, None
        real = self.real[:, :end] if self.padded else self.real[:1, :end]
        positions = torch.arange(end, device=k.device)
        cached = CachedKeys(
            query_positions=positions[start:], key_positions=positions, near=real, far=real, holes=self.padded
        )
        return self.keys[:, :end], self.values[:, :end], cached

    @property
    def num_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()


class RollingLayerCache:
    """The last window - 1 keys and values of one window layer, and the sinks: memory does not grow with length."""

    def __init__(
        self,
        config: AttentionConfig,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert config.window is not None
        heads = (config.num_kv_heads, config.head_dim)
        recent, self.num_sinks = min(config.window - 1, capacity), config.num_sink_tokens
        self.keys = torch.zeros(batch_size, recent, *heads, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.real = torch.zeros(batch_size, recent, dtype=torch.bool, device=device)
        # slot num_sinks is a bin for everything that is no sink, so that writing needs no data-dependent shape
        self.sink_keys = torch.zeros(batch_size, self.num_sinks + 1, *heads, dtype=dtype, device=device)
        self.sink_values = torch.zeros_like(self.sink_keys)
        self.sink_positions = torch.zeros(batch_size, self.num_sinks + 1, dtype=torch.long, device=device)
        self.seen = torch.zeros(batch_size, 1, dtype=torch.long, device=device)  # real tokens so far, a row
        self.padded = False
        self.length = 0

    def extend(self, k: Tensor, v: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor, CachedKeys | None]:
        """As StaticLayerCache.extend; the keys returned are sinks, then the last window - 1, then the new ones."""
        start, new = self.length, k.shape[1]
        self.length, self.padded = start + new, self.padded or padding_mask is not None
        real = k.new_ones(k.shape[:2], dtype=torch.bool) if padding_mask is None else padding_mask
        before = self.seen + real.cumsum(1) - real.long()
        is_sink = real & (before < self.num_sinks)
        keys, values = torch.cat((self.keys, k.detach()), 1), torch.cat((self.values, v.detach()), 1)
        all_real = torch.cat((self.real, real), 1)
        positions = torch.arange(start + new - keys.shape[1], start + new, device=k.device)
        result: tuple[Tensor, Tensor, CachedKeys | None] = (k, v, None)
        if start > 0 and not self.padded and self.num_sinks == 0:
            empty = max(0, self.keys.shape[1] - start)
            held = all_real[:1, empty:]
            cached = CachedKeys(
                query_positions=positions[-new:], key_positions=positions[empty:], near=held,
                far=torch.zeros_like(held), holes=False,
            )  # fmt: skip
            result = keys[:, empty:], values[:, empty:], cached
        elif start > 0:
            filled = torch.arange(self.num_sinks, device=k.device) < self.seen
            sink_positions = self.sink_positions[:, : self.num_sinks]
            cached = CachedKeys(
                query_positions=positions[-new:],
                key_positions=torch.cat((sink_positions, positions.expand(k.shape[0], -1)), 1),
                # a kept sink is also among the recent keys while the window reaches it: seen there, not twice
                near=torch.cat((torch.zeros_like(filled), all_real), 1),
                far=torch.cat((filled, torch.zeros_like(self.real), is_sink), 1),
                holes=True,
            )
            result = (
                torch.cat((self.sink_keys[:, : self.num_sinks], keys), 1),
                torch.cat((self.sink_values[:, : self.num_sinks], values), 1),
                cached,
            )
        slots = torch.where(is_sink, before, self.num_sinks)
        index = slots[:, :, None, None].expand_as(k)
        self.sink_keys.scatter_(1, index, k.detach().to(self.sink_keys.dtype))
        self.sink_values.scatter_(1, index, v.detach().to(self.sink_values.dtype))
        self.sink_positions.scatter_(1, slots, positions[-new:].expand_as(slots))
        self.keys.copy_(keys[:, new:])
        self.values.copy_(values[:, new:])
        self.real.copy_(all_real[:, new:])
        self.seen += real.sum(1, keepdim=True)
        return result

    @property
    def num_bytes(self) -> int:
        return sum(2 * t.numel() * t.element_size() for t in (self.keys, self.sink_keys))


class KVCache:
    """The caches of every layer of a model, or of one layer when given an AttentionConfig.

    Window layers roll (memory O(window)); the others are allocated whole, `capacity` tokens for each row. `capacity`
    bounds the tokens fed in, whatever the layers keep. Gradients do not pass through a cache.
    """

    def __init__(
        self,
        config: ModelConfig | AttentionConfig,
        *,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("batch_size", batch_size), ("capacity", capacity)):
            if value < 1:
                raise InputError(f"cache: {name} must be at least 1, got {value}")
        layers = (config,) if isinstance(config, AttentionConfig) else config.layers
        if not layers[0].causal:
            raise InputError("cache: only a causal model can be decoded with a cache, got causal=False")
        if not dtype.is_floating_point:
            raise InputError(f"cache: dtype must be a floating-point one, got {dtype}")
        self.batch_size, self.capacity, self._configs = batch_size, capacity, layers
        self.layers = [
            (StaticLayerCache if layer.window is None else RollingLayerCache)(
                layer, batch_size, capacity, dtype, torch.device(device)
            )
            for layer in layers
        ]

    def check(self, layer_index: int, config: AttentionConfig) -> None:
        """Raise ValueError when the layer at `layer_index` is not the one that this cache was made for."""
        if layer_index >= len(self._configs):
            raise InputError(f"cache: made for {len(self._configs)} layers, got layer {layer_index}")
        made = self._configs[layer_index]
        for name in ("num_kv_heads", "head_dim", "window", "num_sink_tokens"):
            if getattr(made, name) != getattr(config, name):
                raise InputError(f"cache: made for {name}={getattr(made, name)}, got {getattr(config, name)}")

    @property
    def length(self) -> int:
        """Tokens held so far."""
        return self.layers[-1].length

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values held."""
        return sum(layer.num_bytes for layer in self.layers)

    def extend(
        self, layer_index: int, k: Tensor, v: Tensor, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, CachedKeys | None]:
        """Append new keys and values (B, T, Hkv, D) to one layer; see StaticLayerCache.extend.

        Raises ValueError when batch or padding_mask do not fit, or the tokens do not, before anything is written.
        """
        layer = self.layers[layer_index]
        if k.shape[0] != self.batch_size:
            raise InputError(f"cache: made for batch_size={self.batch_size}, got a batch of {k.shape[0]}")
        if padding_mask is not None and (padding_mask.shape != k.shape[:2] or padding_mask.dtype != torch.bool):
            raise InputError(
                f"cache: padding_mask must be bool {tuple(k.shape[:2])}, of the new tokens alone, "
                f"got {padding_mask.dtype} {tuple(padding_mask.shape)}"
            )
        if layer.length + k.shape[1] > self.capacity:
            raise InputError(
                f"cache: capacity is {self.capacity} tokens, {layer.length} are held and {k.shape[1]} more were given"
            )
        return layer.extend(k, v, padding_mask)
