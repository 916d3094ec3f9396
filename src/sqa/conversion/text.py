"""Rows of tokens for calibration, healing and the verdict, from as many documents as they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sqa.data.batches import Batch
from sqa.losses import IGNORE

Encode = Callable[[Sequence[str]], list[list[int]]]

_CHARACTERS_A_TOKEN = 3  # few, so that hardly a document is read that is not needed


def packed_batches(
    documents: Iterator[str], encode: Encode, end_id: int | None, *, rows: int, length: int, batch_size: int
) -> list[Batch]:
    """`rows` rows of `length` tokens in batches: the next documents end to end, closed by `end_id` where there is one.

    Attention is to be confined to `document_ids`; what follows a document is not to be predicted from it. Raises
    ValueError with both numbers when there is less text.
    """
    if not rows:
        return []
    needed = rows * length + 1
    tokens: list[Tensor] = []
    numbers: list[Tensor] = []
    found = 0
    while found < needed:
        texts = _take(documents, _CHARACTERS_A_TOKEN * (needed - found))
        if not texts:
            raise ValueError(
                f"text: {rows} rows of {length} tokens take {needed:,} tokens, but only {found:,} are left in this "
                f"split; give more documents, or ask for fewer or shorter rows"
            )
        for ids in encode(texts):
            if end_id is not None:
                ids = [*ids, end_id]
            numbers.append(torch.full((len(ids),), len(numbers), dtype=torch.int32))
            tokens.append(torch.tensor(ids, dtype=torch.int64))
            found += len(ids)
    stream, of = torch.cat(tokens)[:needed], torch.cat(numbers)[:needed]
    labels = torch.where(of[1:] == of[:-1], stream[1:], IGNORE)
    inputs, labels, of = (x.view(rows, length) for x in (stream[:-1], labels, of[:-1]))
    return [
        Batch(
            input_ids=inputs[start : start + batch_size],
            labels=labels[start : start + batch_size],
            labels_all_positions=None,
            document_ids=(of - of[:, :1])[start : start + batch_size],
        )
        for start in range(0, rows, batch_size)
    ]


def _take(documents: Iterator[str], characters: int) -> list[str]:
    """The next documents until they hold so many characters."""
    taken = []
    for text in documents:
        taken.append(text)
        characters -= len(text)
        if characters <= 0:
            break
    return taken
