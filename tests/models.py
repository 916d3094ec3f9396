"""Tiny models, and a run directory with a tokenizer: fixtures for tests that save, export or convert."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from sqa import AttentionConfig, ModelConfig, Transformer
from sqa.data.tokenizer import END_TOKEN, PAD_TOKEN

VOCAB = 300
NOT_BUILT = ("built on Linux only", "no C++ compiler")  # why a machine has no library of our C++
TEXT = "def attend(q, k, v):\n    return softmax(q @ k.T) @ v  # größer als ß, 42 times\n" * 20


@pytest.fixture(scope="session")
def private_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies the code of hf-remote models to a cache it chose when it was imported."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="session")
def small_tokenizer() -> tokenizers.Tokenizer:
    """As data/tokenizer.py trains it: byte-level BPE, end and pad first."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 10,
        special_tokens=[END_TOKEN, PAD_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def make_config(*, num_heads: int = 8, **changes: object) -> ModelConfig:
    """d_model 48, two layers, 4 query and 2 KV heads of 8 nominal ones; `changes` go to attention or to the model."""
    own = {"bias", "final_norm", "tie_embeddings", "norm_eps", "num_layers", "attention"}
    model = {key: changes.pop(key) for key in list(changes) if key in own}
    attention = {"num_query_heads": 4, "num_kv_heads": 2, **changes}
    return ModelConfig(
        **{
            "vocab_size": VOCAB,
            "num_layers": 2,
            "d_ff": 64,
            "max_seq_len": 96,
            "attention": AttentionConfig(d_model=48, num_heads=num_heads, **attention),
            **model,
        }
    )


def make_model(config: ModelConfig) -> Transformer:
    """Weights large enough that every part matters, biases and norms included."""
    torch.manual_seed(0)
    model = Transformer(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.15))
            if "norm" in name:
                parameter.add_(1.0)
    return model


@pytest.fixture(scope="session")
def config_of() -> Callable[..., ModelConfig]:
    return make_config


@pytest.fixture(scope="session")
def model_of() -> Callable[[ModelConfig], Transformer]:
    return make_model


@pytest.fixture
def saved(tmp_path: Path, small_tokenizer: tokenizers.Tokenizer) -> Callable[[Transformer], Path]:
    """Write a model as training does, beside its tokenizer."""

    def save(model: Transformer, name: str = "run") -> Path:
        model.save(tmp_path / name)
        small_tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        return tmp_path / name

    return save


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    return torch.randint(2, VOCAB, (2, 21), generator=torch.Generator().manual_seed(1))
