"""Every code block of the README and the documentation runs, or says why it does not."""

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import tokenizers

from sqa import Transformer, preset
from sqa.experiments.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
REASONS = (
    "needs the network", "needs a GPU", "needs several devices", "needs several machines", "takes minutes",
)  # fmt: skip
"""Why the tests do not run a block: its title says one of these, and nothing else."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the rest of its first line, and its text."""

    language: str
    info: str
    text: str

    @property
    def runs(self) -> bool:
        """Whether the tests run it: it has no title. Anything after the language but one of REASONS is an error."""
        excuses = {f' title="{reason}"' for reason in REASONS}
        assert self.info in {"", *excuses}, f"{self.info.strip()}: titles are {', '.join(REASONS)}"
        return not self.info


def blocks(page: str) -> list[Block]:
    text = re.sub(r"<!-- ([a-z ]+): generated.*?<!-- end of \1 -->", "", (ROOT / page).read_text(), flags=re.DOTALL)
    found = re.findall(r"^( *)```(\w*)([^\n]*)\n(.*?)^\1```$", text, flags=re.DOTALL | re.MULTILINE)
    return [Block(language, info, code) for _, language, info, code in found]


@pytest.fixture
def desk(tmp_path: Path, small_tokenizer: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a reader has it: two finished runs, and `sqa` on the path."""
    monkeypatch.chdir(tmp_path)
    for name in ("gqa", "sqa"):
        run = tmp_path / "runs" / "demo" / f"{name}-0"
        Transformer(preset("demo", name)).save(run)
        small_tokenizer.save(str(run / "tokenizer.json"))
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "sqa").write_text(f'#!/bin/sh\nexec {sys.executable} -m sqa "$@"\n')
    (bin_folder / "sqa").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def run_page(page: str, desk: Path) -> dict[str, object]:
    """Run all blocks in their order; returns the names that its Python blocks leave."""
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if not block.runs:
            continue
        if block.language == "python":
            exec(compile(block.text, page, "exec"), names)
        elif block.language == "sh":
            done = subprocess.run(["bash", "-euc", block.text], capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{block.text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        elif block.language == "toml":
            (desk / "mine.toml").write_text(block.text, encoding="utf-8")
            Plan.read("mine.toml")
        else:
            pytest.fail(f"{page}: what is a {block.language or 'nameless'} block?\n{block.text}")
    return names


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in ("README.md", "docs/index.md") and blocks(page)]
)
def test_blocks_run_from_top_to_bottom(page: str, desk: Path) -> None:
    run_page(page, desk)


def test_readme_runs_and_counts_right(desk: Path) -> None:
    names = run_page("README.md", desk)
    assert names["y"].shape == (2, 128, 256)  # type: ignore[attr-defined]
    (claimed,) = re.findall(r'preset\("published", "sqa"\)\)\s+# ([\d,]+) parameters', (ROOT / "README.md").read_text())
    assert sum(p.numel() for p in names["model"].parameters()) == int(claimed.replace(",", ""))  # type: ignore[attr-defined]


@pytest.mark.slow
def test_start_page_makes_the_run_that_it_exports(desk: Path) -> None:
    (desk / "runs").rename(desk / "elsewhere")
    names = run_page("docs/index.md", desk)
    assert names["model"].config.num_attention_heads == 4  # type: ignore[attr-defined]
    assert (desk / "runs" / "demo" / "report" / "report.html").is_file()


def test_extras_that_are_named_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page in PAGES:
        for named in re.findall(r"(?:\.|sparse-query-attention)\[([a-z,]+)\]", (ROOT / page).read_text()):
            assert set(named.split(",")) <= set(extras), page
