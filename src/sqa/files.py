"""Files and folders that appear whole or not at all: written under a temporary name, synced, then renamed.

The next process that writes to a folder removes what a killed process left there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from sqa.errors import InputError
from sqa.records import to_json

if TYPE_CHECKING:
    from torch import Tensor


LOCK = ".lock"
"""The name, or its beginning, of the file that a process locks while it writes beside it."""

_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})-([0-9]+)-[0-9a-f]{8}\.tmp")


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/sqa`, or `~/.cache/sqa` where that variable is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sqa"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write a file to. When the block ends well, the file is synced and renamed to `path`."""
    with _temporary(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask wants it; a library that replaces the file may change it
        yield temporary
        temporary.chmod(mode)
        _sync_file(temporary)
        temporary.replace(path)
        sync_directory(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder. When the block ends well, its files are synced and it is renamed to `path`."""
    with _temporary(path) as temporary:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync_file(file)
        sync_directory(temporary)
        temporary.rename(path)
        sync_directory(path.parent)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A unique temporary name beside `path`. Whatever has that name after the block is removed."""
    remove_abandoned(path.parent)
    temporary = path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with naming(path):
            yield temporary
    finally:
        _remove(temporary)


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files in `folder` of processes of this machine that have ended."""
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _TEMPORARY.fullmatch(path.name)
        if match and match[1] == _host() and not _runs(int(match[2])):
            _remove(path)


def _host() -> str:
    """A hash that tells this machine from others that write to the same folder, and keeps its name private."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _runs(process: int) -> bool:
    if os.name == "nt":
        return True  # os.kill would end the process on Windows
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in an OSError of the block, such as a full disk, that names no file or a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a library raised it with a text alone
            raise OSError(errno.EIO, str(error), str(path)) from error
        if error.filename is None or any(map(_TEMPORARY.fullmatch, Path(os.fsdecode(error.filename)).parts)):
            error.filename, error.filename2 = str(path), None
        raise
    except Exception as error:
        if type(error).__name__ == "SafetensorError" and (match := re.search(r"os error (\d+)", str(error))):
            raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from None
        raise


def _sync_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make a rename in the directory `path` durable. Does nothing on Windows, which cannot sync directories."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_text(path: Path) -> str:
    """The text of a file. Raises InputError unless it is UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON of plain values and records, whole or not at all."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Indented JSON of plain values and records."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=to_json) + "\n"


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors from any device, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path`, which names this process, during the block, and remove it afterwards.

    If another process holds it, wait for that process after telling `waiting` which it is; without `waiting`, raise
    InputError.
    """
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        holder = "?"
        with suppress(OSError):
            holder = path.read_text(encoding="utf-8", errors="replace").strip() or "?"
        place = path.parent / path.name.removeprefix(LOCK).removeprefix("-")
        busy = f"{place} is being written by process {holder}"
        if waiting is None:
            raise InputError(f"out: {busy}") from None
        waiting(f"{busy}; waiting for it")
        lock.acquire()
    try:
        with suppress(OSError):  # Windows lets nobody write to it
            path.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before releasing: a process that waits checks whether it is still there
        lock.release()
