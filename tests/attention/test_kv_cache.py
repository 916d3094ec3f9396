"""Cached decoding equals the uncached forward pass, whatever the window, sinks, padding and chunks."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sqa import AttentionConfig, KVCache, ModelConfig, SparseQueryAttention, Transformer, variant, window_pattern
from sqa.attention.kernels import KERNELS
from sqa.attention.masks import Mask
from sqa.cost import kv_cache_bytes

WINDOW = 5


def config(
    window: int | None, sinks: int, heads: tuple[int, int] = (4, 2), head_dim: int | None = None
) -> AttentionConfig:
    return AttentionConfig(
        d_model=64,
        num_heads=8,
        head_dim=head_dim,
        num_query_heads=heads[0],
        num_kv_heads=heads[1],
        window=window,
        num_sink_tokens=sinks,
    )


def chunks(length: int, size: int) -> list[int]:
    return [*range(0, length, size), length]


@torch.no_grad()
def check(attention: AttentionConfig, length: int, pads: list[int], bounds: list[int]) -> KVCache:
    """Feed the pieces between `bounds` through a cache; compare with one call, and each row with itself unpadded."""
    torch.manual_seed(0)
    layer = SparseQueryAttention(attention)
    x = torch.randn(len(pads), length, 64)
    real = torch.arange(length) >= torch.tensor(pads)[:, None]
    cache = KVCache(attention, batch_size=len(pads), capacity=length)
    steps: list[Tensor] = []
    for start, stop in pairwise(bounds):
        piece = real[:, start:stop]
        mask = None if piece.all() else piece  # as callers do: no mask once all rows are real
        steps.append(layer(x[:, start:stop], padding_mask=mask, cache=cache))
    got = torch.cat(steps, 1)
    whole = layer(x, padding_mask=real if any(pads) else None)
    torch.testing.assert_close(got[real], whole[real])
    for row, pad in enumerate(pads):
        torch.testing.assert_close(got[row : row + 1, pad:], layer(x[row : row + 1, pad:]))
    assert cache.length == length
    return cache


@pytest.mark.parametrize("chunk", [1, 3, WINDOW, 2 * WINDOW + 1], ids=lambda n: f"chunk{n}")
@pytest.mark.parametrize("pads", [[0, 0], [0, 2], [8, 0]], ids=lambda p: f"pads{p[0]}-{p[1]}")
@pytest.mark.parametrize(
    ("window", "sinks"),
    [(None, 0), (1, 0), (1, 2), (WINDOW, 0), (WINDOW, 2), (WINDOW, 7)],
    ids=lambda n: "full" if n is None else str(n),
)
@pytest.mark.parametrize("head_dim", [8, 16], ids=["", "own-kernel"])  # ours has no head_dim of 8
def test_cached_equals_uncached(window: int | None, sinks: int, pads: list[int], chunk: int, head_dim: int) -> None:
    length = 10 * WINDOW
    check(config(window, sinks, head_dim=head_dim), length, pads, chunks(length, chunk))


@given(
    length=st.integers(1, 30),
    window=st.none() | st.integers(1, 34),
    sinks=st.integers(0, 6),
    pads=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    cuts=st.sets(st.integers(1, 29)),
    heads=st.sampled_from([(8, 8), (4, 2), (2, 1), (2, 4)]),
    head_dim=st.sampled_from([8, 16]),
)
def test_drawn_splits(length, window, sinks, pads, cuts, heads, head_dim) -> None:
    pads = [min(pad, length - 1) for pad in pads]
    bounds = [0, *sorted(cut for cut in cuts if cut < length), length]
    check(config(window, sinks if window else 0, heads, head_dim), length, pads, bounds)


def storage_bytes(cache: KVCache) -> int:
    tensors = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, Tensor)]
    return sum(t.untyped_storage().nbytes() for t in tensors)


def test_rolling_memory_is_the_window() -> None:
    attention = config(WINDOW, 2)
    sizes = set()
    for length in (2 * WINDOW, 10 * WINDOW, 40 * WINDOW):
        cache = check(attention, length, [0, 3], chunks(length, 7))
        sizes.add((cache.num_bytes, storage_bytes(cache)))
    assert len(sizes) == 1
    assert storage_bytes(cache) < 3 * kv_cache_bytes(model(attention), 40 * WINDOW, bytes_per_element=4)


def model(attention: AttentionConfig | tuple[AttentionConfig, ...], num_layers: int = 1) -> ModelConfig:
    return ModelConfig(vocab_size=16, num_layers=num_layers, d_ff=64, max_seq_len=200, attention=attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("heads", [(8, 8), (4, 2), (2, 4)], ids=lambda n: f"{n[0]}-{n[1]}")
def test_bytes_equal_the_closed_form(heads: tuple[int, int], dtype: torch.dtype) -> None:
    layers = window_pattern(config(None, 0, heads), num_layers=4, window=9, full_every=2, num_sink_tokens=3)
    cache = KVCache(model(layers, 4), batch_size=3, capacity=50, dtype=dtype)
    assert cache.num_bytes == 3 * kv_cache_bytes(model(layers, 4), 50, bytes_per_element=dtype.itemsize)


@pytest.mark.parametrize("window", [None, 4])
def test_overflow_names_both_sizes_and_writes_nothing(window: int | None) -> None:
    attention = config(window, 0)
    layer, cache = SparseQueryAttention(attention), KVCache(attention, batch_size=1, capacity=7)
    x = torch.randn(1, 9, 64)
    with torch.no_grad():
        layer(x[:, :5], cache=cache)
        before = cache.layers[0].keys.clone()
        with pytest.raises(ValueError, match="capacity is 7 tokens, 5 are held and 3 more were given"):
            layer(x[:, 5:8], cache=cache)
        assert cache.length == 5
        assert torch.equal(cache.layers[0].keys, before)
        torch.testing.assert_close(layer(x[:, 5:7], cache=cache), layer(x[:, :7])[:, 5:])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number from 1 to [0-9,]+, got 0"),
        ({"batch_size": 1.5}, "batch_size must be a whole number .*, got 1.5"),
        ({"capacity": 0}, "capacity must be a whole number from 1 to [0-9,]+, got 0"),
        ({"capacity": 10**30}, "capacity must be a whole number .*, got 1000000"),
        ({"dtype": "float32"}, "dtype must be a floating-point one of 16 bits or more, got 'float32'"),
        ({"dtype": torch.float8_e4m3fn}, "of 16 bits or more, got torch.float8_e4m3fn"),
        ({"device": "nowhere"}, "device must be one that PyTorch has here, got 'nowhere'"),
        ({"device": "xpu:9"}, "device must be one that PyTorch has here, got 'xpu:9'"),
        ({"config": 3}, "config must be a ModelConfig, an AttentionConfig or a list of them, got 3"),
        ({"config": [config(None, 0), None]}, r"or a list of them, got \[AttentionConfig"),
        ({"config": variant("sqa", d_model=64, num_heads=8, causal=False)}, "got causal=False"),
    ],
)
def test_errors(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVCache(**{"config": config(None, 0), "batch_size": 1, "capacity": 1, **given})


def test_rows_and_padding_must_fit() -> None:
    attention = config(None, 0)
    layer, cache = SparseQueryAttention(attention), KVCache(attention, batch_size=2, capacity=9)
    with pytest.raises(ValueError, match="batch_size=2, got a batch of 3"):
        layer(torch.zeros(3, 1, 64), cache=cache)
    layer(torch.zeros(2, 4, 64), cache=cache)
    for mask, got in (
        (torch.ones(2, 5) > 0, r"torch.bool \(2, 5\) on cpu"),
        (torch.ones(2, 1), r"torch.float32 \(2, 1\)"),
    ):
        with pytest.raises(ValueError, match=rf"bool \(2, 1\) on cpu, of the new tokens alone, got {got}"):
            layer(torch.zeros(2, 1, 64), cache=cache, padding_mask=mask)
    with pytest.raises(ValueError, match=r"padding_mask must be a tensor or None, got \[True\]"):
        layer(torch.zeros(2, 1, 64), cache=cache, padding_mask=[True])
    with pytest.raises(ValueError, match="layer_index must be 0 or more, got -1"):
        SparseQueryAttention(attention, layer_index=-1)(torch.zeros(2, 1, 64), cache=cache)


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (3, 0), (3, 1)], ids=str)
def test_a_cache_on_another_device_is_named_and_untouched(window: int | None, sinks: int) -> None:
    attention = config(window, sinks)
    layer = SparseQueryAttention(attention)
    elsewhere = KVCache(attention, batch_size=1, capacity=9, device="meta")
    with pytest.raises(ValueError, match="cache: made on meta, got x on cpu"):
        layer(torch.zeros(1, 2, 64), cache=elsewhere)
    cache = KVCache(attention, batch_size=1, capacity=9)
    with pytest.raises(ValueError, match=r"on cpu, of the new tokens alone, got torch.bool \(1, 2\) on meta"):
        layer(torch.zeros(1, 2, 64), cache=cache, padding_mask=torch.ones(1, 2, dtype=torch.bool, device="meta"))
    assert (elsewhere.length, cache.length) == (0, 0)


@pytest.mark.parametrize("full_every", [1, 2, 4])
def test_model_decodes_as_it_reads(full_every: int) -> None:
    torch.manual_seed(0)
    attention = config(None, 0)
    layers = window_pattern(attention, num_layers=4, window=3, full_every=full_every, num_sink_tokens=1)
    decoder = Transformer(model(layers, 4)).eval()
    ids = torch.randint(16, (2, 30))
    real = torch.arange(30) >= torch.tensor([[0], [4]])
    cache = KVCache(decoder.config, batch_size=2, capacity=30)
    with torch.no_grad():
        whole = decoder(ids, padding_mask=real).logits
        parts = [decoder(ids[:, :6], padding_mask=real[:, :6], cache=cache).logits]
        parts += [decoder(ids[:, i : i + 2], cache=cache).logits for i in range(6, 30, 2)]
        alone = decoder(ids[1:, 4:]).logits
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real])
    torch.testing.assert_close(whole[1:, 4:], alone)


def test_a_model_of_ones_own_decodes_with_one_cache() -> None:
    """Layers of several kinds, called by nobody but the user."""
    torch.manual_seed(0)
    kinds = (config(None, 0), config(3, 1), config(None, 0), config(3, 1, (8, 4)))
    layers = [SparseQueryAttention(kind, layer_index=i) for i, kind in enumerate(kinds)]
    cache = KVCache(kinds, batch_size=2, capacity=12)
    x = torch.randn(2, 12, 64)

    def run(x: Tensor, cache: KVCache | None) -> Tensor:
        for layer in layers:
            x = x + layer(x, cache=cache)
        return x

    with torch.no_grad():
        steps = [run(x[:, start:stop], cache) for start, stop in pairwise((0, 5, 5, 6, 12))]
        torch.testing.assert_close(torch.cat(steps, 1), run(x, None))
    assert cache.length == 12


def test_a_kind_of_mask_that_the_cache_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = Mask.needs
    monkeypatch.setattr(Mask, "needs", lambda self, num_keys: needs(self, num_keys) | {"chunks"})
    for name in ("sdpa", "reference"):
        monkeypatch.setitem(KERNELS, name, replace(KERNELS[name], takes=KERNELS[name].takes | {"chunks"}))
    attention = config(None, 0)
    layer, cache = SparseQueryAttention(attention), KVCache(attention, batch_size=1, capacity=8)
    layer(torch.randn(1, 4, 64))
    layer(torch.randn(1, 4, 64), cache=cache)
    with pytest.raises(ValueError, match="keys from a cache cannot have a mask of chunks"):
        layer(torch.randn(1, 2, 64), cache=cache)


def test_layers_that_share_a_place_in_the_cache_are_an_error() -> None:
    attention = config(None, 0)
    first, second = (SparseQueryAttention(attention) for _ in range(2))
    cache = KVCache(attention, batch_size=1, capacity=9)
    with torch.no_grad():
        first(torch.randn(1, 3, 64), cache=cache)
        with pytest.raises(ValueError, match="two layers have layer_index=0; make layer i of your model with"):
            second(torch.randn(1, 3, 64), cache=cache)
        first(torch.randn(1, 1, 64), cache=cache)
    assert cache.length == 4


def test_a_second_call_in_one_step_is_an_error() -> None:
    kinds = (config(None, 0), config(4, 0))
    layers = [SparseQueryAttention(kind, layer_index=i) for i, kind in enumerate(kinds)]
    cache = KVCache(kinds, batch_size=1, capacity=9)
    with torch.no_grad():
        layers[0](torch.randn(1, 3, 64), cache=cache)
        with pytest.raises(ValueError, match="layer 0 was called twice before layer 1"):
            layers[0](torch.randn(1, 3, 64), cache=cache)
        layers[1](torch.randn(1, 3, 64), cache=cache)
        layers[0](torch.randn(1, 3, 64), cache=cache)
    shared = KVCache((kinds[0],) * 2, batch_size=1, capacity=9)
    step = shared.begin(0, (1, 3))
    keys = torch.randn(1, 3, 2, 8)
    shared.extend(0, step, keys, keys)
    with pytest.raises(ValueError, match="layer 0 was called twice for one piece"):
        shared.extend(0, step, keys, keys)
    with pytest.raises(ValueError, match="layer 1 got 2 tokens after 0, another one 3 after 0"):
        shared.begin(1, (1, 2))


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (5, 0), (1, 0), (5, 2)])
def test_chunks_without_a_token_change_nothing(window: int | None, sinks: int) -> None:
    check(config(window, sinks, head_dim=16), 12, [0, 2], [0, 0, 7, 7, 12, 12])


def test_activation_checkpointing_extends_a_cache_once() -> None:
    torch.manual_seed(0)
    decoder = Transformer(model(config(None, 0), 2))
    ids = torch.randint(16, (1, 8))
    gradients = []
    for checkpointing in (False, True):
        decoder.model.activation_checkpointing = checkpointing
        cache = KVCache(decoder.config, batch_size=1, capacity=8)
        decoder(ids[:, :5], cache=cache)
        loss = decoder(ids[:, 5:], labels=ids[:, 5:], cache=cache).loss
        # keys and values get no gradient through a cache
        gradients.append(torch.autograd.grad(loss, list(decoder.parameters()), allow_unused=True))
        assert cache.length == 8
    for plain, again in zip(*gradients, strict=True):
        assert plain is again is None or torch.equal(plain, again)
