"""Find shapes that spend what a variant saves, so that they cost as much as another variant; write plans of them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from rich.console import Group

from sqa.bench.peers import ours
from sqa.bench.step import training_step
from sqa.config import ModelConfig
from sqa.cost import parameters, train_step_flops
from sqa.errors import InputError, shown
from sqa.files import write_text
from sqa.measure.machine import find_device
from sqa.measure.timing import take_turns
from sqa.model import Transformer
from sqa.records import at_least_one
from sqa.tables import make_table
from sqa.variants import MEASURED_VARIANTS, VARIANTS, find_variant, model_config, shape

WAYS = ("wider-feed-forward", "more-layers", "wider-model", "longer-context")
# a longer context has no more parameters
BUDGETS = {"equal-time": WAYS, "equal-flops": WAYS, "equal-parameters": WAYS[:-1]}
"""What can stay equal, and the ways in which that can be spent."""

ROUNDS = 5  # of timing, for equal-time

_GROWS = {"wider-feed-forward": ("d_ff", 8), "more-layers": ("num_layers", 1), "wider-model": ("num_heads", 1)}
"""The field that a way increases, and the size of its steps."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A variant, a model's shape and rows of `context` tokens. `share` is its cost over that of the first proposal.

    `model`: the fields that differ from the preset's. `step_s`: measured seconds of a step, for equal-time only;
    `share` is then the ratio of times measured in the same turns.
    """

    preset: str
    budget: str
    variant: str
    way: str = "as it is"
    model: Mapping[str, int]
    context: int
    batch_size: int
    step_s: float | None = None
    share: float = 1.0

    @property
    def config(self) -> ModelConfig:
        """The model. Raises InputError when the variant's rule does not fit the shape."""
        fields = {**shape(self.preset), **self.model}
        return model_config(self.variant, **{**fields, "max_seq_len": max(fields["max_seq_len"], self.context)})

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return parameters(self.config)

    @property
    def flops(self) -> int:
        """FLOPs of a training step of the whole batch."""
        return train_step_flops(self.config, self.context, self.batch_size)

    @property
    def cost(self) -> int:
        """What the budget keeps equal, in closed form; for equal-time FLOPs stand in for time."""
        return self.parameters if self.budget == "equal-parameters" else self.flops


def propose(
    like: str, preset: str, budget: str, variants: Sequence[str] = MEASURED_VARIANTS, n: int = 1024, batch: int = 8,
    *, device: str = "cpu",
) -> list[Proposal]:  # fmt: skip
    """First `like` in the preset's shape, then each variant in the largest shapes that cost no more.

    A training step has `batch` rows of `n` tokens, or fewer and longer rows. Layers and width come in large steps, so
    the feed-forward gets what they leave. A way in which nothing fits is left out. For equal-time, fp32 training steps
    are timed in turns on `device`. Raises InputError for bad options.
    """
    if budget not in BUDGETS:
        raise InputError(f"budget: must be one of {', '.join(BUDGETS)}, got {shown(repr(budget))}")
    at_least_one("plan", n=n, batch=batch)
    find_device(device)
    reference, *starts = (
        Proposal(preset=preset, budget=budget, variant=find_variant(name)[0], model={}, context=n, batch_size=batch)
        for name in (like, *(name for name in variants if name.lower() != like.lower()))
    )
    if budget != "equal-time":
        chosen = [_largest(way, start, reference.cost) for way in BUDGETS[budget] for start in starts]
        return [reference, *(replace(p, share=p.cost / reference.cost) for p in chosen if p is not None)]
    # guess a shape from its FLOPs at the variant's measured rate, measure it, and guess again from its own rate
    reference, *starts = _measure([reference, *starts], device)
    bases, found = {start.variant: start for start in starts}, []
    for way in WAYS:
        guessed = starts
        for _ in range(2):
            fitting = [_largest(way, bases[p.variant], p.cost / p.share) for p in guessed]
            guessed = _measure([reference, *(p for p in fitting if p is not None)], device)[1:]
        found += guessed
    return [reference, *found]


def _largest(way: str, start: Proposal, limit: float) -> Proposal | None:
    """The largest of the growing shapes that costs no more than `limit`; None if even the first costs more."""
    found = None
    for grown in takewhile(lambda proposal: proposal.cost <= limit, _grown(way, start)):
        found = replace(grown, way=way)
    if found is not None and way in ("more-layers", "wider-model"):
        left = _largest("wider-feed-forward", found, limit)
        found = found if left is None else replace(left, way=way)
    return found


