"""Hugging Face directories, both ways: logits to 1e-5, generation token by token."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Trainer,
    TrainingArguments,
)

from sqa import ModelConfig, Rope, RopeScaling
from sqa.interop import export, import_model, llama, load_config, load_model
from sqa.interop.llama import stock_config
from sqa.interop.text import TextSide
from sqa.interop.writers import FORMATS

Make = Callable[..., ModelConfig]

OUT = {
    "llama": {},
    "llama interleaved": {"rope": Rope(interleaved=True, base=5000.0)},
    "llama tied": {"tie_embeddings": True},
    "llama linear": {"rope": Rope(scaling=RopeScaling(kind="linear", factor=4.0))},
    "llama llama3": {"rope": Rope(scaling=RopeScaling(kind="llama3", factor=4.0, original_max_seq_len=24))},
    "llama yarn": {"rope": Rope(scaling=RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=24))},
    "mistral width": {"num_heads": 6, "head_dim": 8, "num_query_heads": 5, "num_kv_heads": 1},
    "mistral window": {"window": 7},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "qwen3 interleaved": {"qk_norm": True, "rope": Rope(interleaved=True, base=1e6)},
}


@pytest.mark.parametrize("name", OUT)
def test_exported_model_is_a_stock_class_with_our_logits(
    name: str, config_of: Make, model_of, saved, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = model_of(config_of(**OUT[name]))
    assert export(saved(model), tmp_path / "out", format="hf") == []
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.config.model_type == name.split()[0]
    assert theirs.config.head_dim == model.config.layers[0].head_dim
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    ours = model.generate(ids, max_new_tokens=24, end_id=0)
    generated = theirs.generate(ids, max_new_tokens=24, do_sample=False)
    assert torch.equal(generated, ours[:, : generated.shape[1]])
    # and back in: the same weights but for the order of rotary pairs, the same logits
    again = load_model(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    if "interleaved" not in name:
        assert again.config == model.config


def test_left_padded_generation_is_ours(config_of: Make, model_of, saved, ids: torch.Tensor, tmp_path: Path) -> None:
    model = model_of(config_of())
    export(saved(model), tmp_path / "out", format="hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    generated = theirs.generate(ids, attention_mask=mask, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    logits_end = model.generate(ids, max_new_tokens=16, padding_mask=mask.bool())
    assert torch.equal(generated, logits_end)


def test_exported_tokenizer(config_of: Make, model_of, saved, small_tokenizer, tmp_path: Path) -> None:
    export(saved(model_of(config_of())), tmp_path / "out", format="hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def größer(k):\n    return 42  # ß\n\n"
    assert tokenizer(text)["input_ids"] == small_tokenizer.encode(text).ids
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    batch = tokenizer(["a", "def attend"], padding=True, return_tensors="pt")
    assert batch["attention_mask"][0].tolist()[0] == 0
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["eos_token_id"], values["pad_token_id"], values["bos_token_id"]) == (0, 1, None)


def test_without_tokenizer_weights_alone_and_a_note(config_of: Make, model_of, tmp_path: Path) -> None:
    model_of(config_of()).save(tmp_path / "run")
    (note,) = export(tmp_path / "run", tmp_path / "out", format="hf")
    assert "tokenizer.json" in note
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}


def test_mistral_window_is_written_as_null(config_of: Make, model_of, saved, tmp_path: Path) -> None:
    export(saved(model_of(config_of(**OUT["mistral width"]))), tmp_path / "out", format="hf")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["sliding_window"] is None


def test_dtype_of_the_export(config_of: Make, model_of, saved, tmp_path: Path) -> None:
    export(saved(model_of(config_of())), tmp_path / "out", format="hf", dtype="bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert load_model(tmp_path / "out").lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bias": True}, "bias=False"),
        ({"final_norm": False}, "final_norm=True"),
        ({"num_query_heads": 2, "num_kv_heads": 4}, "num_query_heads >= num_kv_heads"),
        ({"window": 8, "num_sink_tokens": 2}, "num_sink_tokens=0"),
        ({"logit_softcap": 5.0}, "logit_softcap=None"),
        ({"scale": 1.0}, "scale=None"),
        ({"rope": None}, "rope=Rope"),
        ({"qk_norm": True, "qkv_bias": True}, "one of them"),
        ({"causal": False}, "encoder"),
    ],
)
def test_what_no_stock_class_holds_is_refused(
    changes: dict, reason: str, config_of: Make, model_of, saved, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        export(saved(model_of(config_of(**changes))), tmp_path / "out", format="hf")
    assert "hf-remote" in str(error.value)
    assert not list(tmp_path.glob("*out*"))


@dataclass(frozen=True, kw_only=True)
class LaterConfig(ModelConfig):
    """A ModelConfig that has gained a field."""

    residual_scale: float = 1.0


@pytest.mark.parametrize("format", FORMATS)
def test_a_field_that_a_writer_does_not_know_must_have_its_default(format: str, config_of: Make) -> None:
    def check(config: ModelConfig) -> None:
        FORMATS[format].check(config, TextSide(), Path("out.gguf"))

    config = config_of()
    later = {item.name: getattr(config, item.name) for item in fields(config)}
    check(LaterConfig(**later))
    with pytest.raises(ValueError, match=r"residual_scale=2.0 \(residual_scale=1.0\)"):
        check(LaterConfig(**later, residual_scale=2.0))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tie_embeddings", {"tie_embeddings": True}),
        ("qk_norm", {"qk_norm": True}),
        ("interleaved", {"rope": Rope(interleaved=True)}),
        ("beta_fast", {"rope": Rope(scaling=RopeScaling(kind="yarn", factor=2, original_max_seq_len=8, beta_fast=9))}),
    ],
)
def test_unknown_fields_are_found_at_every_depth(
    name: str, changes: dict, config_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock_config(config_of(**changes))
    monkeypatch.setattr(llama, "WRITTEN", llama.WRITTEN - {name})
    stock_config(config_of())
    with pytest.raises(ValueError, match=f"holds {name}="):
        stock_config(config_of(**changes))


def test_layers_with_different_head_counts_are_refused(config_of: Make, model_of, saved, tmp_path: Path) -> None:
    layer = config_of().layers[0]
    config = config_of(attention=(layer, layer.replace(num_query_heads=2)))
    with pytest.raises(ValueError, match="different head counts"):
        export(saved(model_of(config)), tmp_path / "out", format="hf")
    with pytest.raises(ValueError, match="some layers only"):
        export(
            saved(model_of(config_of(attention=(layer, layer.replace(window=8)))), "two"),
            tmp_path / "out",
            format="hf",
        )


SHAPE = {
    "vocab_size": 120,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5e5,
    "factor": 2.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 16.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
IN = {
    "llama mha": LlamaConfig(**SHAPE),
    "llama gqa tied llama3": LlamaConfig(
        **SHAPE, num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=LLAMA3
    ),
    "llama mqa biases": LlamaConfig(**SHAPE, num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    "llama attention bias": LlamaConfig(**SHAPE, attention_bias=True, rms_norm_eps=1e-3),
    "mistral window": MistralConfig(**SHAPE, num_key_value_heads=3, sliding_window=5, head_dim=12),
    "mistral": MistralConfig(**SHAPE, num_key_value_heads=3, sliding_window=None, rope_parameters=YARN),
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=2),
    "qwen2 windows": Qwen2Config(
        **SHAPE, num_key_value_heads=2, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    "qwen3 attention bias": Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=8, attention_bias=True),
}


@pytest.fixture
def theirs(request: pytest.FixtureRequest, tmp_path: Path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(IN[request.param]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "theirs")
    return model


@pytest.mark.parametrize("theirs", IN, indirect=True)
def test_their_directories_load_with_their_logits(theirs, ids: torch.Tensor, tmp_path: Path) -> None:
    model = load_model(tmp_path / "theirs")
    ids = ids % 120
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    assert import_model(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    assert load_config(tmp_path / "ours") == model.config
    again = load_model(tmp_path / "ours")
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("theirs", ["llama gqa tied llama3", "qwen2 windows", "qwen3", "mistral window"], indirect=True)
def test_import_and_export_give_their_model_back(theirs, ids: torch.Tensor, tmp_path: Path) -> None:
    import_model(tmp_path / "theirs", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", format="hf")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is type(theirs)
    with torch.no_grad():
        torch.testing.assert_close(back(ids % 120).logits, theirs(ids % 120).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("both", [False, True], ids=["", "beside-rope_parameters"])
def test_config_of_transformers_4_loads(both: bool, ids: torch.Tensor, tmp_path: Path) -> None:
    """Of the names of both versions transformers reads the older one alone; ours took the rotary base of the other."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, rope_parameters=LLAMA3)).eval()
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["tie_word_embeddings"]  # false, the default
    scaling = values.pop("rope_parameters")
    values |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    if both:
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    (tmp_path / "config.json").write_text(json.dumps(values))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(tmp_path)(ids % 120).logits, theirs(ids % 120).logits, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("theirs", ["qwen2 windows"], indirect=True)
def test_layer_types_follow_from_the_number_of_full_layers(theirs, tmp_path: Path) -> None:
    """Directories of before transformers 4.53 have no layer_types."""
    path = tmp_path / "theirs" / "config.json"
    values = json.loads(path.read_text())
    del values["layer_types"]
    path.write_text(json.dumps(values))
    assert [layer.window for layer in load_config(path.parent).layers] == [None, 6, 6]


