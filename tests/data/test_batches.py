import dataclasses
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqa.data.batches import Batch, Batches, Layout, evaluation_batches
from sqa.data.shards import TokenShards, write_shards
from sqa.losses import IGNORE

PAD = 1


def make_shards(lengths: list[int], folder: Path | None = None) -> TokenShards:
    """Documents whose tokens are all different (from 2 on), so that every token names its place."""
    starts = 2 + np.cumsum([0, *lengths[:-1]])
    documents = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]
    with tempfile.TemporaryDirectory() as temporary:
        target = (folder or Path(temporary)) / "shards"
        return write_shards(target, [documents], vocab_size=70_000, origin={}, tokens_per_file=16)


def same(one: Batch, other: Batch) -> bool:
    def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
        return a is b if a is None or b is None else torch.equal(a, b)

    return all(equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(Batch))


def padded(shards: TokenShards, seed: int = 0, batch_size: int = 2, context: int = 6) -> Batches:
    return Batches(shards, layout="padded", batch_size=batch_size, context_length=context, pad_id=PAD, seed=seed)


def packed(shards: TokenShards, seed: int = 0, batch_size: int = 2, context: int = 6) -> Batches:
    return Batches(shards, layout="packed", batch_size=batch_size, context_length=context, pad_id=PAD, seed=seed)


def stored(shards: TokenShards, layout: Layout, batch_size: int, context: int) -> Batch:
    """The first rows in stored order."""
    return next(
        evaluation_batches(
            shards, layout=layout, batch_size=batch_size, context_length=context, pad_id=PAD, max_tokens=1000
        )
    )


def num_targets(batch: Batch) -> int:
    return int((batch.labels != IGNORE).sum())


LENGTHS = [5, 9, 3, 12, 7, 2, 8, 4, 30, 6, 2]


@pytest.fixture
def shards(tmp_path: Path) -> TokenShards:
    return make_shards(LENGTHS, tmp_path)


@pytest.mark.parametrize("make", [padded, packed])
def test_a_batch_is_a_pure_function_of_arguments_and_t(shards: TokenShards, make: type) -> None:
    batches, other = make(shards), make(shards)
    count = 3 * batches.batches_per_epoch + 1
    forward = [batches.batch(t) for t in range(count)]
    for t in reversed(range(count)):
        assert same(other.batch(t), forward[t])
    assert not same(make(shards, seed=1).batch(0), forward[0])
    epochs = [forward[e * batches.batches_per_epoch] for e in range(3)]
    assert not same(epochs[0], epochs[1])
    assert not same(epochs[1], epochs[2])


@pytest.mark.parametrize("make", [padded, packed])
def test_rows_are_taken_from_every_tensor(shards: TokenShards, make: type) -> None:
    whole = make(shards, batch_size=4).batch(1)
    for rows in (slice(1, 3), [0, 3]):
        part = whole.take(rows)
        for field in dataclasses.fields(Batch):
            tensor = getattr(whole, field.name)
            assert tensor is None or torch.equal(getattr(part, field.name), tensor[rows])


def test_the_order_of_a_seed_never_changes(shards: TokenShards) -> None:
    """Golden: runs that are resumed or compared across machines depend on it."""
    batches = padded(shards, seed=7, batch_size=11)
    starts = (2 + np.cumsum([0, *LENGTHS[:-1]])).tolist()
    orders = [[starts.index(first) for first in batches.batch(t).input_ids[:, 0].tolist()] for t in (0, 1)]
    assert orders == [[6, 3, 4, 10, 9, 0, 2, 8, 7, 5, 1], [1, 3, 2, 10, 7, 8, 4, 5, 9, 0, 6]]


def test_padded_rows(tmp_path: Path) -> None:
    shards = make_shards([3, 5, 4, 20], tmp_path)  # documents 2-4, 5-9, 10-13, 14-33
    batch = stored(shards, "padded", 4, 4)
    assert batch.input_ids.tolist() == [[2, 3, 4, PAD], [5, 6, 7, 8], [10, 11, 12, 13], [14, 15, 16, 17]]
    assert batch.labels.tolist() == [
        [3, 4, IGNORE, IGNORE],
        [6, 7, 8, 9],
        [11, 12, 13, IGNORE],
        [15, 16, 17, 18],
    ]
    assert batch.labels_all_positions is not None
    assert batch.labels_all_positions.tolist() == [
        [3, 4, PAD, PAD],
        [6, 7, 8, 9],
        [11, 12, 13, PAD],
        [15, 16, 17, 18],
    ]
    assert batch.document_ids is None
    assert num_targets(batch) == 2 + 4 + 3 + 4
    assert batch.input_ids.dtype == batch.labels.dtype == batch.labels_all_positions.dtype == torch.int64


def test_a_padded_epoch_shows_every_document_once_but_the_remainder(shards: TokenShards) -> None:
    batches = padded(shards, batch_size=4)
    assert batches.batches_per_epoch == 2
    for epoch in range(2):
        rows = torch.cat([batches.batch(2 * epoch + t).input_ids[:, 0] for t in range(2)])
        assert len(set(rows.tolist())) == 8


def test_packed_rows(tmp_path: Path) -> None:
    shards = make_shards([3, 2, 6], tmp_path)  # documents 2-4, 5-6, 7-12
    batch = stored(shards, "packed", 2, 5)
    assert batch.input_ids.tolist() == [[2, 3, 4, 5, 6], [7, 8, 9, 10, 11]]
    assert batch.labels.tolist() == [[3, 4, IGNORE, 6, IGNORE], [8, 9, 10, 11, 12]]
    assert batch.document_ids is not None
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    assert batch.document_ids.dtype == torch.int32
    assert batch.labels_all_positions is None
    assert num_targets(batch) == 8


