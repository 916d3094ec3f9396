"""The house around the code: import direction, light start, the built wheel, no machine's paths in git."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "sqa"

LAYERS = (
    "errors",
    "records",
    "tables",
    "files",
    "native",
    "progress",
    "config",
    "dtypes",
    "variants",
    "cost",
    "storage",
    "attention",
    "losses",
    "model",
    "measure",
    "charts",
    "data",
    "training",
    "interop",
    "evaluation",
    "bench",
    "conversion",
    "planning",
    "experiments",
    "cli",
)
CORE = LAYERS[: LAYERS.index("model") + 1]
NOT_IN_CORE = {"accelerate", "altair", "datasets", "transformers", "vl_convert"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(path: Path) -> Iterator[str]:
    """Yield the absolute module name of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(PACKAGE.parent).parts[:-1]
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield submodule if is_module(submodule) else base


def rank(module: str) -> int:
    """Return the layer of a module: underscored helpers are below all, the package itself is on top."""
    _, _, inner = module.partition(".")
    layer = inner.split(".")[0]
    if layer in ("", "__main__"):
        return len(LAYERS)
    if layer.startswith("_"):
        return -1
    assert layer in LAYERS, f"{module} has no place in LAYERS"
    return LAYERS.index(layer)


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_imports_run_one_way() -> None:
    wrong = []
    for path in sources():
        importer = module_name(path)
        for imported in imports(path):
            if imported.split(".")[0] != "sqa":
                continue
            if rank(imported) > rank(importer):
                wrong.append(f"{importer} imports {imported}")
    assert not wrong


def test_core_imports_no_heavy_library() -> None:
    wrong = [
        f"{module_name(path)} imports {imported}"
        for path in sources()
        if rank(module_name(path)) < len(CORE)
        for imported in imports(path)
        if imported.split(".")[0] in NOT_IN_CORE
    ]
    assert not wrong


@pytest.mark.parametrize(
    "statement",
    [
        "import sqa, sqa.config, sqa.variants, sqa.cost",
        "from sqa import AttentionConfig, ModelConfig, variant",
        "from sqa.cli import main; sys.argv = ['sqa', 'variants', '--preset', 'published']; main()",
    ],
)
def test_table_of_variants_needs_no_torch(statement: str) -> None:
    code = (
        f"import sys\ntry:\n    {statement}\nexcept SystemExit as exit:\n    assert not exit.code\n"
        "assert 'torch' not in sys.modules"
    )
    run(sys.executable, "-c", code)


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run a command that must succeed, without PYTHONPATH, and return its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, ROOT)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    shipped = set(zipfile.ZipFile(wheel).namelist())
    ours = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert ours <= shipped
    assert "sqa/py.typed" in shipped
    for plan in ("demo.toml", "published.toml"):
        assert any(name.endswith(f"/{plan}") for name in shipped), plan
    assert any(name.endswith("/licenses/LICENSE") for name in shipped)


def test_wheel_runs_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    bin_folder = environment / "bin"
    pip = (sys.executable, "-m", "pip", "--python", bin_folder / "python")
    run(*pip, "install", "--quiet", "--no-deps", wheel)
    (installed,) = environment.glob("lib/python*/site-packages")
    # A folder on the path is not a site folder: its .pth files, and so our checkout, stay unseen.
    (installed / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    found = run(bin_folder / "python", "-I", "-c", "import sqa; print(sqa.__file__)", cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(installed)

    run(bin_folder / "sqa", "variants", "--preset", "published", "--json", "out.json", cwd=tmp_path)
    rows = json.loads((tmp_path / "out.json").read_text())
    assert {row["variant"].lower(): row["parameters"] for row in rows}["sqa"] == 10_655_504


def test_git_holds_no_path_of_a_machine() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("data: not a git checkout")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    absolute = re.compile(r"(?<![\w./])(?:/(?:home|Users|root|work|mnt|workspace)/|[A-Z]:\\)\w")
    own = (str(ROOT), str(Path.home()))
    wrong = []
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        data = path.read_bytes() if path.is_file() else b""
        if path.suffix == ".safetensors":  # its header alone: numbers may spell anything
            data = data[8 : 8 + int.from_bytes(data[:8], "little")]
        text = data.decode("utf-8", errors="ignore")
        if (match := absolute.search(text)) or any(folder in text for folder in own if folder != "/"):
            wrong.append(f"{name}: {match.group() if match else 'this machine'}")
    assert not wrong


@pytest.mark.parametrize(
    "skip",
    [
        "def test_it():\n    pytest.skip('{reason}')",
        "@pytest.mark.skipif(True, reason='{reason}')\ndef test_it(): ...",
        "pytest.skip('{reason}', allow_module_level=True)",
    ],
    ids=["call", "mark", "module"],
)
@pytest.mark.parametrize(("reason", "allowed"), [("data: none", True), ("no transformers", False)])
def test_skip_for_a_missing_package_fails_under_make_test(
    skip: str, reason: str, allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("conftest.py", "models.py"):
        shutil.copy(Path(__file__).with_name(name), tmp_path)
    (tmp_path / "test_it.py").write_text("import pytest\n" + skip.format(reason=reason))
    monkeypatch.setenv("SQA_ALL_EXTRAS", "1")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    passed = done.returncode in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    assert passed == allowed, done.stdout + done.stderr
