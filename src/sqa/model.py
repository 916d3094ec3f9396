"""The Transformer: pre-norm blocks of SparseQueryAttention and SwiGLU, under Llama's parameter names.

Shapes: B batch, T tokens, d = d_model, V = vocab_size.
"""

from __future__ import annotations

import operator
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sqa import storage
from sqa.attention import KVCache, SparseQueryAttention
from sqa.attention.layer import Shared
from sqa.attention.operators import transformed
from sqa.config import AttentionConfig, ModelConfig
from sqa.errors import InputError, shown
from sqa.losses import IGNORE, linear_cross_entropy, logit_losses, token_losses

Number = TypeVar("Number", int, float)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_ff: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., d)."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, attention: AttentionConfig, layer_index: int, kernel: str) -> None:
        super().__init__()
        self.self_attn = SparseQueryAttention(
            attention, output_bias=config.bias, norm_eps=config.norm_eps, layer_index=layer_index, kernel=kernel
        )
        self.mlp = SwiGLU(config.d_model, config.d_ff, bias=config.bias)
        self.input_layernorm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.d_model, eps=config.norm_eps)

    def forward(self, x: Tensor, shared: Shared, cache: KVCache | None = None) -> Tensor:
        """x (B, T, d) -> (B, T, d); shared: of a layer with the same config, by `SparseQueryAttention.share`."""
        x = x + self.self_attn(self.input_layernorm(x), cache=cache, shared=shared)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Embedding, blocks and final norm: everything under the checkpoint prefix `model.`.

    With `activation_checkpointing` set, training keeps only the input of each block, and runs the block again for its
    gradient. With a cache, which a block must extend only once, the setting has no effect.
    """

    def __init__(self, config: ModelConfig, kernel: str = "auto") -> None:
        super().__init__()
        self.activation_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, layer, i, kernel) for i, layer in enumerate(config.layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps) if config.final_norm else nn.Identity()

    def forward(
        self,
        input_ids: Tensor,
        padding_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """input_ids int64 (B, T) -> hidden states (B, T, d); the other arguments are those of Transformer.forward."""
        x = self.embed_tokens(input_ids)
        again = self.activation_checkpointing and torch.is_grad_enabled() and cache is None
        made: dict[tuple[AttentionConfig, str], Shared] = {}
        for layer in self.layers:
            attention = layer.self_attn
            assert isinstance(attention, SparseQueryAttention)
            alike = attention.config, attention.kernel
            if alike not in made:
                made[alike] = attention.share(x, padding_mask=padding_mask, document_ids=document_ids, cache=cache)
            inputs = x, made[alike], cache
            x = checkpoint(layer, *inputs, use_reentrant=False) if again else layer(*inputs)
        return self.norm(x)


@dataclass(frozen=True)
class Output:
    """The result of a forward pass: `logits` (B, T, V) without labels, the loss fields with them.

    nll_sum: sum of -log p over the labels != -100; num_tokens: how many those are; loss: their quotient.
    """

    logits: Tensor | None = None
    loss: Tensor | None = None
    nll_sum: Tensor | None = None
    num_tokens: Tensor | None = None


class Transformer(nn.Module):
    """A decoder language model, or an encoder when the attention is not causal.

    kernel: "auto" or a name from sqa.attention.kernels.KERNELS, for the attention of every layer; a layer's own is
    `model.model.layers[i].self_attn.kernel`. Raises InputError for an unknown one.
    """

    def __init__(self, config: ModelConfig, *, kernel: str = "auto") -> None:
        super().__init__()
        if not isinstance(config, ModelConfig):
            raise InputError(f"model: config must be a ModelConfig, got {shown(repr(config))}")
        self.config = config
        self._compiled = False
        self.model = Backbone(config, kernel)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=config.bias)
        self.register_load_state_dict_post_hook(Transformer._tie)
        self._tie()
        self.reset_parameters()

    def _tie(self, *_: object) -> None:
        """Make the head's matrix the embedding's again: leaving the meta device and loading by assignment part them."""
        if self.config.tie_embeddings and "weight" in self.lm_head._parameters:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        self._tie()
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights of deviation 0.02, those that write into the residual stream divided by sqrt(2 * layers)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                writes_residual = name.endswith(("o_proj", "down_proj"))
                scale = (2 * self.config.num_layers) ** -0.5 if writes_residual else 1.0
                nn.init.normal_(module.weight, std=0.02 * scale)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        padding_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        num_logits: int | None = None,
    ) -> Output:
        """input_ids int64 (B, T). With `labels` (B, T) the loss, without them the logits (B, T, V).

        labels[t] is the target of position t (nothing is shifted here), -100 where there is none. padding_mask:
        bool (B, T), True = real; document_ids: int (B, T); cache: the tokens continue what it holds.
        num_logits: return the logits of the last `num_logits` positions alone; the loss is always that of all labels.

        Raises InputError when the tokens exceed max_seq_len, for ids that are not in the vocabulary (on the CPU; a GPU
        would have to wait for the check), for shapes that do not fit and options that exclude each other.
        """
        if num_logits is not None and (type(num_logits) is not int or num_logits < 1):
            raise InputError(f"num_logits must be a whole number of at least 1, got {shown(repr(num_logits))}")
        hidden = self.hidden_states(input_ids, padding_mask=padding_mask, document_ids=document_ids, cache=cache)
        if labels is None:
            return Output(logits=self.lm_head(hidden if num_logits is None else hidden[:, -num_logits:]))
        _check_ids(labels, "labels")
        if labels.shape != input_ids.shape:
            raise InputError(f"labels must be {tuple(input_ids.shape)} as input_ids, got {tuple(labels.shape)}")
        try:
            if self._losses_by_chunk():
                head = self.lm_head.weight, self.lm_head.bias
                nll_sum = linear_cross_entropy(hidden, *head, labels, compiled=self._compiled)
            else:
                nll_sum = logit_losses(self.lm_head(hidden), labels)[0].sum()
        except RuntimeError:  # as for input_ids below
            _check_range(labels[labels != IGNORE], "labels", self.config.vocab_size)
            raise
        num_tokens = (labels != IGNORE).sum()
        return Output(loss=nll_sum / num_tokens, nll_sum=nll_sum, num_tokens=num_tokens)

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        padding_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The last hidden states, which the output head reads: (B, T, d). Arguments and errors as for `forward`."""
        _check_ids(input_ids, "input_ids")
        if not isinstance(cache, KVCache | None):
            raise InputError(f"cache must be a KVCache or None, got {shown(repr(cache))}")
        held = 0 if cache is None else cache.length
        if held + input_ids.shape[1] > self.config.max_seq_len:
            raise InputError(
                f"input_ids: {held + input_ids.shape[1]} tokens, "
                f"but the model's max_seq_len is {self.config.max_seq_len}"
            )
        try:
            with _many_shapes() if self._compiled else nullcontext():
                return self.model(input_ids, padding_mask, document_ids, cache)
        except IndexError:  # on the CPU; looking at the ids beforehand would make a GPU wait
            _check_range(input_ids, "input_ids", self.config.vocab_size)
            raise

    @torch.no_grad()
    def token_losses(
        self, input_ids: Tensor, labels: Tensor, *, document_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """-log p of each label (B, T), fp32, and whether it was the most likely token, bool; 0 where it is -100."""
        hidden = self.hidden_states(input_ids, document_ids=document_ids)
        if not self._losses_by_chunk():
            return logit_losses(self.lm_head(hidden), labels)
        return token_losses(hidden, self.lm_head.weight, self.lm_head.bias, labels)

    def _losses_by_chunk(self) -> bool:
        """Whether the loss may read the head's weights: there is no adapter in its place, no hook and no torch.func."""
        head = self.lm_head
        hooks = head._forward_hooks or head._forward_pre_hooks
        return type(head) is nn.Linear and not hooks and not transformed()

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int,
        padding_mask: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        end_id: int | Iterable[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue prompts (B, T) -> (B, T + n), n <= max_new_tokens, by prefill and cached decoding.

        temperature 0 takes the most likely token; otherwise one is drawn, from the `top_k` likeliest, and of those
        from the fewest that hold probability `top_p`. Shorter prompts are padded on the left (padding_mask, True =
        real). A row that produced `end_id`, one or several ids, goes on with it; generation stops when all have.

        Raises InputError for settings out of range or when prompt and new tokens exceed max_seq_len.
        """
        max_new_tokens = _number(operator.index, max_new_tokens, "max_new_tokens")
        temperature = _number(float, temperature, "temperature")
        top_k = None if top_k is None else _number(operator.index, top_k, "top_k")
        top_p = None if top_p is None else _number(float, top_p, "top_p")
        for name, value, wanted, good in (
            ("max_new_tokens", max_new_tokens, "at least 1", max_new_tokens >= 1),
            ("temperature", temperature, "0 or more", temperature >= 0),
            ("top_k", top_k, "at least 1", top_k is None or top_k >= 1),
            ("top_p", top_p, "above 0 and at most 1", top_p is None or 0 < top_p <= 1),
            ("generator", generator, "a torch.Generator or None", isinstance(generator, torch.Generator | None)),
        ):
            if not good:
                raise InputError(f"generate: {name} must be {wanted}, got {value}")
        _check_ids(input_ids, "input_ids")
        if input_ids.shape[1] == 0:
            raise InputError(f"generate: input_ids must be (B, T) with T of at least 1, got {tuple(input_ids.shape)}")
        if padding_mask is not None and getattr(padding_mask, "shape", None) != input_ids.shape:
            given = tuple(padding_mask.shape) if isinstance(padding_mask, Tensor) else shown(repr(padding_mask))
            raise InputError(f"generate: padding_mask must be bool {tuple(input_ids.shape)}, got {given}")
        if padding_mask is not None and not bool(padding_mask[:, -1].all()):
            raise InputError("generate: prompts must be padded on the left, but the last token of some row is padding")
        batch_size, length = input_ids.shape
        if length + max_new_tokens > self.config.max_seq_len:
            raise InputError(
                f"generate: {length} prompt tokens and {max_new_tokens} new ones exceed "
                f"max_seq_len={self.config.max_seq_len}"
            )
        weight = self.model.embed_tokens.weight
        cache = KVCache(
            self.config,
            batch_size=batch_size,
            capacity=length + max_new_tokens,  # one to spare: torch.compile would compile a full cache anew
            dtype=weight.dtype,
            device=weight.device,
        )
        ends = torch.tensor(_end_ids(end_id), dtype=torch.int64, device=input_ids.device)
        ended = torch.zeros(batch_size, 1, dtype=torch.bool, device=input_ids.device)
        tokens = [input_ids]
        output = self(input_ids, padding_mask=padding_mask, cache=cache, num_logits=1)
        for step in range(max_new_tokens):
            assert output.logits is not None
            new = sample(output.logits[:, -1], temperature, top_k, top_p, generator)[:, None]
            new = torch.where(ended, tokens[-1][:, -1:], new)
            ended |= torch.isin(new, ends)
            tokens.append(new)
            if step + 1 == max_new_tokens or bool(ended.all()):
                break
            output = self(new, cache=cache, num_logits=1)
        return torch.cat(tokens, dim=1)

    def compile(self) -> None:
        """Compile the blocks and the loss, in place: one block at a time, so that a minute is not spent on the whole.

        Without a C++ compiler or Python's headers (CPU) nothing is compiled, and a warning says so once.
        """
        lack = _compiler_lacks()
        if lack is not None and next(self.parameters()).device.type == "cpu":
            warnings.warn(f"running eager: torch.compile needs {lack}", stacklevel=2)
            return
        for block in self.model.layers:
            block.compile(backend=_frugal_inductor)
        self._compiled = True

    def tensors(self) -> dict[str, Tensor]:
        """The weights as files hold them: on the CPU, contiguous, tied ones once."""
        tensors = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        if self.config.tie_embeddings:
            del tensors["lm_head.weight"]
        return tensors

    @classmethod
    def from_tensors(cls, config: ModelConfig, tensors: Mapping[str, Tensor], where: str) -> Transformer:
        """A model of these weights, in the dtype of its embedding; `where` names them in errors.

        Raises InputError naming tensors that are missing, unknown, misshapen or quantised.
        """
        storage.check_layers(where, config.num_layers, len(tensors))
        with torch.device("meta"):  # no time spent on weights that are replaced at once
            model = cls(config)
        expected = model.state_dict()
        tensors = dict(tensors)
        if config.tie_embeddings and "model.embed_tokens.weight" in tensors:
            tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
        storage.check_tensors(expected, tensors, where)
        if config.tie_embeddings and not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]):
            raise InputError(f"model: {where} says tied embeddings, but lm_head.weight is another matrix")
        model.to(tensors["model.embed_tokens.weight"].dtype).to_empty(device="cpu")
        model.load_state_dict(tensors)
        return model

    def save(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, each under a temporary name first."""
        if directory == "":  # pathlib takes it for the current one
            raise InputError("model: save needs the name of a directory, got ''")
        storage.save_model(Path(directory), self.config, self.tensors())

    @classmethod
    def load(cls, directory: str | Path) -> Transformer:
        """Read a directory written by `save`; `sqa.load_model` reads every kind.

        Raises InputError for a missing file, another kind of directory, and for any key that is missing, unknown or of
        another shape.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise InputError(f"model: {directory} is no directory; sqa.load_model reads names on the Hub as well")
        values = storage.read_config(directory)
        if (kind := values.get("model_type")) != storage.MODEL_TYPE:
            raise InputError(
                f"model: {directory} has model_type {kind!r}, and Transformer.load reads {storage.MODEL_TYPE!r} alone; "
                f"sqa.load_model reads every kind"
            )
        return cls.from_tensors(storage.model_config(values), storage.read_tensors(directory), str(directory))


def _check_ids(ids: object, name: str) -> None:
    """Raise InputError unless it is a tensor (B, T) of int64 or int32, which are what an embedding looks up."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        given = ids.dtype if isinstance(ids, Tensor) else shown(repr(ids))
        raise InputError(f"{name} must be a tensor of int64 or int32, got {given}")
    if ids.ndim != 2:
        raise InputError(f"{name} must be (B, T), got {tuple(ids.shape)}")


def _check_range(ids: Tensor, name: str, vocab_size: int) -> None:
    """Raise InputError unless all are rows of the embedding."""
    if ids.numel():
        least, most = (int(end) for end in ids.aminmax())
        if least < 0 or most >= vocab_size:
            wrong = least if least < 0 else most
            raise InputError(f"{name} must be from 0 to vocab_size - 1 = {vocab_size - 1}, got {wrong}") from None


def _number(convert: Callable[[Any], Number], value: Any, name: str) -> Number:
    """A number of Python, NumPy or a tensor, by operator.index or float."""
    try:
        if isinstance(value, bool | str | bytes):  # float() would read a text
            raise TypeError
        return convert(value)
    except (TypeError, ValueError, OverflowError):
        wanted = "a number" if convert is float else "a whole number"
        raise InputError(f"generate: {name} must be {wanted}, got {shown(repr(value))}") from None


def _end_ids(given: Any) -> list[int]:
    try:
        ids = [] if given is None else list(given)
    except TypeError:  # one alone
        ids = [given]
    return [_number(operator.index, each, "end_id") for each in ids]


def _frugal_inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """inductor, but normalised inputs and gated products are computed again for their gradients, not kept.

    By default it keeps whatever a matrix product reads in the backward pass: a third of what a block saves.
    """
    with torch._functorch.config.patch(ban_recompute_materialized_backward=False):
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)


def _many_shapes() -> AbstractContextManager[None]:
    """Blocks share one code object, so every shape of a comparison takes an entry of its cache: allow 64."""
    limit = max(torch._dynamo.config.recompile_limit, 64)
    patched: AbstractContextManager[None] = torch._dynamo.config.patch(recompile_limit=limit)
    return patched


def _compiler_lacks() -> str | None:
    """What torch.compile lacks on this machine's CPU, or None."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):
        return "a C++ compiler"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "the headers of Python (Python.h)"
    return None


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Token ids (B,) from logits (B, V); see Transformer.generate."""
    if temperature == 0:
        return logits.argmax(-1)
    temperature = max(temperature, 1e-30)  # a smaller one would divide by what is 0 in fp32
    logits, order = (logits.float() / temperature).sort(-1, descending=True)
    if top_k is not None:
        logits[:, top_k:] = -torch.inf
    probabilities = logits.softmax(-1)
    if top_p is not None:
        # a token stays while those before it hold less than top_p: the first always does
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, drawn)[:, 0]
