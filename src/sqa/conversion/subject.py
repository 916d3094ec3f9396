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
from sqa.conversion.records import Quality
from sqa.errors import InputError


@dataclass(frozen=True)
class Projection:
    """A linear map: weight (out, in), and bias (out,) where there is one."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, linear: nn.Linear) -> Projection:
        """What a layer holds, in fp64 on the CPU."""
        bias = None if linear.bias is None else linear.bias.detach().cpu().double()
        return cls(linear.weight.detach().cpu().double(), bias)

    @classmethod
    def split(cls, joined: Tensor, *, bias: bool) -> Projection:
        """The inverse of `joined`."""
        return cls(joined[:, :-1], joined[:, -1]) if bias else cls(joined, None)

    @property
    def joined(self) -> Tensor:
        """The bias as one more column of the weight, (out, in + 1); the weight alone where there is none."""
        return self.weight if self.bias is None else torch.cat([self.weight, self.bias[:, None]], dim=1)

    @torch.no_grad()
    def copy_to(self, linear: nn.Linear) -> None:
        """Give a layer of this shape these values."""
        linear.weight.copy_(self.weight)
        if self.bias is not None:
            linear.bias.copy_(self.bias)


@dataclass(frozen=True)
class AttentionWeights:
    """The four projections of an attention layer as values."""

    q: Projection
    k: Projection
    v: Projection
    o: Projection


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
        return Projection.of(self.o).joined

    def write(self, weights: AttentionWeights) -> None:
        """Take these values."""
        values = (weights.q, weights.k, weights.v, weights.o)
        for projection, linear in zip(values, self.projections, strict=True):
            projection.copy_to(linear)


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
    """A model in conversion. `Any` stands for the class's kind of batch.

    A layer is taken in three parts: what its attention reads of the residual stream, what the attention gives for
    that, and the stream after the layer.
    """

    default_speed_at: ClassVar[tuple[int, ...]]
    predicts: ClassVar[bool]
    """Whether it is a language model: it has a loss and can continue a text."""

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

    @classmethod
    @abstractmethod
    def check_source(cls, directory: Path, attention: Sequence[AttentionConfig]) -> None:
        """Raise ValueError where `save` could not write a model with these layers, or not copy what is beside it."""

    @property
    @abstractmethod
    def views(self) -> list[AttentionView]:
        """The attention layers."""

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @abstractmethod
    def batches(
        self, directory: Path, documents: Iterator[str], rows: int, length: int, batch_size: int
    ) -> Sequence[Any]:
        """The next `rows` rows of `length` tokens of the text, on the model's device.

        Raises ValueError when there is less.
        """

    def tokenizer(self, directory: Path) -> Any:
        """The `tokenizers.Tokenizer` of a model directory. Raises ValueError without one."""
        tokenizer = interop.read_tokenizer(directory, self.model.config.vocab_size)
        if tokenizer is None:
            raise InputError(f"model: {directory} has no tokenizer.json, which the calibration text is encoded with")
        return tokenizer

    def row(self, n: int) -> Any:
        """A batch of one row of n tokens, to be timed with."""
        return self.row_of(torch.arange(n, device=self.device)[None] % self.model.config.vocab_size)

    @abstractmethod
    def row_of(self, input_ids: Tensor) -> Any:
        """A batch of these tokens (1, T), none of them padding."""

    def tokens(self, x: Tensor, batch: Any) -> Tensor:
        """(B, T, F) -> (N, F): the positions of a batch that are no padding."""
        return x.flatten(0, 1)

    @abstractmethod
    def count(self, batch: Any) -> int:
        """The tokens of a batch that are no padding."""

    @property
    def trainable(self) -> list[nn.Parameter]:
        """What the outputs depend on, and so has a gradient in healing."""
        return list(self.model.parameters())

    @abstractmethod
    def stream(self, batch: Any) -> Tensor:
        """The residual stream before the first layer, (B, T, d)."""

    @abstractmethod
    def read(self, index: int, stream: Tensor) -> Tensor:
        """What the attention of a layer reads of the stream before that layer, (B, T, d)."""

    @abstractmethod
    def attend(self, index: int, read: Tensor, batch: Any) -> Tensor:
        """What the attention of a layer gives for what it read, (B, T, d)."""

    @abstractmethod
    def after(self, index: int, stream: Tensor, given: Tensor) -> Tensor:
        """The stream after a layer whose attention gave that, (B, T, d)."""

    @abstractmethod
    def hidden(self, batch: Any) -> Tensor:
        """What the output head reads, (B, T, d)."""

    def prefill(self, batch: Any) -> object:
        """What reading a prompt takes."""
        return self.hidden(batch)

    def layers(self, batch: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """What each layer's attention reads and gives, both (B, T, d)."""
        stream = self.stream(batch)
        for index in range(len(self.views)):
            read = self.read(index, stream)
            given = self.attend(index, read, batch)
            yield read, given
            stream = self.after(index, stream, given)

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """What training minimises."""

    @abstractmethod
    def distance(self, hidden: Tensor, teacher: Any, teacher_hidden: Tensor, batch: Any) -> Tensor:
        """How far outputs are from the teacher's, which distillation minimises."""

    @abstractmethod
    def outputs(self, batches: Iterable[Any]) -> list[Tensor]:
        """What `measure` compares with, when this model is the teacher."""

    @abstractmethod
    def measure(self, batches: Iterable[Any], teacher: Any, reference: Sequence[Tensor]) -> Quality:
        """Quality beside the teacher, whose `outputs` are `reference`."""

    @abstractmethod
    def with_heads(self, attention: Sequence[AttentionConfig]) -> Self:
        """A new model with these attention layers, their projections still to be written; all else is copied."""

    @abstractmethod
    def continued(self, batch: Any, new_tokens: int) -> Tensor | None:
        """Greedy continuation (B, new_tokens) of the rows of a batch; None of a model that predicts nothing."""

    @classmethod
    @abstractmethod
    def serve(cls, directory: Path) -> str:
        """How to use what `save` wrote: a command, or a line of Python."""

    @abstractmethod
    def save(self, folder: Path, source: Path, dtype: torch.dtype) -> None:
        """Write the kind of directory that `source` is; the model itself takes that dtype."""

    def check_finite(self, where: Path) -> None:
        """Raise ValueError naming a weight that holds nan or an infinity."""
        for name, parameter in self.model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise InputError(f"model: {name} of {where} holds nan or infinity; convert a model with finite weights")
