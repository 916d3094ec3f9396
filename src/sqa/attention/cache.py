"""The KV cache: the keys and values of earlier calls. The caller makes it and passes it to each call.

Facts about tokens (which are real, where they stand) are kept once for all layers of one window; keys and values are
kept layer by layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sqa.attention.masks import CachedKeys, check_whole
from sqa.config import AttentionConfig, ModelConfig
from sqa.errors import InputError, shown


@dataclass(frozen=True, kw_only=True)
class Step:
    """The new tokens of one forward pass, at positions start .. start + length - 1.

    keys: what the layers attend to, `num_keys` of them; None for the new ones alone, as without a cache.
    sink_slots: int64 (B, T), the slot of each new token in a layer with sinks; the last slot is for tokens not kept.
    """

    start: int
    length: int
    num_keys: int
    keys: CachedKeys | None = None
    sink_slots: Tensor | None = None


class _Positions:
    """The tokens held by layers without a window."""

    def __init__(self, batch_size: int, size: int, num_sinks: int, device: torch.device) -> None:
        self.num_sinks = num_sinks
        self.real = torch.ones(batch_size, size, dtype=torch.bool, device=device)
        self.padded = False
        self.length = 0
        self.step: Step | None = None

    def add(self, length: int, padding_mask: Tensor | None) -> Step:
        start, end = self.length, self.length + length
        if padding_mask is not None:
            self.real[:, start:end], self.padded = padding_mask, True
        self.length, keys = end, None
        if start > 0:
            real = self.real[:, :end] if self.padded else self.real[:1, :end]
            positions = torch.arange(end, device=real.device)
            keys = CachedKeys(
                query_positions=positions[start:], key_positions=positions, near=real, far=real, holes=self.padded
            )
        return Step(start=start, length=length, num_keys=end, keys=keys)


class _RollingPositions(_Positions):
    """The tokens held by layers with a window: the last window - 1 and the sinks."""

    def __init__(self, batch_size: int, size: int, num_sinks: int, device: torch.device) -> None:
        super().__init__(batch_size, size, num_sinks, device)
        self.real.zero_()
        # the last slot takes every token that is no sink, so that writing needs no data-dependent shape
        self.sink_positions = torch.zeros(batch_size, num_sinks + 1, dtype=torch.long, device=device)
        self.seen = torch.zeros(batch_size, 1, dtype=torch.long, device=device)  # real tokens so far, a row

    def add(self, length: int, padding_mask: Tensor | None) -> Step:
        start, recent, batch_size = self.length, self.real.shape[1], self.real.shape[0]
        self.length, self.padded = start + length, self.padded or padding_mask is not None
        real = self.real.new_ones(batch_size, length) if padding_mask is None else padding_mask
        before = self.seen + real.cumsum(1) - real.long()
        is_sink = real & (before < self.num_sinks)
        all_real = torch.cat((self.real, real), 1)
        positions = torch.arange(start - recent, start + length, device=real.device)
        slots = torch.where(is_sink, before, self.num_sinks)
        keys, num_keys = None, length
        if start > 0 and not self.padded and self.num_sinks == 0:
            empty = max(0, recent - start)
            held = all_real[:1, empty:]
            num_keys = held.shape[1]
            keys = CachedKeys(
                query_positions=positions[recent:], key_positions=positions[empty:], near=held,
                far=torch.zeros_like(held), holes=False,
            )  # fmt: skip
        elif start > 0:
            filled = torch.arange(self.num_sinks, device=real.device) < self.seen
            sink_positions = self.sink_positions[:, : self.num_sinks]
            num_keys = self.num_sinks + recent + length
            keys = CachedKeys(
                query_positions=positions[recent:],
                key_positions=torch.cat((sink_positions, positions.expand(batch_size, -1)), 1),
                # a kept sink is also among the recent keys while the window reaches it: seen there, not twice
                near=torch.cat((torch.zeros_like(filled), all_real), 1),
                far=torch.cat((filled, torch.zeros_like(self.real), is_sink), 1),
                holes=True,
            )
        self.sink_positions.scatter_(1, slots, positions[recent:].expand_as(slots))
        self.real.copy_(all_real[:, length:])
        self.seen += real.sum(1, keepdim=True)
        return Step(
            start=start, length=length, num_keys=num_keys, keys=keys, sink_slots=slots if self.num_sinks else None
        )


class _Keys:
    """All keys and values of one layer without a window, in tensors (B, capacity, Hkv, D) allocated once."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, positions: _Positions) -> None:
        self.positions = positions
        self.keys = torch.zeros(shape, dtype=dtype, device=positions.real.device)
        self.values = torch.zeros_like(self.keys)
        self.length = 0
        self.owner: int | None = None

    def extend(self, step: Step, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        start, end = self.length - step.length, self.length
        self.keys[:, start:end], self.values[:, start:end] = k.detach(), v.detach()
        return (k, v) if step.keys is None else (self.keys[:, :end], self.values[:, :end])


class _RollingKeys(_Keys):
    """The last window - 1 keys and values of one layer, and the sinks: memory does not grow with length."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, positions: _Positions) -> None:
        super().__init__(shape, dtype, positions)
        self.sink_keys = self.keys.new_zeros(shape[0], positions.num_sinks + 1, *shape[2:])
        self.sink_values = torch.zeros_like(self.sink_keys)

    def extend(self, step: Step, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._roll(step, self.keys, self.sink_keys, k), self._roll(step, self.values, self.sink_values, v)

    def _roll(self, step: Step, recent: Tensor, sinks: Tensor, new: Tensor) -> Tensor:
        """Keep the new keys or values; return those that the queries see: sinks, the last window - 1, and the new."""
        held, seen = torch.cat((recent, new.detach()), 1), new
        if step.keys is not None:
            num_sinks = self.positions.num_sinks if step.keys.holes else 0
            seen = held[:, held.shape[1] + num_sinks - step.num_keys :]
            if num_sinks:
                seen = torch.cat((sinks[:, :num_sinks], seen), 1)
        if step.sink_slots is not None:
            slots = step.sink_slots[:, :, None, None].expand_as(new)
            sinks.scatter_(1, slots, new.detach().to(sinks.dtype))
        recent.copy_(held[:, step.length :])
        return seen


class KVCache:
    """The caches of every layer of a model, of the layers of your own model, or of one layer.

    config: a ModelConfig, or one AttentionConfig a layer in their order, or one AttentionConfig for a single layer. In
    your own model, layer i must be made with `layer_index=i`, and each layer is called once for each piece of text.
    Window layers roll (memory O(window)); the others are allocated whole, `capacity` tokens for each row. `capacity`
    bounds the tokens fed in, whatever the layers keep. Gradients do not pass through a cache.

    Raises InputError for a size that is no whole number of at least 1, for what is no config or not causal, and for a
    dtype or device that cannot hold keys.
    """

    def __init__(
        self,
        config: ModelConfig | AttentionConfig | Sequence[AttentionConfig],
        *,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("batch_size", batch_size), ("capacity", capacity)):
            check_whole(f"cache: {name}", value, 1)
        given = config.layers if isinstance(config, ModelConfig) else config
        layers = tuple(given) if isinstance(given, Sequence) else (given,)
        if not layers:
            raise InputError("cache: config must name at least one layer, got none")
        if not all(isinstance(layer, AttentionConfig) for layer in layers):
            wanted = "a ModelConfig, an AttentionConfig or a list of them"
            raise InputError(f"cache: config must be {wanted}, got {shown(repr(config))}")
        if not all(layer.causal for layer in layers):
            raise InputError("cache: only a causal model can be decoded with a cache, got causal=False")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
            raise InputError(f"cache: dtype must be a floating-point one of 16 bits or more, got {shown(repr(dtype))}")
        try:
            device = torch.empty(0, device=device).device
        except (RuntimeError, TypeError, AssertionError):
            raise InputError(f"cache: device must be one that PyTorch has here, got {shown(repr(device))}") from None
        self.batch_size, self.capacity, self._configs = batch_size, capacity, layers
        kept: dict[tuple[int | None, int], _Positions] = {}
        self.layers: list[_Keys] = []
        for layer in layers:
            window, num_sinks = layer.window, layer.num_sink_tokens
            size = capacity if window is None else min(window - 1, capacity)
            if (window, num_sinks) not in kept:
                make_positions = _Positions if window is None else _RollingPositions
                kept[window, num_sinks] = make_positions(batch_size, size, num_sinks, device)
            make_keys = _Keys if window is None else _RollingKeys
            shape = batch_size, size, layer.num_kv_heads, layer.head_dim
            self.layers.append(make_keys(shape, dtype, kept[window, num_sinks]))

    def check(self, layer_index: int, config: AttentionConfig, device: torch.device) -> None:
        """Raise InputError when the cache was made for another kind of layer at this place, or on another device."""
        if layer_index not in range(len(self._configs)):
            raise InputError(f"cache: made for {len(self._configs)} layers, got layer {layer_index!r}")
        if device != self.layers[layer_index].keys.device:
            raise InputError(f"cache: made on {self.layers[layer_index].keys.device}, got x on {device}")
        made = self._configs[layer_index]
        for name in ("num_kv_heads", "head_dim", "window", "num_sink_tokens"):  # numbers, which a traced pass compares
            if getattr(made, name) != getattr(config, name):
                raise InputError(f"cache: made for {name}={getattr(made, name)}, got {getattr(config, name)}")

    def claim(self, layer_index: int, owner: int) -> None:
        """Reserve a place for the layer object with id `owner`. Raises InputError when another one has it."""
        layer = self.layers[layer_index]
        if layer.owner not in (None, owner):
            raise InputError(
                f"cache: two layers have layer_index={layer_index}; make layer i of your model with layer_index=i "
                f"and the cache with one AttentionConfig a layer"
            )
        layer.owner = owner

    @property
    def length(self) -> int:
        """Tokens held so far."""
        return self.layers[-1].length

    @property
    def num_bytes(self) -> int:
        """Bytes that are allocated for keys and values."""
        return sum(x.nbytes for layer in self.layers for x in vars(layer).values() if isinstance(x, Tensor))

    def begin(self, layer_index: int, shape: tuple[int, int], padding_mask: Tensor | None = None) -> Step:
        """Enter the new tokens of a pass, shape (B, T), which continue what the layer holds.

        The first layer of a window enters them; the others get the same step. padding_mask: bool (B, T), True = real.

        Raises InputError, before anything is written, when batch, tokens or padding_mask do not fit, and when a layer
        is called a second time before the others were called.
        """
        layer, (batch_size, length) = self.layers[layer_index], shape
        if batch_size != self.batch_size:
            raise InputError(f"cache: made for batch_size={self.batch_size}, got a batch of {batch_size}")
        if padding_mask is not None:
            if not isinstance(padding_mask, Tensor):
                raise InputError(f"cache: padding_mask must be a tensor or None, got {shown(repr(padding_mask))}")
            given = (padding_mask.dtype, tuple(padding_mask.shape), padding_mask.device)
            if given != (torch.bool, tuple(shape), layer.keys.device):
                raise InputError(
                    f"cache: padding_mask must be bool {tuple(shape)} on {layer.keys.device}, of the new tokens alone, "
                    f"got {given[0]} {given[1]} on {given[2]}"
                )
        if layer.length + length > self.capacity:
            raise InputError(
                f"cache: capacity is {self.capacity} tokens, {layer.length} are held and {length} more were given"
            )
        behind = [i for i, other in enumerate(self.layers) if other.length < layer.length]
        if behind:
            raise InputError(
                f"cache: layer {layer_index} was called twice before layer {behind[0]}; "
                f"each layer is called once for each piece of text"
            )
        positions, step = layer.positions, layer.positions.step
        if step is None or layer.length == positions.length:
            step = positions.step = positions.add(length, padding_mask)
        if (step.start, step.length) != (layer.length, length):
            raise InputError(
                f"cache: layer {layer_index} got {length} tokens after {layer.length}, "
                f"another one {step.length} after {step.start}"
            )
        return step

    def extend(self, layer_index: int, step: Step, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new keys and values (B, T, Hkv, D) of a step to one layer; return all that it attends to.

        Raises InputError when the layer has had this step.
        """
        layer = self.layers[layer_index]
        if layer.length != step.start:
            raise InputError(f"cache: layer {layer_index} was called twice for one piece of text")
        layer.length += step.length  # torch.compile loses step.start, which it knows to be layer.length
        return layer.extend(step, k, v)