def test_a_document_goes_on_in_the_next_row(tmp_path: Path) -> None:
    batch = stored(make_shards([3, 10], tmp_path), "packed", 2, 5)
    assert batch.document_ids is not None
    assert batch.labels.tolist() == [[3, 4, IGNORE, 6, 7], [8, 9, 10, 11, 12]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]


documents = st.lists(st.integers(2, 40), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(lengths=documents, batch_size=st.integers(1, 4), context=st.integers(2, 24), epoch=st.integers(0, 2))
def test_packed_epochs(lengths: list[int], batch_size: int, context: int, epoch: int) -> None:
    """Rows laid end to end are the documents in a permuted order, and each pair of tokens is learned once."""
    shards = make_shards(lengths)
    if shards.num_tokens <= batch_size * context:
        with pytest.raises(ValueError, match=f"takes {batch_size * context + 1} tokens.* only {sum(lengths)}"):
            packed(shards, 3, batch_size, context)
        return
    batches = packed(shards, 3, batch_size, context)
    count = batches.batches_per_epoch
    assert count == (sum(lengths) - 1) // context // batch_size
    epoch_batches = [batches.batch(epoch * count + t) for t in range(count)]
    stream = torch.cat([batch.input_ids.flatten() for batch in epoch_batches]).tolist()
    targets = torch.cat([batch.labels.flatten() for batch in epoch_batches]).tolist()
    ids = torch.cat([batch.document_ids for batch in epoch_batches])  # type: ignore[arg-type,misc]

    owner = {token: i for i in range(len(lengths)) for token in shards.document(i).tolist()}
    visited = list(dict.fromkeys(owner[token] for token in stream))
    expected = [token for document in visited for token in shards.document(document).tolist()]
    assert stream == expected[: len(stream)]
    # the remainder is less than a batch and the token after the last
    assert sum(lengths) - len(stream) <= batch_size * context

    follower = {a: b for i in range(len(lengths)) for a, b in zip(*two_views(shards, i), strict=True)}
    assert targets == [follower.get(token, IGNORE) for token in stream]
    learned = Counter(target for target in targets if target != IGNORE)
    assert set(learned.values()) <= {1}

    owners = torch.tensor([owner[token] for token in stream]).reshape(ids.shape)
    assert (ids[:, 0] == 0).all()
    steps = ids.diff(dim=1)
    assert ((steps == 0) | (steps == 1)).all()
    assert torch.equal(steps == 1, owners.diff(dim=1) != 0)


def two_views(shards: TokenShards, document: int) -> tuple[list[int], list[int]]:
    tokens = shards.document(document).tolist()
    return tokens[:-1], tokens[1:]


@settings(max_examples=60, deadline=None)
@given(
    lengths=documents,
    layout=st.sampled_from(["padded", "packed"]),
    batch_size=st.integers(1, 4),
    context=st.integers(2, 24),
    max_tokens=st.integers(1, 200),
)
def test_evaluation_set(lengths: list[int], layout: str, batch_size: int, context: int, max_tokens: int) -> None:
    """Whole documents in stored order, no more of them than it takes, every target once, no empty batch."""
    shards = make_shards(lengths)

    def evaluate() -> list[Batch]:
        return list(
            evaluation_batches(
                shards,
                layout=layout,  # type: ignore[arg-type]
                batch_size=batch_size,
                context_length=context,
                pad_id=PAD,
                max_tokens=max_tokens,
            )
        )

    batches = evaluate()
    assert all(same(a, b) for a, b in zip(batches, evaluate(), strict=True))
    assert all(num_targets(batch) > 0 for batch in batches)
    assert all(batch.input_ids.shape == (batch_size, context) for batch in batches[:-1])
    targets = [label for batch in batches for label in batch.labels.flatten().tolist() if label != IGNORE]
    seen = [two_views(shards, i)[1][: context if layout == "padded" else None] for i in range(len(lengths))]
    sizes = np.cumsum([len(tokens) for tokens in seen])
    needed = next((i + 1 for i, size in enumerate(sizes) if size >= max_tokens), len(lengths))
    assert targets == [token for tokens in seen[:needed] for token in tokens]
    for batch in batches:
        if batch.document_ids is None:
            assert batch.labels_all_positions is not None
            assert (batch.labels_all_positions[batch.labels == IGNORE] == PAD).all()
        else:
            real, filled = batch.input_ids != PAD, batch.input_ids == PAD
            assert (batch.labels[filled] == IGNORE).all()
            for row in range(len(real)):
                inside, outside = batch.document_ids[row][real[row]], batch.document_ids[row][filled[row]]
                assert not set(inside.tolist()) & set(outside.tolist())


def test_a_split_that_fills_no_batch_is_refused(shards: TokenShards) -> None:
    with pytest.raises(ValueError, match="batch_size 12 needs as many documents, but the corpus has only 11"):
        padded(shards, batch_size=12)
    with pytest.raises(ValueError, match="context_length 1024 takes 2049 tokens, but the corpus has only 88"):
        packed(shards, context=1024)


def test_batches_do_not_share_memory(shards: TokenShards) -> None:
    """Writing into one tensor changes neither another one nor the files."""
    for make in (padded, packed):
        batches = make(shards)
        batch = batches.batch(0)
        labels = batch.labels.clone()
        batch.input_ids.zero_()
        assert torch.equal(batch.labels, labels)
        assert not same(batches.batch(0), batch)
        tensors = [getattr(batch, field.name) for field in dataclasses.fields(Batch)]
        assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
