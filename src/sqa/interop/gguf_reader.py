"""Reader of llama.cpp's GGUF files: the header is checked as a whole, the weights are dequantised.

The format is docs/gguf.md in ggml, versions 2 and 3, little-endian. The `gguf` package's own reader trusts every length
in a damaged file and takes seconds for a vocabulary; this one checks each length against the file.
"""

import math
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sqa import storage
from sqa.attention.rope import inverse_frequencies
from sqa.config import AttentionConfig, ModelConfig, Rope, RopeScaling
from sqa.errors import InputError, MissingExtraError, shown
from sqa.interop.llama import OUTER, repaired, with_zero_biases
from sqa.model import Transformer

try:
    import gguf
    from gguf import GGMLQuantizationType
except ImportError:
    raise MissingExtraError("GGUF needs the gguf package", "gguf") from None

ARCHITECTURES = ("llama", "deci", "qwen2", "qwen3")
INTERLEAVED = ("llama", "deci")  # these pair rotary dimensions (2j, 2j+1), the others as Llama in transformers
_OUTER_BIAS = re.compile(r"blk\.0\.(attn_output|ffn_gate|ffn_up|ffn_down)\.bias")
# keys that change what a model computes, and the value for which ours computes the same
_FIXED: dict[str, Any] = {
    "expert_count": 0,
    "attention.sliding_window": 0,
    "attention.causal": True,
    "attention.scale": 0.0,
    "logit_scale": 0.0,
    "residual_scale": 0.0,
    "embedding_scale": 0.0,
    "rope.scaling.alpha": 0.0,
    "rope.scaling.attn_factor": 1.0,
}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the file; `data` are its stored bytes, (rows, bytes of a row)."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    data: np.ndarray

    def read(self, dtype: torch.dtype) -> Tensor:
        """The values, dequantised."""
        values = gguf.quants.dequantize(self.data, self.kind).reshape(self.shape)
        return torch.from_numpy(np.require(values, requirements="W")).to(dtype)  # F32 is a view of the file


@dataclass(frozen=True)
class GgufFile:
    """A file's metadata, and its tensors by llama.cpp's names."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of a key, or the default if it is missing. Raises InputError for a value of another type."""
        value = self.metadata.get(key, default)
        if value is not default and type(value) is not kind:
            raise InputError(f"model: {key} in {self.path} must be of type {kind.__name__}, got {shown(repr(value))}")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """The value of a key that counts something. Raises InputError unless it is a whole number above 0."""
        value: int | None = self.get(key, int, default)
        if value is None or value < 1:
            raise InputError(f"model: {key} in {self.path} must be a whole number above 0, got {value}")
        return value


class _Cursor:
    """Reads a header from its start. Raises InputError instead of reading past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise InputError(f"model: {self.path} is truncated or damaged: its header goes beyond its end")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self) -> str:
        start = self.at
        try:
            return self.take(self.number(8)).decode()
        except UnicodeDecodeError:
            raise InputError(f"model: {self.path} is damaged: the text at byte {start} is not UTF-8") from None

    def value(self, key: str) -> Any:
        kind = self.number(4)
        if kind != _ARRAY:
            return self.values(key, kind, 1)[0]
        return self.values(key, self.number(4), self.number(8))

    def values(self, key: str, kind: int, count: int) -> list[Any]:
        if kind == _TEXT:
            return [self.text() for _ in range(count)]  # a count that is too large runs into the end of the file
        if kind not in _SCALARS:
            raise InputError(
                f"model: {self.path} is damaged: {shown(key)} has a value of type {kind}, which is not known"
            )
        dtype = np.dtype(f"<{_SCALARS[kind]}")
        values = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        # 1e-05, not 9.999999747e-06
        return [float(str(each)) for each in values] if dtype == np.float32 else values.tolist()


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file, and check that its tensors are there and can be dequantised.

    Raises InputError for a file that is no GGUF, truncated, damaged, or quantised in a way that `gguf` cannot read.
    """
    with open(path, "rb") as opened:
        if opened.read(4) != b"GGUF":
            raise InputError(f"model: {path} is no GGUF file: it does not begin with the letters GGUF")
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(path, data)
    cursor.take(4)
    version = cursor.number(4)
    if version not in (2, 3):
        raise InputError(f"model: {path} must be a little-endian GGUF of version 2 or 3, got version {version}")
    num_tensors, num_keys = cursor.number(8), cursor.number(8)
    metadata = {}
    for _ in range(num_keys):
        key = cursor.text()
        metadata[key] = cursor.value(key)
    found = {}
    for _ in range(num_tensors):
        name = cursor.text()
        dims = [cursor.number(8) for _ in range(cursor.number(4))]
        if name in found or not 1 <= len(dims) <= 4 or 0 in dims:
            raise InputError(f"model: {path} is damaged: {shown(name)} is there twice, or not of 1 to 4 dimensions")
        found[name] = tuple(reversed(dims)), cursor.number(4), cursor.number(8)
    file = GgufFile(path, metadata, {})
    alignment = file.count("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    start = math.ceil(cursor.at / alignment) * alignment
    whole = np.frombuffer(data, dtype=np.uint8)
    for name, (shape, number, offset) in found.items():
        kind = _kind(path, name, number)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise InputError(f"model: {path} is damaged: {shown(name)} has rows of {shape[-1]}, no multiple of {block}")
        row_bytes = shape[-1] // block * size
        begin, end = start + offset, start + offset + math.prod(shape[:-1]) * row_bytes
        if end > len(data):
            raise InputError(
                f"model: {path} is truncated: {shown(name)} ends at byte {end:,}, the file has {len(data):,}"
            )
        file.tensors[name] = StoredTensor(shape, kind, whole[begin:end].reshape(-1, row_bytes))
    return file


def _kind(path: Path, name: str, number: int) -> GGMLQuantizationType:
    """The quantisation of a tensor, if `gguf` can read it."""
    try:
        kind = GGMLQuantizationType(number)
        gguf.quants.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], dtype=np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        called = GGMLQuantizationType(number).name if number in list(GGMLQuantizationType) else f"number {number}"
        raise InputError(
            f"model: {path} holds {shown(name)} in the quantisation {called}, which the gguf package cannot read; "
            f"give a file in F32, F16, BF16, Q8_0 or a Q4, Q5 or Q6 type"
        ) from None
    return kind


