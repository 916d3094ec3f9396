"""`check_kernels`: what the profiler says against what the kernel table says."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from typer.testing import CliRunner

from sqa.attention import check, fused, pytorch
from sqa.attention.call import Call
from sqa.attention.check import Checked, check_kernels, expected_implementations, implementation
from sqa.attention.kernels import KERNELS, Kernel
from sqa.cli import app
from sqa.config import AttentionConfig


@pytest.fixture
def without_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles for a minute."""
    monkeypatch.delitem(KERNELS, "flex")


@pytest.mark.usefixtures("without_flex")
def test_the_table_is_true_on_this_machine() -> None:
    rows = check_kernels("cpu")
    assert [row for row in rows if not row.ok] == []
    ran = {(row.kernel, row.forward, row.backward) for row in rows}
    expected = {("reference", "unfused", "unfused"), ("sdpa", "cpu flash", "cpu flash"), ("blocks", "blocks", "blocks")}
    assert ran == expected | ({("fused", "own", "own")} if fused.lacks() is None else set())
    assert {row.mask for row in rows if row.kernel == "sdpa"} == set(check.MASKS)


@pytest.mark.usefixtures("without_flex")
def test_a_silent_fall_to_unfused_math_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def math(call: Call, form: torch.Tensor | None) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return pytorch.sdpa(call, form)

    monkeypatch.setitem(KERNELS, "sdpa", Kernel(**{**vars(KERNELS["sdpa"]), "run": math}))
    rows = [row for row in check_kernels("cpu") if row.kernel == "sdpa"]
    assert rows
    assert {(row.forward, row.backward, row.ok) for row in rows} == {("math", "unfused", False)}


@pytest.mark.usefixtures("without_flex")
def test_a_kernel_that_does_not_run_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call: Call, form: object) -> torch.Tensor:
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setitem(KERNELS, "blocks", Kernel(**{**vars(KERNELS["blocks"]), "run": broken}))
    rows = [row for row in check_kernels("cpu") if row.kernel == "blocks"]
    assert {(row.error, row.ok) for row in rows} == {("no kernel image is available", False)}


# names of events as PyTorch's profiler records them on CUDA
MADE_UP = {
    "flash": [
        "aten::scaled_dot_product_attention",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_flash_attention_forward",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, cutlass::bfloat16_t>>",
    ],
    "efficient": [
        "aten::scaled_dot_product_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_efficient_attention_forward",
        "fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)",
    ],
    "cudnn": [
        "aten::scaled_dot_product_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_cudnn_attention_forward",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0",
    ],
    "math": [
        "aten::scaled_dot_product_attention",
        "aten::_scaled_dot_product_attention_math",
        "aten::matmul",
        "aten::bmm",
        "aten::_softmax",
        "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_nn",
    ],
    "varlen": [
        "torch_attn::_varlen_attn",
        "aten::_flash_attention_forward",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, cutlass::half_t>>",
    ],
    "flex": ["Torch-Compiled Region: 0/0", "triton_tem_fused_flex_attention_0"],
    "unfused": ["aten::einsum", "aten::bmm", "aten::softmax", "aten::bmm"],
    "nothing known": ["aten::empty"],
}


@pytest.mark.parametrize("name", MADE_UP)
def test_profiles_as_cuda_would_give_them_are_told_apart(name: str) -> None:
    assert implementation(MADE_UP[name]) == name
    assert implementation(reversed(MADE_UP[name])) == name


def test_what_cuda_is_expected_to_run_is_what_pytorch_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an H100: masked GQA in bf16 is cuDNN's; in fp32 no fused kernel shares KV heads, so they are expanded."""

    def answer(dtype, num_heads, num_kv_heads, head_dim, masked, causal, grad):  # type: ignore[no-untyped-def]
        if dtype == torch.float32:
            return ("efficient",) if num_heads == num_kv_heads else ()
        return ("cudnn",) if masked else ("flash", "cudnn")

    monkeypatch.setattr(pytorch, "_answer", answer)
    config = AttentionConfig(d_model=128, num_heads=8, num_kv_heads=4)

    def expected(kernel: str = "sdpa", **options) -> tuple[str, ...]:  # type: ignore[no-untyped-def]
        return expected_implementations(Call.of_layer(config, length=64, device="cuda", **options), kernel)

    assert expected(dtype=torch.bfloat16) == ("flash", "cudnn")
    assert expected(dtype=torch.bfloat16, padding=True) == ("cudnn",)
    assert expected() == ("efficient",)
    assert expected("varlen", dtype=torch.bfloat16, documents=True) == ("varlen",)
    monkeypatch.setattr(pytorch, "_answer", lambda *_: ())
    assert expected() == ("math",)


@pytest.mark.parametrize(
    ("forward", "backward", "ok"),
    [
        ("cudnn", "cudnn", True), ("flash", "cudnn", True), ("cudnn", None, True),
        ("math", "unfused", False), ("cudnn", "unfused", False), ("nothing known", None, False),
    ],
)  # fmt: skip
def test_a_row_is_right_when_both_passes_are(forward: str, backward: str | None, ok: bool) -> None:
    row = Checked(
        kernel="sdpa", mask="causal", dtype="bfloat16", expected=("flash", "cudnn"), forward=forward, backward=backward
    )
    assert row.ok is ok


@pytest.mark.parametrize("forward", ["cpu flash", "math"])
def test_the_command_line_prints_what_ran_and_fails_where_the_table_is_wrong(
    forward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Checked(kernel="sdpa", mask="causal", dtype="float32", expected=("cpu flash",), forward=forward)
    monkeypatch.setattr(check, "check_kernels", lambda device: [row])
    result = CliRunner().invoke(app, ["kernels", "--check"])
    assert result.exit_code == (forward == "math")
    assert ("WRONG" in result.output) == (forward == "math")
    assert f"{int(forward != 'math')} of 1 as the table says, on cpu" in result.output
