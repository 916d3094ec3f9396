"""Figures on paper: against counting by hand, tensors that autograd really keeps, and a published measurement."""

from io import StringIO

import pytest
import torch
from rich.console import Console

from sqa.cost import parameters, train_step_flops
from sqa.model import Transformer
from sqa.planning.scale import (
    ASSUMPTIONS,
    SCALE_VARIANTS,
    communication,
    compute_seconds,
    estimate,
    first_length,
    lengths_table,
    memory,
    saving,
    steps_table,
)
from sqa.variants import preset

LLAMA_3_8B = 8_030_261_248


def test_the_8b_shape_is_llama_3_8b() -> None:
    assert parameters(preset("8b", "gqa")) == LLAMA_3_8B
    assert 1.2e9 < parameters(preset("1.3b", "mha")) < 1.4e9


def test_seconds_are_flops_counted_one_by_one_over_rates() -> None:
    n, d, ff, vocab, layers = 1000, 4096, 14336, 128256, 32
    pairs = sum(range(1, n + 1))  # causal
    for heads, kv_heads, variant in ((32, 8, "gqa"), (16, 8, "sqa"), (8, 8, "xsqa")):
        scores = layers * heads * pairs * 2 * 2 * 128
        block = 2 * n * (2 * d * heads * 128 + 2 * d * kv_heads * 128 + 3 * d * ff)
        head = 2 * n * d * vocab
        attention, rest = compute_seconds(preset("8b", variant), n)
        assert attention == pytest.approx(scores * (2 / 616e12 + 2.5 / 561e12))
        assert rest == pytest.approx((4 * layers * block + 3 * head) / (0.40 * 989e12))
        once = compute_seconds(preset("8b", variant), n, recompute=False)
        assert once[0] == pytest.approx(scores * (1 / 616e12 + 2.5 / 561e12))
        assert once[1] == pytest.approx(3 * (layers * block + head) / (0.40 * 989e12))


def test_links() -> None:
    sent, seconds = communication(1_000_000, 8)
    assert sent == 3 * 2 * 1_000_000 * 7 / 8
    assert seconds == pytest.approx(sent / 450e9)
    sent, seconds = communication(1_000_000, 512)
    assert sent == 3 * 2 * 1_000_000 * 511 / 512
    # 63 of 64 parts come from other nodes, through 8 cards of 50 GB/s
    assert seconds == pytest.approx(6_000_000 * 63 / 64 / 400e9)
    assert communication(1_000_000, 1) == (0, 0)


def test_memory_by_part() -> None:
    found = memory(preset("8b", "gqa"), 16_384, 8)
    assert sum(found[part] for part in ("parameters", "gradients", "adam")) == 16 * LLAMA_3_8B / 8
    ends, block = 2 * 128_256 * 4096, 2 * 4096 * 5120 + 3 * 4096 * 14_336
    assert found["gathered"] == pytest.approx(2 * (ends + 2 * block), rel=1e-4)  # norms are left
    assert found["kept_activations"] == 32 * 16_384 * 4096 * 2
    assert found["logits_chunk"] == 2**28 * 4


@pytest.mark.parametrize("variant", ["gqa", "sqa", "ssqa"])
def test_one_block_is_what_autograd_keeps(variant: str) -> None:
    config = preset("larger", variant, num_layers=1, vocab_size=256, d_model=384, d_ff=1024)
    model, kept = Transformer(config), {}
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(2, 128, config.d_model, requires_grad=True)
    block = model.model.layers[0]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = block(x, block.self_attn.share(x))
    assert output.shape == x.shape
    # two bytes an element on paper, four here; the rest is RoPE's tables and one number a row
    assert 2 * memory(config, 256, 1)["one_block"] == pytest.approx(sum(kept.values()), rel=0.05)


def test_a_published_measurement_lies_between_recomputing_all_and_nothing() -> None:
    config = preset("8b", "gqa")
    slow, fast = (8192 / sum(compute_seconds(config, 8192, recompute=again)) for again in (True, False))
    assert slow < 6514 < 6667 < fast
    assert (round(slow, -2), round(fast, -2)) == (6000, 7900)
    assert f"{round(slow, -2):,.0f}" in " ".join(ASSUMPTIONS.split())
    assert f"{round(fast, -2):,.0f} with none" in ASSUMPTIONS


def test_where_the_saving_disappears() -> None:
    length = first_length("8b", "sqa", 0.05)
    assert length is not None
    assert saving("8b", "sqa", length - 1) < 0.05 <= saving("8b", "sqa", length)
    assert saving("8b", "sqa", 1 << 24) == pytest.approx(0.5, abs=0.005)
    assert first_length("8b", "mha", 0.05) is first_length("8b", "wide-gqa", 0.05) is None
    assert first_length("8b", "sqa", 0.5) is None


def test_estimates_fill_rows_and_the_tables_fit_80_columns() -> None:
    assert [estimate("1.3b", "sqa", n, 8).rows for n in (4096, 16_384, 131_072)] == [4, 1, 1]
    both = [estimate("8b", "SQA", 4096, gpus) for gpus in (8, 512)]
    config = preset("8b", "sqa")
    assert both[0].flops == 8 * train_step_flops(config, 4096, 4)  # four rows on each GPU
    assert both[0].memory == memory(config, 16_384, 8)
    assert both[1].flops == 64 * both[0].flops
    assert both[0].step_s == both[1].step_s == both[0].compute_s > both[1].communicate_s > both[0].communicate_s
    # rows of the same tokens on each of the GPUs
    assert both[0].gpu_hours_per_billion == pytest.approx(both[0].step_s * 8 / 3600 * 1e9 / (8 * 16_384))
    assert estimate("8b", "sqa", 512, 512, tokens=512).step_s == both[1].communicate_s  # too little to compute
    for shape in ("1.3b", "8b"):
        console = Console(width=80, record=True, file=StringIO())
        estimates = [estimate(shape, v, n, 512) for n in (4096, 131_072) for v in SCALE_VARIANTS]
        console.print(steps_table(shape, estimates))
        console.print(lengths_table(shape, [name.upper() for name in (*SCALE_VARIANTS, "lsqa")]))
        text = console.export_text()
        assert "…" not in text
        assert "wide GQA" in text
        assert "1.00x" in text
        steps = {(e.n, e.variant): e.step_s for e in estimates}
        rows = [line.split() for line in text.splitlines()]
        ratio = steps[131_072, "gqa"] / steps[131_072, "xsqa"]
        assert [row[-1] for row in rows if row[:2] == ["131,072", "xSQA"]] == [f"{ratio:.2f}x"]
        # of GQA's attention xSQA computes a quarter
        assert [row[-1] for row in rows if row[:1] == ["xSQA"]] == ["75%"]
        assert [row[-3:] for row in rows if row[:1] == ["lSQA"]] == [[">", "16M", "25%"]]  # it comes near a quarter
    assert max(map(len, ASSUMPTIONS.splitlines())) <= 80
