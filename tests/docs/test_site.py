"""The documentation site builds without a warning and asks nobody for anything."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that the site was built into."""
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_site_builds_strictly_and_loads_nothing_from_elsewhere(site: Path) -> None:
    loaded = re.compile(r"""<(?:script|img|link rel="(?:stylesheet|preconnect|icon)")[^>]*(?:src|href)="(https?:)?//""")
    pages = sorted(site.rglob("*.html"))
    assert {"index.html", "variants.html", "results.html", "changelog.html"} <= {page.name for page in pages}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not loaded.search(text), page
        assert "docs/generate.py" not in re.sub(r"<!--.*?-->|<code>.*?</code>", "", text, flags=re.DOTALL), page


@pytest.mark.slow
def test_reference_holds_everything_public(site: Path) -> None:
    pages = {page.stem: page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html")}
    for module in ("cost", "variants", "config", "losses", "model", "storage"):
        source = (ROOT / "src" / "sqa" / f"{module}.py").read_text(encoding="utf-8")
        for name in re.findall(r"^(?:def|class) ([a-zA-Z]\w*)", source, flags=re.MULTILINE):
            assert f'id="sqa.{module}.{name}"' in pages[module], f"{module}.{name}"
    for package in ("attention", "data", "training", "experiments", "bench", "conversion", "interop", "planning"):
        for path in (ROOT / "src" / "sqa" / package).glob("[a-z]*.py"):
            if not path.stem.startswith("modeling_"):
                assert f'id="sqa.{package}.{path.stem}"' in pages[package], path
