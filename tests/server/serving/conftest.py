"""Models that are served: a registry of small classifiers, and runs of other kinds; what takes seconds is made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.registry.registry import Registry
from server.serving.models import Plan
from shared.job.job import Job
from tests.server.registry.conftest import filled, small_run  # noqa: F401 (fixtures)
from tests.server.serving.live import Live, live
from tests.shared.runtime.export.runs import finished_run


@pytest.fixture
def registry(filled: Path, tmp_path: Path) -> Registry:  # noqa: F811
    """A registry with two versions of the model `films` that a test may change."""
    return Registry(Path(shutil.copytree(filled, tmp_path / "models")))


@pytest.fixture(scope="session")
def writer_run(language_job: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a small GPT-2, `writer`."""
    return finished_run(tmp_path_factory.mktemp("writer") / "writer", language_job(model={"max_length": 64}))


@pytest.fixture(scope="module")
def films(filled: Path) -> Iterator[Live]:  # noqa: F811
    """A service of `films` without tokens."""
    with live("films", filled) as found:
        yield found


@pytest.fixture(scope="module")
def explaining(filled: Path) -> Iterator[Live]:  # noqa: F811
    """A service of `films` that explains."""
    pytest.importorskip("captum")
    with live("films", filled, plan=Plan("torch", explain=True)) as found:
        yield found


@pytest.fixture(scope="module")
def writer(writer_run: Path) -> Iterator[Live]:
    """A service of a small GPT-2, as a graph."""
    with live(str(writer_run), writer_run.parent, plan=Plan("onnx")) as found:
        yield found
