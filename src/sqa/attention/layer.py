"""SparseQueryAttention: project, rotate, cache, attend, project."""

from __future__ import annotations

from torch import Tensor, nn

from sqa.attention.cache import KVCache
from sqa.attention.kernels import attend
from sqa.attention.masks import Mask
from sqa.attention.rope import RotaryEmbedding
from sqa.config import AttentionConfig
from sqa.errors import InputError


class SparseQueryAttention(nn.Module):
    """Attention with `num_query_heads` of `num_heads` query heads; every variant is this one class.

    `output_bias` adds a bias to the output projection; `norm_eps` belongs to QK-norm; `layer_index` is this layer's
    place in a KVCache; `kernel` is "auto" or a name from sqa.attention.kernels.KERNELS.
    """

    def __init__(
        self,
        config: AttentionConfig,
        *,
        output_bias: bool = False,
        norm_eps: float = 1e-6,
        layer_index: int = 0,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        self.config, self.layer_index, self.kernel = config, layer_index, kernel
        self.q_proj = nn.Linear(config.d_model, config.query_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.d_model, config.kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.d_model, config.kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.output_width, config.d_model, bias=output_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=norm_eps) if config.qk_norm else None
        self.rotary = None if config.rope is None else RotaryEmbedding(config.rope, config.head_dim)

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        padding_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """x (B, T, d_model) -> (B, T, d_model).

        context (B, Tk, d_model): keys and values come from there, without rotary positions (needs causal=False).
        padding_mask: bool, True = real, (B, T), or (B, Tk) with a context; with a cache, of the new tokens.
        document_ids: int (B, T); attention stays within runs of equal ids. cache: x continues what it holds.
        Right padding under a causal mask needs no padding_mask: no real token sees it.

        Raises ValueError for shapes that do not fit or options that exclude each other.
        """
        self._check(x, context, document_ids, cache)
        if cache is not None:
            cache.check(self.layer_index, self.config)
        batch_size, length, _ = x.shape
        source = x if context is None else context
        q = self.q_proj(x).view(batch_size, length, self.config.num_query_heads, self.config.head_dim)
        kv_shape = (batch_size, source.shape[1], self.config.num_kv_heads, self.config.head_dim)
        k, v = self.k_proj(source).view(kv_shape), self.v_proj(source).view(kv_shape)
        if self.q_norm is not None and self.k_norm is not None:
            norm_dtype = self.q_norm.weight.dtype  # differs under autocast, which nn.RMSNorm does in a slow way
            q, k = self.q_norm(q.to(norm_dtype)).to(v.dtype), self.k_norm(k.to(norm_dtype)).to(v.dtype)
        if self.rotary is not None and context is None:
            q, k = self.rotary(q, k, 0 if cache is None else cache.layers[self.layer_index].length)
        cached = None
        if cache is not None:
            k, v, cached = cache.extend(self.layer_index, k, v, padding_mask)
            k, v = k.to(q.dtype), v.to(q.dtype)
        mask = Mask(
            causal=self.config.causal,
            window=self.config.window,
            num_sink_tokens=self.config.num_sink_tokens,
            padding_mask=padding_mask if cached is None else None,
            document_ids=document_ids,
            cached=cached,
        )
        heads = attend(q, k, v, mask, scale=self.config.scale, softcap=self.config.logit_softcap, kernel=self.kernel)
        return self.o_proj(heads.flatten(2))

    def _check(self, x: Tensor, context: Tensor | None, document_ids: Tensor | None, cache: KVCache | None) -> None:
        d_model = self.config.d_model
        for name, tensor in (("x", x), ("context", context)):
            if tensor is not None and (tensor.ndim != 3 or tensor.shape[-1] != d_model):
                raise InputError(f"attention: {name} must be (B, T, {d_model}), got {tuple(tensor.shape)}")
        if context is not None and context.shape[0] != x.shape[0]:
            raise InputError(
                f"attention: x and context must have one batch size, got {x.shape[0]} and {context.shape[0]}"
            )
        if context is not None and (self.config.causal or cache is not None or document_ids is not None):
            raise InputError("attention: context needs causal=False, and neither a cache nor document_ids")
        if cache is not None and document_ids is not None:
            raise InputError("attention: a cache holds one document a row; document_ids cannot be given with it")
