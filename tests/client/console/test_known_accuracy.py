"""What a sweep elsewhere reached, beside what a job would cost here: as it was written, said to be another's, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from client.console import known_accuracy as module
from client.console.known_accuracy import known_accuracy
from shared.errors import ConfigError
from simulations import sweep as written
from tests.client.console.conftest import Serving, text_of
from tests.client.console.homes import make_home
from tests.client.console.test_forecast import what_if
from tests.conftest import Outcome
from tests.simulations.console.folders import make_sweep

Serve = Callable[..., Serving]


def test_it_is_what_the_sweep_wrote(tmp_path: Path) -> None:
    found = known_accuracy(make_sweep(tmp_path / "sweep"))
    assert (found.name, found.metric) == ("budgets", "accuracy")
    assert [one.epsilon for one in found.points] == [0.999, 7.992, None]
    assert [one.mean for one in found.points] == pytest.approx([0.595, 0.745, 0.845])
    assert {one.sd for one in found.points} == {0.007}
    told = json.loads((tmp_path / "sweep" / "trials.jsonl").read_text().splitlines()[0])
    assert found.delta == told["delta"]
    for epsilon, point in ((0.5, None), (0.999, 0), (5.0, 0), (8.0, 1), (99.0, 1), (None, None)):
        assert found.within(epsilon) is (None if point is None else found.points[point]), epsilon
    assert (module.FORMAT, module.SWEEP, module.TRIALS) == (written.FORMAT, written.SWEEP, written.TRIALS)


@pytest.mark.parametrize("damage", ["missing", "no JSON", "running", "not finite", "no trials"])
def test_what_is_none_is_told(tmp_path: Path, damage: str, silotune: Callable[..., Outcome]) -> None:
    folder = make_sweep(tmp_path / "sweep")
    place = folder / "sweep.json"
    fields = json.loads(place.read_text())
    if damage == "missing":
        place.unlink()
    elif damage == "no JSON":
        place.write_text("{")
    elif damage == "running":
        place.write_text(json.dumps({key: fields[key] for key in ("format", "name")}))
    elif damage == "not finite":
        place.write_text(place.read_text().replace("0.595", "NaN"))
    else:
        (folder / "trials.jsonl").write_text("")
    with pytest.raises(ConfigError, match="sweep"):
        known_accuracy(folder)
    home = make_home(tmp_path / "site")
    told = silotune("site", "console", home.path, "--port", "0", "--sweep", folder)
    assert (told.status, "Traceback" in told.err) == (2, False)


def test_the_page_shows_it_as_anothers(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("known")
    serving = serve(make_home(folder), sweep=make_sweep(folder / "sweep", name="<b>other</b>"))
    page = what_if(serving.signed_in("viewer"), steps="8", rate="0.1", value="2").text
    words = text_of(page)
    assert "0.9990 0.595 ±0.007 next smaller" in words
    assert "7.9920 0.745 ±0.007 –" in words
    assert "without noise 0.845" in words
    assert "on another data set" in words
    assert "<b>other" not in page
    assert serving.signed_in("viewer").get("/budget").status_code == 200


def test_nothing_is_shown_where_none_is_known(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> None:
    page = what_if(serve(make_home(tmp_path_factory.mktemp("unknown"))).signed_in("viewer")).text
    assert "reached elsewhere" not in text_of(page)
