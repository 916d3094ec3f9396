"""Golden vectors for ports to other frameworks: weights, inputs and outputs of every variant and mask, in one file.

golden.safetensors beside this module holds everything in fp32, and needs nothing of this package to be read: the
tensors `x` (2, 9, 32), `padding_mask` and `document_ids` (2, 9), and for each case `CASE.q_proj.weight` and so on,
and `CASE.output` (2, 9, 32). The header's `cases` is JSON: {case: {"config": fields of AttentionConfig, "inputs": the
names of what the layer is given besides x}}.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from sqa.config import AttentionConfig

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
