"""What calibration text says of each attention layer, as sums: memory does not grow with the text.

Shapes: N tokens, d = d_model, F = Hq * head_dim features that the output projection reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from sqa.config import AttentionConfig

Item = TypeVar("Item")


@dataclass(frozen=True)
class AttentionView:
    """One attention layer of a model, whatever class it is written in: its shape and its four projections."""

    config: AttentionConfig
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        return self.q, self.k, self.v, self.o

    @property
    def output_weight(self) -> Tensor:
        """The output projection in fp64, (d, F), its bias as one more column where there is one."""
        weight = self.o.weight.detach().double()
        return weight if self.o.bias is None else torch.cat([weight, self.o.bias.detach().double()[:, None]], dim=1)


class Moments:
    """Sums of x x^T, y x^T and |y|^2 over tokens, in fp64, for features x (N, F) and targets y (N, d).

    `constant` adds a feature that is always 1, for a projection with a bias.
    """

    def __init__(self, num_features: int, num_targets: int, *, constant: bool) -> None:
        size = num_features + constant
        self.constant = constant
        self.gram = torch.zeros(size, size, dtype=torch.float64)
        self.cross = torch.zeros(num_targets, size, dtype=torch.float64)
        self.energy = 0.0

    def add(self, features: Tensor, targets: Tensor | None = None) -> None:
        """Count more tokens."""
        x = features.detach().double().cpu()
        if self.constant:
            x = torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)
        self.gram += x.T @ x
        if targets is not None:
            y = targets.detach().double().cpu()
            self.cross += y.T @ x
            self.energy += float(y.square().sum())

    def error(self, weight: Tensor) -> float:
        """Sum of |y - weight x|^2 over the tokens counted, as a share of |y|^2. weight (d, F), any bias as last column.

        Below the rounding of its terms it is 0.
        """
        residual = self.energy - 2 * float((weight * self.cross).sum()) + float((weight @ self.gram * weight).sum())
        return max(residual / self.energy, 0.0) if self.energy else 0.0

    def of_projection(self, weight: Tensor) -> None:
        """Take y = weight x for the targets: the layer itself, which needs no second look at the text."""
        self.cross = weight @ self.gram
        self.energy = float((self.cross * weight).sum())


def tokens_of(x: Tensor, real: Tensor | None) -> Tensor:
    """(B, T, F) -> (N, F): the real positions, all where `real` (bool, (B, T)) is None."""
    return x.flatten(0, 1) if real is None else x[real]


def collect(
    run: Callable[[Item], Tensor | None],
    batches: Iterable[Item],
    modules: Sequence[nn.Linear],
    add: Callable[[int, Tensor], None],
) -> None:
    """Run the batches and call `add(i, read)` with what each of the modules read, tokens as rows.

    `run` returns which positions are real, bool (B, T), or None when all are.
    """
    seen: dict[int, Tensor] = {}

    def keep(index: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[index] = inputs[0]

    handles = [module.register_forward_pre_hook(partial(keep, i)) for i, module in enumerate(modules)]
    try:
        with torch.no_grad():
            for batch in batches:
                real = run(batch)
                for index, read in seen.items():
                    add(index, tokens_of(read, real))
    finally:
        for handle in handles:
            handle.remove()
