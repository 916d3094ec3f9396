"""Closed forms against what they describe: parameters of models, pairs of masks, FLOPs as torch counts them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from sqa import AttentionConfig, ModelConfig, SparseQueryAttention, Transformer, cost, variant
from sqa.attention.masks import Mask, dense_mask
from sqa.variants import VARIANTS, preset

PUBLISHED = {
    "mha": 11_966_224,
    "gqa": 11_179_792,
    "mqa": 10_983_184,
    "sqa": 10_655_504,
    "ssqa": 10_917_648,
    "xsqa": 10_393_360,
    "xsmqa": 10_196_752,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts_are_exact(name: str) -> None:
    config = preset("published", name)
    assert cost.parameters(config) == PUBLISHED[name]
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(config).parameters()) == PUBLISHED[name]


@st.composite
def layers(draw, d_model: int) -> AttentionConfig:
    heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    query = draw(st.integers(1, heads))
    kv = draw(st.sampled_from([n for n in range(1, heads + 1) if query % n == 0 or n % query == 0]))
    window = draw(st.none() | st.integers(1, 30))
    return AttentionConfig(
        d_model=d_model,
        num_heads=heads,
        num_query_heads=query,
        num_kv_heads=kv,
        head_dim=draw(st.none() | st.sampled_from([2, 6, 32])),
        window=window,
        num_sink_tokens=draw(st.integers(0, 9)) if window else 0,
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
    )


@st.composite
def models(draw) -> ModelConfig:
    d_model, num_layers = 48 * draw(st.integers(1, 3)), draw(st.integers(1, 4))
    each = st.lists(layers(d_model), min_size=num_layers, max_size=num_layers).map(tuple)
    return ModelConfig(
        vocab_size=draw(st.integers(1, 50)),
        num_layers=num_layers,
        d_ff=draw(st.integers(1, 70)),
        max_seq_len=16,
        attention=draw(layers(d_model) | each),
        bias=draw(st.booleans()),
        final_norm=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
    )


@given(config=models())
def test_parameters_of_drawn_models(config: ModelConfig) -> None:
    with torch.device("meta"):
        assert cost.parameters(config) == sum(p.numel() for p in Transformer(config).parameters())


@given(config=layers(48), bias=st.booleans())
def test_parameters_of_drawn_layers(config: AttentionConfig, bias: bool) -> None:
    with torch.device("meta"):
        layer = SparseQueryAttention(config, output_bias=bias)
    assert cost.attention_parameters(config, output_bias=bias) == sum(p.numel() for p in layer.parameters())


@given(n=st.integers(1, 60), window=st.none() | st.integers(1, 70), sinks=st.integers(0, 70), causal=st.booleans())
def test_visible_pairs_are_those_of_the_mask(n: int, window: int | None, sinks: int, causal: bool) -> None:
    options = {"window": window, "num_sink_tokens": sinks if window else 0} if causal else {}
    config = AttentionConfig(d_model=8, num_heads=2, causal=causal, **options)
    mask = dense_mask(Mask(causal=causal, **options), n, n, torch.device("cpu"))
    assert config.visible_pairs(n) == (n * n if mask is None else int(mask.sum()))


@pytest.mark.parametrize("name", VARIANTS)
def test_flops_are_those_torch_counts(name: str) -> None:
    """The oracle computes every pair, hidden or not, so an encoder is what can be compared."""
    attention = variant(name, d_model=64, num_heads=8, causal=False)
    config = ModelConfig(vocab_size=40, num_layers=2, d_ff=96, max_seq_len=64, attention=attention)
    model, ids = Transformer(config), torch.zeros(1, 32, dtype=torch.long)
    for block in model.model.layers:
        block.self_attn.kernel = "reference"
    with FlopCounterMode(display=False) as counted:
        model(ids).logits.sum().backward()
    assert cost.train_step_flops(config, 32) == counted.get_total_flops()
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(ids)
    assert cost.forward_flops(config, 32) == counted.get_total_flops()
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(ids, num_logits=1)
    assert cost.prefill_flops(config, 32) == counted.get_total_flops()


def test_saving_and_cache() -> None:
    saving = {name: cost.attention_saving(variant(name, d_model=256, num_heads=16), 1024) for name in PUBLISHED}
    assert saving == {"mha": 1, "gqa": 1, "mqa": 1, "sqa": 2, "ssqa": 2, "xsqa": 4, "xsmqa": 4}
    assert cost.attention_saving(variant("rsqa", d_model=256, num_heads=16), 1024) == 2
    for odd in ({"d_model": 100, "head_dim": 32}, {"d_model": 24, "rope": None}):  # of which no MHA has a config
        layer = AttentionConfig(num_heads=8, num_query_heads=4, window=8, **odd)
        full = layer.replace(window=None)
        ratio = cost.attention_flops(full, 32) / cost.attention_flops(layer, 32)
        assert cost.attention_saving(layer, 32) == pytest.approx(ratio * odd["d_model"] / (4 * layer.head_dim))
    assert cost.kv_cache_bytes(preset("published", "sqa")) == 2 * 8 * 4 * 16 * 2


def test_costs_of_variants_are_found_in_any_case_and_unknown_ones_named() -> None:
    costs, left_out = cost.variant_costs("larger", 64, ["SQA", "wide-gqa"])
    assert [(row.variant, row.label) for row in costs] == [("sqa", "SQA")]
    assert "got num_heads=12, 8 or 16 would fit" in left_out[0]
    with pytest.raises(ValueError, match="variant: 'nope' is unknown"):
        cost.variant_costs("larger", 64, ["nope"])
