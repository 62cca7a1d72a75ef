"""examples/first_look.ipynb, cell by cell in a kernel of its own; with fewer captions and steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_look.ipynb"
SIZES, SMALL = "NUM_CAPTIONS, STEPS = 100, 60", "NUM_CAPTIONS, STEPS = 8, 2"


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> list[Any]:
    """The cells of code with their outputs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs")], "committed without outputs"
    (settings,) = [cell for cell in notebook.cells if SIZES in cell.source]
    settings.source = settings.source.replace(SIZES, SMALL)
    folder = tmp_path_factory.mktemp("notebook")
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: Any) -> set[str]:
    return {kind for output in cell.outputs for kind in output.get("data", {})}


def test_it_shows_the_maps_of_teacher_and_student(ran):
    html = [cell for cell in ran if cell.source.rstrip().endswith(("teacher_maps", "before"))]
    assert len(html) == 2
    for cell in html:
        assert "text/html" in shown(cell)


def test_it_draws_before_and_after_and_says_how_far_attention_moved(ran):
    drawn, said = ran[-2], ran[-1]
    assert "image/png" in shown(drawn)
    text = "".join(output.text for output in said.outputs if output.get("name") == "stdout")
    lines = [line for line in text.splitlines() if "agrees with the teacher's maps:" in line]
    assert [line.split()[0] for line in lines] == ["before", "plain", "aligned"]
