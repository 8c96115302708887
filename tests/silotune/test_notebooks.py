"""Both notebooks run from end to end as a user would run them, show plots, tell no path, and are stored empty."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter

from tests.loading import ROOT

NAMES = ("researcher", "officer")
_PATH = re.compile(r"(?<![\w.:/<-])/(?:tmp|home|root|work|usr|var|opt|srv|Users)/[\w.-]+")


def read(name: str) -> Any:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def outputs(notebook: Any) -> Iterator[Any]:
    for cell in notebook.cells:
        yield from cell.get("outputs", ())


def stored(notebook: Any) -> list[str]:
    """Return what a stored notebook holds of a run of it."""
    found = [str(output) for output in outputs(notebook)]
    return found + [str(cell.execution_count) for cell in notebook.cells if cell.get("execution_count") is not None]


def paths_told(notebook: Any) -> list[str]:
    """Return the places of this machine that outputs tell."""
    shown = "\n".join(str({key: value for key, value in one.items() if key != "image/png"}) for one in texts(notebook))
    return _PATH.findall(shown) + [place for place in (str(ROOT), os.path.expanduser("~")) if f"{place}/" in shown]


def texts(notebook: Any) -> Iterator[dict[str, Any]]:
    for output in outputs(notebook):
        yield dict(output.get("data") or {"text": output.get("text", "")})


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_are_stored_without_outputs(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert stored(notebook) == []
    assert len(notebook.cells) > 10


def test_fault_a_stored_output_and_a_path_in_it_are_seen() -> None:
    notebook = deepcopy(read("officer"))
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    cell.outputs = [nbformat.v4.new_output("stream", text="written: /home/anna/runs/x/report.html\n")]
    assert stored(notebook)
    assert paths_told(notebook)


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_run_from_end_to_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_CONFIG_DIR": str(tmp_path / "jupyter"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }.items():
        monkeypatch.setenv(variable, value)
    notebook, work = read(name), tmp_path / "work"
    work.mkdir()
    NotebookClient(notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(work)}}).execute()
    assert [output.text for output in outputs(notebook) if output.get("name") == "stderr"] == []
    assert paths_told(notebook) == []
    shown = list(texts(notebook))
    assert sum("image/png" in one for one in shown) >= 2, "plots"
    assert any("<svg" in one.get("text/html", "") for one in shown), "a figure of the report"
    assert any("noise multiplier" in one.get("text/html", "") for one in shown), "a plan"
    printed = "\n".join(str(one.get("text", "")) for one in shown)
    if name == "officer":
        pairs = re.findall(r"recorded (\d\.\d+), recomputed (\d\.\d+)", printed)
        assert len(pairs) >= 2
        assert all(0 <= float(recorded) - float(found) + 1e-3 < 5e-3 for recorded, found in pairs)
        assert "differentially private" in printed
    else:
        assert "runs/reviews-8/report.html" in printed
        assert re.search(r"(positive|negative)  \d+%  a warm and funny film", printed)
    page, _ = HTMLExporter().from_notebook_node(notebook)
    assert notebook.cells[0].source.splitlines()[0].strip("# ")[:20] in page
