"""Every setting that can be None can be told so, in TOML and on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from client.policy.policy import Policy
from client.site.config import SiteConfig
from server.coordinator.run_file import RunSettings
from server.store.home import CoordinatorConfig
from shared.job.parsing import Section, apply_overrides, takes_none
from simulations.scenario import Scenario
from simulations.sweep.spec import SweepConfig

ROOTS = (Scenario, SiteConfig, Policy, CoordinatorConfig, RunSettings, SweepConfig)


def sections(model: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    if model in seen:
        return
    seen.add(model)
    yield model
    for field in model.model_fields.values():
        for option in (field.annotation, *get_args(field.annotation)):
            if isinstance(option, type) and issubclass(option, BaseModel):
                yield from sections(option, seen)


SEEN: set[type[BaseModel]] = set()
OPTIONAL = [
    (section, name)
    for root in ROOTS
    for section in sections(root, SEEN)
    for name, field in section.model_fields.items()
    if type(None) in get_args(field.annotation)
]


def outcome(section: type[BaseModel], raw: dict[str, Any]) -> object:
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        return [(detail["type"], detail["loc"], detail["msg"]) for detail in error.errors()]


def test_there_are_such_settings() -> None:
    names = {f"{section.__name__}.{name}" for section, name in OPTIONAL}
    assert len(names) > 15
    assert {"LoraConfig.last_layers", "CentralConfig.target_quantile", "DataSource.delimiter"} <= names


@pytest.mark.parametrize(("section", "name"), OPTIONAL, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("word", ["none", "None", "NONE"])
def test_the_word_says_none(section: type[BaseModel], name: str, word: str) -> None:
    assert issubclass(section, Section)
    assert takes_none(section.model_fields[name].annotation)
    # With whatever else is required missing, both are judged alike.
    assert outcome(section, {name: word}) == outcome(section, {name: None})
    (changed,) = apply_overrides({}, [f"{name}={word}"]).values()
    assert outcome(section, {name: changed}) == outcome(section, {name: None})


def test_where_none_is_a_choice_of_its_own_it_stays_one() -> None:
    from shared.data.datasets import DataSource
    from shared.job.federation import AggregationConfig
    from shared.job.privacy import PrivacyConfig

    assert PrivacyConfig.model_validate({"mechanism": "none"}).mechanism == "none"
    assert AggregationConfig.model_validate({"server_optimizer": "none"}).server_optimizer == "none"
    assert DataSource.model_validate({"path": "a", "columns": {"text": "a"}, "quoting": "none"}).quoting == "none"
