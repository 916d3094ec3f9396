"""Configurations: defaults, JSON round trips, and one clear sentence for every mistake."""

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqa import AttentionConfig, ModelConfig, Rope, RopeScaling, window_pattern
from sqa.variants import VARIANTS, variant

GOOD = {"d_model": 256, "num_heads": 16}


def model(**changes) -> ModelConfig:
    fields = {"vocab_size": 500, "num_layers": 4, "d_ff": 192, "max_seq_len": 128, "attention": AttentionConfig(**GOOD)}
    return ModelConfig(**{**fields, **changes})


def test_defaults() -> None:
    config = AttentionConfig(d_model=256, num_heads=16, num_query_heads=8)
    assert (config.head_dim, config.num_query_heads, config.num_kv_heads) == (16, 8, 8)
    assert (config.query_width, config.kv_width, config.output_width) == (128, 128, 128)
    assert AttentionConfig(d_model=256, num_heads=16).num_query_heads == 16
    assert (model().bias, model().final_norm, model().tie_embeddings) == (False, True, False)


def test_reverse_reads_and_costs_the_larger_count() -> None:
    config = AttentionConfig(**GOOD, num_query_heads=4, num_kv_heads=8)
    assert (config.num_output_heads, config.output_width, config.query_width) == (8, 128, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 0}, "d_model must be a positive whole number, got 0"),
        ({"num_heads": -1}, "num_heads must be a positive whole number, got -1"),
        ({"num_heads": 4.0}, "num_heads must be a positive whole number, got 4.0"),
        ({"num_heads": True}, "num_heads must be a positive whole number, got True"),
        ({"num_heads": 15}, "num_heads must divide d_model or head_dim be given, got num_heads=15 and d_model=256"),
        ({"num_query_heads": 0}, "num_query_heads must be a positive whole number, got 0"),
        ({"num_query_heads": 17}, "num_query_heads must be at most num_heads=16, got 17"),
        ({"num_kv_heads": 32}, "num_kv_heads must be at most num_heads=16, got 32"),
        (
            {"num_query_heads": 8, "num_kv_heads": 3},
            "num_kv_heads must divide num_query_heads=8 or be a multiple of it, got num_kv_heads=3; 2 or 4 would fit",
        ),
        ({"num_query_heads": 4, "num_kv_heads": 6}, "num_kv_heads=6; 4 or 8 would fit"),
        ({"head_dim": 15}, "head_dim must be even for rotary positions, got head_dim=15"),
        ({"head_dim": "16"}, "head_dim must be a positive whole number, got '16'"),
        ({"window": 0}, "window must be a positive whole number, got 0"),
        ({"window": 4, "causal": False}, "window needs causal=True, got window=4 and causal=False"),
        ({"num_sink_tokens": 2}, "num_sink_tokens needs a window, got num_sink_tokens=2"),
        ({"num_sink_tokens": -2, "window": 4}, "num_sink_tokens must be 0 or more, got -2"),
        ({"logit_softcap": 0.0}, "logit_softcap must be above 0, got 0.0"),
        ({"scale": -1.0}, "scale must be above 0, got -1.0"),
        ({"scale": float("nan")}, "scale must be a finite number, got nan"),
        ({"scale": float("inf")}, "scale must be a finite number, got inf"),
        ({"num_sink_tokens": 10**400, "window": 4}, "num_sink_tokens must be at most 16,777,216, got 100"),
    ],
)
def test_attention_mistakes(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**{**GOOD, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive whole number, got 0"),
        ({"num_layers": 0}, "num_layers must be a positive whole number, got 0"),
        ({"d_ff": -8}, "d_ff must be a positive whole number, got -8"),
        ({"max_seq_len": 1.5}, "max_seq_len must be a positive whole number, got 1.5"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0, got 0.0"),
        ({"attention": [AttentionConfig(**GOOD)] * 3}, "one config per layer, got 3 for num_layers=4"),
        (
            {"num_layers": 2, "attention": [AttentionConfig(**GOOD), AttentionConfig(d_model=128, num_heads=16)]},
            "every layer must have the same d_model, got 128 and 256",
        ),
        (
            {"num_layers": 2, "attention": [AttentionConfig(**GOOD), AttentionConfig(**GOOD, causal=False)]},
            "every layer must have the same causal, got False and True",
        ),
    ],
)
def test_model_mistakes(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**changes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "ntk", "factor": 2.0}, "kind must be one of 'linear', 'llama3', 'yarn', got 'ntk'"),
        ({"kind": "linear", "factor": 0.5}, "factor must be at least 1, got 0.5"),
        ({"kind": "yarn", "factor": 2.0, "beta_fast": 0}, "beta_fast must be above 0, got 0.0"),
        ({"kind": "yarn", "factor": 2.0, "beta_slow": -1.0}, "beta_slow must be above 0, got -1.0"),
        ({"kind": "yarn", "factor": 2.0, "attention_factor": -1.0}, "attention_factor must be above 0, got -1.0"),
        ({"kind": "yarn", "factor": 2.0}, "original_max_seq_len must be a positive whole number, got None"),
        (
            {"kind": "llama3", "factor": 2.0, "original_max_seq_len": 8, "low_freq_factor": 4.0},
            "low_freq_factor must be below high_freq_factor=4.0, got 4.0",
        ),
    ],
)
def test_rope_scaling_mistakes(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeScaling(**given)


def test_rope_base() -> None:
    with pytest.raises(ValueError, match="base must be above 1, got 1"):
        Rope(base=1)


scalings = st.none() | st.builds(
    RopeScaling,
    kind=st.sampled_from(["linear", "llama3", "yarn"]),
    factor=st.floats(1, 32),
    original_max_seq_len=st.integers(1, 8192),
)
ropes = st.none() | st.builds(Rope, base=st.floats(2, 1e6), interleaved=st.booleans(), scaling=scalings)


@given(name=st.sampled_from(list(VARIANTS)), rope=ropes, window=st.none() | st.integers(1, 99), mixed=st.booleans())
def test_json_round_trip(name: str, rope: Rope | None, window: int | None, mixed: bool) -> None:
    attention = variant(name, d_model=256, num_heads=16, rope=rope, window=window, qk_norm=True)
    layers = window_pattern(attention, num_layers=4, window=7, full_every=2, num_sink_tokens=1)
    config = model(attention=layers if mixed else attention, tie_embeddings=True)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ((), "model has no field 'colour'"),
        (("attention",), "attention has no field 'colour'"),
        (("attention", "rope"), "rope has no field 'colour'"),
        (("attention", "rope", "scaling"), "rope scaling has no field 'colour'"),
    ],
)
def test_unknown_fields_are_named(path: tuple[str, ...], message: str) -> None:
    scaling = RopeScaling(kind="linear", factor=2.0)
    values = model(attention=AttentionConfig(**GOOD, rope=Rope(scaling=scaling))).to_dict()
    inner = values
    for key in path:
        inner = inner[key]
    inner["colour"] = "red"
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention": 5}, "attention must be a table or a list, got 5"),
        ({"attention": [{**GOOD, "rope": 5}] * 4}, "rope must be a table, got 5"),
        ({"attention": {**GOOD, "rope": [{}]}}, "rope must be a table, got"),
    ],
)
def test_what_is_no_config_is_named(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict({**model().to_dict(), **values})


def test_the_nearest_field_is_named() -> None:
    with pytest.raises(ValueError, match="no field 'num_query_head'; did you mean 'num_query_heads'"):
        AttentionConfig.from_dict({**GOOD, "num_query_head": 4})


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (AttentionConfig, {"num_heads": 4}, "attention lacks d_model"),
        (ModelConfig, {"vocab_size": 4, "d_ff": 4}, "model lacks num_layers, max_seq_len, attention"),
    ],
)
def test_missing_fields_are_named(cls: type, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls.from_dict(values)


def test_frozen_and_replaced_with_the_same_checks() -> None:
    config = AttentionConfig(**GOOD)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_heads = 8  # type: ignore[misc]
    assert config.replace(num_query_heads=8, num_kv_heads=4).num_query_heads == 8
    with pytest.raises(ValueError, match="num_kv_heads=5"):
        config.replace(num_kv_heads=5)


def test_window_pattern() -> None:
    layers = window_pattern(AttentionConfig(**GOOD), num_layers=6, window=8, full_every=3, num_sink_tokens=2)
    assert [layer.window for layer in layers] == [8, 8, None, 8, 8, None]
    assert [layer.num_sink_tokens for layer in layers] == [2, 2, 0, 2, 2, 0]
    with pytest.raises(ValueError, match="full_every must be a positive whole number, got 0"):
        window_pattern(AttentionConfig(**GOOD), num_layers=6, window=8, full_every=0)
    with pytest.raises(ValueError, match="num_layers must be at most 10,000, got 1000"):  # it would fill the memory
        window_pattern(AttentionConfig(**GOOD), num_layers=10**30, window=8)
    with pytest.raises(ValueError, match="num_layers must be a positive whole number, got '6'"):
        window_pattern(AttentionConfig(**GOOD), num_layers="6", window=8)
    with pytest.raises(ValueError, match="window must be a positive whole number, got None"):
        window_pattern(AttentionConfig(**GOOD), num_layers=6, window=None)
    with pytest.raises(ValueError, match="attention must be an AttentionConfig, got None"):
        window_pattern(None, num_layers=6, window=8)


def test_no_torch_needed() -> None:
    code = "import sys, sqa, sqa.cost; sqa.variant('sqa', d_model=64, num_heads=8); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_layers_that_are_alike_are_one_config() -> None:
    attention = AttentionConfig(d_model=32, num_heads=4)
    sizes = {"vocab_size": 8, "num_layers": 2, "d_ff": 16, "max_seq_len": 8}
    assert ModelConfig(**sizes, attention=[attention, attention]) == ModelConfig(**sizes, attention=attention)
    fewer = attention.replace(num_query_heads=2, num_kv_heads=2)
    assert ModelConfig(**sizes, attention=[attention, fewer]).head_counts == {(4, 4), (2, 2)}
