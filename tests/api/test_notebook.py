"""The notebook of the documentation runs as it is, in a kernel of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The code cells after their execution, in an empty folder."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = tmp_path_factory.mktemp("notebook")
    client = NotebookClient(notebook, timeout=400, kernel_name="python3", resources={"metadata": {"path": str(where)}})
    client.execute(env={**os.environ, "WANDB_MODE": "offline"})
    assert (where / "report.md").read_text().startswith("# ")
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def output(cells: list[Any], source: str) -> str:
    """Everything that the cell containing `source` printed or showed."""
    (cell,) = (cell for cell in cells if source in cell.source)
    return "\n".join(str(out.get("text", out.get("data", ""))) for out in cell.outputs)


def test_every_cell_of_the_notebook_shows_what_its_text_says(cells: list[Any]) -> None:
    training = output(cells, "run = distft.train(")
    assert "step 20 of 20" in training and "run folder: " in training  # progress reaches the notebook
    assert "<th>status</th><td>finished</td>" in training
    assert "perplexity" in output(cells, 'run.summary["samples_per_second"]')
    assert "tokens_per_second" in output(cells, "run.metrics")
    assert "\nThe film was" in output(cells, "model.generate")
    evaluated = output(cells, "distft.evaluate(")
    assert "'adapter'" in evaluated and "results: " in evaluated  # so does what a launched process prints
    assert "| tiny |" in output(cells, "distft.report(")
    assert "lora.rank" in output(cells, "RecipeError") and "training.max_step" in output(cells, "RecipeError")


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
