"""Checkpoints of a run: tensors as safetensors, scalars and checksums as JSON. The last two are kept.

A checkpoint is a folder `step-N`, written under a temporary name, synced and renamed. Each process writes its parts of
the tensors to one file, in torch.distributed.checkpoint's safetensors format; any number of processes can read them.
"""

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

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
from sqa.files import naming, sha256, sync_directory, write_json, write_safetensors
from sqa.model import Transformer
from sqa.records import differences, read_json, read_record

logger = logging.getLogger(__name__)

T = TypeVar("T")

_KEPT = 2
_RECORD = "progress.json"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is. `wall_s`: seconds of training, over all its starts, as process 0 counted them."""

    step: int
    tokens: int
    wall_s: float


class Checkpoints:
    """The checkpoints in `folder`.

    Of several processes, each must call every method; theirs are written while training goes on.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # a group of its own, so that writing and training do not receive each other's messages
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def close(self) -> None:
        """Wait as `wait` does, and end the group and the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._group is not None:
                dist.destroy_process_group(self._group)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Write `step-N`, and drop all but this one and the one before. A full disk leaves them as they were.

        Raises OSError that names the folder for what the system refuses to write.
        """
        self.wait()
        tensors = _tensors(model, optimizer)
        config = model.config if isinstance(model, Transformer) else None
        if self._group is None:
            self._write(tensors, progress, config)
        else:
            staged = BlockingAsyncStager().stage(tensors)
            self._pending = self._thread.submit(self._write, staged, progress, config)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk. Raises the error that its writing met."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, at_most: int | None = None) -> Progress:
        """Restore the last whole checkpoint, of step `at_most` or before; step 0 when there is none.

        Damaged ones are skipped with a warning. Raises InputError for a checkpoint of a model of another shape.
        """
        # all processes must start from the same step
        found = of_main(_last_whole(self._folder, at_most) if _is_main() else None)
        if found is None:
            return Progress(step=0, tokens=0, wall_s=0.0)
        if isinstance(model, Transformer) and found.model is not None and found.model != model.config:
            changed = "; ".join(differences(found.model.to_dict(), model.config.to_dict()))
            raise InputError(f"resume: {found.path} is a checkpoint of another model ({changed})")
        held = HuggingFaceStorageReader(str(found.path)).read_metadata().state_dict_metadata
        for name, parameter in model.named_parameters():
            if f"{name}.exp_avg" in held:  # otherwise it never had a gradient
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        _read(found.path, _tensors(model, optimizer))
        return found.progress

    def _write(self, tensors: dict[str, Tensor], progress: Progress, config: ModelConfig | None) -> None:
        temporary = self._folder / f".writing-{progress.step}"
        try:
            if _is_main():
                for abandoned in self._folder.glob(".writing-*"):  # by a process that was killed; there is one writer
                    shutil.rmtree(abandoned)
                temporary.mkdir(parents=True)
            if self._group is None:
                write_safetensors(temporary / "tensors.safetensors", tensors)
            else:
                writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
                with naming(temporary), _plain_errors():
                    save(tensors, storage_writer=writer, process_group=self._group)
            if _is_main():  # after the last process has written
                target = self._folder / f"step-{progress.step}"
                _Checkpoint.describe(temporary, progress, config)
                if target.exists():
                    shutil.rmtree(target)
                os.replace(temporary, target)
                sync_directory(self._folder)
                # `load` passed over those of later steps, which are damaged or have no curve
                kept = [path for path in _steps(self._folder) if _step_of(path) <= progress.step][-_KEPT:]
                for path in _steps(self._folder):
                    if path not in kept:
                        shutil.rmtree(path)
        finally:
            if _is_main():
                shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True)
class _Checkpoint:
    """A whole checkpoint, described by its progress.json."""

    path: Path
    progress: Progress
    model: ModelConfig | None

    @classmethod
    def describe(cls, path: Path, progress: Progress, config: ModelConfig | None) -> None:
        """Write progress.json, after all other files."""
        record: dict[str, Any] = {**asdict(progress), "model": config and config.to_dict()}
        record["sha256"] = {file.name: sha256(file) for file in sorted(path.glob("*.safetensors"))}
        write_json(path / _RECORD, record | {"checksum": _checksum(record)})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a checkpoint's description and check its files. Raises InputError for what is missing or was changed."""
        record = read_json(path / _RECORD)
        if record.pop("checksum", None) != _checksum(record):
            raise InputError(f"{_RECORD} does not match its checksum")
        for name, checksum in record["sha256"].items():
            if not (path / name).is_file() or sha256(path / name) != checksum:
                raise InputError(f"{name} is missing or does not match its checksum")
        model = record["model"] and ModelConfig.from_dict(record["model"])
        return cls(path, read_record(Progress, record, _RECORD), model)


def of_main(value: T) -> T:
    """Process 0's value, in all processes: if they decided differently, they would wait for each other for ever."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


def read_model(folder: Path) -> tuple[Transformer, int]:
    """The model of the last whole checkpoint in `folder`, on the CPU, and its step. Raises InputError without one."""
    found = _last_whole(folder)
    if found is None or found.model is None:
        raise InputError(f"run: {folder} holds no whole checkpoint of a model of ours")
    model = Transformer(found.model)
    _read(found.path, {name: parameter.detach() for name, parameter in model.named_parameters()})
    return model, found.progress.step


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _steps(folder: Path) -> list[Path]:
    """The checkpoints, whole or not, by rising step."""
    return sorted((path for path in folder.glob("step-*") if path.name[5:].isdecimal()), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _last_whole(folder: Path, at_most: int | None = None) -> _Checkpoint | None:
    """The last checkpoint whose files match their checksums, of step `at_most` or before."""
    for path in reversed(_steps(folder)):
        if at_most is not None and _step_of(path) > at_most:
            logger.warning("checkpoint %s is passed over: the curve before it is damaged", path.name)
            continue
        try:
            return _Checkpoint.read(path)
        except (OSError, InputError) as error:
            logger.warning("checkpoint %s is damaged (%s); going back to the one before it", path.name, error)
    return None


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Each parameter under its name (a tied head once), and the optimiser's state of it under `name.key`."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach()
        found |= {f"{name}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    return found


def _read(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill the tensors, or this process's shards of them, in place. The files are safetensors: nothing is unpickled."""
    with warnings.catch_warnings(), _plain_errors():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is meant
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(path)))


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise the first process's own error: the library raises a BaseException, which no `except Exception` catches."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None
