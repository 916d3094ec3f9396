"""The closed-form part of a conversion, layer by layer: choose heads, cut, pool, refit.

Each layer is fitted to the original's outputs on the original's inputs. Fitting it on the outputs of the converted
layers before it was tried and did not help (docs/conversion.md).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sqa.conversion import importance, surgery
from sqa.conversion.moments import Moments
from sqa.conversion.records import LayerChange
from sqa.conversion.settings import Settings
from sqa.conversion.subject import AttentionView, Subject, watched
from sqa.conversion.surgery import Plan


def _walk(original: Subject, batches: Sequence[Any]) -> Iterator[tuple[Moments, list[Tensor], list[Tensor]]]:
    """For each layer: moments of its output projection's input; the inputs and outputs of its attention by batch."""
    passes = [original.layers(batch) for batch in batches]
    for view in original.views:
        moments, inputs, outputs = _moments_of(view), [], []
        with watched([view.o]) as seen:
            for batch, one in zip(batches, passes, strict=True):
                x, output = next(one)
                moments.add(original.tokens(seen[0][0], batch))
                inputs.append(x)
                outputs.append(output)
        yield moments, inputs, outputs


def _features(
    cut: Subject, index: int, batches: Sequence[Any], inputs: Sequence[Tensor], targets: Sequence[Tensor]
) -> Moments:
    """Run a cut layer's attention on `inputs`: moments of its output projection's input, with `targets`."""
    view = cut.views[index]
    moments = _moments_of(view)
    with watched([view.o]) as seen:
        for batch, x, target in zip(batches, inputs, targets, strict=True):
            cut.attend(index, x, batch)
            moments.add(cut.tokens(seen[0][0], batch), cut.tokens(target, batch))
    return moments


def _input_moments(subject: Subject, batches: Sequence[Any], inputs: Sequence[Tensor]) -> Moments:
    moments = Moments(inputs[0].shape[-1], 0, constant=True)
    for batch, x in zip(batches, inputs, strict=True):
        moments.add(subject.tokens(x, batch))
    return moments


def _moments_of(view: AttentionView) -> Moments:
    return Moments(view.o.in_features, view.o.out_features, constant=view.o.bias is not None)


@torch.no_grad()
def operate(
    settings: Settings,
    original: Subject,
    plans: Sequence[Plan],
    fit: Sequence[Any],
    held_out: Sequence[Any],
    on_layer: Callable[[], None] = lambda: None,
) -> tuple[Subject, Subject, tuple[LayerChange, ...]]:
    """The model with heads dropped, the same model refitted, and the changes in each layer.

    `plans`: for each layer, by surgery.plan_heads or plan_without. `fit` and `held_out`: batches of
    calibration text; errors are measured on the second.
    """
    gradients: Sequence[Tensor | None] = [None] * len(plans)
    if settings.method == "taylor":
        gradients = importance.gate_gradients(original, fit)
    generator = torch.Generator().manual_seed(settings.seed)
    shapes = [after for after, _ in plans]
    dropped, refitted = original.with_heads(shapes), original.with_heads(shapes)
    changes = []
    both = zip(plans, _walk(original, fit), _walk(original, held_out), strict=True)
    for index, ((after, pools), (own, inputs, outputs), (_, held_inputs, held_outputs)) in enumerate(both):
        view = original.views[index]
        kept = importance.choose_heads(
            settings.method,
            view,
            own,
            pools,
            after.num_query_heads // len(pools),
            gate_gradients=gradients[index],
            generator=generator,
        )
        shared = view.config.num_query_heads // view.config.num_kv_heads
        merged = len(pools) == after.num_kv_heads and len(pools[0]) > shared  # a pool's KV heads become one
        joins = settings.pooling == "aligned" and merged
        weights = surgery.cut(view, after.num_kv_heads, kept, _input_moments(original, fit, inputs) if joins else None)
        dropped.views[index].write(weights)
        fitted = _features(dropped, index, fit, inputs, outputs)
        held = _features(dropped, index, held_out, held_inputs, held_outputs)
        output = surgery.refit(weights.o, fitted, held)
        refitted.views[index].write(replace(weights, o=output))
        changes.append(LayerChange(kept=tuple(kept), dropped=held.error(weights.o), refitted=held.error(output)))
        on_layer()
    return dropped, refitted, tuple(changes)
