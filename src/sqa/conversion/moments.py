"""Sums over the calibration text that a projection is fitted by; their size does not grow with the text.

Shapes: N tokens, d = d_model, F = Hq * head_dim features that the output projection reads.
"""

import torch
from torch import Tensor


def damped(gram: Tensor, share: float) -> Tensor:
    """A symmetric matrix (F, F) with `share` of the mean of its diagonal added to the diagonal, to be inverted."""
    strength = share * max(float(gram.diagonal().mean()), 1e-30)  # a layer whose values are all 0 has no other
    return gram + strength * torch.eye(len(gram), dtype=gram.dtype)


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
        """Add N tokens: features (N, F) and, if there are any, targets (N, d)."""
        x = features.detach().cpu().double()
        if self.constant:
            x = torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)
        self.gram += x.T @ x
        if targets is not None:
            y = targets.detach().cpu().double()
            self.cross += y.T @ x
            self.energy += float(y.square().sum())

    def error(self, weight: Tensor) -> float:
        """Sum of |y - weight x|^2 over the tokens, as a share of |y|^2. weight (d, F), with any bias as last column.

        0 when rounding would make it negative.
        """
        residual = self.energy - 2 * float((weight * self.cross).sum()) + float((weight @ self.gram * weight).sum())
        return max(residual / self.energy, 0.0) if self.energy else 0.0
