"""Batches of token ids from encoded documents, in an order that depends on nothing but the seed.

Axes: B rows of a batch, T positions of a row (the context length). A row reads T inputs and the T tokens
that follow them, so `labels[t]` is the target of position t.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from sqa.data.shards import TokenShards
from sqa.losses import IGNORE

Layout = Literal["padded", "packed"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch of rows, on the CPU.

    input_ids             (B, T) int64
    labels                (B, T) int64, the target of each position, -100 where there is none
    labels_all_positions  (B, T) int64, the published convention: padding has the pad token as target;
                          None for packed batches
    document_ids          (B, T) int32, which document of its row a position belongs to, counted from 0;
                          None for padded batches, where right padding under a causal mask needs no mask
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    labels_all_positions: torch.Tensor | None
    document_ids: torch.Tensor | None

    @property
    def num_tokens(self) -> int:
        """Real tokens: positions that have a target."""
        return int((self.labels != IGNORE).sum())


class _Batches(ABC):
    """Batch t as a pure function of the constructor's arguments and t.

    Epoch e visits all documents in a permutation of its own, drawn from (seed, e); with seed None that is
    the stored order. An epoch has `batches_per_epoch` whole batches; the rows left over at its end, fewer
    than a batch, are dropped. Only the order of the epoch in use is in memory.
    """

    def __init__(
        self, shards: TokenShards, *, batch_size: int, context_length: int, seed: int | None, num_rows: int
    ) -> None:
        if seed is not None and seed < 0:
            raise ValueError(f"seed must be at least 0, not {seed}")
        self.batches_per_epoch = num_rows // batch_size
        self._shards = shards
        self._batch_size = batch_size
        self._context_length = context_length
        self._seed = seed
        self._epoch: int | None = None

    def batch(self, t: int) -> Batch:
        """Batch t >= 0 of an endless sequence of epochs: (batch_size, context_length)."""
        return self.rows(t, 0, self._batch_size)

    def rows(self, t: int, start: int, stop: int) -> Batch:
        """Rows start..stop of batch t, without reading the others: (stop - start, context_length)."""
        if t < 0 or not 0 <= start < stop <= self._batch_size:
            raise ValueError(f"batch {t} of {self._batch_size} rows has no rows {start}..{stop}")
        epoch, index = divmod(t, self.batches_per_epoch)
        if epoch != self._epoch:
            self._start_epoch(_order(self._shards.num_documents, self._seed, epoch))
            self._epoch = epoch
        first = index * self._batch_size
        return self._read(first + start, first + stop)

    @abstractmethod
    def _start_epoch(self, order: np.ndarray) -> None: ...

    @abstractmethod
    def _read(self, first: int, last: int) -> Batch:
        """Rows first..last of the epoch."""


class PaddedBatches(_Batches):
    """One document a row, cut after context_length + 1 tokens and padded on the right.

    Raises ValueError if there are fewer documents than `batch_size`, or a number is out of range.
    """

    def __init__(
        self, shards: TokenShards, *, batch_size: int, context_length: int, pad_id: int, seed: int | None
    ) -> None:
        _check(batch_size, context_length)
        if shards.num_documents < batch_size:
            raise ValueError(
                f"batch_size {batch_size} needs as many documents, but the corpus has only "
                f"{shards.num_documents} in this split"
            )
        super().__init__(
            shards,
            batch_size=batch_size,
            context_length=context_length,
            seed=seed,
            num_rows=shards.num_documents,
        )
        self._pad_id = pad_id

    def _start_epoch(self, order: np.ndarray) -> None:
        self._documents = order

    def _read(self, first: int, last: int) -> Batch:
        return _padded(self._shards, self._documents[first:last], self._context_length, self._pad_id)


class PackedBatches(_Batches):
    """Documents laid end to end and cut into rows; a document may go on in the next row.

    Attention is to be confined to `document_ids`; the end token of a document predicts nothing. Raises
    ValueError if there are fewer tokens than one batch takes, or a number is out of range.
    """

    def __init__(self, shards: TokenShards, *, batch_size: int, context_length: int, seed: int | None) -> None:
        _check(batch_size, context_length)
        if shards.num_tokens <= batch_size * context_length:
            raise ValueError(
                f"One batch of {batch_size} rows at context_length {context_length} takes "
                f"{batch_size * context_length + 1} tokens, but the corpus has only {shards.num_tokens} "
                "in this split"
            )
        super().__init__(
            shards,
            batch_size=batch_size,
            context_length=context_length,
            seed=seed,
            num_rows=(shards.num_tokens - 1) // context_length,
        )

    def _start_epoch(self, order: np.ndarray) -> None:
        self._stream = _Stream(self._shards, order)

    def _read(self, first: int, last: int) -> Batch:
        return self._stream.rows(first, last, self._context_length, fill=0)  # an epoch's rows are full


def evaluation_batches(
    shards: TokenShards,
    *,
    layout: Layout,
    batch_size: int,
    context_length: int,
    pad_id: int,
    max_tokens: int,
) -> Iterator[Batch]:
    """The fixed evaluation set: whole documents in stored order until they hold `max_tokens` real tokens.

    All documents where they hold fewer. The last batch may have fewer rows, none is empty; the last packed
    row is filled with `pad_id`, which has no target and a document id of its own. Raises ValueError for a
    number out of range.
    """
    _check(batch_size, context_length)
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
    targets = shards.lengths - 1
    if layout == "padded":
        targets = np.minimum(targets, context_length)
    num_documents = min(int(np.searchsorted(np.cumsum(targets), max_tokens)) + 1, shards.num_documents)
    documents = np.arange(num_documents)
    if layout == "padded":
        return (
            _padded(shards, documents[i : i + batch_size], context_length, pad_id)
            for i in range(0, num_documents, batch_size)
        )
    stream = _Stream(shards, documents)
    num_rows = -(-(stream.size - 1) // context_length)
    return (
        stream.rows(i, min(i + batch_size, num_rows), context_length, fill=pad_id)
        for i in range(0, num_rows, batch_size)
    )


def _check(batch_size: int, context_length: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if context_length < 2:
        raise ValueError(f"context_length must be at least 2, not {context_length}")


def _order(count: int, seed: int | None, epoch: int) -> np.ndarray:
    if seed is None:
        return np.arange(count)
    # raw bits, because numpy keeps them the same between releases and its shuffles not
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(bits, kind="stable")


def _padded(shards: TokenShards, documents: np.ndarray, context_length: int, pad_id: int) -> Batch:
    tokens = np.full((len(documents), context_length + 1), pad_id, dtype=np.int64)
    real = np.zeros(tokens.shape, dtype=bool)
    for row, document in enumerate(documents):
        ids = shards.document(document)[: context_length + 1]
        tokens[row, : ids.size] = ids
        real[row, : ids.size] = True
    labels = tokens[:, 1:]
    return Batch(
        input_ids=torch.from_numpy(tokens[:, :-1].copy()),
        labels=torch.from_numpy(np.where(real[:, 1:], labels, IGNORE)),
        labels_all_positions=torch.from_numpy(labels.copy()),
        document_ids=None,
    )


class _Stream:
    """Documents of `shards` laid end to end in the given order."""

    def __init__(self, shards: TokenShards, order: np.ndarray) -> None:
        self._shards = shards
        self._order = order
        self._bounds = np.concatenate([[0], np.cumsum(shards.lengths[order])])
        self.size = int(self._bounds[-1])

    def rows(self, first: int, last: int, context_length: int, *, fill: int) -> Batch:
        """Rows first..last of the stream; positions behind its end hold `fill` and have no target."""
        start, stop = first * context_length, last * context_length + 1
        positions = np.arange(start, stop)
        ranks = np.searchsorted(self._bounds, positions, side="right") - 1  # which document of the order
        tokens = np.full(stop - start, fill, dtype=np.int64)
        found = self._tokens(start, min(stop, self.size))
        tokens[: found.size] = found
        has_target = (ranks[:-1] == ranks[1:]) & (positions[1:] < self.size)
        shape = (last - first, context_length)
        documents = ranks[:-1].reshape(shape)
        return Batch(
            input_ids=torch.from_numpy(tokens[:-1].reshape(shape).copy()),
            labels=torch.from_numpy(np.where(has_target, tokens[1:], IGNORE).reshape(shape)),
            labels_all_positions=None,
            document_ids=torch.from_numpy((documents - documents[:, :1]).astype(np.int32)),
        )

    def _tokens(self, start: int, stop: int) -> np.ndarray:
        first = int(np.searchsorted(self._bounds, start, side="right")) - 1
        pieces = []
        while start < stop:
            document = self._order[first]
            offset = int(self._shards.offsets[document]) - int(self._bounds[first])
            end = min(stop, int(self._bounds[first + 1]))
            pieces.append(self._shards.tokens(offset + start, offset + end))
            start, first = end, first + 1
        return np.concatenate(pieces)
