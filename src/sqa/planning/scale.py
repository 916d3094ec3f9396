"""An estimate of what training a large model takes, from closed forms and published rates of the hardware.

A step takes as long as the slower of computing and communicating, which FSDP does at the same time. Attention computes
at its published rate, all else at one share of the peak. ASSUMPTIONS has the rest.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from sqa.config import ModelConfig
from sqa.cost import attention_flops, forward_flops, parameters, train_step_flops
from sqa.losses import CHUNK_ELEMENTS
from sqa.records import at_least_one
from sqa.tables import known, make_table
from sqa.variants import BASELINE, MEASURED_VARIANTS, VARIANTS, find_variant, preset

SCALE_VARIANTS = ("mha", *MEASURED_VARIANTS)
BACKWARD = 2.5
"""FLOPs of attention's backward over its forward: the backward computes the scores again."""

PEAK, REST_SHARE = 989e12, 0.40
"""FLOP/s of an H100, and the share of them that all but attention reaches."""
ATTENTION_FORWARD, ATTENTION_BACKWARD = 616e12, 561e12
"""FLOP/s of attention on an H100."""
NODE_SIZE, INSIDE, ACROSS = 8, 450e9, 50e9
"""H100s in a node, and bytes/s of a GPU's links in each direction, inside its node and to others."""

ASSUMPTIONS = """\
Hardware: H100 SXM with 80 GB, 989 TFLOP/s in bf16 without sparsity, NVLink with
450 GB/s each way (data sheet: 900 both ways); DGX H100, 8 in a node, each with
a 400 Gb/s network card (user guide).
Attention: 616 TFLOP/s forward, causal, and 561 backward, not causal, which is
all there is (FlashAttention-3, arXiv 2407.08608, figures 5 and 6: head_dim 128,
16k tokens); a backward is 2.5 forwards. Wide GQA's heads of 256 run as fast.
All else: 40 % of the peak, chosen so that Llama 3 8B at 8k tokens makes 6,000
tokens/s a GPU with every block run again in the backward and 7,900 with none:
torchtitan, which runs some again, measured 6,667 on 8 H100s of 500 W, and 6,514
on 128 (benchmarks/llama3_h100_202412_torchtitan.md in its repository).
FSDP2 over all GPUs: parameters, gradients and both of Adam's states sharded, in
fp32; parameters gathered in bf16 for the forward and again for the backward,
gradients reduced in bf16, all while other blocks compute; links at full rate,
what enters a node shared by its 8 cards. A GPU takes rows of 16,384 tokens in
all, or one longer row.
Memory beside the states: the input of each block, one block's tensors, weights
of two blocks, embedding and head gathered, one chunk of logits. Every block
runs again in the backward: that counts as time, not as FLOPs of the step.
Not counted: latency, stragglers, fragmentation, gradients of a block's tensors,
loading, checkpoints; in the links nothing but parameters and gradients."""


@dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """A training step. `memory` (by part) and `communication` are bytes of one GPU; `flops` are those of all GPUs."""

    variant: str
    n: int
    gpus: int
    rows: int
    flops: int
    memory: dict[str, float]
    communication: float
    compute_s: float
    communicate_s: float

    @property
    def step_s(self) -> float:
        """Seconds of the whole step."""
        return max(self.compute_s, self.communicate_s)

    @property
    def gpu_hours_per_billion(self) -> float:
        """GPU hours for 1e9 tokens."""
        return self.step_s / (self.rows * self.n) * 1e9 / 3600

    def to_dict(self) -> dict[str, Any]:
        """The fields, and the two figures that follow from them, for --json."""
        return asdict(self) | {"step_s": self.step_s, "gpu_hours_per_billion": self.gpu_hours_per_billion}


def compute_seconds(config: ModelConfig, n: int, *, recompute: bool = True) -> tuple[float, float]:
    """Seconds of attention and of all else for `n` tokens on one H100; with `recompute`, blocks run forward twice."""
    scores = sum(attention_flops(layer, n) for layer in config.layers)
    matrix = forward_flops(config, n) - scores
    again = matrix - 2 * n * config.vocab_size * config.d_model if recompute else 0
    forward = scores * (1 + recompute) / ATTENTION_FORWARD
    rest = (3 * matrix + again) / (REST_SHARE * PEAK)
    return forward + BACKWARD * scores / ATTENTION_BACKWARD, rest


def communication(num_parameters: int, gpus: int) -> tuple[float, float]:
    """Bytes that a GPU sends in a step, and their seconds over the slower link: two gathers and a reduction in bf16."""
    size = 3 * 2 * num_parameters
    nodes = math.ceil(gpus / NODE_SIZE)
    inside = size * (gpus - 1) / gpus / INSIDE
    return size * (gpus - 1) / gpus, max(inside, size * (nodes - 1) / nodes / (NODE_SIZE * ACROSS))


