"""The command: a Hugging Face directory in, the same kind out, what it cost beside it; bad input in one sentence."""

import hashlib
import importlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from typer.testing import CliRunner

from sqa import ModelConfig
from sqa.cli import app
from sqa.conversion import report
from sqa.conversion.convert import convert
from sqa.conversion.settings import Settings, prepare
from sqa.interop import load_model
from sqa.progress import Interrupted, StepReport

SMALL = {"length": 32, "sequences": 16, "batch_size": 4, "evaluation_tokens": 320, "speed_at": ()}


class Silent:
    def note(self, text: str) -> None: ...
    def start(self, label: str, steps: int) -> None: ...
    def step(self, report: StepReport | None) -> None: ...
    def finish(self, text: str) -> None: ...
    def beside(self) -> "Silent": ...


FIELDS = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 96,
}
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "tied llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 16}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}


@pytest.fixture
def hugging_face(tmp_path: Path, small_tokenizer) -> Callable[[str], Path]:
    """A directory of one of the classes, with a tokenizer."""

    def write(kind: str) -> Path:
        config_class, model_class, changes = CLASSES[kind]
        torch.manual_seed(1)
        model = model_class(config_class(**FIELDS, **changes))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.normal_(std=0.15)
        model.save_pretrained(tmp_path / "in")
        small_tokenizer.save(str(tmp_path / "in" / "tokenizer.json"))
        return tmp_path / "in"

    return write


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", CLASSES)
def test_same_kind_out_and_stock_transformers_reads_it(kind: str, hugging_face, text: Path, tmp_path: Path) -> None:
    source = hugging_face(kind)
    before = contents(source)
    job = prepare(str(source), tmp_path / "out", str(text), Settings(query_heads=3, **SMALL))
    state = convert(job, Silent())
    assert contents(source) == before
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert theirs.config.num_attention_heads == 3
    ids = torch.arange(2, 40)[None]
    torch.testing.assert_close(
        load_model(tmp_path / "out").eval()(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4
    )
    original, dropped, refitted = state["stages"]
    assert [row["stage"] for row in state["stages"]] == ["original", "dropped", "refitted"]
    assert original["kl"] == 0
    assert 0 < refitted["kl"] < dropped["kl"]
    assert all(layer["refitted"] <= layer["dropped"] for layer in state["layers"])
    assert json.loads((tmp_path / "out" / "conversion.json").read_text()) == json.loads(json.dumps(state))
    if kind == "tied llama":
        assert theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_weights_keep_their_dtype(hugging_face, text: Path, tmp_path: Path) -> None:
    source = hugging_face("llama")
    LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    convert(prepare(str(source), tmp_path / "out", str(text), Settings(query_heads=3, **SMALL)), Silent())
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_without_the_module_resource_memory_is_not_told(
    hugging_face, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.delitem(sys.modules, "sqa.conversion.convert")
    fresh = importlib.import_module("sqa.conversion.convert")
    job = prepare(str(hugging_face("llama")), tmp_path / "out", str(text), Settings(query_heads=3, **SMALL))
    state = fresh.convert(job, Silent())
    assert state["peak_bytes"] is None
    console = Console(file=io.StringIO())
    console.print(report.speed_table(state))
    assert "converting took" in console.file.getvalue()
    assert "GiB" not in console.file.getvalue()


@pytest.mark.parametrize("method", ["l2", "taylor", "greedy"])
def test_as_many_heads_give_the_same_model(method: str, hugging_face, text: Path, tmp_path: Path) -> None:
    source = hugging_face("qwen2")
    settings = Settings(query_heads=6, method=method, **SMALL)
    state = convert(prepare(str(source), tmp_path / "out", str(text), settings), Silent())
    ids = torch.arange(2, 40)[None]
    assert torch.equal(load_model(tmp_path / "out")(ids).logits, load_model(source)(ids).logits)
    assert state["stages"][-1]["kl"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("pooling", ["aligned", "mean"])
def test_kv_heads_of_a_run_of_ours(
    pooling: str, saved, config_of: Callable[..., ModelConfig], model_of: Callable, text: Path, tmp_path: Path
) -> None:
    run = saved(model_of(config_of(num_query_heads=8, num_kv_heads=8, bias=True, final_norm=False)))
    settings = Settings(query_heads=4, kv_heads=2, pooling=pooling, **SMALL)  # type: ignore[arg-type]
    state = convert(prepare(str(run), tmp_path / "out", str(text), settings), Silent())
    layer = load_model(tmp_path / "out").config.layers[0]
    assert (layer.num_query_heads, layer.num_kv_heads, layer.head_dim) == (4, 2, 6)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    _, dropped, refitted = state["stages"]
    assert refitted["kl"] < dropped["kl"]


def test_healed_in_phases_and_resumed(hugging_face, text: Path, tmp_path: Path) -> None:
    source = hugging_face("llama")
    settings = Settings(query_heads=3, heal_tokens=1280, layerwise=0.3, learning_rate=3e-3, control=True, **SMALL)
    whole = convert(prepare(str(source), tmp_path / "whole", str(text), settings), Silent())
    stages = {(row["stage"], row["tokens"]): row for row in whole["stages"]}
    assert {stage for stage, _ in stages} == {
        "original",
        "dropped",
        "refitted",
        "layers healed",
        "distilled",
        "control",
    }
    assert ("layers healed", 384) in stages
    assert ("distilled", 1280) in stages
    assert stages["distilled", 1280]["kl"] < stages["refitted", 0]["kl"]
    steps: list[StepReport] = []

    class Counting(Silent):
        def step(self, report: StepReport | None) -> None:
            if report is not None:
                steps.append(report)

    job = prepare(str(source), tmp_path / "out", str(text), settings)
    for stop_at in (2, 9):  # in the first phase, then in the second
        with pytest.raises(Interrupted):
            convert(job, Counting(), lambda stop_at=stop_at: len(steps) >= stop_at)
        assert not job.out.exists()
    other = Settings(query_heads=3, heal_tokens=640, **SMALL)
    with pytest.raises(
        ValueError, match=r"unfinished conversion with other settings .*heal_tokens: 1280 there, 640 now"
    ):
        convert(prepare(str(source), tmp_path / "out", str(text), other), Silent())
    resumed = convert(job, Counting())
    assert len(steps) == 10 + 10  # no step twice: healing and the control
    assert resumed["stages"] == whole["stages"]
    weights = [load_model(tmp_path / name).state_dict() for name in ("whole", "out")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert not job.work.exists()


def test_an_encoder(private_modules, small_tokenizer, text: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.15,
        pad_token_id=None,
    )
    BertModel(config).save_pretrained(tmp_path / "in")
    small_tokenizer.save(str(tmp_path / "in" / "tokenizer.json"))
    settings = Settings(
        query_heads=3, length=32, sequences=16, batch_size=4, evaluation_tokens=32, heal_tokens=256,
        learning_rate=3e-3, speed_at=(8,),
    )  # fmt: skip
    job = prepare(str(tmp_path / "in"), tmp_path / "out", str(text), settings)
    stages = {row["stage"]: row for row in convert(job, Silent())["stages"]}
    assert stages["original"]["cosine"] == pytest.approx(1.0)
    assert stages["original"]["cosine"] > stages["refitted"]["cosine"] > stages["dropped"]["cosine"]
    assert stages["distilled"]["cosine"] > stages["dropped"]["cosine"]
    theirs = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert theirs.encoder.layer[0].attention.self.query.out_features == 3 * 8
    with pytest.raises(ValueError, match="need a loss, which an encoder has not"):
        prepare(str(tmp_path / "in"), tmp_path / "again", str(text), replace(settings, method="taylor"))


def test_the_command(hugging_face, text: Path, tmp_path: Path) -> None:
    source = hugging_face("llama")
    arguments = ["convert", str(source), str(tmp_path / "out"), "--query-heads", "3", "--calibration", str(text),
                 "--length", "32", "--sequences", "16", "--evaluation-tokens", "320", "--speed-at", "16,64",
                 "--batch-size", "4", "--heal", "tokens=640"]  # fmt: skip
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "query heads" in dry.output
    assert not (tmp_path / "out").exists()
    figures, plot = tmp_path / "figures.json", tmp_path / "plot.svg"
    done = CliRunner().invoke(app, [*arguments, "--json", str(figures), "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    for word in ("original", "dropped", "refitted", "distilled", "prefill"):
        assert word in done.output
    speed = json.loads(figures.read_text())["speed"]
    assert [(row["what"], row["n"]) for row in speed] == [
        (what, n) for n in (16, 64) for what in ("prefill", "forward and backward")
    ]
    assert plot.read_text().startswith("<svg")


def test_what_cannot_be_converted(hugging_face, text: Path, tmp_path: Path) -> None:
    source = hugging_face("llama")

    def refused(message: str, out: Path = tmp_path / "out", data: Path = text, **changes: object) -> None:
        with pytest.raises(ValueError, match=message):
            convert(prepare(str(source), out, str(data), Settings(**{"query_heads": 3, **SMALL, **changes})), Silent())
        assert not out.exists() or out == source

    refused(r"query_heads must be a multiple of 3 KV heads, at most 6 \(3, 6\), got 4", query_heads=4)
    refused("lies inside the model", out=source / "out")
    refused("exists", out=source)
    refused("method must be one of .*did you mean 'taylor'", method="tailor")
    refused("length must be at most what the model reads, 96, got 200", length=200, evaluation_tokens=400)
    (tmp_path / "short").mkdir()
    for i in range(40):
        (tmp_path / "short" / f"{i}.txt").write_text(f"a word or {i}")
    refused("rows of 32 tokens take", data=tmp_path / "short")
    (source / "tokenizer.json").unlink()
    refused("has no tokenizer.json")
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "model_type": "gpt2"}))
    refused("model_type 'gpt2'; supported: .*llama")
    (source / "config.json").write_text(json.dumps({**values, "quantization_config": {"bits": 4}}))
    refused("quantization_config must be None")
