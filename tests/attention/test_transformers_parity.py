"""Independent code: layers of transformers with our weights copied in give the same outputs."""

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from sqa import AttentionConfig, ModelConfig, SparseQueryAttention, Transformer, variant
from sqa.variants import VARIANTS

LENGTH = 23
# query heads are what transformers has: reverse SQA, with fewer of them than KV heads, has no counterpart
UNIFORM = [name for name in VARIANTS if name != "rsqa"]


def randomise(module: nn.Module) -> None:
    """Weights at which a mistake shows: fresh ones make attention almost uniform, norms the identity."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.3 * noise if "norm" in name else 0.1 * noise


def shape(config: AttentionConfig) -> dict[str, int]:
    return {
        "hidden_size": config.d_model,
        "num_attention_heads": config.num_query_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
    }


def causal_mask(window: int | None = None) -> Tensor:
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    seen = (distance >= 0) & (distance < (window or LENGTH))
    return torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~seen, -torch.inf)


@pytest.mark.parametrize("name", UNIFORM)
def test_llama_attention(name: str) -> None:
    ours = SparseQueryAttention(variant(name, d_model=96, num_heads=8))  # LlamaConfig wants 6 | d_model
    config = LlamaConfig(**shape(ours.config), attn_implementation="eager")
    theirs = LlamaAttention(config, layer_idx=0)
    randomise(ours)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, LENGTH, 96, requires_grad=True)
    positions = LlamaRotaryEmbedding(config)(x, torch.arange(LENGTH)[None])
    expected, _ = theirs(x, positions, causal_mask())
    got = ours(x)
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, [x, *ours.parameters()], grad),
        torch.autograd.grad(expected, [x, *theirs.parameters()], grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"window": 5}, {"sliding_window": 5}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"qkv_bias": True}, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"qk_norm": True}, {}),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", ["gqa", "sqa", "xsmqa"])
def test_models(name: str, family: str, tied: bool) -> None:
    """Same parameter names, so loading is strict; logits of whole models agree, padded on the left or not."""
    config_class, model_class, options, theirs = MODELS[family]
    attention = variant(name, d_model=64, num_heads=8, **options)
    ours = Transformer(
        ModelConfig(
            vocab_size=50,
            num_layers=2,
            d_ff=96,
            max_seq_len=64,
            attention=attention,
            norm_eps=1e-6,
            tie_embeddings=tied,
        )
    )
    config = config_class(
        **shape(attention),
        **theirs,
        vocab_size=50,
        num_hidden_layers=2,
        intermediate_size=96,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        attn_implementation="eager",
    )
    randomise(ours)
    other = model_class(config).eval()
    other.load_state_dict(ours.state_dict(), strict=True)
    ids = torch.randint(50, (2, LENGTH))
    real = torch.arange(LENGTH) >= torch.tensor([[0], [4]])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, other(ids).logits, atol=1e-4, rtol=1e-4)
        got = ours(ids, padding_mask=real).logits
        expected = other(ids, attention_mask=real.long()).logits
    torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, 1], ids=["window", "full"])
def test_gemma2_attention(layer: int) -> None:
    """Soft-capped logits and a scale of its own; Gemma's norms differ, so the attention module alone."""
    window = 6 if layer == 0 else None
    attention = variant("sqa", d_model=64, num_heads=8, window=window, logit_softcap=3.0, scale=24**-0.5)
    config = Gemma2Config(
        **shape(attention),
        num_hidden_layers=2,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=3.0,
        sliding_window=6,
        attn_implementation="eager",
    )
    ours, theirs = SparseQueryAttention(attention), Gemma2Attention(config, layer_idx=layer).eval()
    randomise(ours)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, LENGTH, 64)
    positions = Gemma2RotaryEmbedding(config)(x, torch.arange(LENGTH)[None])
    expected, _ = theirs(x, positions, causal_mask(window))
    torch.testing.assert_close(ours(x), expected)
    uncapped = SparseQueryAttention(attention.replace(logit_softcap=None))
    uncapped.load_state_dict(ours.state_dict())
    assert not torch.allclose(uncapped(x), expected, atol=1e-3)
