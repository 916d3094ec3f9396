"""What the README says holds: its commands exist, its links lead somewhere, its figures come from committed files.

Its snippet runs in tests/docs/test_blocks.py.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from sqa import __version__
from sqa.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_two_commands_are_make_targets_and_ci_runs_the_second() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    assert "sqa compare demo" in makefile
    assert re.search(r"\bmake test\b", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_the_commands_it_lists_exist() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    listed = set(re.findall(r"^\| `sqa ([a-z]+)", README, flags=re.MULTILINE))
    assert {"variants", "compare", "train", "generate", "bench", "export", "import", "kernels"} <= listed
    assert listed <= set(commands)
    for name in re.findall(r"`sqa bench (\w+)`, `(\w+)`, `(\w+)`, `(\w+)`", README)[0]:
        assert name in commands["bench"].commands


@pytest.mark.parametrize(
    "path", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
)
def test_links_inside_the_project_lead_somewhere(path: str) -> None:
    file = ROOT / path
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text(encoding="utf-8")):
        assert (file.parent / target).exists(), target


def test_generated_figures_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_citation_names_the_version() -> None:
    assert re.search(rf"^version: {re.escape(__version__)}$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
