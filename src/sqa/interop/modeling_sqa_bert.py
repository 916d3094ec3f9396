"""BERT with fewer query and KV heads, for transformers, in one file that needs nothing else.

Copied beside the weights of a converted encoder and loaded from there with AutoModel and trust_remote_code=True. All
but the attention is transformers' BERT, and all parameters have its names. Shapes: B batch, T tokens, H heads,
D head_dim.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import BertSelfAttention, eager_attention_forward


@strict
class SqaBertConfig(BertConfig):
    """BERT's fields and three more; `num_attention_heads` stays the nominal count."""

    model_type = "sqa_bert"

    num_query_heads: int = 12
    num_kv_heads: int = 12
    head_dim: int = 64

    def __post_init__(self, **kwargs: Any) -> None:
        if min(self.num_query_heads, self.num_kv_heads) < 1 or self.num_query_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_query_heads={self.num_query_heads}, got num_kv_heads={self.num_kv_heads}"
            )
        if self.is_decoder:
            raise ValueError("sqa_bert is an encoder: is_decoder must be false")
        super().__post_init__(**kwargs)


class SqaBertSelfAttention(BertSelfAttention):
    """Query head i reads KV head i // (num_query_heads // num_kv_heads)."""

    def __init__(self, config: SqaBertConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.num_attention_heads, self.attention_head_size = config.num_query_heads, config.head_dim
        self.all_head_size = config.num_query_heads * config.head_dim
        self.num_key_value_groups = config.num_query_heads // config.num_kv_heads
        self.scaling = config.head_dim**-0.5
        self.query = nn.Linear(config.hidden_size, self.all_head_size)
        self.key = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.value = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: None = None,
        **kwargs: Any,  # the interface passes what every attention function may need
    ) -> tuple[Tensor, Tensor | None]:
        heads = (*hidden_states.shape[:2], -1, self.attention_head_size)
        query, key, value = (
            projection(hidden_states).view(heads).transpose(1, 2) for projection in (self.query, self.key, self.value)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        if attend is eager_attention_forward:  # BERT's own; the others know of grouped KV heads
            key, value = (t.repeat_interleave(self.num_key_value_groups, dim=1) for t in (key, value))
        dropout = self.dropout.p if self.training else 0.0
        out, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return out.flatten(2), weights  # out: (B, T, H, D)


class SqaBertModel(BertModel):
    config_class = SqaBertConfig

    def __init__(self, config: SqaBertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        for index, layer in enumerate(self.encoder.layer):
            layer.attention.self = SqaBertSelfAttention(config, index)
            layer.attention.output.dense = nn.Linear(config.num_query_heads * config.head_dim, config.hidden_size)
        self.post_init()
