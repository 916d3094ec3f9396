"""The layer: which inputs reach which outputs, encoders, cross-attention, precision, errors."""

import pytest
import torch
from attention_cases import BATCH, MASKS, left_padding, make_mask, seen
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sqa import AttentionConfig, InputError, KVCache, ModelConfig, Rope, SparseQueryAttention, Transformer, variant
from sqa.attention import kernels
from sqa.attention.reference import reference_attention
from sqa.variants import VARIANTS

LENGTH = 11
IDS = torch.zeros(2, 9, dtype=torch.long)


def layer_config(kind: str, name: str = "sqa") -> AttentionConfig:
    mask = make_mask(kind, LENGTH)
    return variant(
        name,
        d_model=64,
        num_heads=8,
        causal=mask.causal,
        window=mask.window,
        num_sink_tokens=mask.num_sink_tokens,
    )


def inputs(kind: str) -> dict[str, Tensor | None]:
    mask = make_mask(kind, LENGTH)
    return {"padding_mask": mask.padding_mask, "document_ids": mask.document_ids}


def reach(function, x: Tensor) -> Tensor:
    """Bool (B, Tout, B, Tin): whether output (b, i) depends on input (c, j) at all."""
    jacobian = torch.autograd.functional.jacobian(lambda x: function(x).sum(-1), x)
    return (jacobian != 0).any(-1)


def expected_reach(kind: str) -> Tensor:
    """What the mask allows: the keys seen, and through the query itself once there is a choice of keys."""
    allowed = seen(kind, LENGTH)
    own = torch.eye(LENGTH, dtype=torch.bool) & (allowed.sum(-1, keepdim=True) > 1)
    result = torch.zeros(BATCH, LENGTH, BATCH, LENGTH, dtype=torch.bool)
    for b in range(BATCH):
        result[b, :, b] = allowed[b] | own[b]
    return result


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", ["gqa", "sqa", "rsqa"])
def test_layer_influence(name: str, kind: str) -> None:
    torch.manual_seed(0)
    layer = SparseQueryAttention(layer_config(kind, name))
    got = reach(lambda x: layer(x, **inputs(kind)), torch.randn(BATCH, LENGTH, 64))
    assert torch.equal(got, expected_reach(kind))


@pytest.mark.parametrize("kind", MASKS)
def test_model_influence(kind: str) -> None:
    """Two layers reach what a seen key has seen; the residual stream always reaches its own position."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=20, num_layers=2, d_ff=64, max_seq_len=LENGTH, attention=layer_config(kind))
    model = Transformer(config)
    ids = torch.randint(20, (BATCH, LENGTH))

    def from_embeddings(x: Tensor) -> Tensor:
        hook = model.model.embed_tokens.register_forward_hook(lambda *_: x)
        with hook:
            return model(ids, **inputs(kind)).logits

    one = expected_reach(kind).flatten(2).flatten(0, 1) | torch.eye(BATCH * LENGTH, dtype=torch.bool)
    two = (one.float() @ one.float()).bool().view(BATCH, LENGTH, BATCH, LENGTH)
    assert torch.equal(reach(from_embeddings, torch.randn(BATCH, LENGTH, 64)), two)


def test_a_kernel_in_the_wrong_layout_cannot_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads attending to heads: every shape fits, nothing raises, and tokens never mix."""

    def swapped(call, form):
        out = reference_attention(*(x.transpose(1, 2) for x in (call.q, call.k, call.v)), None, scale=call.scale)
        return out.transpose(1, 2)

    torch.manual_seed(0)
    layer = SparseQueryAttention(layer_config("none", "mha"))
    broken = kernels.Kernel(**{**vars(kernels.KERNELS["sdpa"]), "run": swapped})
    monkeypatch.setitem(kernels.KERNELS, "sdpa", broken)
    got = reach(layer, torch.randn(BATCH, LENGTH, 64))
    assert not torch.equal(got, expected_reach("none"))
    off_diagonal = got & ~torch.eye(BATCH * LENGTH, dtype=torch.bool).view(BATCH, LENGTH, BATCH, LENGTH)
    assert not off_diagonal.any()


