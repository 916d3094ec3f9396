"""The table of variants: the rules, for any number of heads, and what they refuse."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqa.variants import DEFAULT_VARIANTS, PRESETS, PUBLISHED_VARIANTS, VARIANTS, model_config, preset, shape, variant

SIXTEEN = {
    "mha": (16, 16, 16),
    "gqa": (16, 4, 16),
    "mqa": (16, 1, 16),
    "sqa": (8, 4, 16),
    "ssqa": (8, 8, 16),
    "xsqa": (4, 4, 16),
    "xsmqa": (4, 1, 16),
    "lsqa": (12, 4, 16),
    "rsqa": (4, 8, 16),
    "wide-mha": (8, 8, 32),
    "wide-gqa": (8, 2, 32),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_published_heads(name: str) -> None:
    config = variant(name, d_model=256, num_heads=16)
    assert (config.num_query_heads, config.num_kv_heads, config.head_dim) == SIXTEEN[name]
    assert config.num_heads == 16


def test_tables_agree() -> None:
    assert set(SIXTEEN) == set(VARIANTS)
    assert set(PUBLISHED_VARIANTS) < set(DEFAULT_VARIANTS) <= set(VARIANTS)
    assert len({row.label for row in VARIANTS.values()}) == len(VARIANTS)


@given(name=st.sampled_from(list(VARIANTS)), multiple=st.integers(1, 12), head_dim=st.sampled_from([2, 8, 64]))
def test_rules_scale_with_the_heads(name: str, multiple: int, head_dim: int) -> None:
    heads = 8 * multiple
    config = variant(name, d_model=heads * head_dim, num_heads=heads)
    query, kv, _ = SIXTEEN[name]
    assert config.num_query_heads * 16 == query * heads
    assert config.num_kv_heads == (1 if VARIANTS[name].kv is None else kv * heads // 16)
    assert config.head_dim == head_dim * VARIANTS[name].head_dim_factor


@pytest.mark.parametrize("name", ["wide-mha", "wide-gqa"])
def test_wide_costs_what_its_namesake_does(name: str) -> None:
    wide, plain = (variant(n, d_model=256, num_heads=16) for n in (name, name.removeprefix("wide-")))
    assert (wide.query_width, wide.kv_width) == (plain.query_width, plain.kv_width)


@given(name=st.sampled_from(list(VARIANTS)), heads=st.integers(1, 40), kv=st.none() | st.integers(1, 40))
def test_any_head_count_fits_or_is_refused(name: str, heads: int, kv: int | None) -> None:
    """A variant keeps its promise or raises ValueError: nothing is rounded."""
    row, shape = VARIANTS[name], {"d_model": 8 * heads, "num_heads": heads, "num_kv_heads": kv}
    query = row.query * heads
    own = Fraction(1) if row.kv is None else row.kv * heads
    kv_fits = own.denominator == 1 if kv is None or not row.kv_free else kv <= heads
    chosen = own if kv is None else Fraction(kv)
    kv_fits = kv_fits and (row.kv_free or chosen == own)
    if query.denominator == 1 and kv_fits and (query % chosen == 0 or chosen % query == 0):
        config = variant(name, **shape)
        assert (config.num_query_heads, config.num_kv_heads) == (query, chosen)
    else:
        with pytest.raises(ValueError, match=f"{heads}|{kv}"):
            variant(name, **shape)


def test_wide_heads_may_be_twice_an_odd_width() -> None:
    assert variant("wide-gqa", d_model=24, num_heads=8).head_dim == 6
    with pytest.raises(ValueError, match="head_dim must be even for rotary positions, got head_dim=3"):
        variant("gqa", d_model=24, num_heads=8)


def test_names_in_any_case_and_free_kv_heads() -> None:
    assert variant("xSMQA", d_model=256, num_heads=16) == variant("xsmqa", d_model=256, num_heads=16)
    assert variant("sqa", d_model=256, num_heads=16, num_kv_heads=2).num_kv_heads == 2
    assert variant("sqa", d_model=48, num_heads=6, num_kv_heads=3).num_query_heads == 3
    assert variant("ssqa", d_model=256, num_heads=16, num_kv_heads=8).num_kv_heads == 8


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sqaa", {}, "variant: 'sqaa' is unknown; did you mean 'sqa'"),
        (None, {}, "variant: None is unknown"),
        (
            "lsqa",
            {"d_model": 96, "num_heads": 6},
            "3/4 of num_heads, which needs a multiple of 4; got num_heads=6, 4 or 8 would fit",
        ),
        ("xsqa", {"num_heads": 2}, "needs a multiple of 4; got num_heads=2, 4 would fit"),
        ("mqa", {"num_kv_heads": 2}, "num_kv_heads is 1 for num_heads=16, got 2"),
        ("ssqa", {"num_kv_heads": 4}, "num_kv_heads is 8 for num_heads=16, got 4"),
        ("sqa", {"num_kv_heads": 3}, "num_query_heads=8 or be a multiple of it, got num_kv_heads=3; 2 or 4 would fit"),
        ("sqa", {"num_query_heads": 4}, "variant sqa has no field 'num_query_heads'"),
        ("sqa", {"windw": 4}, "no field 'windw'; did you mean 'window'"),
        ("sqa", {"num_heads": 15}, "num_heads=15 and d_model=256"),
    ],
)
def test_mistakes(name: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        variant(name, **{"d_model": 256, "num_heads": 16, **changes})


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("row", DEFAULT_VARIANTS)
def test_presets_take_every_default_variant(name: str, row: str) -> None:
    if name == "larger" and row == "wide-gqa":
        with pytest.raises(ValueError, match="got num_heads=12, 8 or 16 would fit"):
            preset(name, row)
        return
    config = preset(name, row)
    assert config == model_config(row, **shape(name))


def test_presets_change_and_refuse() -> None:
    config = preset("published", "sqa", num_layers=2, window=64, num_kv_heads=2)
    assert (config.num_layers, config.layers[0].window, config.layers[0].num_kv_heads) == (2, 64, 2)
    assert config.d_ff == 768
    with pytest.raises(ValueError, match="preset: 'publshed' is unknown; did you mean 'published'"):
        preset("publshed", "sqa")
    with pytest.raises(ValueError, match="model has no field 'dff'; did you mean 'd_ff'"):
        preset("published", "sqa", dff=3)
    with pytest.raises(ValueError, match="variant: 'nope' is unknown"):
        preset("published", "nope")
