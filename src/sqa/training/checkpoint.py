"""Checkpoints of a run: tensors as safetensors, scalars and checksums as JSON, the last two kept, each whole or absent.

A checkpoint is a folder `step-N`, written under a temporary name, synced and renamed. Each process writes one file, of
the parts that it holds (torch.distributed.checkpoint's safetensors format); any number of processes read them back.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from sqa.config import ModelConfig
from sqa.errors import InputError
from sqa.files import sha256, sync_directory, write_json, write_safetensors
from sqa.model import Transformer

logger = logging.getLogger(__name__)

T = TypeVar("T")

_KEPT = 2


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come. `wall_s`: seconds spent training, over all its starts, as process 0 counted them."""

    step: int
    tokens: int
    wall_s: float


class Checkpoints:
    """The checkpoints in `folder`. Of several processes all call every method, and write while training goes on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._beside = _beside_training() if dist.is_initialized() else None
        self._pending: Future[None] | None = None

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Write `step-N` and drop all but the last two. A full disk leaves the earlier ones as they were."""
        self.wait()
        tensors = _tensors(model, optimizer)
        record = asdict(progress) | ({"model": model.config.to_dict()} if isinstance(model, Transformer) else {})
        if self._beside is None:
            self._write(tensors, record)
        else:
            self._pending = self._beside.thread.submit(self._write, BlockingAsyncStager().stage(tensors), record)

    def wait(self) -> None:
        """Until what was saved last is on disk. Raises what kept it from getting there."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress | None:
        """Restore the last whole checkpoint; None when there is none. Damaged ones are named and passed.

        Raises ValueError for a checkpoint of a model of another shape.
        """
        found = of_main(_last_whole(self._folder) if _is_main() else None)  # all must go on from one step
        if found is None:
            return None
        path, record = found
        if isinstance(model, Transformer) and "model" in record:
            there, here = (c.to_dict() for c in (ModelConfig.from_dict(record["model"]), model.config))
            if differences := [
                f"{name}: {there[name]} there, {here[name]} now" for name in here if there[name] != here[name]
            ]:
                raise InputError(f"resume: {path} is a checkpoint of another model ({'; '.join(differences)})")
        held = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        for name, parameter in model.named_parameters():
            if f"{name}.exp_avg" not in held:  # it never had a gradient
                continue
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        _read(path, _tensors(model, optimizer))
        return Progress(step=record["step"], tokens=record["tokens"], wall_s=record["wall_s"])

    def _write(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        temporary = self._folder / f".writing-{record['step']}"
        try:
            if _is_main():
                for abandoned in self._folder.glob(".writing-*"):  # by a process that was killed; there is one writer
                    shutil.rmtree(abandoned)
                temporary.mkdir(parents=True)
            if self._beside is None:
                write_safetensors(
                    temporary / "tensors.safetensors", {k: v.cpu().contiguous() for k, v in tensors.items()}
                )
            else:
                writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
                with _plain_errors():
                    save(tensors, storage_writer=writer, process_group=self._beside.group)
            if _is_main():  # after the last process has written
                sums = {path.name: sha256(path) for path in sorted(temporary.glob("*.safetensors"))}
                write_json(temporary / "progress.json", {**record, "sha256": sums})
                target = self._folder / f"step-{record['step']}"
                if target.exists():
                    shutil.rmtree(target)
                os.replace(temporary, target)
                sync_directory(self._folder)
                for old in _steps(self._folder)[:-_KEPT]:
                    shutil.rmtree(old)
        finally:
            if _is_main():
                shutil.rmtree(temporary, ignore_errors=True)


def of_main(value: T) -> T:
    """What process 0 gives, in all processes: they must decide alike, or they would wait for each other."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


def read_model(folder: Path) -> tuple[Transformer, int]:
    """The model of the last whole checkpoint in `folder`, on the CPU, and its step. Raises ValueError without one."""
    found = _last_whole(folder)
    if found is None or "model" not in found[1]:
        raise InputError(f"run: {folder} holds no whole checkpoint of a model of ours")
    path, record = found
    model = Transformer(ModelConfig.from_dict(record["model"]))
    _read(path, {name: parameter.detach() for name, parameter in model.named_parameters()})
    return model, record["step"]


class _Beside(NamedTuple):
    """A group and a thread of their own: writing and training would take each other's messages."""

    group: dist.ProcessGroup
    thread: ThreadPoolExecutor


@lru_cache(maxsize=1)
def _beside_training() -> _Beside:
    return _Beside(dist.new_group(backend="gloo"), ThreadPoolExecutor(1))


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _steps(folder: Path) -> list[Path]:
    return sorted(
        (path for path in folder.glob("step-*") if path.name[5:].isdigit()),
        key=lambda path: int(path.name.removeprefix("step-")),
    )


def _last_whole(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The last checkpoint whose files match their checksums, with its progress.json."""
    for path in reversed(_steps(folder)):
        try:
            record: dict[str, Any] = json.loads((path / "progress.json").read_text(encoding="utf-8"))
            for name, checksum in record["sha256"].items():
                if sha256(path / name) != checksum:
                    raise InputError(f"{name} does not match its checksum")
            return path, record
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            logger.warning("checkpoint %s is damaged (%s); going back to the one before it", path.name, error)
    return None


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Each parameter under its name (a tied head once), and what the optimiser keeps of it under `name.key`."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach()
        found |= {f"{name}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    return found


def _read(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill the tensors, or this process's shards of them, in place. Nothing is unpickled: the files are safetensors."""
    with warnings.catch_warnings(), _plain_errors():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is meant
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(path)))


@contextmanager
def _plain_errors() -> Iterator[None]:
    """The first process's own error: the library's is a BaseException, which passes every `except`."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None
