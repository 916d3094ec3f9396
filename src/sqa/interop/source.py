"""Models on disk of every kind: ours, those of transformers and of the SQA authors, and GGUF files."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from sqa import storage
from sqa.config import ModelConfig
from sqa.errors import InputError
from sqa.interop import llama, reactive, text
from sqa.interop.hub import local_path
from sqa.interop.text import TextSide
from sqa.model import Transformer


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model whose config has been read and checked, but not its weights.

    `for_transformers`: whether it is a model of transformers, with a stock class or with ours beside it (hf-remote).
    """

    path: Path
    for_transformers: bool
    config: ModelConfig
    read_tensors: Callable[[], dict[str, Tensor]]
    read_text_side: Callable[[], TextSide]

    def load(self) -> Transformer:
        """The model, in the dtype of its files. Raises InputError for weights that are missing, unknown or damaged."""
        return Transformer.from_tensors(self.config, self.read_tensors(), str(self.path))


def open_source(source: str | Path) -> ModelSource:
    """Read the config of a model: a directory, a .gguf file or a name on the Hub ("ReactiveAI/SQAT-m").

    Raises InputError for anything that `load_model` cannot read.
    """
    path = local_path(source)
    return _open_gguf(path) if path.is_file() else _open_directory(path)


def _open_gguf(path: Path) -> ModelSource:
    from sqa.interop import gguf_reader, gguf_tokenizer

    file = gguf_reader.read_gguf(path)
    with storage.in_file(path):
        config = gguf_reader.model_config(file)
    sizes = {"vocab_size": config.vocab_size, "max_seq_len": config.max_seq_len}
    return ModelSource(
        path=path,
        for_transformers=True,
        config=config,
        read_tensors=partial(gguf_reader.read_tensors, file, config),
        read_text_side=partial(gguf_tokenizer.read_text_side, file, **sizes),
    )


def _open_directory(path: Path) -> ModelSource:
    values = storage.read_config(path)
    kind = values.get("model_type")
    ours: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    with storage.in_file(path / "config.json"):
        if kind == storage.MODEL_TYPE:
            config, ours = storage.model_config(values), dict
        elif kind in llama.MODEL_TYPES:
            config = llama.model_config(values)
            ours = partial(llama.state_from_stock, config=config, values=values)
        elif reactive.is_reactive(values):
            config = reactive.model_config(values)
            ours = partial(reactive.state_from_reactive, config=config)
        else:
            raise InputError(
                f"model: config.json has model_type {kind!r}; supported: {storage.MODEL_TYPE}, "
                f"{', '.join(llama.MODEL_TYPES)} and ReactiveAI's SQAT format"
            )
    if (count := storage.count_tensors(path)) is not None:
        storage.check_layers(str(path), config.num_layers, count)
    sizes = {"vocab_size": config.vocab_size, "max_seq_len": config.max_seq_len}
    return ModelSource(
        path=path,
        for_transformers=kind in llama.MODEL_TYPES or "auto_map" in values,
        config=config,
        read_tensors=lambda: ours(storage.read_tensors(path)),
        read_text_side=partial(text.read_text_side, path, values, **sizes),
    )


def read_text_side(path: Path, vocab_size: int) -> TextSide:
    """The text side of a GGUF file, or of a model directory of any kind, also of kinds that `open_source` refuses."""
    if path.is_file():
        return open_source(path).read_text_side()
    return text.read_text_side(path, storage.read_config(path), vocab_size=vocab_size)


def load_config(source: str | Path) -> ModelConfig:
    """The ModelConfig of any model that `load_model` reads; no weight is read."""
    return open_source(source).config


def load_model(source: str | Path) -> Transformer:
    """Read a model: our own directory, one of transformers (Llama, Mistral, Qwen2, Qwen3), a GGUF file, the authors'.

    `source` is a directory, a .gguf file (Llama, Qwen2, Qwen3) or a name on the Hub ("ReactiveAI/SQAT-m"). The dtype
    is that of the file, fp32 for quantised weights. Raises InputError, naming what is wrong, for anything missing,
    unknown, damaged, misshapen or pickled.
    """
    return open_source(source).load()
