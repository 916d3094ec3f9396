"""Our model and its peers: models of other libraries that compute the same function."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sqa.config import unknown
from sqa.errors import InputError, MissingExtraError
from sqa.interop import llama
from sqa.losses import IGNORE
from sqa.model import Transformer

OURS = "sqa"


class Unavailable(Exception):
    """A peer cannot take part. The message replaces its time in the table."""


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A language model to be measured.

    The functions take `module`, or a compiled form of it, as their first argument. `logits(module, input_ids)` returns
    (B, T, V), `last_logits` (B, 1, V), and `loss(module, input_ids, labels)` the mean over labels != -100, where
    labels[t] is the target of position t. A model that only gives its last logits has neither `logits` nor `loss`.
    `same_function`: it has our weights, and the norm of the difference of its results from ours may be at most
    `tolerance` times the norm of ours.
    """

    module: nn.Module
    last_logits: Callable[[nn.Module, Tensor], Tensor]
    logits: Callable[[nn.Module, Tensor], Tensor] | None = None
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
    same_function: bool = True
    tolerance: float = 1e-4  # fp32 rounds to 6e-8, 30 layers add up to 1e-5; a wrong mask or rotary order is off by 1


def ours(model: Transformer) -> Entrant:
    """Our Transformer."""
    return Entrant(
        module=model,
        logits=lambda module, ids: module(ids).logits,
        loss=lambda module, ids, labels: module(ids, labels=labels).loss,
        last_logits=lambda module, ids: module(ids, num_logits=1).logits,
    )


def _hf_llama(own: Transformer) -> dict[str, Entrant]:
    from transformers import AutoConfig, AutoModelForCausalLM

    if len(own.config.head_counts) > 1:  # no stock class has that: what transformers runs then is the one we export
        from sqa.interop.modeling_sqa import SqaConfig, SqaForCausalLM

        module = SqaForCausalLM(SqaConfig(**own.config.to_dict(), use_cache=False))
        module.load_state_dict(own.state_dict())
    else:
        values = llama.stock_config(own.config)
        config = AutoConfig.for_model(values.pop("model_type"), **values, use_cache=False)
        module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        module.load_state_dict(llama.stock_state(own.state_dict(), own.config))
    entrant = Entrant(
        module=module,
        logits=lambda module, ids: module(ids).logits,
        # shift_labels: its own loss, over all T tokens as ours, where `labels` alone would drop one a row
        loss=lambda module, ids, labels: module(ids, labels=labels, shift_labels=labels).loss,
        last_logits=lambda module, ids: module(ids, logits_to_keep=1).logits,
    )
    return {"eager": entrant}


def _x_transformers(own: Transformer) -> dict[str, Entrant]:
    from x_transformers import Decoder, TransformerWrapper

    config, layer = own.config, own.config.layers[0]
    if len(set(config.layers)) > 1 or layer.window is not None:
        raise Unavailable("cannot be built: all of its layers are alike, and none has a window")
    decoder = Decoder(
        dim=config.d_model,
        depth=config.num_layers,
        heads=layer.num_query_heads,
        attn_kv_heads=layer.num_kv_heads,
        attn_dim_head=layer.head_dim,
        attn_flash=True,
        rotary_pos_emb=True,
        rotary_emb_dim=layer.head_dim,
        use_rmsnorm=True,
        ff_glu=True,
        ff_swish=True,
        ff_no_bias=True,
        ff_mult=config.d_ff / config.d_model,
        verbose=False,
    )

    def loss(module: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(module(ids).flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)

    wrapper = TransformerWrapper(
        num_tokens=config.vocab_size, max_seq_len=config.max_seq_len, use_abs_pos_emb=False, attn_layers=decoder
    )
    entrant = Entrant(
        module=wrapper,
        loss=loss,
        last_logits=lambda module, ids: wrapper.to_logits(module(ids, return_embeddings=True)[:, -1:]),
        # it shares KV heads in another order, normalises without eps and has a bias in the gate
        same_function=False,
    )
    return {"eager": entrant}


def _llama_cpp(own: Transformer) -> dict[str, Entrant]:
    from sqa.bench.llama_cpp import SETTINGS, LlamaCpp

    if own.lm_head.weight.device.type != "cpu":
        raise Unavailable("it is measured on the CPU only")
    return {
        name: Entrant(
            module=LlamaCpp(own, setting),
            last_logits=lambda module, ids: module(ids),
            same_function=setting.exact,
            tolerance=2**-11 if setting.flash else 1e-4,  # its fused attention rounds to 16 bits
        )
        for name, setting in SETTINGS.items()
    }


_BUILDERS = {"hf-llama": (_hf_llama, "hf"), "x-transformers": (_x_transformers, "peers"), "llama-cpp": (_llama_cpp, "")}
"""What builds each peer (an Entrant for each setting), and the extra that installs it."""

PEERS = tuple(_BUILDERS)
FORWARD_ONLY = ("llama-cpp",)


def check_peers(peers: Sequence[str], *, training: bool) -> None:
    """Raise InputError for an unknown peer, or one that cannot train where it would have to."""
    for name in peers:
        if name not in PEERS:
            raise unknown("peer", name, PEERS)
        if training and name in FORWARD_ONLY:
            raise InputError(f"peer: {name} cannot train, it takes part in bench prefill only")


def build(name: str, own: Transformer) -> dict[str, Entrant]:
    """A peer in each of its settings, with the shape of our model and, if they fit, its weights.

    Raises Unavailable if it cannot be built.
    """
    builder, extra = _BUILDERS[name]
    layer = own.config.layers[0]
    if layer.num_query_heads % layer.num_kv_heads:
        raise Unavailable(f"it cannot have {layer.num_query_heads} query and {layer.num_kv_heads} KV heads")
    try:
        return builder(own)
    except InputError as error:
        raise Unavailable(f"cannot be built: {error}") from None
    except ImportError:
        if not extra:
            raise Unavailable("not installed; pip install llama-cpp-python builds it in ten minutes") from None
        raise Unavailable(str(MissingExtraError("not installed", extra))) from None


@torch.no_grad()
def difference(own: Entrant, peer: Entrant, input_ids: Tensor, labels: Tensor) -> str | None:
    """Compare logits and loss in fp32: None if they agree within the peer's tolerance, else how they differ.

    The losses agree only if both count the same tokens.
    """
    pairs = {"last logits": [entrant.last_logits(entrant.module, input_ids) for entrant in (own, peer)]}
    if own.logits is not None and peer.logits is not None:
        pairs["logits"] = [own.logits(own.module, input_ids), peer.logits(peer.module, input_ids)]
    if own.loss is not None and peer.loss is not None:
        pairs["loss"] = [own.loss(own.module, input_ids, labels), peer.loss(peer.module, input_ids, labels)]
    for what, (mine, theirs) in pairs.items():
        if theirs.shape != mine.shape:
            return f"not timed: {what} {tuple(theirs.shape)}, ours {tuple(mine.shape)}"
        off = float((theirs - mine).norm() / mine.norm())
        if not off <= peer.tolerance:
            return f"not timed: {what} differ from ours by {off:.1e} of their size"
    return None
