"""notebooks/train_lora.ipynb, run on a toy from the first cell to the last."""

from __future__ import annotations

import sys

import nbclient
import nbformat
import pytest
from conftest import FAMILIES, ROOT, SAMPLE

pytestmark = [pytest.mark.run, pytest.mark.xdist_group("processes")]
FILE = ROOT / "notebooks" / "train_lora.ipynb"
PARAMETERS = ["PROJECT_URL", "BASE", "PICTURES", "CAPTION", "PROMPT", "OUTPUT", "FLAGS"]


def test_the_notebook_is_stored_with_short_cells_and_without_outputs():
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in codes)
    assert all(len(cell.source.splitlines()) <= 20 for cell in codes)
    assert codes[0].metadata.tags == ["parameters"] and notebook.cells.index(codes[0]) == 1
    assert [line.split(" = ")[0] for line in codes[0].source.splitlines()] == PARAMETERS


def test_the_notebook_trains_a_toy_and_shows_what_it_learned(tmp_path, monkeypatch):
    """Where the project's folder is open it is used as it is; nothing is downloaded."""
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    (tmp_path / "settings.yaml").write_text(
        "resolution: 64\nvalidation_inference_steps: 1\nreport_to: none\n"
    )
    values = {
        "BASE": FAMILIES["sd15"].base,
        "PICTURES": str(SAMPLE),
        "OUTPUT": str(tmp_path / "mine"),
        "FLAGS": f"--config {tmp_path / 'settings.yaml'} --max_train_steps 2 --num_validation_images 1",
    }
    notebook = nbformat.read(FILE, as_version=4)
    parameters = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells[1].source += f"\n{parameters}"
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(FILE.parent)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    texts = "".join(output.get("text", "") for output in outputs)
    assert "pictures in" in texts and str(tmp_path / "mine" / "mine.safetensors") in texts
    shown = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(shown) == 4  # three of the training, and the comparison
    assert (tmp_path / "mine" / "mine.safetensors").is_file()
