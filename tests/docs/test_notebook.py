"""The notebook runs from top to bottom, and its committed outputs are those of a whole run."""

import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "tour.ipynb"


def texts(notebook: object) -> list[str]:
    """What the code cells printed or returned as text."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]  # type: ignore[attr-defined]
    return ["".join(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in outputs]


def test_committed_outputs_are_those_of_one_whole_run() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert sum("image/svg+xml" in output.get("data", {}) for cell in code for output in cell.outputs) == 2
    assert NOTEBOOK.stat().st_size < 400_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's own
def test_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    source = str(NOTEBOOK.parents[1] / "src")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = tmp_path / "notebook"
    folder.mkdir()
    NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(folder)}}).execute()
    said = "\n".join(texts(notebook))
    assert "LlamaForCausalLM with 4 query heads" in said
    difference = re.search(r"largest difference: (\S+)", said)
    assert difference is not None
    assert float(difference[1]) < 1e-5 + 1.3e-6 * 15  # torch.testing's for fp32 and logits of at most 15
    assert (folder / "runs" / "tour" / "report" / "report.html").is_file()
