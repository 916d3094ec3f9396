"""Files that are whole or not there, in the modes that the user asks for, and what killed writers leave."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sqa.files import locked, naming, new_folder, replacing, write_json, write_safetensors, write_text
from sqa.progress import Interrupted, stop_flag

KILLED = """
import os, sys
from pathlib import Path
from sqa.files import new_folder, replacing
with replacing(Path(sys.argv[1], "a.json")) as file, new_folder(Path(sys.argv[1], "b")) as folder:
    file.write_text("half")
    (folder / "half").write_text("half")
    print("writing", flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), 9)
    sys.stdin.read()
"""


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_the_umask_decides_who_may_read(tmp_path: Path, umask: int, file_mode: int, folder_mode: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "text", "whole")
        write_json(tmp_path / "json", {})
        write_safetensors(tmp_path / "tensors", {"a": torch.zeros(1)})
        with new_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"text": file_mode, "json": file_mode, "tensors": file_mode, "folder": folder_mode}


def test_the_next_writer_removes_what_a_dead_process_left_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run([*command, "killed"], stdout=subprocess.DEVNULL).returncode == -9
    left = set(tmp_path.iterdir())
    assert len(left) == 2
    with subprocess.Popen([*command, "alive"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as alive:
        assert alive.stdout
        assert alive.stdout.readline() == "writing\n"
        writing = set(tmp_path.iterdir())
        assert len(writing) == 2
        assert not writing & left
        foreign = tmp_path / ".note.tmp"
        foreign.write_text("of somebody else")
        write_text(tmp_path / "c.txt", "whole")
        assert set(tmp_path.iterdir()) == {*writing, foreign, tmp_path / "c.txt"}
        alive.communicate()
    assert (tmp_path / "a.json").read_text() == "half"
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b", ".note.tmp", "c.txt"}


def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "before")

    def fail() -> None:
        with replacing(tmp_path / "file") as file, new_folder(tmp_path / "folder") as folder:
            file.write_text("after")
            (folder / "x").write_text("x")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"


def test_a_full_disk_is_said_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as full, replacing(tmp_path / "file"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert full.value.filename == str(tmp_path / "file")
    with pytest.raises(OSError, match="No space left") as full, naming(tmp_path / "other"):
        Path("/dev/full").write_text("x")
    assert full.value.filename == str(tmp_path / "other")


def test_an_error_in_a_new_folder_names_the_folder_and_no_temporary_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing, new_folder(tmp_path / "out") as folder:
        write_text(folder / "inside" / "a.json", "x")
    assert missing.value.filename == str(tmp_path / "out")


def test_safetensors_on_a_full_disk_are_an_ordinary_error(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the library reports both in the same way."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "import torch; from pathlib import Path; from sqa.files import write_safetensors\n"
        "try: write_safetensors(Path(sys.argv[1], 'model.safetensors'), {'a': torch.zeros(10_000)})\n"
        "except OSError as error: print(error.filename)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "model.safetensors"), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_lock_names_who_holds_it_and_is_gone_afterwards(tmp_path: Path) -> None:
    said: list[str] = []
    with locked(tmp_path / ".lock-model"):
        with pytest.raises(ValueError, match=rf"model is being written by process {os.getpid()}$"):
            locked(tmp_path / ".lock-model").__enter__()
        code = (
            "import sys; from pathlib import Path; from sqa.files import locked\n"
            "with locked(Path(sys.argv[1]), lambda text: print(text, flush=True)): print('mine')"
        )
        command = [sys.executable, "-c", code, str(tmp_path / ".lock-model")]
        waiting = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert waiting.stdout
        said.append(waiting.stdout.readline())
    said.append(waiting.communicate(timeout=60)[0])
    assert said[0].strip().endswith(f"model is being written by process {os.getpid()}; waiting for it")
    assert said[1] == "mine\n"
    assert not list(tmp_path.iterdir())


def raised(number: int) -> None:
    signal.raise_signal(number)
    time.sleep(0.01)  # the handler runs between two instructions


def test_a_signal_ends_work_at_once_unless_it_is_held() -> None:
    with pytest.raises(Interrupted, match="stopped"), stop_flag():
        raised(signal.SIGINT)
    with stop_flag() as stop, stop.held():
        raised(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(Interrupted, match="a reason"), stop.at_once("a reason"):
            pytest.fail("went on")
        with pytest.raises(KeyboardInterrupt):
            raised(signal.SIGTERM)