@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_fields_that_a_config_lacks_are_those_of_transformers(config_class: type) -> None:
    values = {
        **SHAPE,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "use_sliding_window": True,
        "max_window_layers": 1,
    }
    theirs = config_class(**values)
    config = llama.model_config({"model_type": theirs.model_type, **values})
    window = getattr(theirs, "sliding_window", None)
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 3
    assert [layer.window for layer in config.layers] == [window if "sliding" in kind else None for kind in types]
    for layer in config.layers:
        assert (layer.num_kv_heads, layer.head_dim) == (theirs.num_key_value_heads, getattr(theirs, "head_dim", 64))
        assert layer.rope.base == theirs.rope_parameters["rope_theta"]
    assert (config.norm_eps, config.tie_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)


@pytest.mark.parametrize("theirs", ["qwen2"], indirect=True)
def test_sharded_weights_load(theirs, ids: torch.Tensor, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(tmp_path / "shards")(ids % 120).logits, theirs(ids % 120).logits, atol=1e-5, rtol=1e-5
        )
    next((tmp_path / "shards").glob("*-00002-*")).unlink()
    with pytest.raises(ValueError, match="00002"):
        load_model(tmp_path / "shards")


@pytest.mark.parametrize("theirs", ["llama mha"], indirect=True)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt_neox"}, "supported: sqa, llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "supported: sqa"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "48"}, "hidden_size in config.json must be a whole number above 0, got '48'"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads in config.json must be a whole number"),
        ({"num_attention_heads": 96, "head_dim": None}, "head_dim must be a positive whole number"),
        ({"rope_parameters": "none"}, "rope_parameters must be a JSON object, got 'none'"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope type must be default"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope type linear lacks factor"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "layer_types": 3},
            "layer_types must",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": None},
            "max_window_layers must be a whole number, got None",
        ),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial"),
        ({"rope_parameters": {**YARN, "mscale": 0.7}}, "mscale"),
        ({"num_key_value_heads": 4}, "num_kv_heads"),
        ({"intermediate_size": 81}, r"gate_proj.weight is \(80, 48\), expected \(81, 48\)"),
        ({"num_hidden_layers": 2}, "unknown model.layers.2"),
        ({"num_hidden_layers": 4}, "missing model.layers.3"),
    ],
)
def test_bad_configs_are_refused(theirs, changes: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        import_model(tmp_path / "theirs", tmp_path / "ours")
    assert not list(tmp_path.glob("*ours*"))


def test_bad_directories_are_refused(config_of: Make, model_of, saved, small_tokenizer, tmp_path: Path) -> None:
    run = saved(model_of(config_of()))

    def refused(message: str, change: Callable[[Path], object]) -> None:
        case = tmp_path / "case"
        shutil.copytree(run, case)
        change(case)
        for action in (import_model, lambda source, out: export(source, out, format="hf")):
            with pytest.raises(ValueError, match=message):
                action(case, tmp_path / "out")
        assert not list(tmp_path.glob("*out*"))
        shutil.rmtree(case)

    def truncate(case: Path) -> None:
        data = (case / "model.safetensors").read_bytes()
        (case / "model.safetensors").write_bytes(data[: len(data) // 2])

    def quantise(case: Path) -> None:
        tensors = load_file(case / "model.safetensors")
        key = "model.layers.0.self_attn.q_proj.weight"
        save_file(tensors | {key: tensors[key].to(torch.int8)}, case / "model.safetensors")

    def tie(case: Path) -> None:
        values = json.loads((case / "config.json").read_text())
        (case / "config.json").write_text(json.dumps(values | {"tie_embeddings": True}))

    def shrink(case: Path) -> None:
        model_of(config_of().replace(vocab_size=280)).save(case)

    refused("no config.json", lambda case: (case / "config.json").unlink())
    refused("not JSON", lambda case: (case / "config.json").write_text("{"))
    refused(
        "attention must be a table or a list, got None",
        lambda case: (case / "config.json").write_text(
            json.dumps(json.loads((case / "config.json").read_text()) | {"attention": None})
        ),
    )
    refused("no model.safetensors", lambda case: (case / "model.safetensors").unlink())
    refused("pickle.*save_pretrained", lambda case: (case / "model.safetensors").rename(case / "pytorch_model.bin"))
    refused("damaged or incomplete", truncate)
    refused("q_proj.weight is int8, expected floating point of 16 bits or more", quantise)
    refused("tied embeddings", tie)
    refused("290 entries.*vocab_size is only 280", shrink)
    refused("tokenizer.*damaged", lambda case: (case / "tokenizer.json").write_text("{}"))
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    before = sorted(run.rglob("*"))
    for action in (import_model, lambda source, out: export(source, out, format="hf")):
        for out in ("out", "link"):
            with pytest.raises(ValueError, match=f"{out} exists"):
                action(run, tmp_path / out)
        with pytest.raises(ValueError, match=r"new/out lies inside the model .*run, which is never changed"):
            action(run, run / "new" / "out")
    assert sorted(run.rglob("*")) == before
    for kind, message in (("onnx", "hf, hf-remote, gguf"), ("gguf", "ends in .gguf")):
        with pytest.raises(ValueError, match=message):
            export(run, tmp_path / "new", format=kind)
    with pytest.raises(ValueError, match="float32, bfloat16, float16 for hf"):
        export(run, tmp_path / "new", format="hf", dtype="int8")
    assert not (tmp_path / "new").exists()


def test_a_failed_write_leaves_nothing(
    config_of: Make, model_of, saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved(model_of(config_of()))

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("sqa.interop.writers.write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        export(run, tmp_path / "out", format="hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_index_may_not_point_elsewhere(config_of: Make, model_of, saved, tmp_path: Path) -> None:
    run = saved(model_of(config_of()))
    tensors = load_file(run / "model.safetensors")
    (run / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "elsewhere.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "../elsewhere.safetensors")}
    (run / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="files beside it"):
        load_model(run)
    save_file(tensors, run / "elsewhere.safetensors")
    index = {"weight_map": dict.fromkeys((*tensors, "lost"), "elsewhere.safetensors")}
    (run / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names tensors that its files lack: lost"):
        load_model(run)


def test_trainer_trains_the_exported_model(config_of: Make, model_of, saved, tmp_path: Path) -> None:
    export(saved(model_of(config_of())), tmp_path / "out", format="hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(2, 300, (8, 16)).tolist()]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
