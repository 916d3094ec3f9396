"""Rotary positions: against transformers' frequencies, both pairings, precision and devices."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from sqa import AttentionConfig, Rope, RopeScaling, SparseQueryAttention
from sqa.attention.rope import RotaryEmbedding, inverse_frequencies

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"factor": 4.0, "beta_fast": 24.0, "beta_slow": 2.0}
SCALINGS = {
    "none": (None, {}),
    "linear": ("linear", {"factor": 3.0}),
    "llama3": ("llama3", LLAMA3),
    "yarn": ("yarn", YARN),
    "yarn-defaults": ("yarn", {"factor": 16.0}),
    "yarn-attention-factor": ("yarn", {**YARN, "attention_factor": 1.25}),
}


def both(name: str, base: float, head_dim: int, original: int = 256) -> tuple[Rope, LlamaConfig]:
    """The same rotary embedding in our words and in transformers'."""
    kind, options = SCALINGS[name]
    theirs = {"rope_type": kind or "default", "rope_theta": base, **options}
    scaling = None
    if kind is not None:
        ours = dict(options)
        if kind != "linear":
            ours["original_max_seq_len"] = original
            theirs["original_max_position_embeddings"] = original
        scaling = RopeScaling(kind=kind, **ours)
    longest = int(original * options.get("factor", 1))
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=longest,
        rope_parameters=theirs,
    )
    return Rope(base=base, scaling=scaling), config


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "none"])
def test_frequencies_are_those_of_transformers(name: str, base: float, head_dim: int) -> None:
    rope, config = both(name, base, head_dim)
    expected, factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, torch.device("cpu"))
    got, got_factor = inverse_frequencies(rope, head_dim)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    assert got_factor == pytest.approx(factor, abs=1e-6)


@pytest.mark.parametrize("name", SCALINGS)
def test_rotation_is_that_of_transformers(name: str) -> None:
    rope, config = both(name, 10_000.0, 16)
    q, k = torch.randn(2, 40, 4, 16), torch.randn(2, 40, 2, 16)
    positions = torch.arange(7, 47)[None].expand(2, -1)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    expected = [x.transpose(1, 2) for x in apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)]
    for got, want in zip(turned(RotaryEmbedding(rope, 16), q, k, 7), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_interleaved_is_half_split_with_permuted_rows() -> None:
    """The authors' checkpoints pair 2j with 2j + 1: permuting q and k rows maps one onto the other."""
    torch.manual_seed(0)
    config = AttentionConfig(d_model=64, num_heads=8, num_query_heads=4, num_kv_heads=2)
    half = SparseQueryAttention(config)
    paired = SparseQueryAttention(config.replace(rope=Rope(interleaved=True)))
    state = half.state_dict()
    for name in ("q_proj.weight", "k_proj.weight"):
        state[name] = state[name].view(-1, 2, 4, 64).transpose(1, 2).reshape(-1, 64)
    paired.load_state_dict(state)
    x = torch.randn(2, 9, 64)
    torch.testing.assert_close(paired(x), half(x))
    paired.load_state_dict(half.state_dict())
    assert not torch.allclose(paired(x), half(x))


def turned(rotary: RotaryEmbedding, q: Tensor, k: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
    return rotary(q, k, *rotary.tables(start, q.shape[1]))


def scores(rotary: RotaryEmbedding, q: Tensor, k: Tensor, start: int) -> Tensor:
    q, k = turned(rotary, q, k, start)
    return torch.einsum("bihd,bjhd->bhij", q, k)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distance_alone(interleaved: bool) -> None:
    rotary = RotaryEmbedding(Rope(interleaved=interleaved), 16)
    q, k = torch.randn(2, 1, 12, 3, 16)
    torch.testing.assert_close(scores(rotary, q, k, 0), scores(rotary, q, k, 50), atol=1e-4, rtol=1e-4)


def test_position_zero_turns_nothing_and_lengths_stay() -> None:
    rotary = RotaryEmbedding(Rope(), 16)
    q, k = torch.randn(2, 1, 12, 3, 16)
    rotated, _ = turned(rotary, q, k)
    torch.testing.assert_close(rotated[:, 0], q[:, 0])
    torch.testing.assert_close(rotated.norm(dim=-1), q.norm(dim=-1))


def layer() -> SparseQueryAttention:
    return SparseQueryAttention(AttentionConfig(d_model=64, num_heads=8))


def test_tables_stay_fp32() -> None:
    exact = RotaryEmbedding(Rope(), 8).tables(0, 3000)
    for moved in (layer().to(torch.bfloat16), layer().half().float(), layer().to(torch.bfloat16).double()):
        assert moved.rotary is not None
        for table, expected in zip(moved.rotary.tables(0, 3000), exact, strict=True):
            assert table.dtype == torch.float32
            assert torch.equal(table, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(RotaryEmbedding(Rope(), 8).tables(0, 3000)[0], exact[0])


def test_tables_survive_the_meta_device() -> None:
    with torch.device("meta"):
        empty = layer()
    full = layer()
    empty.to_empty(device="cpu")
    empty.load_state_dict(full.state_dict())
    x = torch.randn(2, 9, 64)
    assert torch.equal(empty(x), full(x))


def test_no_table_is_stored() -> None:
    assert sorted(layer().state_dict()) == [f"{name}_proj.weight" for name in "koqv"]


def test_far_positions_are_exact() -> None:
    """What a bf16 table would get wrong: angles above 256 radians."""
    rotary = RotaryEmbedding(Rope(), 16)
    cos, sin = rotary.tables(100_000, 3)
    angles = torch.arange(100_000, 100_003, dtype=torch.float64)[:, None] * rotary.inverse.double()
    torch.testing.assert_close(cos[:, 0], angles.cos().float(), atol=1e-2, rtol=0)
    torch.testing.assert_close(sin[:, 0], angles.sin().float(), atol=1e-2, rtol=0)