def memory(config: ModelConfig, tokens: int, gpus: int) -> dict[str, float]:
    """Bytes of a GPU's memory by part, with `tokens` positions on it."""
    total, layer, d = parameters(config), config.layers[0], config.d_model
    ends = 2 * config.vocab_size * d
    widths = 5 * d + 2 * layer.query_width + layer.output_width + 3 * layer.kv_width + 4 * config.d_ff
    return {
        "parameters": 4 * total / gpus,
        "gradients": 4 * total / gpus,
        "adam": 8 * total / gpus,
        "gathered": 2 * (ends + 2 * (total - ends) / config.num_layers),
        "kept_activations": 2 * tokens * d * config.num_layers,
        "one_block": 2 * tokens * widths,
        "logits_chunk": 4 * min(tokens * config.vocab_size, CHUNK_ELEMENTS["cuda"]),
    }


def estimate(shape: str, variant: str, n: int, gpus: int, *, tokens: int = 16_384) -> StepEstimate:
    """A step of a named shape on so many H100s, each with rows of `n` tokens: `tokens` in all, or one row.

    Raises InputError for an unknown shape or variant and for numbers below 1.
    """
    at_least_one("scale", n=n, gpus=gpus, tokens=tokens)
    config = preset(shape, variant, max_seq_len=n)
    rows = max(1, tokens // n)
    sent, seconds = communication(parameters(config), gpus)
    return StepEstimate(
        variant=find_variant(variant)[0],
        n=n,
        gpus=gpus,
        rows=rows,
        flops=gpus * train_step_flops(config, n, rows),
        memory=memory(config, rows * n, gpus),
        communication=sent,
        compute_s=rows * sum(compute_seconds(config, n)),
        communicate_s=seconds,
    )


def saving(shape: str, variant: str, n: int) -> float:
    """The share of the baseline's computing time that attention saves at `n` tokens."""
    (own, _), (theirs, rest) = (compute_seconds(preset(shape, v, max_seq_len=n), n) for v in (variant, BASELINE))
    return (theirs - own) / (theirs + rest)


def first_length(shape: str, variant: str, share: float) -> int | None:
    """The smallest number of tokens at which attention saves that share; None if it is above 16M."""
    lengths = range(1, 1 << 24)
    found = bisect_left(lengths, share, key=lambda n: saving(shape, variant, n))
    return lengths[found] if found < len(lengths) else None


def steps_table(shape: str, estimates: Sequence[StepEstimate]) -> Table:
    """Steps on one number of GPUs, at most 80 columns wide."""
    headings = ("N", "variant", "PFLOP\na step", "states\nGB", "other\nGB", "sent\nGB", "links\ns", "step\ns",
                "GPU h a\nG token", "vs\nGQA")  # fmt: skip
    built = make_table(*headings, title=f"{shape}, {estimates[0].gpus} H100s", gap=2)
    for i, e in enumerate(estimates):
        if i and e.n != estimates[i - 1].n:
            built.add_row()
        base = estimate(shape, BASELINE, e.n, e.gpus, tokens=e.rows * e.n)
        states = sum(e.memory[part] for part in ("parameters", "gradients", "adam"))
        other = sum(e.memory.values()) - states
        built.add_row(
            f"{e.n:,}", VARIANTS[e.variant].label, f"{e.flops / 1e15:,.1f}", f"{states / 1e9:#.3g}",
            f"{other / 1e9:.1f}", f"{e.communication / 1e9:.1f}", f"{e.communicate_s:.3f}", f"{e.step_s:.2f}",
            f"{e.gpu_hours_per_billion:.1f}", f"{base.step_s / e.step_s:.2f}x",
        )  # fmt: skip
    return built


def lengths_table(shape: str, variants: Sequence[str]) -> Table:
    """The lengths N from which attention saves certain shares of GQA's computing time."""
    shares = (0.05, 0.1, 0.25)
    headings = ("variant", *(f"{share:.0%} from N" for share in shares), "at most")
    built = make_table(*headings, title=f"{shape}: attention saved, as a share of GQA's step", gap=2)
    for name, row in map(find_variant, variants):
        lengths = [first_length(shape, name, share) for share in shares]
        heads, theirs = (preset(shape, v).layers[0].num_output_heads for v in (name, BASELINE))
        if any(lengths):
            built.add_row(row.label, *(known("{:,}", n, "> 16M") for n in lengths), f"{1 - heads / theirs:.0%}")
    return built
