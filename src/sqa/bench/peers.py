"""Who takes part: our model, and models of other libraries in the same shape behind the same three functions."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sqa.attention.call import Call
from sqa.attention.kernels import resolve
from sqa.bench.report import Row, add_ratios, choose_baseline, heads, time_rows
from sqa.config import ModelConfig, unknown
from sqa.errors import MissingExtraError
from sqa.losses import IGNORE
from sqa.measure.machine import find_dtype
from sqa.measure.timing import Budget
from sqa.model import Transformer
from sqa.variants import preset as model_preset

logger = logging.getLogger(__name__)

OURS = "sqa"


class Unavailable(Exception):
    """A peer cannot take part; the message stands in the table in place of its time."""


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A language model to be measured.

    `module` is passed to the other three, or a compiled form of it: logits(module, input_ids) is (B, T, V), last_logits
    (B, 1, V), and loss(module, input_ids, labels) the mean over labels != -100, labels[t] being the target of position
    t. `same_function`: given our weights it must compute what ours does.
    """

    module: nn.Module
    logits: Callable[[nn.Module, Tensor], Tensor]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    last_logits: Callable[[nn.Module, Tensor], Tensor]
    same_function: bool = True


def ours(config: ModelConfig) -> Entrant:
    """Our Transformer."""
    return Entrant(
        module=Transformer(config),
        logits=lambda module, ids: module(ids).logits,
        loss=lambda module, ids, labels: module(ids, labels=labels).loss,
        last_logits=lambda module, ids: module(ids, num_logits=1).logits,
    )


def _hf_llama(config: ModelConfig) -> Entrant:
    from transformers import LlamaConfig, LlamaForCausalLM

    layer = config.layers[0]
    if config.d_model % layer.num_query_heads:
        raise Unavailable(f"Llama cannot have {layer.num_query_heads} query heads in a width of {config.d_model}")
    assert layer.rope is not None
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.num_layers,
        num_attention_heads=layer.num_query_heads,
        num_key_value_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": layer.rope.base},
        tie_word_embeddings=config.tie_embeddings,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return Entrant(
        module=LlamaForCausalLM(llama),
        logits=lambda module, ids: module(ids).logits,
        # shift_labels: its own loss, over all T tokens as ours, where `labels` alone would drop one a row
        loss=lambda module, ids, labels: module(ids, labels=labels, shift_labels=labels).loss,
        last_logits=lambda module, ids: module(ids, logits_to_keep=1).logits,
    )


def _x_transformers(config: ModelConfig) -> Entrant:
    from x_transformers import Decoder, TransformerWrapper

    layer = config.layers[0]
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
    return Entrant(
        module=wrapper,
        logits=lambda module, ids: module(ids),
        loss=loss,
        last_logits=lambda module, ids: wrapper.to_logits(module(ids, return_embeddings=True)[:, -1:]),
        # it shares KV heads in another order, normalises without eps and has a bias in the gate
        same_function=False,
    )


_BUILDERS = {"hf-llama": (_hf_llama, "hf"), "x-transformers": (_x_transformers, "peers")}
"""Of each peer, and the extra that installs it."""

PEERS = tuple(_BUILDERS)


def shapes(preset: str, variants: Sequence[str], peers: Sequence[str], *, length: int) -> dict[str, ModelConfig]:
    """A preset for sequences of `length` in each variant; with peers the shape they can have: no biases, a final norm.

    Raises ValueError for an unknown preset, variant or peer.
    """
    for name in peers:
        if name not in PEERS:
            raise unknown("peer", name, PEERS)
    configs = {name: model_preset(preset, name) for name in variants}
    changes = {"bias": False, "final_norm": True} if peers else {}
    return {
        name: config.replace(max_seq_len=max(config.max_seq_len, length), **changes) for name, config in configs.items()
    }


def build(name: str, config: ModelConfig) -> Entrant:
    """Our model or a peer's, with its own initial weights. Raises Unavailable where a peer cannot be built."""
    if name == OURS:
        return ours(config)
    builder, extra = _BUILDERS[name]
    layer = config.layers[0]
    if layer.num_query_heads % layer.num_kv_heads:
        raise Unavailable(f"it cannot have {layer.num_query_heads} query and {layer.num_kv_heads} KV heads")
    try:
        return builder(config)
    except ImportError:
        raise Unavailable(str(MissingExtraError("not installed", extra))) from None


@torch.no_grad()
def difference(own: Entrant, peer: Entrant, input_ids: Tensor, labels: Tensor) -> str | None:
    """Compare logits and loss in fp32: None when equal within torch.testing's tolerance for fp32, else how not.

    The losses agree only when both count the same tokens.
    """
    pairs = {
        "logits": [entrant.logits(entrant.module, input_ids) for entrant in (own, peer)],
        "last logits": [entrant.last_logits(entrant.module, input_ids) for entrant in (own, peer)],
        "loss": [entrant.loss(entrant.module, input_ids, labels) for entrant in (own, peer)],
    }
    for what, (mine, theirs) in pairs.items():
        if theirs.shape != mine.shape:
            return f"not timed: {what} {tuple(theirs.shape)}, ours {tuple(mine.shape)}"
        if not torch.allclose(theirs, mine, rtol=1.3e-6, atol=1e-5):
            return f"not timed: {what} differ from ours by {float((theirs - mine).abs().max()):.1e}"
    return None


