"""A Sparse Query Attention language model for transformers, in one file that needs nothing else.

Copied beside the weights of an hf-remote export and loaded from there with trust_remote_code=True. Shapes: B batch,
T new tokens, S all tokens so far, H heads, D head_dim.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple


class SqaConfig(PreTrainedConfig):
    """The fields of sqa.ModelConfig; `attention` is one mapping for all layers or a list with one per layer."""

    model_type = "sqa"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "d_ff",
        "max_position_embeddings": "max_seq_len",
        "tie_word_embeddings": "tie_embeddings",
        "rms_norm_eps": "norm_eps",
    }

    vocab_size: int = 32_000
    num_layers: int = 2
    d_ff: int = 256
    max_seq_len: int = 2048
    attention: dict[str, Any] | list[dict[str, Any]] | None = None
    bias: bool = False
    final_norm: bool = True
    tie_embeddings: bool = False
    norm_eps: float = 1e-5
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @property
    def layers(self) -> list[dict[str, Any]]:
        if isinstance(self.attention, list):
            return self.attention
        if self.attention is None:
            raise ValueError("attention must describe the layers: see sqa.AttentionConfig")
        return [self.attention] * self.num_layers

    @property
    def hidden_size(self) -> int:
        return int(self.layers[0]["d_model"])

    @property
    def num_attention_heads(self) -> int:
        return int(self.layers[0]["num_query_heads"])


def inverse_frequencies(rope: dict[str, Any], head_dim: int, device: torch.device) -> tuple[Tensor, float]:
    """Radians a position for each rotary pair, fp32 (D / 2,), and the factor on cos and sin."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / rope["base"] ** exponents
    scaling = rope.get("scaling")
    if scaling is None:
        return frequencies, 1.0
    factor, length = scaling["factor"], scaling["original_max_seq_len"]
    if scaling["kind"] == "linear":
        return frequencies / factor, 1.0
    if scaling["kind"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((length * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return (1 - keep) * frequencies / factor + keep * frequencies, 1.0
    if scaling["kind"] != "yarn":
        raise ValueError(f"rope scaling must be linear, llama3 or yarn, got {scaling['kind']!r}")

    def pair_with(turns: float) -> float:
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope["base"]))

    first = max(math.floor(pair_with(scaling["beta_fast"])), 0)
    last = min(math.ceil(pair_with(scaling["beta_slow"])), head_dim - 1)
    ramp = torch.arange(head_dim // 2, dtype=torch.float32, device=device) - first
    interpolate = (ramp / max(last - first, 0.001)).clamp(0, 1)
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = 0.1 * math.log(factor) + 1.0
    return interpolate * frequencies / factor + (1 - interpolate) * frequencies, attention_factor


def rotate(x: Tensor, positions: Tensor, rope: dict[str, Any]) -> Tensor:
    """x (B, H, T, D) rotated by positions (1 or B, T); computed in fp32."""
    frequencies, factor = inverse_frequencies(rope, x.shape[-1], x.device)
    angles = positions[:, None, :, None].float() * frequencies
    cos, sin = angles.cos() * factor, angles.sin() * factor
    if rope.get("interleaved"):
        first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    else:
        first, second = x.float().chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def visible(
    layer: dict[str, Any], start: int, x: Tensor, padding: Tensor | None, documents: Tensor | None
) -> Tensor | None:
    """bool (1 or B, 1, T, S): the keys each query sees. x: the new tokens, (B, T, d), which follow `start` others.

    padding: (B, S), nonzero = real. documents: (B, T), equal within one. None where each query sees all keys up to its
    own and PyTorch need not be given a mask: it then skips hidden keys.
    """
    length, plain = x.shape[1], layer["window"] is None and layer["logit_softcap"] is None
    if plain and padding is None and documents is None and (start == 0 or length == 1):
        return None
    keys = torch.arange(start + length, device=x.device)
    distance = keys[start:, None] - keys
    real = torch.ones_like(keys, dtype=torch.bool)[None] if padding is None else padding.bool()
    seen, places = (distance >= 0)[None], real.cumsum(1)
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])
        places = seen.sum(2)
    if layer["window"] is not None:
        near = (distance < layer["window"])[None]
        sinks = real & (places <= layer["num_sink_tokens"])
        seen = seen & (near | sinks[:, None, :])
    # a padded query sees at least itself: softmax over nothing has no value
    return ((seen & real[:, None, :]) | (distance == 0))[:, None]


