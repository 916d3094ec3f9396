"""The closed-form part of a conversion, layer by layer: choose heads, cut, pool, refit what is left.

A layer is fitted to give what the original's gives, on the original's inputs. Fitting it on what the converted layers
before it give was measured and did not help (docs/conversion.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sqa.config import AttentionConfig
from sqa.conversion import importance, surgery
from sqa.conversion.moments import Moments
from sqa.conversion.records import LayerChange
from sqa.conversion.settings import Settings
from sqa.conversion.subject import AttentionView, Subject, watched


class Walk:
    """One set of batches on its way through the original: its residual stream, and what the layer it is in read."""

    def __init__(self, original: Subject, batches: Sequence[Any]) -> None:
        self.original, self.batches = original, batches
        self.streams = [original.stream(batch) for batch in batches]
        self.reads: list[Tensor] = []
        self.targets: list[Tensor] = []

    def enter(self, index: int) -> Moments:
        """Pass layer `index`; returns the moments of what its output projection read.

        Then `reads` holds what the attention read, and `targets` what it gave.
        """
        view = self.original.views[index]
        moments = _moments_of(view)
        self.reads = [self.original.read(index, stream) for stream in self.streams]
        self.targets = []
        for i, (batch, read) in enumerate(zip(self.batches, self.reads, strict=True)):
            with watched([view.o]) as seen:
                given = self.original.attend(index, read, batch)
            moments.add(self.original.tokens(seen[0][0], batch))
            self.targets.append(given)
            self.streams[i] = self.original.after(index, self.streams[i], given)
        return moments

    def inputs(self) -> Moments:
        """Moments of what the layer read."""
        moments = Moments(self.reads[0].shape[-1], 0, constant=True)
        for read, batch in zip(self.reads, self.batches, strict=True):
            moments.add(self.original.tokens(read, batch))
        return moments

    def features(self, cut: Subject, index: int) -> Moments:
        """Moments of what the output projection of the cut layer reads, with the targets."""
        view = cut.views[index]
        moments = _moments_of(view)
        for batch, read, target in zip(self.batches, self.reads, self.targets, strict=True):
            with watched([view.o]) as seen:
                cut.attend(index, read, batch)
            moments.add(cut.tokens(seen[0][0], batch), cut.tokens(target, batch))
        return moments


def _moments_of(view: AttentionView) -> Moments:
    return Moments(view.o.in_features, view.o.out_features, constant=view.o.bias is not None)


@torch.no_grad()
def operate(
    settings: Settings,
    original: Subject,
    plans: Sequence[tuple[AttentionConfig, Sequence[range]]],
    fit: Sequence[Any],
    held_out: Sequence[Any],
    on_layer: Callable[[], None] = lambda: None,
) -> tuple[Subject, Subject, tuple[LayerChange, ...]]:
    """The model with heads dropped, the model refitted, and what changed in each layer.

    `plans`: of each layer the shape afterwards and the pools of heads (surgery.plan_heads). `fit` and `held_out` are
    batches of calibration text; a layer's error is measured on the second.
    """
    gradients: Sequence[Tensor | None] = [None] * len(plans)
    if settings.method == "taylor":
        gradients = importance.gate_gradients(original, fit)
    generator = torch.Generator().manual_seed(settings.seed)
    shapes = [after for after, _ in plans]
    dropped, refitted = original.with_heads(shapes), original.with_heads(shapes)
    walk, check = Walk(original, fit), Walk(original, held_out)
    changes = []
    for index, (after, pools) in enumerate(plans):
        view = original.views[index]
        own = walk.enter(index)
        check.enter(index)
        kept = importance.choose_heads(
            settings.method,
            view,
            own,
            pools,
            after.num_query_heads // len(pools),
            gate_gradients=gradients[index],
            generator=generator,
        )
        joins = settings.pooling == "aligned" and after.num_kv_heads < view.config.num_kv_heads
        weights = surgery.cut(view, after.num_kv_heads, kept, walk.inputs() if joins else None)
        dropped.views[index].write(weights)
        fitted, held = walk.features(dropped, index), check.features(dropped, index)
        output = surgery.refit(weights.o, fitted, held)
        refitted.views[index].write(replace(weights, o=output))
        changes.append(LayerChange(kept=tuple(kept), dropped=held.error(weights.o), refitted=held.error(output)))
        on_layer()
    return dropped, refitted, tuple(changes)
