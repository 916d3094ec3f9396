"""Batches of token ids from encoded documents, in an order that depends on nothing but the seed.

Axes: B rows of a batch, T positions of a row (the context length). A row reads T inputs and the T tokens
that follow them, so `labels[t]` is the target of position t.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from sqa.data.shards import TokenShards
from sqa.errors import InputError
from sqa.losses import IGNORE

Layout = Literal["padded", "packed"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch of rows, on the CPU unless taken elsewhere.

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

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: slice | Sequence[int], device: torch.device | str = "cpu") -> "Batch":
        """Some of the rows, on `device`."""
        part: dict[str, Any] = {k: None if v is None else v[rows].to(device) for k, v in vars(self).items()}
        return Batch(**part)


class Batches:
    """Training batches: batch t is a pure function of the constructor's arguments and t.

    Layout "padded" has one document a row, cut after context_length + 1 tokens and padded on the right; "packed" lays
    documents end to end and cuts that into rows, so that a document may go on in the next one: attention is to be
    confined to `document_ids`, and the end token of a document predicts nothing.

    Epoch e visits all documents in a permutation of its own, drawn from (seed, e). It has `batches_per_epoch` whole
    batches; the rows left over at its end, fewer than a batch, are dropped. Only the order of the epoch in use is in
    memory. Raises InputError when the split does not fill one batch.
    """

    def __init__(
        self, shards: TokenShards, *, layout: Layout, batch_size: int, context_length: int, pad_id: int, seed: int
    ) -> None:
        packed = layout == "packed"
        # a packed row of an epoch is full
        num_rows = (shards.num_tokens - 1) // context_length if packed else shards.num_documents
        self.batches_per_epoch = num_rows // batch_size
        if not self.batches_per_epoch:
            needs, has = f"batch_size {batch_size} needs as many documents", shards.num_documents
            if packed:
                tokens, has = batch_size * context_length + 1, shards.num_tokens
                needs = f"One batch of {batch_size} rows at context_length {context_length} takes {tokens} tokens"
            raise InputError(f"{needs}, but the corpus has only {has} in this split")
        self._rows = _PackedRows if packed else _PaddedRows
        self._shards, self._batch_size, self._context_length = shards, batch_size, context_length
        self._pad_id, self._seed = pad_id, seed
        self._epoch: int | None = None

    def batch(self, t: int) -> Batch:
        """Batch t >= 0 of an endless sequence of epochs: (batch_size, context_length)."""
        epoch, index = divmod(t, self.batches_per_epoch)
        if epoch != self._epoch:
            # raw bits stay the same between releases of numpy, shuffles do not
            bits = np.random.PCG64(np.random.SeedSequence([self._seed, epoch])).random_raw(self._shards.num_documents)
            order = np.argsort(bits, kind="stable")
            self._source = self._rows(self._shards, order, self._context_length, self._pad_id)
            self._epoch = epoch
        return self._source.read(index * self._batch_size, (index + 1) * self._batch_size)


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

    If all documents hold fewer, it is all of them. The last batch may have fewer rows. The last packed row is filled
    up with `pad_id`, which has no target and a document id of its own.
    """
    packed = layout == "packed"
    targets = shards.lengths - 1 if packed else np.minimum(shards.lengths - 1, context_length)
    num_documents = min(int(np.searchsorted(np.cumsum(targets), max_tokens)) + 1, shards.num_documents)
    source = (_PackedRows if packed else _PaddedRows)(shards, np.arange(num_documents), context_length, pad_id)
    return (source.read(i, min(i + batch_size, source.count)) for i in range(0, source.count, batch_size))


def pack(
    tokens: np.ndarray, documents: np.ndarray, context_length: int, *, has_target: np.ndarray | bool = True
) -> Batch:
    """Rows of `context_length` tokens, cut from documents that lie end to end.

    tokens: int64 (B * context_length + 1,); documents: the number of each token's document, rising. The last token of
    a document has no target. has_target: bool, like tokens[1:], False where there is none for another reason.
    """
    shape = (-1, context_length)
    same = documents[:-1] == documents[1:]
    numbers = documents[:-1].reshape(shape)
    return Batch(
        input_ids=torch.from_numpy(tokens[:-1].reshape(shape).copy()),
        labels=torch.from_numpy(np.where(same & has_target, tokens[1:], IGNORE).reshape(shape)),
        labels_all_positions=None,
        document_ids=torch.from_numpy((numbers - numbers[:, :1]).astype(np.int32)),
    )


class _PaddedRows:
    """Documents of `shards` in the given order, one a row."""

    def __init__(self, shards: TokenShards, order: np.ndarray, context_length: int, pad_id: int) -> None:
        self._shards, self._order, self._context_length, self._pad_id = shards, order, context_length, pad_id
        self.count = len(order)

    def read(self, first: int, last: int) -> Batch:
        tokens = np.full((last - first, self._context_length + 1), self._pad_id, dtype=np.int64)
        real = np.zeros(tokens.shape, dtype=bool)
        for row, document in enumerate(self._order[first:last]):
            ids = self._shards.document(document)[: tokens.shape[1]]
            tokens[row, : ids.size] = ids
            real[row, : ids.size] = True
        labels = tokens[:, 1:]
        return Batch(
            input_ids=torch.from_numpy(tokens[:, :-1].copy()),
            labels=torch.from_numpy(np.where(real[:, 1:], labels, IGNORE)),
            labels_all_positions=torch.from_numpy(labels.copy()),
            document_ids=None,
        )


class _PackedRows:
    """Documents of `shards` in the given order, end to end; positions behind their end hold `pad_id` and no target."""

    def __init__(self, shards: TokenShards, order: np.ndarray, context_length: int, pad_id: int) -> None:
        self._shards, self._order, self._context_length, self._pad_id = shards, order, context_length, pad_id
        self._bounds = np.concatenate([[0], np.cumsum(shards.lengths[order])])
        self._size = int(self._bounds[-1])
        self.count = -(-(self._size - 1) // context_length)

    def read(self, first: int, last: int) -> Batch:
        start, stop = first * self._context_length, last * self._context_length + 1
        positions = np.arange(start, stop)
        ranks = np.searchsorted(self._bounds, positions, side="right") - 1  # which document of the order
        tokens = np.full(stop - start, self._pad_id, dtype=np.int64)
        for rank in range(ranks[0], min(ranks[-1] + 1, len(self._order))):
            low, high = max(start, self._bounds[rank]), min(stop, self._bounds[rank + 1])
            offset = self._shards.offsets[self._order[rank]] - self._bounds[rank]
            tokens[low - start : high - start] = self._shards.tokens(offset + low, offset + high)
        return pack(tokens, ranks, self._context_length, has_target=positions[1:] < self._size)
