"""The golden vectors that porters get: small, complete, and right by code that shares nothing with ours."""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from sqa import AttentionConfig, Rope, RopeScaling, SparseQueryAttention, variant
from sqa.attention.golden import PATH, read_golden
from sqa.files import write_safetensors
from sqa.variants import VARIANTS

GOLDEN = read_golden()


def test_the_file_is_small_and_has_every_variant() -> None:
    assert PATH.stat().st_size < 300_000
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


def write_golden(path: Path) -> None:
    """Make the file anew with the oracle: for a new variant or option, never to make a failing test pass."""

    def config(name: str, **options: Any) -> AttentionConfig:
        return variant(name, d_model=32, num_heads=8, **options)

    padding, documents = ("padding_mask",), ("document_ids",)
    scaling = RopeScaling(kind="llama3", factor=4.0, original_max_seq_len=8)
    cases: dict[str, tuple[AttentionConfig, tuple[str, ...]]] = {
        **{name: (config(name), ()) for name in VARIANTS},
        "sqa-window-sinks": (config("sqa", window=3, num_sink_tokens=1), padding),
        "sqa-documents": (config("sqa", window=4), documents),
        "sqa-encoder": (config("sqa", causal=False, rope=None), padding),
        "sqa-softcap-qk-norm": (config("sqa", logit_softcap=2.0, qk_norm=True, scale=0.7, qkv_bias=True), ()),
        "sqa-rope-interleaved": (config("sqa", rope=Rope(interleaved=True)), ()),
        "sqa-rope-scaled": (config("sqa", rope=Rope(base=100.0, scaling=scaling)), ()),
    }
    inputs = {
        "padding_mask": torch.arange(9) >= torch.tensor([[0], [4]]),
        "document_ids": torch.tensor([[0] * 4 + [1] * 5, [3] * 2 + [1] * 3 + [3] * 4]),
    }
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    tensors = {"x": x, **inputs}
    for name, (layer_config, names) in cases.items():
        layer = SparseQueryAttention(layer_config, kernel="reference")
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))  # a new case leaves the others as they are
        with torch.no_grad():
            for key, weight in layer.named_parameters():
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator) + (1.0 if "norm" in key else 0.0))
                tensors[f"{name}.{key}"] = weight.detach().clone()
            tensors[f"{name}.output"] = layer(x, **{key: inputs[key] for key in names})
    described = {name: {"config": config.to_dict(), "inputs": names} for name, (config, names) in cases.items()}
    write_safetensors(path, tensors, {"cases": json.dumps(described)})


def test_the_file_is_what_the_writer_makes(tmp_path: Path) -> None:
    write_golden(tmp_path / "golden.safetensors")
    made, kept = load_file(tmp_path / "golden.safetensors"), load_file(PATH)
    assert made.keys() == kept.keys()
    for name, value in kept.items():
        np.testing.assert_allclose(made[name], value, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    write_golden(PATH)