def _grown(way: str, start: Proposal) -> Iterator[Proposal]:
    """Shapes of rising cost, up to four times the start's value of the field that grows."""
    fields: dict[str, Any] = {**shape(start.preset), **start.model}
    if way == "longer-context":
        # fewer rows, as many tokens
        for count in range(start.batch_size - 1, 0, -1):
            yield replace(start, context=start.batch_size * start.context // count, batch_size=count)
        return
    name, by = _GROWS[way]
    head_dim = fields["d_model"] // fields["num_heads"]
    for value in range(fields[name] + by, 4 * fields[name] + 1, by):
        changes = {name: value} | ({"d_model": head_dim * value} if name == "num_heads" else {})
        grown = replace(start, model={**start.model, **changes})
        try:
            _ = grown.config
        except InputError:
            continue  # the variant's rule wants another multiple of heads
        yield grown


def _measure(proposals: Sequence[Proposal], device: str) -> list[Proposal]:
    """Time a training step of each in turns, and set `step_s` and the share of the first one's time."""

    def step(proposal: Proposal) -> Any:
        config = proposal.config
        entrant = ours(Transformer(config))
        entrant.module.to(device)
        batch = torch.randint(config.vocab_size, (2, proposal.batch_size, proposal.context), device=device)
        return training_step(entrant, entrant.module, torch.float32, batch)

    turns = take_turns({i: step(p) for i, p in enumerate(proposals)}, rounds=ROUNDS, device=device)
    seconds = [timing.median for timing in turns.values()]
    return [replace(p, step_s=s, share=s / seconds[0]) for p, s in zip(proposals, seconds, strict=True)]


def table(proposals: Sequence[Proposal]) -> Group:
    """The proposals, and the ways in which nothing fitted, at most 80 columns wide."""
    measured = [] if proposals[0].step_s is None else ["ms a\nstep"]
    headings = ("spent on", "variant", "shape", "params", "GFLOP\na step", *measured, "of\nall")
    built = make_table(*headings, names=("spent on", "variant", "shape"), gap=2)
    for p in proposals:
        rows = {} if p.context == proposals[0].context else {"context": p.context, "batch_size": p.batch_size}
        built.add_row(
            p.way.replace("-", " "),
            VARIANTS[p.variant].label,
            ", ".join(f"{name} {value}" for name, value in {**p.model, **rows}.items()),
            f"{p.parameters / 1e6:.2f}M",
            f"{p.flops / 1e9:,.0f}",
            *([] if p.step_s is None else [f"{1000 * p.step_s:,.0f}"]),
            f"{p.share:.0%}",
        )
    found = {(p.variant, p.way) for p in proposals[1:]}
    variants = dict.fromkeys(p.variant for p in proposals[1:])
    ways = BUDGETS[proposals[0].budget]
    missing = [(name, way) for way in ways for name in variants if (name, way) not in found]
    listed = ", ".join(f"{VARIANTS[name].label} {way.replace('-', ' ')}" for name, way in missing)
    return Group(built, *([f"The next size would cost more: {listed}."] if missing else []))


def write_plans(proposals: Sequence[Proposal], out: Path) -> list[Path]:
    """Write a TOML for `sqa compare` for each way; for longer contexts one for each, since a plan has one context."""
    reference, *others = proposals
    plans: dict[str, list[Proposal]] = {}
    for p in others:
        plans.setdefault(f"{p.way}-{p.variant}" if p.way == "longer-context" else p.way, []).append(p)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, members in plans.items():
        written.append(out / f"{reference.budget}-{name}.toml")
        write_text(written[-1], _toml(written[-1].stem, reference, members))
    return written


def _toml(name: str, reference: Proposal, members: Sequence[Proposal]) -> str:
    variants, alone = [p.variant for p in members], members[0].way == "longer-context"
    if not alone:
        # a comparison without the baseline of wide heads proves nothing
        variants = list(dict.fromkeys([reference.variant, *variants, "wide-gqa"]))
    label = VARIANTS[reference.variant].label
    fields = {
        "name": name, "shape": reference.preset, "variants": variants, "seeds": [0, 1, 2],
        "context": members[0].context, "batch_size": members[0].batch_size,
    }  # fmt: skip
    lines = [f"# What is saved against {label} at {reference.context:,} tokens is spent ({reference.budget})."]
    if alone:
        lines.append(f"# Compare bits per byte with a run of {label} on the same data at its own context.")
    lines += [f"# {p.variant}: {p.parameters:,} parameters, {p.share:.1%} of {label}'s cost" for p in members]
    lines += [f"{field} = {json.dumps(value)}" for field, value in fields.items()]
    for p in members:
        if p.model:
            lines += ["", f"[shapes.{p.variant}]", *(f"{field} = {value}" for field, value in p.model.items())]
    return "\n".join(lines) + "\n"
