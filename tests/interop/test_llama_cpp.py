"""llama.cpp loads our GGUF file and continues as we do: `make test-gguf` builds llama-cpp-python first."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sqa import ModelConfig
from sqa.interop import export

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="data: llama-cpp-python is not installed"),
]
PROMPT = "def attend(q, k"


@pytest.mark.parametrize("arch", ["llama", "qwen3", "deci"])
def test_same_greedy_tokens(
    arch: str, config_of: Callable[..., ModelConfig], model_of, saved, small_tokenizer, tmp_path: Path
) -> None:
    from llama_cpp import Llama

    layer = config_of(qk_norm=arch == "qwen3").layers[0]
    layers = (layer, layer.replace(num_query_heads=6, num_kv_heads=1)) if arch == "deci" else layer
    model = model_of(config_of(attention=layers))
    export(saved(model), tmp_path / "model.gguf", format="gguf", dtype="f32")
    kv_f32 = 0  # GGML_TYPE_F32: its default cache is f16
    llama = Llama(
        str(tmp_path / "model.gguf"), n_ctx=96, n_batch=96, type_k=kv_f32, type_v=kv_f32, verbose=False, n_threads=1
    )
    ids = llama.tokenize(PROMPT.encode(), add_bos=False)
    assert ids == small_tokenizer.encode(PROMPT).ids
    ours = model.generate(torch.tensor([ids]), max_new_tokens=64)[0, len(ids) :].tolist()
    theirs = []
    for token in llama.generate(ids, temp=0.0, repeat_penalty=1.0):
        theirs.append(token)
        if len(theirs) == 64:
            break
    assert theirs == ours
