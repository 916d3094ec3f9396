"""Files and folders that are whole or not there: made under a temporary name beside it, synced, renamed.

What a process left that was killed meanwhile is removed by the next that writes to the same folder.
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

if TYPE_CHECKING:
    from torch import Tensor


LOCK = ".lock"
"""The name, or how it begins, of a file that a process holds while it writes beside it."""

_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})-([0-9]+)-[0-9a-f]{8}\.tmp")


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/sqa`, or `~/.cache/sqa` where that variable is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sqa"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file to; when the block ends well it is synced and takes the name of `path`."""
    with _temporary(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; a library that makes its file anew may forget that
        yield temporary
        temporary.chmod(mode)
        _sync_file(temporary)
        temporary.replace(path)
        sync_directory(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`; when the block ends well its files are synced and it takes the name of `path`."""
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
    """A name that no other process uses; what has it is gone after the block."""
    remove_abandoned(path.parent)
    temporary = path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with naming(path):
            yield temporary
    finally:
        _remove(temporary)


def remove_abandoned(folder: Path) -> None:
    """Remove what processes of this machine that no longer run were writing to `folder`."""
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _TEMPORARY.fullmatch(path.name)
        if match and match[1] == _host() and not _runs(int(match[2])):
            _remove(path)


def _host() -> str:
    """A mark of this machine, because others may write to the same folder; not its name, which stays private."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _runs(process: int) -> bool:
    if os.name == "nt":
        return True  # there, asking with os.kill would end it
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
    """An OSError of the block, such as a full disk, says that it was about `path` unless it says another file."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # of a library that says no more than a text
            raise OSError(errno.EIO, str(error), str(path)) from error
        if error.filename is None or _TEMPORARY.fullmatch(Path(os.fsdecode(error.filename)).name):
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
    """Make a rename in `path` durable; where directories cannot be synced (Windows) nothing is done."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises InputError for another one."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors, wherever they are, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})


def sha256(path: Path) -> str:
    """Hex digest of what a file holds."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the OS lock of a file that names this process; the file is gone afterwards.

    Where another process holds it, `waiting` is told which and this one waits; without `waiting` raises InputError.
    """
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        holder = "?"
        with suppress(OSError):
            holder = path.read_text(encoding="utf-8", errors="replace").strip() or "?"
        busy = (
            f"out: {path.parent / path.name.removeprefix(LOCK).removeprefix('-')} is being written by process {holder}"
        )
        if waiting is None:
            raise InputError(busy) from None
        waiting(f"{busy}; waiting for it")
        lock.acquire()
    try:
        with suppress(OSError):  # Windows lets nobody write to it
            path.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: a process that waits for it looks whether it is still there
        lock.release()
