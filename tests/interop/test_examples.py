"""The examples run and do what they say."""

import importlib.util
import runpy
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_train_llama(tmp_path: Path) -> None:
    """In bfloat16 with our kernels and with PyTorch's: the same loss."""
    runs = {kind: example("train_llama").main(str(tmp_path / kind), 30, kind) for kind in ("sqa", "sdpa")}
    for first, last, text in runs.values():
        assert last < first - 0.5
        assert text.startswith("def heappush(")
        assert len(text) > 20
    assert abs(runs["sqa"][1] - runs["sdpa"][1]) < 0.05


def test_plain_encoder() -> None:
    module = example("plain_encoder")
    torch.manual_seed(0)
    assert module.train(module.OwnEncoder(), steps=150) > 0.8
    assert module.train(module.torch_encoder(), steps=150) > 0.8


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks
def test_lora(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before, after, back = example("lora").main(tmp_path)
    assert after < before - 0.5
    assert back <= after


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora_takes_options_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lora.py", "--steps", "1"])
    runpy.run_path(str(EXAMPLES / "lora.py"), run_name="__main__")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
