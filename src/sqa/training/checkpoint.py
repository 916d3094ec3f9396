"""Checkpoints of a run: tensors as safetensors, scalars and checksums as JSON, the last two kept, each whole or absent.

A checkpoint is a folder `step-N`, written under a temporary name, synced and renamed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sqa.files import sync_directory, write_json, write_safetensors

logger = logging.getLogger(__name__)

_KEPT = 2
_FILES = ("model.safetensors", "optimizer.safetensors")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come. `wall_s`: seconds spent training, over all its processes."""

    step: int
    tokens: int
    wall_s: float


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
    """Write `folder/step-N` and drop all but the last two. A full disk leaves the earlier ones as they were."""
    folder.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.glob(".writing-*"):  # by a process that was killed; the directory has one writer
        shutil.rmtree(abandoned)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
    try:
        write_safetensors(temporary / _FILES[0], _unshared(model.state_dict()))
        write_safetensors(temporary / _FILES[1], _optimizer_tensors(model, optimizer))
        checksums = {name: _sha256(temporary / name) for name in _FILES}
        write_json(temporary / "progress.json", {**asdict(progress), "sha256": checksums})
        target = folder / f"step-{progress.step}"
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        sync_directory(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _steps(folder)[:-_KEPT]:
        shutil.rmtree(old)
    return target


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress | None:
    """Restore the last whole checkpoint under `folder`; None when there is none. Damaged ones are named and passed."""
    for path in reversed(_steps(folder)):
        try:
            progress, model_tensors, optimizer_tensors = _read(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            logger.warning("checkpoint %s is damaged (%s); going back to the one before it", path.name, error)
            continue
        for name, tensor in model.state_dict().items():
            if name in model_tensors:  # a tied head is stored once
                tensor.copy_(model_tensors[name])
        _restore_optimizer(model, optimizer, optimizer_tensors)
        return progress
    return None


def _steps(folder: Path) -> list[Path]:
    return sorted(
        (path for path in folder.glob("step-*") if path.name[5:].isdigit()),
        key=lambda path: int(path.name.removeprefix("step-")),
    )


def _read(path: Path) -> tuple[Progress, dict[str, Tensor], dict[str, Tensor]]:
    scalars = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    for name, checksum in scalars.pop("sha256").items():
        if _sha256(path / name) != checksum:
            raise ValueError(f"{name} does not match its checksum")
    return Progress(**scalars), load_file(path / _FILES[0]), load_file(path / _FILES[1])


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without second names for the same storage, which safetensors refuses."""
    seen: set[int] = set()
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in tensors.items()
        if not (tensor.data_ptr() in seen or seen.add(tensor.data_ptr()))  # type: ignore[func-returns-value]
    }


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.detach().cpu()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        state = {
            key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.rpartition(".")[0] == name
        }
        optimizer.state[parameter] = {
            key: value.clone() if key == "step" else value.to(parameter.device).clone() for key, value in state.items()
        }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
