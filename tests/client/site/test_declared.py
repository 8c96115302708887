"""The declared size is chosen once and stays, so that no flip tells how many records there are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from client.check import check_site
from client.site.declared import DECLARED_FILE, durable_size
from client.site.home import open_site
from shared.data.datasets import write_jsonl
from shared.errors import ConfigError
from simulations.federation.processes import change_toml
from tests.client.site.test_guard import World
from tests.client.site.test_oracles import ROWS, make_world  # noqa: F401 (a fixture)

MakeWorld = Callable[..., World]


def with_records(world: World, number: int) -> World:
    """Return the site after its file has changed, opened anew."""
    write_jsonl(world.home.path.parent / "notes.jsonl", [ROWS[i % 60] | {"text": f"text {i}"} for i in range(number)])
    world.opened.clear()
    return world


def findings(world: World) -> dict[str, tuple[str, str]]:
    return {f.name: (f.outcome, f.text) for f in check_site(world.home, passphrase=None, connect=False)}


def test_crossing_a_power_of_two_changes_nothing_that_is_declared(make_world: MakeWorld) -> None:  # noqa: F811
    world = make_world(ROWS)
    assert world.site.describe().declared_records == 32
    for number in (63, 64, 65, 31, 5, 200):
        site = with_records(world, number).site
        assert site.describe().declared_records == 32
        assert (site.size_warnings() == []) == (32 <= number < 64)


def test_only_the_engineer_declares_another_size(make_world: MakeWorld) -> None:  # noqa: F811
    world = make_world(ROWS)
    assert world.site.describe().declared_records == 32
    with_records(world, 150)
    outcome, text = findings(world)["records"]
    assert outcome == "warning"
    assert "150 records are trained on, but the site declares 32 to the coordinator." in text
    assert "the power of two below would be 128" in text
    change_toml(world.home.config, declared_records=128)
    world.opened.clear()
    assert world.site.describe().declared_records == 128
    assert findings(world)["records"] == (
        "ok",
        "declared to the coordinator as 128; not charged under another name here",
    )


def test_far_more_records_than_declared_are_told_with_what_follows(make_world: MakeWorld) -> None:  # noqa: F811
    """Honest rounds then leave the bounds that every site sets to adapters (client/training/adapter_bounds.py)."""
    world = make_world(ROWS)
    change_toml(world.home.config, declared_records=4)
    world.opened.clear()
    outcome, text = findings(world)["records"]
    assert outcome == "warning"
    assert "a step can move the adapter up to 15 times as far" in text
    change_toml(world.home.config, declared_records=61)
    world.opened.clear()
    assert "times as far" not in findings(world)["records"][1]


def test_another_spelling_of_the_name_keeps_the_size(make_world: MakeWorld) -> None:  # noqa: F811
    world = make_world(ROWS)
    assert world.site.describe().declared_records == 32
    with_records(world, 200)
    change_toml(world.home.config, dataset="North-Records")
    assert world.site.describe().declared_records == 32


def test_a_new_data_set_has_a_size_of_its_own(make_world: MakeWorld) -> None:  # noqa: F811
    world = make_world(ROWS)
    assert world.site.describe().declared_records == 32
    change_toml(world.home.config, dataset="other")
    assert with_records(world, 10).site.describe().declared_records == 8
    change_toml(world.home.config, dataset="north-records")
    world.opened.clear()
    assert world.site.describe().declared_records == 32
    assert json.loads((world.home.path / DECLARED_FILE).read_text()) == {
        "north-records/record": 32,
        "other/record": 8,
    }


@pytest.mark.parametrize("content", ["{", "[1]", '{"north-records/record": "many"}'])
def test_a_damaged_file_is_refused_not_replaced(make_world: MakeWorld, content: str) -> None:  # noqa: F811
    world = make_world(ROWS)
    file = world.home.path / DECLARED_FILE
    file.write_text(content)
    with pytest.raises(ConfigError, match="holds the size that this site declared"):
        open_site(world.home, passphrase=None).describe()
    assert file.read_text() == content


@pytest.mark.parametrize("size", [0, -1, 10**9 + 1, 10**400])
def test_a_size_that_no_data_set_has_is_no_size_that_was_declared(tmp_path: Path, size: int) -> None:
    (tmp_path / DECLARED_FILE).write_text(f'{{"notes/record": {size}}}')
    with pytest.raises(ConfigError, match="it holds the size that this site declared"):
        durable_size(tmp_path, dataset="notes", unit="record", num_units=64)
