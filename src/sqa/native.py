"""Our C++, compiled for this processor on first use and kept in the cache folder.

It is a plain shared library called through ctypes, which compiles in seconds; PyTorch's headers take a minute.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

from sqa.files import default_cache_dir, locked, replacing, sha256, write_text

logger = logging.getLogger(__name__)

# no -ffast-math: it would reorder sums, and linked into a library it flushes denormals in the whole process
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared", "-std=c++17")


def load(source: Path) -> ctypes.CDLL | str:
    """The library of a C++ file, from the cache or compiled now, or the reason why there is none."""
    if platform.system() != "Linux":
        return "built on Linux only"
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler"
    try:
        return ctypes.CDLL(str(_compiled(source, compiler)))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:  # ValueError: no command line in CXX
        said = error.stderr.decode(errors="replace").strip() if isinstance(error, subprocess.CalledProcessError) else ""
        logger.warning("%s could not compile %s, going on without it: %s", compiler, source.name, said or error)
        return "did not compile"


def _compiled(source: Path, compiler: str) -> Path:
    """The path of the library in the cache; it is compiled when source, compiler or processor are new."""
    command = shlex.split(compiler)  # CXX="ccache g++" is usual
    version = subprocess.run([*command, "--version"], capture_output=True, check=True).stdout
    target = subprocess.run(  # what -march=native means here
        [*command, "-march=native", "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, check=True
    ).stdout
    key = hashlib.sha256(b"\0".join((source.read_bytes(), version, target, " ".join(_FLAGS).encode()))).hexdigest()
    path = default_cache_dir() / "kernels" / f"{source.stem}-{key[:16]}.so"
    if not _whole(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock"), logger.info):  # processes that start together compile once
            if not _whole(path):
                logger.info("compiling %s for this processor, which is done once", source.name)
                with replacing(path) as temporary:
                    arguments = [*command, *_FLAGS, str(source), "-o", str(temporary)]
                    subprocess.run(arguments, capture_output=True, check=True)
                write_text(path.with_suffix(".sha256"), sha256(path))
    return path


def _whole(path: Path) -> bool:
    """Whether a library is there, unchanged since it was built: loading a truncated one would kill the process."""
    seal = path.with_suffix(".sha256")
    return path.exists() and seal.exists() and seal.read_text() == sha256(path)
