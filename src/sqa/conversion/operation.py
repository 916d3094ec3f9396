"""The closed-form part of a conversion: look at the text once, choose heads, cut, pool, refit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sqa.conversion import importance, surgery
from sqa.conversion.moments import Moments
from sqa.conversion.settings import Job
from sqa.conversion.subject import Subject, watched
from sqa.progress import Display


def operate(
    job: Job, original: Subject, fit: Sequence[Any], held_out: Sequence[Any], display: Display
) -> tuple[Subject, Subject, list[dict[str, Any]]]:
    """The model with heads dropped, the model refitted, and for each layer which heads stayed and both errors.

    `fit` and `held_out` are batches of calibration text; a layer's error is that of its attention output on the
    second, as a share of its energy, with the original's input.
    """
    settings, views = job.settings, original.views
    display.start("calibrating", len(fit) + len(held_out))

    def counted(batches: Sequence[Any]) -> Iterator[Any]:
        for batch in batches:
            yield batch
            display.step(None)

    own, held = (_own_moments(original, counted(batches)) for batches in (fit, held_out))
    gradients: Sequence[Tensor | None] = [None] * len(views)
    if settings.method == "taylor":
        gradients = importance.gate_gradients(original, fit)
    inputs: list[Moments] | list[None] = [None] * len(views)
    if settings.pooling == "aligned" and any(
        after.num_kv_heads < before.num_kv_heads for before, after in zip(job.before, job.after, strict=True)
    ):
        inputs = [Moments(view.q.in_features, 0, constant=True) for view in views]
        _count(inputs, original, fit, [view.q for view in views])
    display.finish("calibrated")
    generator = torch.Generator().manual_seed(settings.seed)
    kept, weights, pooled = [], [], False
    for view, after, pools, moments, x, gradient in zip(
        views, job.after, job.pools, own, inputs, gradients, strict=True
    ):
        keep = after.num_query_heads // len(pools)
        chosen = importance.choose_heads(
            settings.method, view, moments, pools, keep, gate_gradients=gradient, generator=generator
        )
        cut, mixed = surgery.cut(view, after.num_kv_heads, chosen, x)
        kept.append(chosen)
        weights.append(cut)
        pooled |= mixed
    dropped = original.converted(job.after, weights)
    if pooled:  # what the heads give has changed: look again
        own, held = (_changed_moments(original, dropped, batches) for batches in (fit, held_out))
    else:
        size = job.before[0].head_dim
        own, held = ([m.of_heads(chosen, size) for m, chosen in zip(ms, kept, strict=True)] for ms in (own, held))
    report = []
    for view, layer, chosen, fitted, checked in zip(dropped.views, weights, kept, own, held, strict=True):
        before = view.output_weight
        refitted = surgery.refit(before, fitted, checked)
        layer["o.weight"] = refitted[:, : view.o.in_features]
        if view.o.bias is not None:
            layer["o.bias"] = refitted[:, view.o.in_features]
        report.append({"kept": chosen, "dropped": checked.error(before), "refitted": checked.error(refitted)})
    return dropped, original.converted(job.after, weights), report


def _own_moments(subject: Subject, batches: Iterable[Any]) -> list[Moments]:
    """Moments of what each output projection reads, with what it makes of that as target."""
    views, found = subject.views, _empty_moments(subject)
    _count(found, subject, batches, [view.o for view in views])
    for view, moments in zip(views, found, strict=True):
        moments.of_projection(view.output_weight)
    return found


def _count(found: list[Moments], subject: Subject, batches: Iterable[Any], modules: Sequence[nn.Linear]) -> None:
    """Add to each of the moments what its module reads in these batches."""
    for reads in subject.reads(batches, modules):
        for moments, read in zip(found, reads, strict=True):
            moments.add(read)


@torch.no_grad()
def _changed_moments(original: Subject, changed: Subject, batches: Iterable[Any]) -> list[Moments]:
    """Moments of what the changed layers' output projections read, with what the original layers give as target."""
    found = _empty_moments(changed)
    with watched([view.o for view in changed.views]) as seen:
        for batch in batches:
            for i, (read, given) in enumerate(original.layers(batch)):
                changed.attend(i, read, batch)
                found[i].add(original.tokens(seen[i][0], batch), original.tokens(given, batch))
    return found


def _empty_moments(subject: Subject) -> list[Moments]:
    return [Moments(v.o.in_features, v.o.out_features, constant=v.o.bias is not None) for v in subject.views]
