"""Probes of a model while it trains: when does it begin to use its context?

There are two. Loss by position: a model that uses its context has a lower loss late in a document than early. The
repeated sequence (arXiv 2209.11895, induction heads): random tokens repeated once; only attention to the first half
makes the second half predictable.
"""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from sqa.data.shards import TokenShards
from sqa.errors import InputError
from sqa.model import Transformer
from sqa.records import check_least

ROWS = 32


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The figures after `step` steps. All losses are means, in nats a token.

    `positions` are the bounds of the ranges of document positions that `loss_by_position` is given for: 0, 16, 64, ...
    `repeated_loss` is over the second half of a random sequence that repeats its first half; `unrepeated_loss` is over
    the first half, where ln(vocabulary) is the best that can be done.
    """

    step: int
    tokens: int
    positions: tuple[int, ...]
    loss_by_position: tuple[float, ...]
    repeated_loss: float
    unrepeated_loss: float

    def __post_init__(self) -> None:
        check_least(self, 1, "step")
        check_least(self, 0, "tokens")


def probe_steps(steps: int, count: int) -> frozenset[int]:
    """`count` steps after which a run of `steps` is probed: evenly in log over its last two decades, and at its end."""
    return frozenset(max(1, round(steps * 100 ** ((i + 1) / count - 1))) for i in range(count))


class Prober:
    """The texts of the probes, the same for every variant and seed.

    `context_length`: at least 4, which plans make sure of. Raises InputError when no document is longer than that.
    """

    def __init__(self, shards: TokenShards, *, context_length: int, vocab_size: int, batch_size: int) -> None:
        long = np.flatnonzero(shards.lengths > context_length)[:ROWS]
        if not long.size:
            raise InputError(
                f"plan: probes need a validation document of more than context={context_length} tokens, the longest "
                f"has {int(shards.lengths.max())}; set probes = 0 or a shorter context"
            )
        documents = np.stack([shards.document(i)[: context_length + 1].astype(np.int64) for i in long])
        half = context_length // 2
        first = np.random.default_rng(0).integers(0, vocab_size, (ROWS, half))
        repeated = np.concatenate([first, first, first[:, :1]], axis=1)
        self._texts = [torch.from_numpy(documents), torch.from_numpy(repeated)]
        self._batch_size, self._half = batch_size, half
        bounds = [0, 16]
        while bounds[-1] < context_length:
            bounds.append(bounds[-1] * 4)
        self.positions = (*(bound for bound in bounds if bound < context_length), context_length)

    @torch.no_grad()
    def measure(self, model: Transformer, accelerator: Accelerator, *, step: int, tokens: int) -> Probe:
        """Probe a model that is being trained, and leave it in training mode."""
        model.eval()
        documents, repeated = (self._mean_losses(model, text, accelerator) for text in self._texts)
        model.train()
        ranges = zip(self.positions[:-1], self.positions[1:], strict=True)
        return Probe(
            step=step,
            tokens=tokens,
            positions=self.positions,
            loss_by_position=tuple(float(documents[low:high].mean()) for low, high in ranges),
            # position half - 1 predicts the first repeated token, which nothing announces
            repeated_loss=float(repeated[self._half :].mean()),
            unrepeated_loss=float(repeated[: self._half - 1].mean()),
        )

    def _mean_losses(self, model: Transformer, text: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
        """Loss at each position (T,), the mean over rows."""
        total = torch.zeros(text.shape[1] - 1, dtype=torch.float64)
        for start in range(0, len(text), self._batch_size):
            rows = text[start : start + self._batch_size].to(accelerator.device)
            ids, labels = rows[:, :-1], rows[:, 1:]
            documents = torch.zeros_like(ids, dtype=torch.int32)
            with accelerator.autocast():
                losses, _ = model.token_losses(ids, labels, document_ids=documents)
            total += losses.cpu().double().sum(0)
        return total / len(text)
