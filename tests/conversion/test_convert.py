"""The command: a Hugging Face directory in, the same kind out, what it cost beside it; bad input in one sentence."""

import hashlib
import importlib
import io
import json
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
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
from typer.main import get_command
from typer.testing import CliRunner

from sqa import ModelConfig
from sqa.cli import app
from sqa.conversion import report
from sqa.conversion.language_model import LanguageModel
from sqa.conversion.records import Conversion
from sqa.conversion.run import convert, run
from sqa.conversion.settings import Settings, prepare
from sqa.data.batches import Batch
from sqa.errors import InputError
from sqa.interop import load_config, load_model
from sqa.measure.timing import Timing
from sqa.progress import Display, Interrupted, StepReport, StopFlag

SMALL = {"length": 32, "sequences": 16, "batch_size": 4, "evaluation_tokens": 320, "speed_at": ()}


def test_the_command_has_the_defaults_of_the_settings() -> None:
    options = get_command(app).commands["convert"].params  # type: ignore[attr-defined]
    given = {option.name: option.default for option in options}
    for item in fields(Settings):
        if item.name in given and item.default is not MISSING:
            assert given[item.name] == item.default, item.name


def converted(
    source: Path,
    out: Path,
    text: Path,
    settings: Settings,
    display: Display | None = None,
    stop: StopFlag | None = None,
) -> Conversion:
    """On one domain alone: the second is a test of its own."""
    return convert(source, out, settings, calibration=str(text), evaluate=None, display=display, stop=stop)