class SqaAttention(nn.Module):
    def __init__(self, config: SqaConfig, index: int) -> None:
        super().__init__()
        self.layer, self.index = config.layers[index], index
        width, dim = self.layer["d_model"], self.layer["head_dim"]
        queries, kv = self.layer["num_query_heads"], self.layer["num_kv_heads"]
        self.q_proj = nn.Linear(width, queries * dim, bias=self.layer["qkv_bias"])
        self.k_proj = nn.Linear(width, kv * dim, bias=self.layer["qkv_bias"])
        self.v_proj = nn.Linear(width, kv * dim, bias=self.layer["qkv_bias"])
        self.o_proj = nn.Linear(max(queries, kv) * dim, width, bias=config.bias)
        norm = self.layer["qk_norm"]
        self.q_norm = nn.RMSNorm(dim, eps=config.norm_eps) if norm else nn.Identity()
        self.k_norm = nn.RMSNorm(dim, eps=config.norm_eps) if norm else nn.Identity()

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None, cache: DynamicCache | None) -> Tensor:
        heads = (*x.shape[:2], -1, self.layer["head_dim"])
        v = self.v_proj(x).view(heads).transpose(1, 2)
        q = self.q_norm(self.q_proj(x).view(heads)).to(v.dtype).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(heads)).to(v.dtype).transpose(1, 2)
        if self.layer["rope"] is not None:
            q, k = rotate(q, positions, self.layer["rope"]), rotate(k, positions, self.layer["rope"])
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        repeats = max(q.shape[1], k.shape[1])
        q = q.repeat_interleave(repeats // q.shape[1], dim=1)  # reverse SQA: one query head, several KV heads
        k, v = (t.repeat_interleave(repeats // t.shape[1], dim=1) for t in (k, v))
        scale, cap = self.layer["scale"] or self.layer["head_dim"] ** -0.5, self.layer["logit_softcap"]
        if cap is None:
            causal = mask is None and x.shape[1] > 1
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
        else:
            assert mask is not None, "visible() makes one under a soft cap"
            scores = cap * torch.tanh((q @ k.transpose(-1, -2)).float() * scale / cap)
            out = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v
        return self.o_proj(out.transpose(1, 2).flatten(2))


class SqaMLP(nn.Module):
    def __init__(self, config: SqaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.d_ff, bias=config.bias)
        self.up_proj = nn.Linear(config.hidden_size, config.d_ff, bias=config.bias)
        self.down_proj = nn.Linear(config.d_ff, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SqaBlock(GradientCheckpointingLayer):
    def __init__(self, config: SqaConfig, index: int) -> None:
        super().__init__()
        self.self_attn = SqaAttention(config, index)
        self.mlp = SqaMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None, cache: DynamicCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), positions, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class SqaPreTrainedModel(PreTrainedModel):
    config_class = SqaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["SqaBlock"]
    _supports_sdpa = True


class SqaModel(SqaPreTrainedModel):
    def __init__(self, config: SqaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SqaBlock(config, i) for i in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps) if config.final_norm else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self, x: Tensor, positions: Tensor | None, padding: Tensor | None, cache: DynamicCache | None
    ) -> Tensor:
        start, documents = 0 if cache is None else cache.get_seq_length(), None
        if positions is None:
            positions = torch.arange(start, start + x.shape[1], device=x.device)[None]
        elif padding is None and start == 0:
            documents = find_packed_sequence_indices(positions.expand(x.shape[0], -1))
        if padding is not None and not torch.compiler.is_compiling() and padding.all():
            padding = None
        masks: dict[str, Tensor | None] = {}  # layers that see the same keys share a mask
        for layer, attention in zip(self.layers, self.config.layers, strict=True):
            sees = str([attention[field] for field in ("window", "num_sink_tokens", "logit_softcap")])
            if sees not in masks:
                masks[sees] = visible(attention, start, x, padding, documents)
            x = layer(x, positions, masks[sees], cache)
        return self.norm(x)


class SqaForCausalLM(SqaPreTrainedModel, GenerationMixin):
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SqaConfig) -> None:
        super().__init__(config)
        self.model = SqaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,  # Trainer's num_items_in_batch and the like, for the loss
    ) -> CausalLMOutputWithPast:
        """attention_mask: (B, S), nonzero = real; labels (B, T): input_ids, -100 where there is none.

        Without a mask, another document begins where position_ids (B, T) do not rise by one.
        """
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name):
                raise ValueError(f"{name} must be false: this model returns no more than logits")
        if getattr(past_key_values, "is_compileable", False):  # it also has keys that stand for no token
            raise ValueError(f"past_key_values must be a dynamic cache, got {type(past_key_values).__name__}")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask must be (B, S), got {tuple(attention_mask.shape)}")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        x = self.model(x, position_ids, attention_mask, past_key_values)
        logits = self.lm_head(x[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