class Runner(NamedTuple):
    """An entrant ready to run: `module` is what is called, compiled (`setting`) or not."""

    implementation: str
    variant: str
    setting: str
    entrant: Entrant
    module: nn.Module


def compiled(name: str, module: nn.Module) -> nn.Module:
    """Ours by its own recipe, in place; a peer as torch.compile does it."""
    if name == OURS:
        module.compile()
        return module
    wrapped: nn.Module = torch.compile(module)  # type: ignore[assignment]
    return wrapped


def line_up(
    configs: Mapping[str, ModelConfig], peers: Sequence[str], *, compile: bool, device: torch.device
) -> tuple[list[Runner], dict[tuple[str, str], str]]:
    """All that take part for each variant's config, in fp32, and why a (peer, variant) does not.

    Peers get our weights and must compute what ours does, where they can. Each peer is there eager and, with
    `compile`, compiled as well; both share one module. Ours is compiled or not, as asked.
    """
    runners: list[Runner] = []
    absent: dict[tuple[str, str], str] = {}
    for variant, config in configs.items():
        input_ids, labels = torch.randint(config.vocab_size, (2, 2, min(config.max_seq_len, 128)), device=device)
        labels[:, ::4] = IGNORE
        own = build(OURS, config)
        for name in (OURS, *peers):
            try:
                entrant = own if name == OURS else build(name, config)
            except Unavailable as reason:
                absent[name, variant] = str(reason)
                continue
            entrant.module.to(device)
            if name != OURS and entrant.same_function:
                entrant.module.load_state_dict(own.module.state_dict())  # the names are Llama's
                if (problem := difference(own, entrant, input_ids, labels)) is not None:
                    absent[name, variant] = problem
                    continue
            settings = ("eager", "compiled") if compile else ("eager",)
            for setting in settings[-1:] if name == OURS else settings:
                module = compiled(name, entrant.module) if setting == "compiled" else entrant.module
                runners.append(Runner(name, variant, setting, entrant, module))
    return runners, absent


def model_row(
    kind: str, preset: str, implementation: str, variant: str, config: ModelConfig, dtype: str, *,
    batch_size: int, n: int, device: torch.device, grad: bool,
) -> Row:  # fmt: skip
    """What is known of a model's row before it is timed."""
    layer, kernel = config.layers[0], "sdpa"
    if implementation == OURS:
        call = Call.of_layer(layer, length=n, device=device.type, dtype=find_dtype(dtype), grad=grad)
        kernel = resolve(call).kernel
    row: Row = {"kind": kind, "preset": preset, "implementation": implementation, "variant": variant, **heads(layer)}
    return row | {"batch_size": batch_size, "n": n, "dtype": dtype, "kernel": kernel}


def measure(
    runners: Sequence[Runner],
    absent: Mapping[tuple[str, str], str],
    work: Callable[[Runner], Callable[[], None]],
    configs: Mapping[str, ModelConfig],
    *,
    kind: str,
    preset: str,
    dtype: str,
    batch_size: int,
    n: int,
    rounds: int,
    device: torch.device,
    budget: Budget,
) -> list[Row]:
    """Time the `work` of each runner, in turns: a row for each implementation and variant, in its best setting.

    A peer's row says whether it was shown to compute what ours does; who is absent or cannot run has a note. In the
    order of `configs`, ours before its peers.
    """
    training = kind == "step"

    def start(implementation: str, variant: str) -> Row:
        return model_row(
            kind, preset, implementation, variant, configs[variant], dtype,
            batch_size=batch_size, n=n, device=device, grad=training,
        )  # fmt: skip

    def entries() -> Iterator[tuple[Row, Callable[[], None] | None]]:
        for who, reason in absent.items():
            yield start(*who) | {"note": reason}, None
        for runner in runners:
            logger.info("warming %s %s %s", *runner[:3])
            row = start(runner.implementation, runner.variant) | {"setting": runner.setting}
            if runner.implementation != OURS:
                row["checked"] = runner.entrant.same_function
            yield row, work(runner)

    # a pass is made to see that it runs, and is a long one at the longest prompts; a second step still allocates
    rows = time_rows(entries(), rounds=rounds, warmup=int(training), device=device, budget=budget)
    for row in rows:
        if "seconds" in row:
            row["tokens_per_s"] = batch_size * n / row["seconds"]["median"]
    best = best_settings(rows)
    add_ratios(best, same=("implementation",), baseline=choose_baseline(configs))
    order = list(configs)
    return sorted(best, key=lambda row: (order.index(row["variant"]), row["implementation"] != OURS))


def best_settings(rows: Sequence[Row]) -> list[Row]:
    """For each implementation and variant the row with the least median, which lists the medians `tried`."""
    rivals: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        rivals.setdefault((row["implementation"], row["variant"]), []).append(row)
    best = []
    for same in rivals.values():
        tried = {row["setting"]: row["seconds"]["median"] for row in same if "seconds" in row}
        fastest = min(same, key=lambda row: tried.get(row.get("setting"), math.inf))
        best.append(fastest | {"tried": tried} if tried else fastest)
    return best
