"""Golden vectors for ports to other frameworks: weights, inputs and outputs of every variant and mask, in one file.

golden.safetensors beside this module holds everything in fp32, and needs nothing of this package to be read: the
tensors `x` (2, 9, 32), `padding_mask` and `document_ids` (2, 9), and for each case `CASE.q_proj.weight` and so on,
and `CASE.output` (2, 9, 32). The header's `cases` is JSON: {case: {"config": fields of AttentionConfig, "inputs": the
names of what the layer is given besides x}}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sqa.attention.layer import SparseQueryAttention
from sqa.config import AttentionConfig, Rope, RopeScaling
from sqa.files import write_safetensors
from sqa.variants import VARIANTS, variant

PATH = Path(__file__).with_name("golden.safetensors")


@dataclass(frozen=True, kw_only=True)
class Golden:
    """One case: a layer of `config` with `weights`, given x (2, 9, 32) and `inputs`, returns `output` (2, 9, 32)."""

    config: AttentionConfig
    weights: Mapping[str, Tensor]
    x: Tensor
    inputs: Mapping[str, Tensor]
    output: Tensor


def read_golden() -> dict[str, Golden]:
    """The cases of the file by name: each variant, causal; and SQA with each kind of mask and option."""
    with safe_open(PATH, framework="pt") as file:
        cases = json.loads(file.metadata()["cases"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {
        name: Golden(
            config=AttentionConfig.from_dict(case["config"]),
            weights={
                key.removeprefix(f"{name}."): value
                for key, value in tensors.items()
                if key.startswith(f"{name}.") and key != f"{name}.output"
            },
            x=tensors["x"],
            inputs={key: tensors[key] for key in case["inputs"]},
            output=tensors[f"{name}.output"],
        )
        for name, case in cases.items()
    }


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
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "padding_mask": torch.arange(9) >= torch.tensor([[0], [4]]),
        "document_ids": torch.tensor([[0] * 4 + [1] * 5, [3] * 2 + [1] * 3 + [3] * 4]),
    }
    x = torch.randn(2, 9, 32, generator=generator)
    tensors = {"x": x, **inputs}
    for name, (layer_config, names) in cases.items():
        layer = SparseQueryAttention(layer_config, kernel="reference")
        with torch.no_grad():
            for key, weight in layer.named_parameters():
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator) + (1.0 if "norm" in key else 0.0))
                tensors[f"{name}.{key}"] = weight.detach().clone()
            tensors[f"{name}.output"] = layer(x, **{key: inputs[key] for key in names})
    described = {name: {"config": config.to_dict(), "inputs": names} for name, (config, names) in cases.items()}
    write_safetensors(path, tensors, {"cases": json.dumps(described)})
