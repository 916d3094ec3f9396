"""What conversion needs of a model, whatever its class.

Shapes: B rows, T tokens a row, N real tokens, d = d_model, F = what a projection reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sqa import interop
from sqa.config import AttentionConfig
from sqa.errors import InputError


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


@contextmanager
def watched(modules: Sequence[nn.Linear]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """A list that holds, after each forward pass inside the block, what every module read and gave."""
    seen = [(torch.empty(0), torch.empty(0))] * len(modules)

    def keep(index: int, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[index] = inputs[0], output

    handles = [module.register_forward_hook(partial(keep, i)) for i, module in enumerate(modules)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class Subject(ABC):
    """A model in conversion. `Any` stands for the class's kind of batch."""

    default_speed_at: ClassVar[tuple[int, ...]]

    def __init__(self, model: Any) -> None:
        """`model` as it was read: its weights become fp32, and `dtype` keeps what they were."""
        self.dtype = next(model.parameters()).dtype
        self.model = model.float().eval()

    @classmethod
    @abstractmethod
    def load(cls, directory: Path) -> Self:
        """Read a model directory. Raises ValueError for what is missing, damaged or of another kind."""

    @classmethod
    @abstractmethod
    def shape(cls, directory: Path) -> tuple[tuple[AttentionConfig, ...], int]:
        """The attention layers, and how many tokens the model can read."""

    @property
    @abstractmethod
    def views(self) -> list[AttentionView]:
        """The attention layers."""

    @abstractmethod
    def batches(
        self, directory: Path, documents: Iterator[str], rows: int, length: int, batch_size: int
    ) -> Sequence[Any]:
        """The next `rows` rows of `length` tokens of the text. Raises ValueError when there is less."""

    def tokenizer(self, directory: Path) -> Any:
        """The `tokenizers.Tokenizer` of a model directory. Raises ValueError without one."""
        tokenizer = interop.read_tokenizer(directory, self.model.config.vocab_size)
        if tokenizer is None:
            raise InputError(f"model: {directory} has no tokenizer.json, which the calibration text is encoded with")
        return tokenizer

    def row(self, n: int) -> Any:
        """A batch of one row of n tokens, to be timed with."""
        return self.row_of(torch.arange(n)[None] % self.model.config.vocab_size)

    @abstractmethod
    def row_of(self, input_ids: Tensor) -> Any:
        """A batch of these tokens (1, T), none of them padding."""

    def tokens(self, x: Tensor, batch: Any) -> Tensor:
        """(B, T, F) -> (N, F): the positions of a batch that are no padding."""
        return x.flatten(0, 1)

    @abstractmethod
    def hidden(self, batch: Any) -> Tensor:
        """What the output head reads, (B, T, d)."""

    def prefill(self, batch: Any) -> object:
        """What reading a prompt takes."""
        return self.hidden(batch)

    @abstractmethod
    def attend(self, index: int, read: Tensor, batch: Any) -> Tensor:
        """What the attention of one layer makes of its input (B, T, d)."""

    def layers(self, batch: Any) -> list[tuple[Tensor, Tensor]]:
        """What each layer's attention read and gave in one forward pass, both (B, T, d)."""
        with watched([view.q for view in self.views]) as first, watched([view.o for view in self.views]) as last:
            self.hidden(batch)
        return [(read, given) for (read, _), (_, given) in zip(first, last, strict=True)]

    @torch.no_grad()
    def reads(self, batches: Iterable[Any], modules: Sequence[nn.Linear]) -> Iterator[list[Tensor]]:
        """For each batch what the modules read, (N, F) each."""
        with watched(modules) as seen:
            for batch in batches:
                self.hidden(batch)
                yield [self.tokens(read, batch) for read, _ in seen]

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """What training minimises."""

    @abstractmethod
    def distance(self, hidden: Tensor, teacher: Any, teacher_hidden: Tensor, batch: Any) -> Tensor:
        """How far outputs are from the teacher's, which distillation minimises."""

    @abstractmethod
    def outputs(self, batches: Sequence[Any]) -> list[Tensor]:
        """What `measure` compares with, when this model is the teacher."""

    @abstractmethod
    def measure(self, batches: Sequence[Any], teacher: Any, reference: Sequence[Tensor]) -> dict[str, float]:
        """Figures of quality beside the teacher, whose `outputs` are `reference`."""

    @abstractmethod
    def converted(self, attention: Sequence[AttentionConfig], weights: Sequence[dict[str, Tensor]]) -> Self:
        """A new model with these attention layers; `weights` by the names of AttentionView, all else is copied."""

    @abstractmethod
    def save(self, folder: Path, source: Path, dtype: torch.dtype) -> None:
        """Write the kind of directory that `source` is; the model itself takes that dtype."""
