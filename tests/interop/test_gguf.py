"""GGUF files, read back with the gguf package; llama.cpp itself is in test_llama_cpp.py."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from sqa import ModelConfig, Rope, RopeScaling, Transformer
from sqa.interop import export

Make = Callable[..., ModelConfig]


def fields_of(reader: gguf.GGUFReader) -> dict[str, object]:
    return {name: field.contents() for name, field in reader.fields.items()}


def tensors_of(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def paired(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Written out: llama.cpp's row 2j of a head is Llama's j, its row 2j+1 is Llama's j + head_dim/2."""
    out = np.empty_like(rows)
    for start in range(0, len(rows), head_dim):
        for j in range(head_dim // 2):
            out[start + 2 * j] = rows[start + j]
            out[start + 2 * j + 1] = rows[start + j + head_dim // 2]
    return out


@pytest.mark.parametrize("interleaved", [False, True])
def test_weights_and_metadata(
    interleaved: bool, config_of: Make, model_of, saved, small_tokenizer, tmp_path: Path
) -> None:
    model = model_of(config_of(rope=Rope(base=5000.0, interleaved=interleaved)))
    assert export(saved(model), tmp_path / "model.gguf", format="gguf") == []
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields, tensors = fields_of(reader), tensors_of(reader)
    expected = {
        "general.architecture": "llama",
        "general.file_type": 0,
        "llama.vocab_size": 300,
        "llama.context_length": 96,
        "llama.embedding_length": 48,
        "llama.block_count": 2,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 6,
        "llama.attention.value_length": 6,
        "llama.rope.dimension_count": 6,
        "llama.rope.freq_base": 5000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 1,
    }
    assert {name: fields[name] for name in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 300
    assert [tokens.index(token) for token in ("<|endoftext|>", "<|pad|>")] == [0, 1]
    assert types == [3, 3] + [1] * 288 + [5] * 10
    vocabulary = small_tokenizer.get_vocab()
    assert all(tokens[index] == token for token, index in vocabulary.items())
    assert all(merge.replace(" ", "") in vocabulary for merge in fields["tokenizer.ggml.merges"])

    state = {key: value.numpy() for key, value in model.state_dict().items()}
    assert len(tensors) == len(state)
    for ours, theirs in {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.1.mlp.gate_proj": "blk.1.ffn_gate",
        "model.layers.1.self_attn.v_proj": "blk.1.attn_v",
        "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
        "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
    }.items():
        np.testing.assert_array_equal(tensors[f"{theirs}.weight"], state[f"{ours}.weight"])
    for name in "qk":
        rows = state[f"model.layers.1.self_attn.{name}_proj.weight"]
        np.testing.assert_array_equal(tensors[f"blk.1.attn_{name}.weight"], rows if interleaved else paired(rows, 6))


@pytest.mark.parametrize(("dtype", "error"), [("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 1e-2)])
def test_dtypes(dtype: str, error: float, config_of: Make, model_of, saved, tmp_path: Path) -> None:
    model = model_of(config_of())
    export(saved(model), tmp_path / "model.gguf", format="gguf", dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_down.weight"] == dtype.upper()  # rows of 64
    assert kinds["blk.0.ffn_up.weight"] == ("F16" if dtype == "q8_0" else dtype.upper())  # 48 is no multiple of 32
    weight = model.state_dict()["model.layers.0.mlp.down_proj.weight"]
    read = torch.from_numpy(tensors_of(reader)["blk.0.ffn_down.weight"].copy())
    assert (read - weight).abs().max() < error * weight.abs().max()


def test_qk_norm_is_qwen3_and_tied_weights_are_written_once(config_of: Make, model_of, tmp_path: Path) -> None:
    model: Transformer = model_of(config_of(qk_norm=True, tie_embeddings=True))
    model.save(tmp_path / "run")
    (note,) = export(tmp_path / "run", tmp_path / "model.gguf", format="gguf")
    assert "tokenizer" in note
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert fields_of(reader)["general.architecture"] == "qwen3"
    tensors = tensors_of(reader)
    assert "output.weight" not in tensors
    q = model.model.layers[0].self_attn.q_proj.weight.detach().numpy()
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight"], q)
    assert tensors["blk.0.attn_q_norm.weight"].shape == (6,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 8}, r"window=8 \(window=None\)"),
        ({"bias": True}, "bias=False"),
        ({"qkv_bias": True}, "qkv_bias"),
        ({"rope": Rope(scaling=RopeScaling(kind="linear", factor=2.0))}, "scaling"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(
    changes: dict, message: str, config_of: Make, model_of, saved, tmp_path: Path
) -> None:
    run = saved(model_of(config_of(**changes)))
    with pytest.raises(ValueError, match=message):
        export(run, tmp_path / "model.gguf", format="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_other_tokenizers_and_dtypes_are_refused(
    config_of: Make, model_of, saved, small_tokenizer, tmp_path: Path
) -> None:
    run = saved(model_of(config_of()))
    with pytest.raises(ValueError, match="f32, f16, bf16, q8_0"):
        export(run, tmp_path / "model.gguf", format="gguf", dtype="q4_0")
    other_split = small_tokenizer.to_str().replace('"use_regex":true', '"use_regex":false')
    values = json.loads(small_tokenizer.to_str())
    values["model"]["merges"] = []  # llama.cpp reads no such file
    for text in (other_split, json.dumps(values)):
        (run / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=r"has merges and splits text as GPT-2.* this tokenizer does not"):
            export(run, tmp_path / "model.gguf", format="gguf")
