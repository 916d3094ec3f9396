"""Model directories that ask for too much, hold what is no number, or do not fit on the disk: one sentence each."""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sqa import AttentionConfig, InputError, ModelConfig, Transformer
from sqa.interop import export, import_model, load_config

Make = Callable[..., ModelConfig]


@pytest.fixture
def ours(config_of: Make, model_of, saved) -> Path:
    return saved(model_of(config_of()))


@pytest.fixture
def stock(ours: Path, tmp_path: Path) -> Path:
    export(ours, tmp_path / "stock", format="hf")
    return tmp_path / "stock"


def change(path: Path, values: dict) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


SIZES = {
    "layers": ({"num_layers": 10_000}, {"num_hidden_layers": 10_000}, "10,000 layers, but 21 tensors in all"),
    "many layers": ({"num_layers": 10**9}, {"num_hidden_layers": 10**9}, "layers .*must be at most 10,000"),
    "vocabulary": ({"vocab_size": 10**12}, {"vocab_size": 10**12}, "vocab_size .*must be at most 16,777,216"),
    "2^63": ({"d_ff": 2**63}, {"intermediate_size": 2**63}, "must be at most 16,777,216"),
    "2^70": ({"max_seq_len": 2**70}, {"max_position_embeddings": 2**70}, "must be at most 1,099,511,627,776"),
    "long": ({"d_ff": 10**300}, {"intermediate_size": 10**300}, "must be at most"),
    "NaN": ({"norm_eps": float("nan")}, {"rms_norm_eps": float("nan")}, "NaN is no number of JSON"),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_sizes_are_checked_before_anything_is_built(
    name: str, kind: str, ours: Path, stock: Path, tmp_path: Path
) -> None:
    own, theirs, message = SIZES[name]
    folder = ours if kind == "ours" else stock
    change(folder / "config.json", own if kind == "ours" else theirs)
    start = time.process_time()
    for action in (load_config, lambda source: import_model(source, tmp_path / "out")):
        with pytest.raises(InputError, match=message) as error:
            action(folder)
        assert str(folder) in str(error.value) or name == "2^63"
        assert len(str(error.value)) < 500
    assert time.process_time() - start < 5
    if kind == "ours" and name != "NaN":
        with pytest.raises(InputError):
            Transformer.load(folder)


def test_sizes_of_a_config_are_bounded() -> None:
    with pytest.raises(InputError, match=r"d_model must be at most 16,777,216, got 33554432"):
        AttentionConfig(d_model=2**25, num_heads=1)


@pytest.mark.parametrize("base", [2**70, 2**1100, float("inf"), "many", [1.0]])
def test_rope_base_of_any_size(base: object, stock: Path) -> None:
    values = {"rope_parameters": {"rope_type": "default", "rope_theta": base}}
    change(stock / "config.json", values)
    if base == 2**70:
        layer = load_config(stock).layers[0]
        assert layer.rope is not None
        assert layer.rope.base == 2.0**70
    else:
        with pytest.raises(InputError) as error:
            load_config(stock)
        assert str(stock) in str(error.value)


def test_an_adapter_is_named_so(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="is a PEFT adapter; merge it first"):
        load_config(tmp_path)


def test_names_of_tensors_are_printed_on_one_line(ours: Path, tmp_path: Path) -> None:
    tensors = load_file(ours / "model.safetensors")
    save_file({**tensors, "a\nb": torch.zeros(1), "x" * 100_000: torch.zeros(1)}, ours / "model.safetensors")
    with pytest.raises(InputError, match=r"unknown .*a\\nb") as error:
        import_model(ours, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("suffix", ["", ".gguf"])
def test_a_full_disk_is_said_of_the_place(suffix: str, ours: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: libraries report both in the same way."""
    out = tmp_path / f"out{suffix}"
    command = ["export", str(ours), str(out), "--format", "gguf"] if suffix else ["import", str(ours), str(out)]
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from sqa.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        "sys.argv[0] = 'sqa'; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert str(tmp_path) in done.stderr
    assert os.strerror(errno.EFBIG) in done.stderr or os.strerror(errno.ENOSPC) in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