def model_config(file: GgufFile) -> ModelConfig:
    """The config of a file of one of ARCHITECTURES. Raises InputError for another one and for unsupported features."""
    arch = file.get("general.architecture", str)
    if arch not in ARCHITECTURES:
        raise InputError(
            f"model: {file.path} is of architecture {shown(str(arch))}; supported are {', '.join(ARCHITECTURES)}"
        )
    for name, plain in _FIXED.items():
        if (value := file.metadata.get(f"{arch}.{name}", plain)) != plain:
            raise InputError(f"model: {arch}.{name} in {file.path} must be {plain} to be read here, got {value}")
    d_model, num_layers = file.count(f"{arch}.embedding_length"), file.count(f"{arch}.block_count")
    storage.check_layers(str(file.path), num_layers, len(file.tensors))
    query_heads = _counts(file, f"{arch}.attention.head_count", num_layers)
    kv_heads = _counts(file, f"{arch}.attention.head_count_kv", num_layers, query_heads)
    head_dim = file.count(f"{arch}.attention.key_length", max(d_model // query_heads[0], 1))
    for name in ("attention.value_length", "rope.dimension_count"):
        if (value := file.count(f"{arch}.{name}", head_dim)) != head_dim:
            raise InputError(f"model: {arch}.{name} in {file.path} must be the head_dim {head_dim}, got {value}")
    max_seq_len = file.count(f"{arch}.context_length")
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"model: {file.path} has no tensor token_embd.weight")
    attention = AttentionConfig(
        d_model=d_model,
        # the nominal count of a layer with fewer query heads
        num_heads=max(*query_heads, d_model // head_dim),
        head_dim=head_dim,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        rope=_read_rope(file, arch, head_dim, max_seq_len),
    )
    return ModelConfig(
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        num_layers=num_layers,
        d_ff=file.count(f"{arch}.feed_forward_length"),
        max_seq_len=max_seq_len,
        attention=tuple(
            attention.replace(num_query_heads=query, num_kv_heads=kv)
            for query, kv in zip(query_heads, kv_heads, strict=True)
        ),
        bias=any(map(_OUTER_BIAS.fullmatch, file.tensors)),
        tie_embeddings="output.weight" not in file.tensors,
        norm_eps=file.get(f"{arch}.attention.layer_norm_rms_epsilon", float, 1e-5),
    )


def _counts(file: GgufFile, key: str, num_layers: int, default: list[int] | None = None) -> list[int]:
    """Heads of each layer, from one number for all of them or from a list."""
    value = file.metadata.get(key, default)
    if not isinstance(value, list):
        return [file.count(key)] * num_layers
    if len(value) != num_layers or any(type(each) is not int or each < 1 for each in value):
        raise InputError(
            f"model: {key} in {file.path} must be {num_layers} whole numbers above 0, got {shown(repr(value))}"
        )
    return value


def _read_rope(file: GgufFile, arch: str, head_dim: int, max_seq_len: int) -> Rope:
    base = file.get(f"{arch}.rope.freq_base", float, 10_000.0)
    prefix = f"{arch}.rope.scaling"
    # 0 stands for a key that is not there, as in llama.cpp
    factors = (file.get(key, float, 0.0) for key in (f"{prefix}.factor", f"{arch}.rope.scale_linear"))
    factor = next(filter(None, factors), 1.0)
    kind = file.get(f"{prefix}.type", str, "none" if factor == 1.0 else "linear")
    if kind not in ("none", "linear", "yarn"):
        raise InputError(f"model: {prefix}.type in {file.path} must be none, linear or yarn, got {shown(kind)}")
    if (divisors := file.tensors.get("rope_freqs.weight")) is not None:
        if kind == "yarn" or (kind == "linear" and factor != 1.0):
            raise InputError(f"model: {file.path} has rope_freqs.weight beside {prefix}; only one of them is read here")
        return _llama3_rope(file.path, base, divisors.read(torch.float32).double(), head_dim)
    if kind == "none":
        return Rope(base=base)
    if kind == "linear":
        return Rope(base=base, scaling=RopeScaling(kind="linear", factor=factor))
    known = {f"{prefix}.{name}" for name in ("type", "factor", "original_context_length", "finetuned")}
    if others := [key for key in file.metadata if key.startswith(prefix) and key not in known]:
        raise InputError(f"model: {file.path} has rope scaling fields not read here: {', '.join(others)}")
    length = file.get(f"{prefix}.original_context_length", int, max_seq_len)
    return Rope(base=base, scaling=RopeScaling(kind="yarn", factor=factor, original_max_seq_len=length))


def _llama3_rope(path: Path, base: float, factors: Tensor, head_dim: int) -> Rope:
    """Llama 3's rope scaling, found from the file's tensor, which holds the divisor of each frequency.

    This inverts conversion/llama.py of llama.cpp for the low and high frequency factors 1 and 4 of all Llama 3 models.
    """
    plain = inverse_frequencies(Rope(base=base), head_dim)[0].double()
    if factors.shape == plain.shape and bool((factors == 1).all()):
        return Rope(base=base)
    if factors.shape == plain.shape and bool(((factors > 1) & (factors < factors.max())).any()):
        factor = float(factors.max())
        # 1 / factors = (1 - keep) / factor + keep, where keep = (turns - 1) / 3 and turns = length / wavelength
        keep = (1 / factors - 1 / factor) / (1 - 1 / factor)
        lengths = (1 + 3 * keep) * 2 * math.pi / plain
        length = round(float(lengths[(factors > 1) & (factors < factor)].median()))
        scaling = RopeScaling(kind="llama3", factor=factor, original_max_seq_len=length)
        rope = Rope(base=base, scaling=scaling)
        if torch.allclose(inverse_frequencies(rope, head_dim)[0].double() * factors, plain, rtol=1e-4):
            return rope
    raise InputError(f"model: rope_freqs.weight in {path} is not the rope scaling of a Llama 3 model")


def read_tensors(file: GgufFile, config: ModelConfig) -> dict[str, Tensor]:
    """The file's tensors under our names, dequantised to fp32; half precision stays if all matrices have it."""
    kinds = {stored.kind for stored in file.tensors.values() if len(stored.shape) > 1}
    half = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
    dtype = half.get(next(iter(kinds)), torch.float32) if len(kinds) == 1 else torch.float32
    ours = {theirs: key for key, theirs in their_names(config).items()}
    tensors = {
        ours.get(name, name): each.read(dtype) for name, each in file.tensors.items() if name != "rope_freqs.weight"
    }  # a name that is not known is kept, for the model to refuse
    if config.bias:
        absent = [part for part in OUTER if f"model.layers.0.{part}.bias" not in tensors]
        tensors = with_zero_biases(tensors, config, absent)
    if file.metadata["general.architecture"] in INTERLEAVED:
        tensors = repaired(tensors, config.layers[0].head_dim, interleaved=False)
    return tensors


def their_names(config: ModelConfig) -> dict[str, str]:
    """llama.cpp's name of each tensor of a model of ours."""
    with torch.device("meta"):
        ours = Transformer(config).state_dict()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_layers)  # the names of the others, and QK-norm
    return {key: names.get_name(key, try_suffixes=(".weight", ".bias")) for key in ours}
