"""Parameters, FLOPs and KV-cache bytes in closed form.

One multiply-add is 2 FLOPs. Attention counts the (query, key) pairs that the mask leaves visible, so causal is half of
N * N; its softmax and every element-wise operation are left out. A training step is three forward passes (backward
is two), with nothing recomputed.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sqa.config import AttentionConfig, ModelConfig
from sqa.errors import InputError
from sqa.variants import find_variant, preset, shape


def _projection_weights(config: AttentionConfig) -> int:
    """Weights of the four projections of one attention layer, biases left out."""
    return config.d_model * (config.query_width + 2 * config.kv_width + config.output_width)


def attention_parameters(config: AttentionConfig, *, output_bias: bool = False) -> int:
    """Parameters of one attention layer."""
    total = _projection_weights(config)
    if config.qkv_bias:
        total += config.query_width + 2 * config.kv_width
    if output_bias:
        total += config.d_model
    if config.qk_norm:
        total += 2 * config.head_dim
    return total


def parameters(config: ModelConfig) -> int:
    """Parameters of the whole model; equals `sum(p.numel())` of Transformer(config)."""
    d, ff = config.d_model, config.d_ff
    feed_forward = 3 * d * ff + (2 * ff + d if config.bias else 0)
    total = config.vocab_size * d * (1 if config.tie_embeddings else 2)
    total += config.vocab_size if config.bias else 0
    total += d if config.final_norm else 0
    for layer in config.layers:
        total += attention_parameters(layer, output_bias=config.bias) + feed_forward + 2 * d
    return total


def attention_flops(config: AttentionConfig, n: int) -> int:
    """FLOPs of scores and weighted values for one sequence of `n` tokens in one layer, projections left out."""
    return 4 * config.num_output_heads * config.head_dim * config.visible_pairs(n)


def forward_flops(config: ModelConfig, n: int, *, num_logits: int | None = None) -> int:
    """FLOPs of a forward pass over one sequence of `n` tokens, with the logits of every position or of `num_logits`."""
    blocks = sum(map(_projection_weights, config.layers)) + config.num_layers * 3 * config.d_model * config.d_ff
    logits = config.vocab_size * config.d_model * (n if num_logits is None else num_logits)
    return 2 * (n * blocks + logits) + sum(attention_flops(layer, n) for layer in config.layers)


def train_step_flops(config: ModelConfig, n: int, batch_size: int = 1) -> int:
    """FLOPs of a training step over `batch_size` sequences of `n` tokens: forward and backward."""
    return 3 * batch_size * forward_flops(config, n)


def prefill_flops(config: ModelConfig, n: int) -> int:
    """FLOPs of reading a prompt of `n` tokens: a forward pass with the logits of the last position only."""
    return forward_flops(config, n, num_logits=1)


def kv_cache_bytes(config: ModelConfig, n: int = 1, *, bytes_per_element: int = 2) -> int:
    """Bytes of keys and values kept for one sequence of `n` tokens; window layers keep the window and the sinks."""
    total = 0
    for layer in config.layers:
        kept = n if layer.window is None else min(n, layer.window + layer.num_sink_tokens)
        total += 2 * kept * layer.kv_width * bytes_per_element
    return total


def attention_saving(config: AttentionConfig, n: int) -> float:
    """FLOPs of full multi-head attention, whose heads are d_model wide in all, over this layer's: H / Hq for SQA."""
    pairs = config.replace(window=None, num_sink_tokens=0).visible_pairs(n)
    return 4 * config.d_model * pairs / attention_flops(config, n)


@dataclass(frozen=True, kw_only=True)
class VariantCost:
    """One variant of a named shape: heads, parameters, FLOPs for one sequence of `n` tokens, bytes of 16-bit cache."""

    variant: str
    label: str
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    parameters: int
    n: int
    train_step_flops: int
    prefill_flops: int
    kv_cache_bytes_per_token: int
    attention_saving: float


def variant_costs(preset_name: str, n: int, variants: Iterable[str]) -> tuple[list[VariantCost], list[str]]:
    """The costs of those variants whose rule fits the shape, and a sentence for each that does not.

    Raises InputError for an unknown preset or variant.
    """
    shape(preset_name)
    costs: list[VariantCost] = []
    left_out: list[str] = []
    for name, row in map(find_variant, variants):
        try:
            config = preset(preset_name, name)
        except InputError as error:
            left_out.append(str(error))
            continue
        layer = config.layers[0]
        costs.append(
            VariantCost(
                variant=name,
                label=row.label,
                num_query_heads=layer.num_query_heads,
                num_kv_heads=layer.num_kv_heads,
                head_dim=layer.head_dim,
                parameters=parameters(config),
                n=n,
                train_step_flops=train_step_flops(config, n),
                prefill_flops=prefill_flops(config, n),
                kv_cache_bytes_per_token=kv_cache_bytes(config),
                attention_saving=attention_saving(layer, n),
            )
        )
    return costs, left_out
