"""The interface of a model for conversion, whatever its class.

Shapes: B rows, T tokens a row, N real tokens, d = d_model, F = what a projection reads.
"""

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
from sqa.interop.text import TextSide


def joined(linear: nn.Linear) -> Tensor:
    """Weight in fp64 on the CPU, (out, in), with the bias as one more column where there is one."""
    parts = [linear.weight] if linear.bias is None else [linear.weight, linear.bias[:, None]]
    return torch.cat([part.detach().cpu().double() for part in parts], dim=1)


@dataclass(frozen=True)
class AttentionWeights:
    """New weights of the four projections of an attention layer, (out, in) each, with any bias as last column."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


@dataclass(frozen=True)
class AttentionView:
    """One attention layer of a model of any class: its shape and its four projections."""

    config: AttentionConfig
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        """q, k, v and o, in this order."""
        return self.q, self.k, self.v, self.o

    @torch.no_grad()
    def write(self, weights: AttentionWeights) -> None:
        """Copy these weights; a bias column is ignored if the projection has no bias."""
        for values, linear in zip((weights.q, weights.k, weights.v, weights.o), self.projections, strict=True):
            linear.weight.copy_(values[:, : linear.in_features])
            if linear.bias is not None:
                linear.bias.copy_(values[:, linear.in_features])


@contextmanager
def watched(modules: Sequence[nn.Linear]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """A list that has each module's input and output after each forward pass in the block."""
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
    """A model in conversion. `Any` stands for the class's kind of batch, whose `input_ids` are (B, T)."""

    default_speed_at: ClassVar[tuple[int, ...]]
    predicts: ClassVar[bool]
    """Whether it is a language model, which has a loss and can continue text."""

    def __init__(self, model: Any) -> None:
        """Turn the model's weights to fp32; `dtype` keeps their own dtype."""
        self.dtype = next(model.parameters()).dtype
        self.model = model.float().eval()

    @classmethod
    @abstractmethod
    def load(cls, directory: Path) -> Self:
        """Read a model directory. Raises InputError for what is missing, damaged or of another kind."""

    @classmethod
    @abstractmethod
    def shape(cls, directory: Path) -> tuple[tuple[AttentionConfig, ...], int]:
        """The attention layers, and how many tokens the model can read.

        Raises InputError for a damaged directory, and for files that `save` could not copy.
        """

    @property
    @abstractmethod
    def views(self) -> list[AttentionView]:
        """The attention layers."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @abstractmethod
    def batches(
        self, side: TextSide, documents: Iterator[str], rows: int, length: int, batch_size: int
    ) -> Sequence[Any]:
        """The next `rows` rows of `length` tokens of the documents, on the model's device.

        `side`: by `text_side`. Raises InputError when there are fewer rows.
        """

    def text_side(self, directory: Path) -> TextSide:
        """The text side of the model in `directory`. Raises InputError if it has no tokenizer."""
        side = interop.read_text_side(directory, self.model.config.vocab_size)
        if side.tokenizer is None:
            raise InputError(f"model: {directory} has no tokenizer.json, which the calibration text is encoded with")
        return side

    @abstractmethod
    def row_of(self, input_ids: Tensor) -> Any:
        """A batch of these tokens (1, T), none of them padding."""

    def tokens(self, x: Tensor, batch: Any) -> Tensor:
        """(B, T, ...) -> (N, ...): the positions of x that are no padding."""
        return x.flatten(0, 1)

    def count(self, batch: Any) -> int:
        """N, the number of tokens that are no padding."""
        return len(self.tokens(batch.input_ids, batch))

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that get a gradient in healing."""
        return list(self.model.parameters())

    @abstractmethod
    def attend(self, index: int, x: Tensor, batch: Any) -> Tensor:
        """The output of one layer's attention for its input x, both (B, T, d)."""

    @abstractmethod
    def layers(self, batch: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """The input and the output of each layer's attention in a forward pass, both (B, T, d)."""

    @abstractmethod
    def hidden(self, batch: Any) -> Tensor:
        """The last hidden state, (B, T, d)."""

    def prefill(self, batch: Any) -> object:
        """Read a prompt, for timing."""
        return self.hidden(batch)

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """The model's own training loss."""

    @abstractmethod
    def distance(self, hidden: Tensor, teacher: Any, teacher_hidden: Tensor, batch: Any) -> Tensor:
        """The loss of distillation: how far the outputs are from the teacher's."""

    @abstractmethod
    def outputs(self, batches: Iterable[Any]) -> list[Tensor]:
        """What `measure` takes as `reference` when this model is the teacher."""

    @abstractmethod
    def measure(self, batches: Iterable[Any], teacher: Any, reference: Sequence[Tensor]) -> Quality:
        """Quality beside the teacher, whose `outputs` are `reference`."""

    @abstractmethod
    def with_heads(self, attention: Sequence[AttentionConfig]) -> Self:
        """A copy of the model with these attention layers, whose projections are still to be written."""

    def continued(self, batch: Any, new_tokens: int) -> Tensor:
        """Greedy continuation (B, new_tokens) of the rows of a batch, by a model that predicts."""
        raise NotImplementedError

    @classmethod
    @abstractmethod
    def serve(cls, directory: Path) -> str:
        """How to use the written model: a command, or a line of Python."""

    @abstractmethod
    def save(self, folder: Path, source: Path, dtype: torch.dtype) -> None:
        """Turn the model to `dtype`, and write it as a directory of the same kind as `source`."""

    def check_finite(self, where: Path) -> None:
        """Raise InputError, naming the weight, for nan or infinity."""
        for name, parameter in self.model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise InputError(f"model: {name} of {where} holds nan or infinity; convert a model with finite weights")
