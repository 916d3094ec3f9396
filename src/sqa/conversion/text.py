"""Rows of tokens for calibration, healing and the verdict, from as many documents as they take."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sqa.data.batches import Batch
from sqa.errors import InputError
from sqa.losses import IGNORE


def packed_batches(documents: Iterator[list[int]], *, rows: int, length: int, batch_size: int) -> list[Batch]:
    """`rows` rows of `length` tokens in batches: the next documents (token ids) end to end.

    Attention is to be confined to `document_ids`; what follows a document is not to be predicted from it. Raises
    ValueError with both numbers when there is less text.
    """
    if not rows:
        return []
    needed = rows * length + 1
    found: list[torch.Tensor] = []
    count = 0
    while count < needed:
        ids = next(documents, None)
        if ids is None:
            raise InputError(
                f"text: {rows} rows of {length} tokens take {needed:,} tokens, but only {count:,} are left in this "
                f"split; give more documents, or ask for fewer or shorter rows"
            )
        found.append(torch.tensor(ids, dtype=torch.int64))
        count += len(ids)
    numbers = torch.arange(len(found), dtype=torch.int32).repeat_interleave(torch.tensor([len(ids) for ids in found]))
    stream, of = torch.cat(found)[:needed], numbers[:needed]
    labels = torch.where(of[1:] == of[:-1], stream[1:], IGNORE)
    inputs, labels, of = (x.view(rows, length).split(batch_size) for x in (stream[:-1], labels, of[:-1]))
    return [
        Batch(input_ids=a, labels=b, labels_all_positions=None, document_ids=c - c[:, :1])
        for a, b, c in zip(inputs, labels, of, strict=True)
    ]
