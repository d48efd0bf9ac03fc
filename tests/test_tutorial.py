"""The tutorial runs from beginning to end, learns, and its replay gives the same adapter."""

import json
import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
RESULTS = {
    "train": r"test loss (\d\.\d{3}) -> (\d\.\d{3}) nats/token\n",
    "adapter": r"8,192 LoRA parameters\n",
    "replay": r"10 rounds from [\d,]+ bytes; the same adapter: True\n",
}
"""What the cells print, each once."""


def printed(cells):
    outputs = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
    return "".join("".join(output["text"]) for output in outputs if output.get("name") == "stdout"), outputs


def check(cells):
    text, outputs = printed(cells)
    for name, pattern in RESULTS.items():
        assert len(re.findall(pattern, text)) == 1, name
    before, after = re.search(RESULTS["train"], text).groups()
    assert float(after) < float(before)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1


def test_the_stored_notebook_has_its_results_and_no_paths_of_a_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = json.loads(text)
    check(notebook["cells"])
    assert "stderr" not in text
    assert not re.search(r"/(home|root|tmp|work|Users|usr)/", re.sub(r'"image/png": "[^"]*"', "", text))
    assert len(text) < 60_000
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.filterwarnings("default")  # those of Jupyter's own packages are not ours to mend
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the kernel is a process of its own
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbclient.NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    check(notebook.cells)
