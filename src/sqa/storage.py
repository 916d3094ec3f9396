"""Our model directories: read strictly, written whole or not at all. Knows configs and tensors, no models."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sqa.config import LARGEST, LONGEST, MOST_LAYERS, ModelConfig
from sqa.dtypes import dtype_name
from sqa.errors import InputError, shown
from sqa.files import new_folder, write_json, write_safetensors
from sqa.records import read_json

MODEL_TYPE = "sqa"


@contextmanager
def in_file(path: Path) -> Iterator[None]:
    """Add the name of the file to an InputError of the block that does not name it."""
    try:
        yield
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{error} (in {path})") from None


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as a dict. Raises InputError when it is missing or no JSON object."""
    if (directory / "config.json").is_file():
        return read_json(directory / "config.json")
    if (directory / "adapter_config.json").is_file():
        raise InputError(
            f"model: {directory} is a PEFT adapter; merge it first: merge_and_unload().save_pretrained(OUT)"
        )
    raise InputError(f"model: {directory} has no config.json; give a directory written by save or by transformers")


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """model.safetensors, or the shards of model.safetensors.index.json. Raises InputError when missing or damaged."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file():
        return _read_file(directory / "model.safetensors")
    if not index.is_file():
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        if pickles:
            raise InputError(
                f"model: {directory} holds its weights as a pickle ({pickles[0]}), which can run code when read and is "
                f"refused; convert it where you trust it: AutoModelForCausalLM.from_pretrained(IN).save_pretrained(OUT)"
            )
        raise InputError(f"model: {directory} has no model.safetensors")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise InputError(f"model: {index} must map tensor names to files beside it, under weight_map")
    tensors = {}
    for name in sorted(set(weight_map.values())):
        tensors.update(_read_file(directory / name))
    if absent := sorted(set(weight_map) - set(tensors)):
        raise InputError(f"model: {index} names tensors that its files lack: {', '.join(absent[:5])}")
    return tensors


def check_layers(where: str, num_layers: int, num_tensors: int) -> None:
    """Raise InputError when there are more layers than tensors, before a model of that size is built."""
    if num_layers > num_tensors:
        raise InputError(
            f"model: {where} does not fit its config: {num_layers:,} layers, but {num_tensors:,} tensors in all"
        )


def count_tensors(directory: Path) -> int | None:
    """The number of tensors, from the headers of model*.safetensors alone; None if there is none or one is damaged."""
    try:
        counts = []
        for path in directory.glob("model*.safetensors"):
            with safe_open(path, "pt") as file:
                counts.append(len(file.keys()))
    except (SafetensorError, OSError):
        return None
    return sum(counts) if counts else None


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"model: {path.parent} has no {path.name}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"model: {path} is damaged or incomplete: {error}") from None


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of our own config.json; fields that transformers adds to an hf-remote one are ignored."""
    values = {key: value for key, value in values.items() if key != "model_type"}
    if "auto_map" in values:
        known = {field.name for field in fields(ModelConfig)}
        values = {key: value for key, value in values.items() if key in known}
    return ModelConfig.from_dict(values)


def require_counts(values: Mapping[str, Any], *names: str) -> None:
    """Raise InputError unless these fields of a config.json are whole numbers above 0 and below sensible limits."""
    if absent := [name for name in names if values.get(name) is None]:
        raise InputError(f"model: config.json lacks {', '.join(absent)}")
    for name in names:
        if type(values[name]) is not int or values[name] < 1:
            given = shown(repr(values[name]))
            raise InputError(f"model: {name} in config.json must be a whole number above 0, got {given}")
        limit = MOST_LAYERS if "layers" in name else LONGEST if "position" in name or "seq_len" in name else LARGEST
        if values[name] > limit:
            raise InputError(f"model: {name} in config.json must be at most {limit:,}, got {shown(str(values[name]))}")


def require_values(values: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise InputError unless each of these fields of a config.json is absent or has one of the given values."""
    for name, allowed in known.items():
        if (given := values.get(name, allowed[0])) not in allowed:
            raise InputError(f"model: {name} must be {allowed[0]} to be read here, got {shown(repr(given))}")


def check_tensors(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise InputError naming the tensors that are missing, unknown, misshapen or quantised."""
    problems = [f"missing {key}" for key in expected if key not in tensors]
    problems += [f"unknown {shown(key)}" for key in tensors if key not in expected]
    problems += [
        f"{key} is {tuple(tensors[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    problems += [
        f"{shown(key)} is {dtype_name(value.dtype)}, expected floating point of 16 bits or more"
        for key, value in tensors.items()
        if not value.is_floating_point() or value.element_size() < 2
    ]
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise InputError(f"model: {where} does not fit its config: {listed}")


def save_model(directory: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write config.json and model.safetensors into `directory`, made if missing."""
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", tensors)
    write_json(directory / "config.json", {"model_type": MODEL_TYPE, **config.to_dict()})


def refuse_existing(out: Path) -> None:
    """Raise InputError when `out` exists."""
    if out.exists() or out.is_symlink():
        raise InputError(f"output: {out} exists; name a new one, nothing is overwritten")


def refuse_inside(out: Path, source: Path) -> None:
    """Raise InputError when `out` lies inside the model directory `source`."""
    if source.resolve() in out.resolve().parents:
        raise InputError(f"output: {out} lies inside the model {source}, which is never changed; name another place")


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A temporary folder, which becomes `out` when the block ends well. Raises InputError when `out` exists."""
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(out) as temporary:
        yield temporary


def regular_file(path: Path) -> bool:
    """Whether there is such a file. Raises InputError for a link to another place and for anything but a regular file.

    A link may lead to a file beside it, or to the blobs of the Hub's cache.
    """
    if not path.exists() and not path.is_symlink():
        return False
    folder = path.parent.resolve()
    blobs = [above / "blobs" for above in folder.parents[1:3]]  # a model may have folders of its own
    if path.is_symlink() and Path(os.path.realpath(path)).parent not in (folder, *blobs):
        raise InputError(f"model: {path} is a link to another place; put the file itself there")
    if not path.is_file():
        raise InputError(f"model: {path} must be a regular file")
    return True