@pytest.mark.parametrize("name", VARIANTS)
def test_any_variant_is_an_encoder_and_reads_a_context(name: str) -> None:
    torch.manual_seed(0)
    layer = SparseQueryAttention(variant(name, d_model=64, num_heads=8, causal=False))
    x, context = torch.randn(BATCH, 5, 64), torch.randn(BATCH, 9, 64)
    real = left_padding(9)
    whole = layer(x, context=context, padding_mask=real)
    assert whole.shape == x.shape
    torch.testing.assert_close(layer(x[1:], context=context[1:, 3:]), whole[1:])
    encoded = layer(context, padding_mask=real)
    torch.testing.assert_close(layer(context[1:, 3:]), encoded[1:, 3:])


def test_context_has_no_positions() -> None:
    torch.manual_seed(0)
    layer = SparseQueryAttention(variant("sqa", d_model=64, num_heads=8, causal=False))
    x, context = torch.randn(1, 5, 64), torch.randn(1, 9, 64)
    torch.testing.assert_close(layer(x, context=context.flip(1)), layer(x, context=context))
    assert not torch.allclose(layer(x.flip(1)).flip(1)[:, :2], layer(torch.cat((x[:, 2:], x[:, :2]), 1))[:, 3:])


def test_documents_equal_separate_sequences() -> None:
    torch.manual_seed(0)
    layer = SparseQueryAttention(variant("sqa", d_model=64, num_heads=8, window=4, num_sink_tokens=2))
    parts = [torch.randn(1, n, 64) for n in (7, 1, 12)]
    ids = torch.tensor([[5] * 7 + [2] + [5] * 12])
    packed = layer(torch.cat(parts, 1), document_ids=ids)
    torch.testing.assert_close(packed, torch.cat([layer(part) for part in parts], 1))


def test_right_padding_needs_no_mask() -> None:
    torch.manual_seed(0)
    layer = SparseQueryAttention(variant("sqa", d_model=64, num_heads=8))
    x = torch.randn(2, 9, 64)
    real = torch.arange(9) < torch.tensor([[9], [6]])
    with_mask, without = layer(x, padding_mask=real), layer(x)
    torch.testing.assert_close(with_mask[real], without[real])


@given(
    heads=st.sampled_from([(8, 8), (8, 2), (4, 2), (2, 1), (2, 4), (1, 8)]),
    kernel=st.sampled_from(["auto", "sdpa"]),
    kind=st.sampled_from(MASKS),
    options=st.fixed_dictionaries(
        {
            "qkv_bias": st.booleans(),
            "qk_norm": st.booleans(),
            "scale": st.none() | st.just(0.3),
            "rope": st.none() | st.builds(Rope, interleaved=st.booleans()),
        }
    ),
)
def test_layer_is_the_same_with_the_oracle_inside(heads, kernel, kind, options) -> None:
    mask = make_mask(kind, LENGTH)
    config = AttentionConfig(
        d_model=32,
        num_heads=8,
        num_query_heads=heads[0],
        num_kv_heads=heads[1],
        causal=mask.causal,
        window=mask.window,
        num_sink_tokens=mask.num_sink_tokens,
        **options,
    )
    torch.manual_seed(0)
    oracle = SparseQueryAttention(config, output_bias=True, kernel="reference")
    layer = SparseQueryAttention(config, output_bias=True, kernel=kernel)
    layer.load_state_dict(oracle.state_dict())
    x = torch.randn(BATCH, LENGTH, 32)
    torch.testing.assert_close(layer(x, **inputs(kind)), oracle(x, **inputs(kind)))


@pytest.mark.parametrize("kind", MASKS)
def test_autocast(kind: str) -> None:
    """No worse than twice the error of the oracle inside the same autocast; gradients arrive in fp32."""
    torch.manual_seed(0)
    layers = {k: SparseQueryAttention(layer_config(kind), kernel=k) for k in ("auto", "reference")}
    layers["auto"].load_state_dict(layers["reference"].state_dict())
    x = torch.randn(BATCH, LENGTH, 64)
    exact = layers["reference"](x, **inputs(kind))
    errors = {}
    for name, layer in layers.items():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(x, **inputs(kind))
        assert out.dtype == torch.bfloat16
        errors[name] = (out.float() - exact).norm()
        out.float().square().sum().backward()
        assert layer.q_proj.weight.grad is not None
        assert layer.q_proj.weight.grad.dtype == torch.float32
    assert errors["auto"] <= 2 * errors["reference"]


