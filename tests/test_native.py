"""Our C++ is compiled once, whoever asks for it at the same time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sqa import native


def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("gpu: no C++ compiler")
    (tmp_path / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    (tmp_path / "slow").write_text(
        f'#!/bin/sh\ncase "$*" in *one.cpp*) echo built >> "{tmp_path}/log"; sleep 1;; esac\nexec {compiler} "$@"\n'
    )
    (tmp_path / "slow").chmod(0o755)
    code = f"from pathlib import Path; from sqa import native; print(native.load(Path('{tmp_path}/one.cpp')).one())"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": str(tmp_path / "slow")}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=100)[0] for process in both] == ["1\n", "1\n"]
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_compiler_that_is_no_command_line_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", 'c++ "')
    assert native.load(tmp_path / "one.cpp") in ("did not compile", "built on Linux only")


def test_a_failed_compilation_is_logged_with_what_the_compiler_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if shutil.which("c++") is None or sys.platform != "linux":
        pytest.skip("gpu: no C++ compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bad.cpp").write_text("#error no such thing\n")
    assert native.load(tmp_path / "bad.cpp") == "did not compile"
    assert "no such thing" in caplog.text
