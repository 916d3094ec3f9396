"""Masks by name, and what they mean in plain loops: written without looking at the code under test."""

import functools

import torch
from torch import Tensor

from sqa.attention.masks import Mask

BATCH = 2


def by_rule(mask: Mask, num_queries: int, num_keys: int, batch: int = BATCH) -> Tensor:
    """Bool (B, Tq, Tk): may query i read key j, decided one pair at a time."""
    seen = torch.zeros(batch, num_queries, num_keys, dtype=torch.bool)
    for b in range(batch):
        ids = [0] * num_keys if mask.document_ids is None else mask.document_ids[b].tolist()
        real = [True] * num_keys if mask.padding_mask is None else mask.padding_mask[b].tolist()
        document, rank = [0] * num_keys, [0] * num_keys  # rank: real tokens of the document before this one
        for j in range(1, num_keys):
            same = ids[j] == ids[j - 1]
            document[j] = document[j - 1] + (not same)
            rank[j] = rank[j - 1] + real[j - 1] if same else 0
        for i in range(num_queries):
            for j in range(num_keys):
                ok = real[j] and (not mask.causal or j <= i)
                if mask.document_ids is not None:
                    ok = ok and document[i] == document[j]
                if mask.window is not None and i - j >= mask.window:
                    ok = ok and rank[j] < mask.num_sink_tokens
                seen[b, i, j] = ok
    return seen


def left_padding(length: int, batch: int = BATCH) -> Tensor:
    """Row b starts with b * (a third of the length) padding positions."""
    pads = torch.arange(batch)[:, None] * (length // 3)
    return torch.arange(length) >= pads


def documents(length: int, batch: int = BATCH) -> Tensor:
    """Row b: documents of b + 3, twice that, ... tokens; two that are not neighbours share an id."""
    rows = []
    for b in range(batch):
        row: list[int] = []
        while len(row) < length:
            row += [len(set(row)) % 3] * (len(row) + b + 3)
        rows.append(row[:length])
    return torch.tensor(rows)


def make_mask(kind: str, length: int) -> Mask:
    """The mask `kind` for BATCH rows of `length` keys."""
    parts = kind.split("+")
    window = max(1, length // 5)
    return Mask(
        causal="causal" in parts,
        window=window if "window" in parts else None,
        num_sink_tokens=3 if "sinks" in parts else 0,
        padding_mask=left_padding(length) if "padding" in parts else None,
        document_ids=documents(length) if "documents" in parts else None,
    )


@functools.cache
def seen(kind: str, length: int) -> Tensor:
    """`by_rule` of `make_mask`: bool (B, T, T)."""
    return by_rule(make_mask(kind, length), length, length)


MASKS = (
    "none",
    "padding",
    "documents",
    "causal",
    "causal+padding",
    "causal+documents",
    "causal+documents+padding",
    "causal+window",
    "causal+window+sinks",
    "causal+window+padding",
    "causal+window+sinks+padding",
    "causal+window+documents",
    "causal+window+sinks+documents",
)