def test_autocast_with_qk_norm_and_cache() -> None:
    torch.manual_seed(0)
    config = variant("sqa", d_model=64, num_heads=8, qk_norm=True)
    layer = SparseQueryAttention(config)
    x = torch.randn(2, 6, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        whole = layer(x)
        for dtype in (torch.float32, torch.bfloat16):
            cache = KVCache(config, batch_size=2, capacity=6, dtype=dtype)
            steps = torch.cat([layer(x[:, i : i + 1], cache=cache) for i in range(6)], 1)
            torch.testing.assert_close(steps, whole, atol=0.02, rtol=0.02)


def test_cache_of_a_lower_precision() -> None:
    torch.manual_seed(0)
    config = variant("sqa", d_model=64, num_heads=8, window=3, num_sink_tokens=1)
    layer = SparseQueryAttention(config)
    x = torch.randn(2, 9, 64)
    cache = KVCache(config, batch_size=2, capacity=9, dtype=torch.bfloat16)
    with torch.no_grad():
        steps = torch.cat([layer(x[:, i : i + 1], cache=cache) for i in range(9)], 1)
    assert steps.dtype == torch.float32
    torch.testing.assert_close(steps, layer(x), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("causal", "given", "message"),
    [
        (True, {"x": torch.zeros(2, 9, 32)}, r"x must be \(B, T, 64\), got \(2, 9, 32\)"),
        (True, {"x": torch.zeros(9, 64)}, r"x must be \(B, T, 64\), got \(9, 64\)"),
        (False, {"context": torch.zeros(2, 9, 32)}, r"context must be \(B, T, 64\), got \(2, 9, 32\)"),
        (True, {"context": torch.zeros(2, 9, 64)}, "context needs causal=False"),
        (False, {"context": torch.zeros(3, 9, 64)}, "one batch size, got 2 and 3"),
        (
            False,
            {"context": torch.zeros(2, 9, 64), "document_ids": IDS},
            "neither a cache nor document",
        ),
        (
            True,
            {"cache": True, "document_ids": IDS},
            "a cache holds one document a row",
        ),
        (True, {"padding_mask": torch.ones(2, 8) > 0}, r"padding_mask must be \(2, 9\), got \(2, 8\)"),
        (True, {"document_ids": IDS[:, 1:]}, r"document_ids must be \(2, 9\), got \(2, 8\)"),
    ],
)
def test_errors(causal: bool, given: dict, message: str) -> None:
    config = variant("sqa", d_model=64, num_heads=8, causal=causal)
    given = {"x": torch.zeros(2, 9, 64), **given}
    if "cache" in given:
        given["cache"] = KVCache(config, batch_size=2, capacity=9)
    with pytest.raises(ValueError, match=message):
        SparseQueryAttention(config)(**given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_eps": "x"}, "norm_eps must be a finite number, got 'x'"),
        ({"norm_eps": -1.0}, "norm_eps must be above 0, got -1.0"),
        ({"layer_index": 1.5}, "layer_index must be a whole number, got 1.5"),
        ({"layer_index": -1}, "layer_index must be 0 or more, got -1"),
        ({"config": None}, "config must be an AttentionConfig, got None"),
    ],
)
def test_a_layer_of_wrong_settings_is_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SparseQueryAttention(**{"config": AttentionConfig(d_model=16, num_heads=4), **options})


def test_unknown_kernel() -> None:
    with pytest.raises(ValueError, match="kernel: 'flash' is unknown"):
        SparseQueryAttention(variant("sqa", d_model=64, num_heads=8), kernel="flash")


def test_repr_shows_the_heads() -> None:
    layer = SparseQueryAttention(variant("sqa", d_model=64, num_heads=8, window=9), kernel="sdpa")
    assert "4 query and 2 KV heads of 8 (nominal 8), causal, window 9, kernel sdpa" in repr(layer)
    assert "both ways" in repr(SparseQueryAttention(variant("sqa", d_model=64, num_heads=8, causal=False)))


@pytest.mark.parametrize("wrong", [None, "x", [[1.0]]], ids=repr)
def test_an_input_that_is_no_tensor_is_named(wrong: object) -> None:
    layer = SparseQueryAttention(variant("sqa", d_model=32, num_heads=4, causal=False))
    with pytest.raises(InputError, match="attention: x must be a tensor, got"):
        layer(wrong)
    if wrong is not None:
        with pytest.raises(InputError, match="attention: context must be a tensor or None, got"):
            layer(torch.zeros(1, 5, 32), context=wrong)
    with pytest.raises(InputError, match="kernel: 3 is unknown"):
        SparseQueryAttention(layer.config, kernel=3)
