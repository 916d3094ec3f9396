"""What every test shares: a cache of its own, the articles, and no silent skips under ``make test``."""

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import settings

pytest_plugins = ["models"]

ROOT = Path(__file__).resolve().parents[1]
Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)
ALLOWED_SKIPS = ("data:", "gpu:", "browser:")

# Tests run side by side, one process a core, and their tensors are tiny: threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No example database: it would make a run depend on the runs before it.
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=25, database=None)
settings.load_profile("ci")


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Point $XDG_CACHE_HOME, also of subprocesses, at an empty folder for the whole session; it shares kernels."""
    cache = tmp_path_factory.mktemp("cache")
    kernels = ROOT / ".pytest_cache" / "kernels"  # named by a hash of what they were built from
    kernels.mkdir(parents=True, exist_ok=True)
    (cache / "sqa").mkdir()
    (cache / "sqa" / "kernels").symlink_to(kernels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield cache


@pytest.fixture(scope="session")
def articles() -> Path:
    """Return the folder of English Wikipedia articles in Parquet, or skip."""
    folder = ROOT.parent / "shared" / "data" / "wikipedia-en"
    if not folder.is_dir():
        pytest.skip("data: no ../shared/data/wikipedia-en beside the repository")
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test that skips for a reason that is not allowed."""
    return _refuse_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Fail a module that skips as a whole for a reason that is not allowed."""
    return _refuse_skip((yield))


def _refuse_skip(report: Report) -> Report:
    if os.environ.get("SQA_ALL_EXTRAS") != "1" or not report.skipped or hasattr(report, "wasxfail"):
        return report
    _, _, message = report.longrepr
    reason = message.removeprefix("Skipped: ")
    if not reason.startswith(ALLOWED_SKIPS):
        report.outcome = "failed"
        report.longrepr = f"skipped with every extra installed: {reason}"
    return report
