"""Batches of random rows, and a folder of real text for the command."""

import sysconfig
from pathlib import Path

import pytest
import torch

from sqa.data.batches import Batch


@pytest.fixture(scope="session")
def batches() -> list[Batch]:
    """Six batches of two rows of 24 tokens, two documents a row."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(2, 300, (6, 2, 25), generator=generator)
    documents = (torch.arange(24) >= 15).int().expand(2, -1)
    return [
        Batch(input_ids=row[:, :-1], labels=row[:, 1:], labels_all_positions=None, document_ids=documents)
        for row in drawn
    ]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Standard-library sources as documents."""
    folder = tmp_path_factory.mktemp("text")
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in ("abc", "ast", "bisect", "cmd", "code", "copy", "csv", "dis", "glob", "heapq", "hmac", "io", "keyword",
                 "nturl2path", "opcode", "pprint", "queue", "sched", "shlex", "stat", "string", "struct", "this",
                 "token", "trace", "tty", "types", "uuid", "warnings", "weakref", "wave", "zipapp"):  # fmt: skip
        if (library / f"{name}.py").is_file():
            (folder / f"{name}.txt").write_text((library / f"{name}.py").read_text(encoding="utf-8"), encoding="utf-8")
    return folder