class Stopping(Display):
    """Keeps the reports of training, and gives the signal to stop at one of its steps, or at one of all steps."""

    def __init__(self, reports: list[StepReport], *, trained: int | None = None, shown: int | None = None) -> None:
        self.reports, self.trained, self.shown, self.flag = reports, trained, shown, StopFlag()
        self.seen = 0

    def step(self, report: StepReport | None) -> None:
        self.seen += 1
        if report is not None:
            self.reports.append(report)
        if self.seen == self.shown or (report is not None and len(self.reports) == self.trained):
            self.flag(signal.SIGTERM, None)


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
    state = converted(source, tmp_path / "out", text, Settings(query_heads=3, **SMALL))
    assert contents(source) == before
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert theirs.config.num_attention_heads == 3
    ids = torch.arange(2, 40)[None]
    torch.testing.assert_close(
        load_model(tmp_path / "out").eval()(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4
    )
    assert [stage.stage for stage in state.stages] == ["original", "dropped", "refitted"]
    original, dropped, refitted = (stage.quality for stage in state.stages)
    assert (original.kl, original.agreement) == (0, 1)
    assert 0 < refitted.kl < dropped.kl
    assert all(layer.refitted <= layer.dropped for layer in state.layers)
    assert Conversion.from_dict(json.loads((tmp_path / "out" / "conversion.json").read_text())) == state
    if kind == "tied llama":
        assert theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_weights_keep_their_dtype(hugging_face, text: Path, tmp_path: Path) -> None:
    source = hugging_face("llama")
    LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    converted(source, tmp_path / "out", text, Settings(query_heads=3, **SMALL))
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_without_the_module_resource_memory_is_not_told(
    hugging_face, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.delitem(sys.modules, "sqa.conversion.run")
    fresh = importlib.import_module("sqa.conversion.run")
    settings = Settings(query_heads=3, **SMALL)
    state = fresh.convert(hugging_face("llama"), tmp_path / "out", settings, calibration=str(text), evaluate=None)
    assert state.peak_bytes is None
    console = Console(file=io.StringIO())
    console.print(report.speed_table(state))
    assert "converting took" in console.file.getvalue()
    assert "GiB" not in console.file.getvalue()


@pytest.mark.parametrize("method", ["l2", "taylor", "greedy"])
def test_as_many_heads_give_the_same_model(method: str, hugging_face, text: Path, tmp_path: Path) -> None:
    source = hugging_face("qwen2")
    settings = Settings(query_heads=6, method=method, **SMALL)
    state = converted(source, tmp_path / "out", text, settings)
    ids = torch.arange(2, 40)[None]
    assert torch.equal(load_model(tmp_path / "out")(ids).logits, load_model(source)(ids).logits)
    assert state.stages[-1].quality.kl == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("pooling", ["aligned", "mean"])
def test_kv_heads_of_a_run_of_ours(
    pooling: str, saved, config_of: Callable[..., ModelConfig], model_of: Callable, text: Path, tmp_path: Path
) -> None:
    run = saved(model_of(config_of(num_query_heads=8, num_kv_heads=8, bias=True, final_norm=False)))
    settings = Settings(query_heads=4, kv_heads=2, pooling=pooling, **SMALL)  # type: ignore[arg-type]
    state = converted(run, tmp_path / "out", text, settings)
    layer = load_model(tmp_path / "out").config.layers[0]
    assert (layer.num_query_heads, layer.num_kv_heads, layer.head_dim) == (4, 2, 6)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    _, dropped, refitted = state.stages
    assert refitted.quality.kl < dropped.quality.kl


def test_healed_in_phases_and_resumed(hugging_face, text: Path, tmp_path: Path) -> None:
    source = hugging_face("llama")
    settings = Settings(query_heads=3, heal_tokens=1280, layerwise=0.3, learning_rate=3e-3, control=True, **SMALL)
    whole = converted(source, tmp_path / "whole", text, settings)
    stages = {(stage.stage, stage.tokens): stage.quality for stage in whole.stages}
    assert {stage for stage, _ in stages} == {
        "original",
        "dropped",
        "refitted",
        "layers healed",
        "distilled",
        "control",
    }
    assert ("layers healed", 384) in stages
    assert whole.peak_bytes is not None
    assert 2**26 < whole.peak_bytes < 2**40  # PyTorch alone takes more than the first
    assert stages["distilled", 1280].kl < stages["refitted", 0].kl
    out = tmp_path / "out"
    steps: list[StepReport] = []
    for stop_at in (2, 9):  # in the first phase, then in the second
        display = Stopping(steps, trained=stop_at)
        with pytest.raises(Interrupted, match="of healing; the same command goes on from there"):
            converted(source, out, text, settings, display, display.flag)
        assert not out.exists()
    other = Settings(query_heads=3, heal_tokens=640, **SMALL)
    with pytest.raises(
        ValueError, match=r"unfinished conversion with other settings .*heal_tokens: 1280 there, 640 now"
    ):
        converted(source, out, text, other)
    resumed = converted(source, out, text, settings, Stopping(steps))
    assert len(steps) == 10 + 10  # no step twice: healing and the control
    assert resumed.stages == whole.stages
    weights = [load_model(tmp_path / name).state_dict() for name in ("whole", "out")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    before = load_model(source).state_dict()
    changed = {name for name, tensor in weights[0].items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "self_attn" in name}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


def test_text_of_each_split_has_its_own_use(
    hugging_face, tmp_path: Path, small_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fitted on the train split of the first domain, some of it held out; measured on the validation split of both."""
    for domain, letters in (("first", "ab"), ("second", "cd")):
        (tmp_path / domain).mkdir()
        for split, letter in zip(("train", "validation"), letters, strict=True):
            documents = (json.dumps({"text": f"{letter * 4}{number:03}"}) + "\n" for number in range(100))
            (tmp_path / domain / f"{split}.jsonl").write_text("".join(documents))
    seen: dict[str, str] = {}
    measure = LanguageModel.measure

    def read(batches: object) -> str:
        return "".join(small_tokenizer.decode(row.tolist()) for batch in batches for row in batch.input_ids)  # type: ignore[attr-defined]

    def measured(self: LanguageModel, batches: object, teacher: LanguageModel, reference: object) -> object:
        batches = list(batches)  # type: ignore[call-overload]
        seen[f"measured {len(seen)}"] = read(batches)
        return measure(self, batches, teacher, reference)  # type: ignore[arg-type]

    def operate(settings: Settings, original: object, plans: object, fit: object, held_out: object, *rest: object):
        seen.update({"fit": read(fit), "held out": read(held_out)})
        raise Interrupted("enough is seen")

    monkeypatch.setattr(LanguageModel, "measure", measured)
    monkeypatch.setattr(sys.modules[convert.__module__], "operate", operate)
    source, options = hugging_face("llama"), {"calibration": str(tmp_path / "first")}
    settings = Settings(query_heads=3, **SMALL)
    with pytest.raises(Interrupted, match="enough"):
        convert(source, tmp_path / "out", settings, evaluate=str(tmp_path / "second"), **options)
    letters = {name: set(words) - set("0123456789") for name, words in seen.items()}
    assert letters == {"measured 0": {"b"}, "measured 1": {"d"}, "fit": {"a"}, "held out": {"a"}}
    fit, held_out = (set(re.findall(r"\d{3}", seen[name])) for name in ("fit", "held out"))
    assert fit
    assert held_out
    assert not fit & held_out
    text = tmp_path / "first" / "train.jsonl"
    text.write_text(text.read_text().replace("a010", "e010"))
    with pytest.raises(ValueError, match=r"unfinished conversion with other settings \(text: "):
        convert(source, tmp_path / "out", settings, evaluate=str(tmp_path / "second"), **options)


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
    whole = converted(tmp_path / "in", tmp_path / "out", text, settings)
    cosine = {stage.stage: stage.quality.cosine for stage in whole.stages}
    assert cosine["original"] == pytest.approx(1.0)
    assert cosine["original"] > cosine["refitted"] > cosine["dropped"]
    assert cosine["distilled"] > cosine["dropped"]
    steps: list[StepReport] = []

    display = Stopping(steps, trained=1)
    with pytest.raises(Interrupted, match="step 1 of 2 of healing; the same command goes on"):
        converted(tmp_path / "in", tmp_path / "again", text, settings, display, display.flag)
    # the pooler has no gradient, and so nothing in the checkpoint
    resumed = converted(tmp_path / "in", tmp_path / "again", text, settings, Stopping(steps))
    assert len(steps) == 2
    assert resumed.stages[-1] == whole.stages[-1]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]
    theirs = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert theirs.encoder.layer[0].attention.self.query.out_features == 3 * 8
    # a second domain of fewer documents than there are rows to measure
    (tmp_path / "few").mkdir()
    for at in range(120):  # a twentieth of them is validation
        (tmp_path / "few" / f"{at}.txt").write_text(f"document {at} of a second domain", encoding="utf-8")
    measured = replace(settings, heal_tokens=0, evaluation_tokens=32 * 20)
    out = tmp_path / "second"
    short = convert(tmp_path / "in", out, measured, calibration="builtin", evaluate=str(tmp_path / "few"))
    assert short.stages[-1].elsewhere is not None
    for at in range(1, 120):
        (tmp_path / "few" / f"{at}.txt").unlink()
    with pytest.raises(ValueError, match="only 0 documents are left"):
        convert(tmp_path / "in", tmp_path / "none", measured, calibration="builtin", evaluate=str(tmp_path / "few"))
    with pytest.raises(ValueError, match="method taylor needs a loss, which an encoder has not"):
        converted(tmp_path / "in", tmp_path / "third", text, replace(settings, method="taylor"))


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
    assert f"serve it (from {tmp_path}): vllm serve out" in done.output.replace("\n", "")
    speed = json.loads(figures.read_text())["speed"]
    assert [(row["what"], row["n"]) for row in speed] == [
        (what, n) for n in (16, 64) for what in ("prefill", "forward and backward")
    ]
    assert plot.read_text().startswith("<svg")


def test_what_cannot_be_converted(hugging_face, text: Path, tmp_path: Path) -> None:
    source = hugging_face("llama")

    def refused(message: str, out: Path = tmp_path / "out", data: Path = text, **changes: object) -> None:
        with pytest.raises(ValueError, match=message):
            converted(source, out, data, Settings(**{"query_heads": 3, **SMALL, **changes}))
        assert not out.exists() or out == source

    refused(r"query_heads must be a multiple of 3 KV heads, at most 6 \(3, 6\), got 4", query_heads=4)
    refused("lies inside the model", out=source / "out")
    refused("exists", out=source)
    for nameless in (Path(), Path("/")):
        with pytest.raises(ValueError, match=r"exists; name a new one"):
            converted(source, nameless, text, Settings(query_heads=3, **SMALL))
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


def test_a_second_domain_samples_and_what_serves_it(
    hugging_face, text: Path, tmp_path: Path, small_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Telling(Display):
        def note(self, text: str) -> None:
            told.append(text)

    continued, said = LanguageModel.continued, []

    def listening(self: LanguageModel, batch: Batch, new_tokens: int) -> torch.Tensor:
        said.append((batch.input_ids, continued(self, batch, new_tokens)))
        return said[-1][1]

    monkeypatch.setattr(LanguageModel, "continued", listening)
    source = hugging_face("llama")
    small = Settings(query_heads=3, heal_tokens=640, layerwise=0.4, train="all", control=True, **SMALL)
    state = convert(source, tmp_path / "out", small, calibration=str(text), evaluate="builtin", display=Telling())
    elsewhere = {stage.stage: stage.elsewhere for stage in state.stages}
    assert elsewhere["original"].kl == 0 < elsewhere["distilled"].kl
    assert elsewhere["original"].loss != state.last("original").quality.loss
    assert elsewhere["dropped"].kl > elsewhere["refitted"].kl
    assert len(state.samples) == 3
    before, after = load_model(source).eval(), load_model(tmp_path / "out").eval()
    texts = []
    for ids, _ in said[::2]:
        new = (model.generate(ids, max_new_tokens=32)[0, ids.shape[1] :] for model in (before, after))
        texts.append([small_tokenizer.decode(each.tolist()) for each in (ids[0], *new)])
    assert [[sample.prompt, sample.original, sample.converted] for sample in state.samples] == texts
    weights = (model.model.layers[0].mlp.up_proj.weight for model in (before, after))
    assert not torch.equal(*weights)  # all parameters were trained
    assert state.serve == "vllm serve out"
    told_of = [line.split(":")[0].split(" (")[0] for line in told]
    order = [told_of.index(stage) for stage in ("original", "dropped", "refitted", "layers healed", "distilled")]
    assert order == sorted(order)  # each as it is measured
    console = Console(file=io.StringIO(), width=200)
    console.print(report.quality_table(state), report.samples(state))
    assert "the second domain" in console.file.getvalue()
    gaps = [
        f"{new.loss - old.loss:+.4f}"
        for old, new in (
            (state.last("original").quality, state.last("distilled").quality),
            (elsewhere["original"], elsewhere["distilled"]),
        )
    ]
    assert f"distilled beside the original: {gaps[0]} and {gaps[1]} nats." in console.file.getvalue()
    assert state.samples[0].converted.split()[0] in console.file.getvalue()


def test_layers_keep_what_their_heads_are_worth(private_modules, hugging_face, text: Path, tmp_path: Path) -> None:
    """A layer whose attention hardly matters gives its heads to the other."""
    source = hugging_face("llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"] *= 0.01
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    settings = Settings(query_heads=3, allocation="measured", **SMALL)
    with pytest.raises(ValueError, match="no allocation to 2 layers has 4 query heads in all; try 6"):
        converted(source, tmp_path / "out", text, replace(settings, query_heads=2))
    with pytest.raises(ValueError, match="allocation measured decides about KV heads"):
        converted(source, tmp_path / "out", text, replace(settings, kv_heads=1))
    same = converted(source, tmp_path / "same", text, replace(settings, query_heads=6))
    assert same.stages[-1].quality.kl == pytest.approx(0, abs=1e-6)
    settings = replace(settings, query_heads=5)
    with pytest.raises(ValueError, match="try 9 or 12"):
        converted(source, tmp_path / "out", text, settings)
    config = json.loads((source / "config.json").read_text())
    config["num_key_value_heads"] = 1
    for name in ("k", "v"):
        for layer in range(2):
            key = f"model.layers.{layer}.self_attn.{name}_proj.weight"
            tensors[key] = tensors[key][:8].contiguous()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(config))
    spread = converted(source, tmp_path / "spread", text, replace(settings, query_heads=4))
    uniform = converted(source, tmp_path / "uniform", text, replace(settings, query_heads=4, allocation="uniform"))
    counts = [len(layer.kept) for layer in spread.layers]
    assert counts == [2, 6]
    assert [len(layer.kept) for layer in uniform.layers] == [4, 4]
    assert spread.stages[-1].quality.kl < uniform.stages[-1].quality.kl
    assert spread.serve == 'sqa generate spread --prompt "..."'
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "spread", trust_remote_code=True).eval()
    ids = torch.arange(2, 40)[None]
    torch.testing.assert_close(
        theirs(ids).logits, load_model(tmp_path / "spread").eval()(ids).logits, atol=1e-4, rtol=1e-4
    )


def test_what_no_stock_class_holds_is_written_with_ours(
    private_modules, hugging_face, text: Path, tmp_path: Path
) -> None:
    """A Llama with biases, of which every layer keeps as many heads; converted again it is for transformers still."""
    source = hugging_face("llama")
    LlamaForCausalLM(LlamaConfig(**FIELDS, attention_bias=True)).save_pretrained(source)
    ids = torch.arange(2, 40)[None]
    for name, heads in (("once", 3), ("twice", 2)):
        converted(source, tmp_path / name, text, Settings(query_heads=heads, **SMALL))
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True).eval()
        assert theirs.config.num_attention_heads == heads
        ours = load_model(tmp_path / name).eval()
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-4, rtol=1e-4)
        source = tmp_path / name


def test_a_layer_may_lose_kv_heads(private_modules, hugging_face, text: Path, tmp_path: Path) -> None:
    """Of three KV heads of a layer two have query heads that add nothing: they go, and nothing is lost."""
    source = hugging_face("llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][:, 16:] = 0.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    settings = Settings(query_heads=4, allocation="measured-kv", **SMALL)
    result = converted(source, tmp_path / "out", text, settings)
    assert [layer.kept for layer in result.layers] == [(0, 1, 2, 3, 4, 5), (0, 1)]
    config = load_config(tmp_path / "out")
    assert [layer.num_kv_heads for layer in config.layers] == [3, 1]
    assert result.stages[-1].quality.kl == pytest.approx(0, abs=1e-6)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    ids = torch.arange(2, 40)[None]
    expected = theirs(ids).logits
    torch.testing.assert_close(expected, load_model(tmp_path / "out").eval()(ids).logits, atol=1e-4, rtol=1e-4)
    cached = theirs.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(cached, load_model(tmp_path / "out").eval().generate(ids, max_new_tokens=3))


def test_stopped_in_any_phase_it_ends_the_same(hugging_face, text: Path, tmp_path: Path) -> None:
    """Stopped again and again, ever later: what is done is kept, no step is trained twice, the weights are the same."""
    source = hugging_face("llama")
    settings = Settings(query_heads=3, heal_tokens=512, **{**SMALL, "evaluation_tokens": 32, "speed_at": (16,)})
    whole = converted(source, tmp_path / "whole", text, settings)
    # measuring 32 tokens takes as long as training on 11: it fits after every step into a tenth of the phase's time
    assert [stage.tokens for stage in whole.stages if stage.stage == "distilled"] == [256, 384, 512]
    said: list[str] = []
    steps: list[StepReport] = []
    while True:
        display = Stopping(steps, shown=1 + 3 * len(said))
        try:
            state = converted(source, tmp_path / "out", text, settings, display, display.flag)
            break
        except Interrupted as error:
            said.append(str(error))
    assert len(said) > 5
    assert all("the same command goes on" in words for words in said)
    assert [report.step for report in steps] == [1, 1, 2, 3]
    assert state.stages == whole.stages
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


def test_weights_are_there_before_the_timing(
    hugging_face, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies while it times leaves the model; the same command adds the figures and tidies up."""
    source, settings = hugging_face("llama"), Settings(query_heads=3, **{**SMALL, "speed_at": (16,)})

    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[convert.__module__], "take_turns", killed)
        with pytest.raises(Interrupted, match="the same command goes on"):
            converted(source, tmp_path / "out", text, settings)
    assert load_model(tmp_path / "out").config.layers[0].num_query_heads == 3
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["speed"] == []
    passes: list[tuple[str, int, int]] = []

    def noting(name: str) -> Callable:
        real = getattr(LanguageModel, name)

        def passing(self: LanguageModel, row: Batch) -> object:
            passes.append((name, self.views[0].config.num_query_heads, row.input_ids.shape[1]))
            found = real(self, row)
            assert name == "loss" or found.logits.shape[1] == 1  # as in bench prefill
            return found

        return passing

    def timed(contestants: dict, **options: object) -> dict:
        """As many seconds as the model has heads; ten times that for forward and backward."""
        found = {}
        for name, contestant in contestants.items():
            contestant()
            what, heads, n = passes.pop()
            seconds = float(heads * n * (1 if what == "prefill" else 10))
            found[name] = Timing(p20=seconds, median=seconds, p80=seconds)
        return found

    for name in ("prefill", "loss"):
        monkeypatch.setattr(LanguageModel, name, noting(name))
    monkeypatch.setattr(sys.modules[convert.__module__], "take_turns", timed)
    state = converted(source, tmp_path / "out", text, settings)
    assert [(speed.what, speed.n, speed.before["median"], speed.after["median"]) for speed in state.speed] == [
        ("prefill", 16, 6 * 16, 3 * 16),
        ("forward and backward", 16, 60 * 16, 30 * 16),
    ]
    assert [speed.ratio for speed in state.speed] == [2, 2]
    assert Conversion.from_dict(json.loads((tmp_path / "out" / "conversion.json").read_text())) == state
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    with pytest.raises(ValueError, match="exists"):
        converted(source, tmp_path / "out", text, settings)


def test_a_layer_whose_attention_adds_nothing(
    saved, config_of: Callable[..., ModelConfig], model_of: Callable, text: Path, tmp_path: Path
) -> None:
    """Its Gram matrix is 0, and so is the energy of its output."""
    model = model_of(config_of())
    torch.nn.init.zeros_(model.model.layers[0].self_attn.v_proj.weight)
    settings = Settings(
        query_heads=2, allocation="measured", method="greedy", heal_tokens=256, layerwise=0.5, **SMALL
    )  # fmt: skip
    state = converted(saved(model), tmp_path / "out", text, settings)
    assert (state.layers[0].dropped, state.layers[0].refitted) == (0, 0)
    assert [stage.stage for stage in state.stages][-2:] == ["layers healed", "distilled"]


def test_samples_of_a_model_that_reads_few_tokens(
    saved, config_of: Callable[..., ModelConfig], model_of: Callable, text: Path, tmp_path: Path
) -> None:
    run = saved(model_of(config_of().replace(max_seq_len=32)))
    state = converted(run, tmp_path / "out", text, Settings(query_heads=2, **SMALL))
    assert len(state.samples) == 3


def test_an_unfinished_conversion_goes_on_with_the_same_model_alone(
    hugging_face, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: object) -> None:
        raise Interrupted("stopped")

    monkeypatch.setattr(sys.modules[convert.__module__], "operate", stopped)
    source, settings = hugging_face("llama"), Settings(query_heads=3, **SMALL)
    with pytest.raises(Interrupted):
        converted(source, tmp_path / "out", text, settings)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"unfinished conversion with other settings \(model: "):
        converted(source, tmp_path / "out", text, settings)


def test_what_another_process_has_written_meanwhile_stays(hugging_face, text: Path, tmp_path: Path) -> None:
    options = {"calibration": str(text), "evaluate": None}
    job = prepare(hugging_face("llama"), tmp_path / "out", Settings(query_heads=3, **SMALL), **options)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists"):
        run(job, Display(), StopFlag())


def test_weights_that_are_not_finite(hugging_face, text: Path, tmp_path: Path) -> None:
    source = hugging_face("llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight of .* holds nan or infinity"):
        converted(source, tmp_path / "out", text, Settings(query_heads=3, **SMALL))
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(1e38)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the original gives values that are not finite"):
        converted(source, tmp_path / "out", text, Settings(query_heads=3, **SMALL))
    assert not (tmp_path / "out").exists()


def test_what_could_not_be_written_is_found_before_the_work(hugging_face, text: Path, tmp_path: Path) -> None:
    source = hugging_face("llama")
    (source / "generation_config.json").write_text("{")
    told: list[str] = []

    class Telling(Display):
        def note(self, text: str) -> None:
            told.append(text)

    (source / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"generation_config\.json is damaged: it is not JSON"):
        converted(source, tmp_path / "out", text, Settings(query_heads=3, **SMALL), Telling())
    assert not told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 100_000}, r"threads must be 0 to \d+ \(four a core\), got 100000"),
        ({"threads": -1}, "threads must be 0 to"),
        ({"speed_at": (16, -1)}, r"speed_at must be lengths of at least 1, got \(16, -1\)"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number, got nan"),
        ({"device": "abacus"}, "device: 'abacus' cannot be used here"),
        ({"allocation": "measure"}, "allocation must be one of .*did you mean 'measured'"),
    ],
)
def test_settings_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(query_heads=3, **changes)


def test_autocast_sees_the_weights_as_they_are_now(hugging_face, text: Path, tmp_path: Path) -> None:
    """Autocast keeps cast weights until its block ends, and stages change them."""
    settings = Settings(query_heads=3, dtype="bfloat16", heal_tokens=1280, learning_rate=3e-3, **SMALL)
    state = converted(hugging_face("llama"), tmp_path / "out", text, settings)
    kl = {stage.stage: stage.quality.kl for stage in state.stages}
    assert kl["dropped"] > kl["refitted"] > kl["distilled"] > kl["original"]
    assert all(layer.refitted < layer.dropped for layer in state.layers)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        ({"cost": 3}, r"conversion\.cost must be a table"),
        ({"cost": {"before": {}}}, r"conversion\.parameters\[0\] must be a whole number, got None"),
        ({"stages": [{"stage": "original", "tokens": 0, "elsewhere": 3}]}, r"elsewhere must be a table, got 3"),
    ],
)
def test_a_damaged_field_of_a_conversion_is_named(damage: dict[str, object], error: str) -> None:
    with pytest.raises(InputError, match=error):
        Conversion.from_dict({"settings": {}, **damage})
