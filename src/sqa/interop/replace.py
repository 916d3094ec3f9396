"""Replace the attention layers of an existing model by new ones of a variant."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sqa import cost
from sqa.attention import SparseQueryAttention
from sqa.config import AttentionConfig
from sqa.errors import InputError
from sqa.model import Transformer
from sqa.variants import variant as variant_config


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """The result of `replace_attention`: the layers by name, before and after; notes on what was left out."""

    before: Mapping[str, AttentionConfig]
    after: Mapping[str, AttentionConfig]
    parameters_before: int
    parameters_after: int
    notes: tuple[str, ...] = ()

    def attention_flops(self, num_tokens: int) -> tuple[int, int]:
        """FLOPs of scores and weighted values over a sequence of `num_tokens` in those layers, before and after."""
        before, after = (
            sum(cost.attention_flops(config, num_tokens) for config in configs.values())
            for configs in (self.before, self.after)
        )
        return before, after

    def __str__(self) -> str:
        lines = [
            f"{name}: {old.num_query_heads}/{old.num_kv_heads} -> "
            f"{self.after[name].num_query_heads}/{self.after[name].num_kv_heads} query/KV heads"
            for name, old in self.before.items()
        ]
        flops = self.attention_flops(1024)
        lines.append(f"parameters: {self.parameters_before:,} -> {self.parameters_after:,}")
        lines.append(f"attention FLOPs at 1,024 tokens: {flops[0]:,} -> {flops[1]:,}")
        return "\n".join((*lines, *self.notes))


class MultiheadSparseQueryAttention(nn.Module):
    """SparseQueryAttention with the interface of nn.MultiheadAttention; made by `replace_attention`.

    It never returns attention weights (None in their place). The only attention mask it takes is the causal one, if it
    was made with causal=True.
    """

    in_proj_bias = None  # keeps nn.TransformerEncoderLayer off its fused path, which would bypass this layer
    _qkv_same_embed_dim = True

    def __init__(self, config: AttentionConfig, *, output_bias: bool, batch_first: bool) -> None:
        super().__init__()
        self.config = config
        self.attention = SparseQueryAttention(config, output_bias=output_bias)
        self.batch_first = batch_first
        self.num_heads = config.num_query_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """query (B, T, d) or (T, B, d) as `batch_first` says; key_padding_mask (B, Tk): True, or -inf, = padding.

        Raises InputError for a mask it cannot honour, and when key and value are not the same tensor.
        """
        causal = self.config.causal
        if value is not key:
            raise InputError("attention: key and value must be the same tensor")
        if (is_causal or attn_mask is not None) != causal or (attn_mask is not None and not is_causal):
            raise InputError(
                f"attention: made with causal={causal}, but called with is_causal={is_causal} and "
                f"{'an' if attn_mask is not None else 'no'} attn_mask; other masks are not supported"
            )
        if query.ndim != 3:
            raise InputError(f"attention: query must have three axes, got {tuple(query.shape)}")
        x, context = query, None if key is query else key
        if not self.batch_first:
            x, context = x.transpose(0, 1), None if context is None else context.transpose(0, 1)
        real = None
        if key_padding_mask is not None:
            real = ~key_padding_mask if key_padding_mask.dtype == torch.bool else key_padding_mask == 0
        out = self.attention(x, context=context, padding_mask=real)
        return (out if self.batch_first else out.transpose(0, 1)), None


def replace_attention(
    model: nn.Module, variant: str, *, num_kv_heads: int | None = None, causal: bool = False
) -> Replacement:
    """Swap every attention layer of `model` for a new one of a variant, in place; the new weights are random.

    Knows the layers of our Transformer, which keep their masks and positions, and nn.MultiheadAttention (as in
    nn.TransformerEncoder), whose replacement has no rotary positions, and is masked causally if `causal`.
    `variant` and `num_kv_heads` are those of `sqa.variant`, for each layer's own width and number of heads.

    Raises InputError, before anything is changed, when there is no such layer or one does not fit.
    """
    if isinstance(model, SparseQueryAttention | nn.MultiheadAttention):
        raise InputError(
            f"replace_attention: model is itself a {type(model).__name__}, and is changed in place; "
            f"give the module that holds it"
        )
    parameters_before = sum(p.numel() for p in model.parameters())
    before: dict[str, AttentionConfig] = {}
    new: dict[str, SparseQueryAttention | MultiheadSparseQueryAttention] = {}
    notes = []
    first_names: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        first = first_names.setdefault(module, name)
        if first != name:  # a layer in several places stays one layer
            if first in new:
                before[name], new[name] = before[first], new[first]
        elif isinstance(module, SparseQueryAttention):
            before[name] = module.config
            new[name] = _renewed(module, variant, num_kv_heads)
        elif isinstance(module, nn.MultiheadAttention):
            before[name], new[name] = _from_multihead(name, module, variant, num_kv_heads, causal)
            if module.dropout:
                notes.append(f"{name}: attention dropout {module.dropout} is left out")
    if not new:
        raise InputError(
            f"replace_attention: {type(model).__name__} holds no attention layer that can be replaced "
            f"(SparseQueryAttention or nn.MultiheadAttention inside it)"
        )
    for name, module in new.items():
        old = model.get_submodule(name)
        model.set_submodule(name, module.to(next(old.parameters())).train(old.training))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # part of the fused path
        if isinstance(module, Transformer):
            attentions = tuple(block.self_attn.config for block in module.model.layers)  # type: ignore[union-attr]
            module.config = module.config.replace(attention=attentions)
    return Replacement(
        before=before,
        after={name: module.config for name, module in new.items()},
        parameters_before=parameters_before,
        parameters_after=sum(p.numel() for p in model.parameters()),
        notes=tuple(notes),
    )


def _of_variant(old: AttentionConfig, variant: str, num_kv_heads: int | None) -> AttentionConfig:
    """The layer with the head counts and head_dim of a variant."""
    new = variant_config(
        variant, d_model=old.d_model, num_heads=old.num_heads, num_kv_heads=num_kv_heads, rope=old.rope
    )
    return old.replace(num_query_heads=new.num_query_heads, num_kv_heads=new.num_kv_heads, head_dim=new.head_dim)


def _renewed(layer: SparseQueryAttention, variant: str, num_kv_heads: int | None) -> SparseQueryAttention:
    norm_eps = 1e-6 if layer.q_norm is None or layer.q_norm.eps is None else layer.q_norm.eps
    return SparseQueryAttention(
        _of_variant(layer.config, variant, num_kv_heads),
        output_bias=layer.o_proj.bias is not None,
        norm_eps=norm_eps,
        layer_index=layer.layer_index,
        kernel=layer.kernel,
    )


def _from_multihead(
    name: str, old: nn.MultiheadAttention, variant: str, num_kv_heads: int | None, causal: bool
) -> tuple[AttentionConfig, MultiheadSparseQueryAttention]:
    if not old._qkv_same_embed_dim or old.bias_k is not None or old.add_zero_attn:
        raise InputError(
            f"replace_attention: {name} uses kdim, vdim, add_bias_kv or add_zero_attn, which are not supported"
        )
    before = AttentionConfig(
        d_model=old.embed_dim,
        num_heads=old.num_heads,
        causal=causal,
        rope=None,
        qkv_bias=old.in_proj_bias is not None,
    )
    config = _of_variant(before, variant, num_kv_heads)
    new = MultiheadSparseQueryAttention(config, output_bias=old.out_proj.bias is not None, batch_first=old.batch_first)
    return before, new
