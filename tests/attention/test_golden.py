"""The golden vectors that porters get: small, complete, and right by code that shares nothing with ours."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from sqa import SparseQueryAttention
from sqa.attention.golden import PATH, read_golden, write_golden
from sqa.variants import VARIANTS

GOLDEN = read_golden()


def test_the_file_is_small_and_has_every_variant() -> None:
    assert PATH.stat().st_size < 200_000
    assert set(VARIANTS) < set(GOLDEN)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("name", GOLDEN)
def test_our_layer_gives_them(name: str, kernel: str) -> None:
    golden = GOLDEN[name]
    layer = SparseQueryAttention(golden.config, kernel=kernel)
    layer.load_state_dict(dict(golden.weights))
    torch.testing.assert_close(layer(golden.x, **golden.inputs), golden.output)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_port_in_plain_numpy_gives_them(name: str) -> None:
    """What a porter would write from docs/attention.md, one head and one query at a time, reading the file alone."""
    tensors = load_file(PATH)
    with safe_open(PATH, framework="np") as file:
        config = json.loads(file.metadata()["cases"])[name]["config"]
    x = tensors["x"].astype(np.float64)
    dim, hq, hkv = config["head_dim"], config["num_query_heads"], config["num_kv_heads"]
    weights = {key: tensors[f"{name}.{key}_proj.weight"].astype(np.float64) for key in "qkvo"}

    def turn(vector: np.ndarray, position: int) -> np.ndarray:
        half = dim // 2
        angles = position * config["rope"]["base"] ** (-np.arange(half) * 2 / dim)
        first, second = vector[:half], vector[half:]
        return np.concatenate(
            (first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles))
        )

    for b in range(len(x)):
        q, k, v = (x[b] @ weights[key].T for key in "qkv")
        heads = max(hq, hkv)
        for i in range(x.shape[1]):
            parts = []
            for head in range(heads):
                iq, ikv = head * hq // heads, head * hkv // heads
                query = turn(q[i, iq * dim : (iq + 1) * dim], i)
                keys = [turn(k[j, ikv * dim : (ikv + 1) * dim], j) for j in range(i + 1)]
                scores = np.array([query @ key for key in keys]) / math.sqrt(dim)
                shares = np.exp(scores - scores.max())
                parts.append(shares / shares.sum() @ v[: i + 1, ikv * dim : (ikv + 1) * dim])
            row = weights["o"] @ np.concatenate(parts)
            np.testing.assert_allclose(row, tensors[f"{name}.output"][b, i], rtol=1e-4, atol=1e-5)


def test_the_file_is_what_the_writer_makes(tmp_path: Path) -> None:
    write_golden(tmp_path / "golden.safetensors")
    made, kept = load_file(tmp_path / "golden.safetensors"), load_file(PATH)
    assert made.keys() == kept.keys()
    for name, value in kept.items():
        np.testing.assert_allclose(made[name], value, rtol=1e-5, atol=1e-5)
