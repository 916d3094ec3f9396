"""Fresh Sparse Query Attention inside models that exist."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sqa import ModelConfig, SparseQueryAttention, Transformer, cost, variant
from sqa.interop import replace_attention

Make = Callable[..., ModelConfig]


def encoder(*, batch_first: bool = True, dropout: float = 0.0, norm_first: bool = False) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 8, 96, dropout=dropout, batch_first=batch_first, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first and not norm_first)


def test_our_model_keeps_everything_but_the_heads(config_of: Make, ids: torch.Tensor) -> None:
    layer = config_of(num_heads=8, num_query_heads=8, num_kv_heads=8, qk_norm=True).layers[0]
    config = config_of(attention=(layer, layer.replace(window=5)), bias=True)
    model = Transformer(config)
    embedding = model.model.embed_tokens.weight.clone()
    report = replace_attention(model, "sqa")
    assert list(report.after) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert [each.window for each in model.config.layers] == [None, 5]
    assert {(each.num_query_heads, each.num_kv_heads, each.qk_norm) for each in model.config.layers} == {(4, 2, True)}
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert report.parameters_before == cost.parameters(config)
    assert report.parameters_after == cost.parameters(model.config) == sum(p.numel() for p in model.parameters())
    before, after = report.attention_flops(100)
    assert before == 2 * after
    assert "8/8 -> 4/2" in str(report)
    model.generate(ids, max_new_tokens=5)  # layer indices of the cache


def test_heads_of_odd_width_without_rotary_positions(config_of: Make) -> None:
    for model in (Transformer(config_of(num_heads=16, rope=None)), nn.TransformerEncoderLayer(48, 16)):
        (after,) = set(replace_attention(model, "sqa").after.values())
        assert (after.num_query_heads, after.num_kv_heads, after.head_dim) == (8, 4, 3)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_runs_our_layer_in_training_and_in_evaluation(batch_first: bool, norm_first: bool) -> None:
    model = encoder(batch_first=batch_first, norm_first=norm_first)
    report = replace_attention(model, "sqa", num_kv_heads=4)
    assert list(report.before) == ["layers.0.self_attn", "layers.1.self_attn"]
    x = torch.randn(2, 11, 64)
    padding = torch.zeros(2, 11, dtype=torch.bool)
    padding[1, 7:] = True

    def run(x: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        given = x if batch_first else x.transpose(0, 1)
        out = model(given, src_key_padding_mask=padding)
        return out if batch_first else out.transpose(0, 1)

    trained = run(x, padding)
    calls = []
    hook = model.layers[0].self_attn.attention.q_proj.register_forward_hook(lambda *_: calls.append(1))
    model.eval()
    with torch.inference_mode():  # where PyTorch takes its fused path if it can
        evaluated = run(x, padding)
        hook.remove()
        again = run(x, padding)
        torch.testing.assert_close(evaluated, again)
        torch.testing.assert_close(evaluated[0], trained[0])
        torch.testing.assert_close(evaluated[1, :7], trained[1, :7])
        changed = x.clone()
        changed[1, 7:] += torch.randn(4, 64)
        torch.testing.assert_close(run(changed, padding)[1, :7], evaluated[1, :7])
        assert (run(changed, None)[1, :7] - run(x, None)[1, :7]).abs().max() > 1e-3
    assert calls


def test_replacing_all_heads_by_all_heads_with_the_same_weights_is_the_same_function() -> None:
    old = encoder().eval()
    new = copy.deepcopy(old)
    old.use_nested_tensor = False  # it warns
    replace_attention(new, "mha")
    with torch.no_grad():
        for before, after in zip(old.layers, new.layers, strict=True):
            for i, name in enumerate("qkv"):
                projection = getattr(after.self_attn.attention, f"{name}_proj")
                projection.weight.copy_(before.self_attn.in_proj_weight.chunk(3)[i])
                projection.bias.copy_(before.self_attn.in_proj_bias.chunk(3)[i])
            after.self_attn.attention.o_proj.load_state_dict(before.self_attn.out_proj.state_dict())
        x = torch.randn(2, 9, 64)
        padding = torch.zeros(2, 9, dtype=torch.bool)
        padding[0, 6:] = True
        torch.testing.assert_close(new(x), old(x))
        left, right = (model(x, src_key_padding_mask=padding)[~padding] for model in (new, old))
        torch.testing.assert_close(left, right)


def test_decoder_layer_attends_causally_to_itself_and_fully_to_the_memory() -> None:
    layer = nn.TransformerDecoderLayer(64, 8, 96, dropout=0.0, batch_first=True)
    model = nn.ModuleDict({"own": layer.self_attn, "cross": layer.multihead_attn})
    replace_attention(model, "sqa", causal=False)
    layer.multihead_attn = model["cross"]
    replace_attention(layer, "xsqa", causal=True)
    assert not layer.multihead_attn.attention.config.causal
    assert layer.self_attn.attention.config.causal
    x, memory = torch.randn(1, 6, 64), torch.randn(1, 9, 64)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    changed = x.clone()
    changed[:, 3] += 1.0
    differs = (layer(x, memory, mask, tgt_is_causal=True) - layer(changed, memory, mask, tgt_is_causal=True)).abs()
    assert (differs.amax((0, 2)) > 1e-6).tolist() == [False] * 3 + [True] * 3


def test_masks_it_cannot_honour_are_refused() -> None:
    model = encoder()
    replace_attention(model, "sqa")
    x = torch.randn(1, 5, 64)
    with pytest.raises(ValueError, match="causal=False"):
        model(x, mask=nn.Transformer.generate_square_subsequent_mask(5))
    with pytest.raises(ValueError, match="other masks"):
        model(x, mask=torch.eye(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="same tensor"):
        model.layers[0].self_attn(x, x, x + 1)
    causal = encoder()
    replace_attention(causal, "sqa", causal=True)
    causal(x, mask=nn.Transformer.generate_square_subsequent_mask(5))
    with pytest.raises(ValueError, match="causal=True"):
        causal(x)


def test_what_is_left_out_is_reported_and_nothing_half_done() -> None:
    assert "dropout 0.1 is left out" in str(replace_attention(encoder(dropout=0.1), "sqa"))
    with pytest.raises(ValueError, match="no attention layer"):
        replace_attention(nn.Linear(3, 3), "sqa")
    model = nn.Sequential(nn.MultiheadAttention(64, 8), nn.MultiheadAttention(64, 6 + 2, kdim=32, vdim=32))
    with pytest.raises(ValueError, match="kdim"):
        replace_attention(model, "sqa")
    assert isinstance(model[0], nn.MultiheadAttention)
    with pytest.raises(ValueError, match="did you mean"):
        replace_attention(encoder(), "sqaa")


@pytest.mark.parametrize(
    "layer", [nn.MultiheadAttention(64, 8), SparseQueryAttention(variant("sqa", d_model=64, num_heads=8))]
)
def test_a_layer_by_itself_cannot_be_replaced_in_place(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"model is itself a {type(layer).__name__}"):
        replace_attention(layer, "xsqa")


def test_a_layer_in_several_places_stays_one_layer() -> None:
    """Only its first place was replaced: elsewhere the old layer stayed, with weights of its own."""
    layer = nn.MultiheadAttention(64, 8)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.ModuleList([nn.ReLU()] * 2)})
    report = replace_attention(model, "sqa")
    assert model["a"] is model["b"]
    assert list(report.after) == ["a", "b"]
    assert report.parameters_after == sum(p.numel() for p in model["a"].parameters())


def test_a_head_of_an_odd_width_needs_no_rotary_positions() -> None:
    """It was refused for rotary positions, which the new layer does not have."""
    model = nn.ModuleList([nn.MultiheadAttention(84, 4)])
    replace_attention(model, "sqa")
    x = torch.randn(5, 2, 84)
    assert model[0](x, x, x)[0].shape == x.shape
