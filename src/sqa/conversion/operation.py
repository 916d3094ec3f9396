"""The closed-form part of a conversion: look at the text once, choose heads, cut, pool, refit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sqa.conversion import importance, surgery
from sqa.conversion.moments import AttentionView, Moments, collect, tokens_of
from sqa.conversion.settings import Job
from sqa.conversion.subject import Subject
from sqa.training.loop import Display


def operate(
    job: Job, original: Subject, fit: list[Any], held_out: list[Any], display: Display
) -> tuple[Subject, Subject, list[dict[str, Any]]]:
    """The model with heads dropped, the model refitted, and for each layer which heads stayed and both errors.

    `fit` and `held_out` are batches of calibration text; a layer's error is that of its attention output on the
    second, as a share of its energy, with the original's input.
    """
    settings, views = job.settings, original.views
    display.start("calibrating", len(fit) + len(held_out))

    def counted(batches: list[Any]) -> Iterator[Any]:
        for batch in batches:
            yield batch
            display.step(None)

    own, held = (_own_moments(original, counted(batches)) for batches in (fit, held_out))
    gradients: list[Tensor | None] = [None] * len(views)
    if settings.method == "taylor":
        gradients = list(importance.gate_gradients(original.loss, fit, views))
    inputs: list[Moments | None] = [None] * len(views)
    if settings.pooling == "aligned" and any(
        each.num_kv_heads < view.config.num_kv_heads for each, view in zip(job.heads, views, strict=True)
    ):
        inputs = list(_input_moments(original, fit))
    display.finish("calibrated")
    generator = torch.Generator().manual_seed(settings.seed)
    kept, weights, pooled = [], [], False
    for view, heads, moments, x, gradient in zip(views, job.heads, own, inputs, gradients, strict=True):
        chosen = importance.choose_heads(
            settings.method, view, moments, heads.pools, heads.keep, gate_gradients=gradient, generator=generator
        )
        cut, mixed = surgery.cut(view, heads, chosen, x)
        kept.append(chosen)
        weights.append(cut)
        pooled |= mixed
    dropped = original.converted(job.after, weights)
    if pooled:  # what the heads give has changed: look again
        own, held = (_changed_moments(original, dropped, batches) for batches in (fit, held_out))
    else:
        own, held = (
            [
                surgery.select(each, chosen, view.config.head_dim)
                for each, chosen, view in zip(m, kept, views, strict=True)
            ]
            for m in (own, held)
        )
    report = []
    for view, layer, chosen, fitted, checked in zip(dropped.views, weights, kept, own, held, strict=True):
        before = view.output_weight
        after = surgery.refit(before, fitted, checked)
        layer["o.weight"] = after[:, : view.o.in_features]
        if view.o.bias is not None:
            layer["o.bias"] = after[:, view.o.in_features]
        report.append({"kept": chosen, "dropped": checked.error(before), "refitted": checked.error(after)})
    return dropped, original.converted(job.after, weights), report


def _own_moments(subject: Subject, batches: Iterator[Any]) -> list[Moments]:
    """Moments of what each output projection reads, with what it makes of that as target."""
    views = subject.views
    found = [_moments_of(view) for view in views]
    collect(subject.run, batches, [view.o for view in views], lambda i, read: found[i].add(read))
    for view, moments in zip(views, found, strict=True):
        moments.of_projection(view.output_weight)
    return found


def _input_moments(subject: Subject, batches: list[Any]) -> list[Moments]:
    """Moments of what each layer reads."""
    views = subject.views
    found = [Moments(view.q.in_features, 0, constant=True) for view in views]
    collect(subject.run, batches, [view.q for view in views], lambda i, read: found[i].add(read))
    return found


def _changed_moments(original: Subject, changed: Subject, batches: list[Any]) -> list[Moments]:
    """Moments of what the changed layers' output projections read, with what the original layers give as target."""
    views = changed.views
    found = [_moments_of(view) for view in views]
    targets: dict[int, Tensor] = {}

    def run(batch: Any) -> Tensor | None:
        real = original.real(batch)
        for i, (read, given) in enumerate(original.layers(batch)):
            targets[i] = tokens_of(given, real)
            changed.attend(i, read, batch)
        return real

    collect(run, batches, [view.o for view in views], lambda i, read: found[i].add(read, targets[i]))
    return found


def _moments_of(view: AttentionView) -> Moments:
    return Moments(view.o.in_features, view.o.out_features, constant=view.o.bias is not None)
