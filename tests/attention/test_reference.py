"""The oracle against loops in float64, the dense masks against their rule."""

import math

import numpy as np
import pytest
import torch
from attention_cases import BATCH, MASKS, by_rule, make_mask
from hypothesis import given
from hypothesis import strategies as st

from sqa.attention.kernels import attend
from sqa.attention.masks import Mask, dense_mask


def by_loops(q, k, v, seen, scale, softcap):
    """Attention of lists of float64 vectors, one weight at a time."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    heads = max(q.shape[2], k.shape[2])
    out = np.zeros((q.shape[0], q.shape[1], heads, q.shape[3]))
    for b in range(q.shape[0]):
        for h in range(heads):
            hq, hkv = h * q.shape[2] // heads, h * k.shape[2] // heads
            for i in range(q.shape[1]):
                weights = []
                for j in range(k.shape[1]):
                    score = scale * sum(q[b, i, hq, d] * k[b, j, hkv, d] for d in range(q.shape[3]))
                    if softcap is not None:
                        score = softcap * math.tanh(score / softcap)
                    weights.append(math.exp(score) if seen[b, i, j] else 0.0)
                total = sum(weights)
                for j, weight in enumerate(weights):
                    if total > 0:
                        out[b, i, h] += weight / total * v[b, j, hkv]
    return torch.from_numpy(out).float()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (2, 4), (1, 4)], ids=lambda n: f"{n[0]}-{n[1]}")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", ["none", "causal+window+sinks+padding"])
def test_oracle_equals_loops_in_float64(kind: str, softcap: float | None, heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    length = 6
    q = torch.randn(BATCH, length, heads[0], 4) * 2
    k, v = torch.randn(2, BATCH, length, heads[1], 4)
    mask = make_mask(kind, length)
    expected = by_loops(q, k, v, by_rule(mask, length, length), 0.7, softcap)
    got = attend(q, k, v, mask, scale=0.7, softcap=softcap, kernel="reference")
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("length", [1, 7, 20])
@pytest.mark.parametrize("kind", MASKS)
def test_dense_mask_follows_the_rule(kind: str, length: int) -> None:
    mask = make_mask(kind, length)
    dense = dense_mask(mask, length, length, torch.device("cpu"))
    expected = by_rule(mask, length, length)
    if dense is None:
        assert expected.all()
    else:
        assert torch.equal(dense[:, 0].expand_as(expected), expected)


@given(data=st.data(), length=st.integers(1, 14))
def test_drawn_masks_follow_the_rule(data: st.DataObject, length: int) -> None:
    rows = st.lists(st.integers(0, 2), min_size=length, max_size=length)
    causal = data.draw(st.booleans())
    window = data.draw(st.none() | st.integers(1, length + 2)) if causal else None
    mask = Mask(
        causal=causal,
        window=window,
        num_sink_tokens=data.draw(st.integers(0, 4)) if window else 0,
        padding_mask=data.draw(st.none() | st.tuples(rows, rows).map(lambda r: torch.tensor(r) > 0)),
        document_ids=data.draw(st.none() | st.tuples(rows, rows).map(torch.tensor)),
    )
    dense = dense_mask(mask, length, length, torch.device("cpu"))
    expected = by_rule(mask, length, length)
    assert expected.all() if dense is None else torch.equal(dense[:, 0].expand_as(expected), expected)
