"""SparseQueryAttention: project, rotate, cache, attend, project."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sqa.attention.cache import KVCache, Step
from sqa.attention.call import Call
from sqa.attention.kernels import attend, check_kernel, prepare
from sqa.attention.masks import Mask, check_tensor
from sqa.attention.rope import RotaryEmbedding
from sqa.config import AttentionConfig
from sqa.dtypes import product_dtype
from sqa.errors import InputError, shown
from sqa.records import read_value


class Shared(NamedTuple):
    """What layers of one AttentionConfig share in a forward pass; `SparseQueryAttention.share` makes it once.

    The mask in the form that their kernel reads, the rotary tables, and the new tokens' place in the cache.
    """

    mask: Mask
    tables: tuple[Tensor, Tensor] | None
    step: Step | None


class SparseQueryAttention(nn.Module):
    """Attention with `num_query_heads` of `num_heads` query heads; every variant is this one class.

    `output_bias` adds a bias to the output projection; `norm_eps` belongs to QK-norm; `layer_index` is this layer's
    place in a KVCache; `kernel` is "auto" or a name from sqa.attention.kernels.KERNELS.

    Raises InputError for an unknown kernel.
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
        check_kernel(kernel)
        if not isinstance(config, AttentionConfig):
            raise InputError(f"attention: config must be an AttentionConfig, got {shown(repr(config))}")
        if not read_value(float, norm_eps, "attention: norm_eps") > 0:
            raise InputError(f"attention: norm_eps must be above 0, got {norm_eps}")
        if read_value(int, layer_index, "attention: layer_index") < 0:
            raise InputError(f"attention: layer_index must be 0 or more, got {layer_index}")
        self.config, self.layer_index, self.kernel = config, layer_index, kernel
        self.q_proj = nn.Linear(config.d_model, config.query_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.d_model, config.kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.d_model, config.kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.output_width, config.d_model, bias=output_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=norm_eps) if config.qk_norm else None
        self.rotary = None if config.rope is None else RotaryEmbedding(config.rope, config.head_dim)

    def extra_repr(self) -> str:
        """What `print(layer)` shows in brackets."""
        c = self.config
        parts = [f"{c.num_query_heads} query and {c.num_kv_heads} KV heads of {c.head_dim} (nominal {c.num_heads})"]
        parts += ["causal"] if c.causal else ["both ways"]
        parts += [f"window {c.window}"] if c.window is not None else []
        parts += [f"kernel {self.kernel}"] if self.kernel != "auto" else []
        return ", ".join(parts)

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        padding_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        shared: Shared | None = None,
    ) -> Tensor:
        """x (B, T, d_model) -> (B, T, d_model).

        context (B, Tk, d_model): keys and values come from there, without rotary positions (needs causal=False).
        padding_mask: bool, True = real, (B, T), or (B, Tk) with a context; with a cache, of the new tokens.
        document_ids: int (B, T); attention stays within runs of equal ids. cache: x continues what it holds.
        shared: what `share` of a layer with the same config returned; it replaces padding_mask and document_ids.
        Right padding under a causal mask needs no padding_mask: no real token sees it.

        Raises InputError for shapes that do not fit or options that exclude each other.
        """
        for name, tensor in (("x", x), ("context", context)):
            check_tensor(name, tensor, or_none=name == "context")
            if tensor is not None and (tensor.ndim != 3 or tensor.shape[-1] != self.config.d_model):
                wanted = f"(B, T, {self.config.d_model})"
                raise InputError(f"attention: {name} must be {wanted}, got {tuple(tensor.shape)}")
        if cache is not None:
            cache.check(self.layer_index, self.config, x.device)
        if shared is None:
            if cache is not None:
                cache.claim(self.layer_index, id(self))
            shared = self.share(x, context=context, padding_mask=padding_mask, document_ids=document_ids, cache=cache)
        batch_size, length, _ = x.shape
        source = x if context is None else context
        q = self.q_proj(x).view(batch_size, length, self.config.num_query_heads, self.config.head_dim)
        kv_shape = (batch_size, source.shape[1], self.config.num_kv_heads, self.config.head_dim)
        k, v = self.k_proj(source).view(kv_shape), self.v_proj(source).view(kv_shape)
        if self.q_norm is not None and self.k_norm is not None:
            norm_dtype = self.q_norm.weight.dtype  # differs under autocast, which nn.RMSNorm does in a slow way
            q, k = self.q_norm(q.to(norm_dtype)).to(v.dtype), self.k_norm(k.to(norm_dtype)).to(v.dtype)
        if self.rotary is not None and shared.tables is not None:
            q, k = self.rotary(q, k, *shared.tables)
        if cache is not None and shared.step is not None:
            k, v = cache.extend(self.layer_index, shared.step, k, v)
            k, v = k.to(q.dtype), v.to(q.dtype)
        heads = attend(
            q, k, v, shared.mask, scale=self.config.scale, softcap=self.config.logit_softcap, kernel=self.kernel
        )
        return self.o_proj(heads.flatten(2))

    def share(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        padding_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Shared:
        """What this layer and others of the same config share for x (B, T, d_model); arguments as for `forward`.

        The cache's positions get the new tokens here; each layer adds their keys and values later.

        Raises InputError, before the cache is changed, for options that exclude each other, for shapes that do not fit
        and for a cache of other layers.
        """
        if context is not None and context.shape[0] != x.shape[0]:
            raise InputError(
                f"attention: x and context must have one batch size, got {x.shape[0]} and {context.shape[0]}"
            )
        if context is not None and (self.config.causal or cache is not None or document_ids is not None):
            raise InputError("attention: context needs causal=False, and neither a cache nor document_ids")
        if cache is not None and document_ids is not None:
            raise InputError("attention: a cache holds one document a row; document_ids cannot be given with it")
        batch_size, length = x.shape[:2]
        num_keys = length if context is None else context.shape[1]
        step, cached = None, None
        if cache is not None:
            cache.check(self.layer_index, self.config, x.device)
            step = cache.begin(self.layer_index, (batch_size, length), padding_mask)
            cached, num_keys = step.keys, step.num_keys
        tables = None
        if self.rotary is not None and context is None:
            tables = self.rotary.tables(0 if step is None else step.start, length)
        padding_mask = padding_mask if cached is None else None  # the cache holds it
        mask = Mask.of(self.config, padding_mask=padding_mask, document_ids=document_ids, cached=cached)
        call = Call.described(
            self.config,
            mask,
            (batch_size, length, num_keys),
            product_dtype(x),
            device=x.device,
            grad=torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())),
        )
        return Shared(prepare(call, self.kernel), tables, step)
