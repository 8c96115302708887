"""One record at a time: nothing of one record reaches another, tokens keep their number, and messages show nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest
from pydantic import ValidationError

from shared.data.datasets import DataSource
from shared.data.deidentify.config import DeidentifyConfig
from shared.data.deidentify.engine import Deidentifier, open_deidentifier
from shared.data.deidentify.spans import KINDS
from shared.errors import DataError
from tests.shared.data.deidentify.synthetic_notes import notes

RULES = open_deidentifier(DeidentifyConfig(engine="rules"))


def masked(deidentifier: Deidentifier, texts: list[str]) -> dict[str, str]:
    return {text: deidentifier.mask(text)[0] for text in texts}


def test_a_record_is_masked_by_itself_alone() -> None:
    """Any other records, in any order, before or after, in a fresh engine or a used one: the record becomes the same."""
    texts = [
        note.text
        for language in ("en", "zh")
        for templates in ("seen", "unseen")
        for note in notes(60, seed=3, language=language, templates=templates)
    ]
    together = masked(RULES, texts)
    assert sum(before != after for before, after in together.items()) > 150
    rng = random.Random(0)
    for _ in range(3):
        some = rng.sample(texts, 40)
        fresh = open_deidentifier(DeidentifyConfig(engine="rules"))
        assert masked(fresh, some) == {text: together[text] for text in some}
    # A name that one record gives away is not masked in another, where nothing gives it away.
    assert RULES.mask("Mr Quillfeather came.")[0] == "Mr [NAME] came."
    assert RULES.mask("Then Quillfeather left.")[0] == "Then Quillfeather left."


def test_two_data_sets_that_differ_in_one_record_still_do() -> None:
    texts = [note.text for note in notes(50, seed=4, language="en", templates="seen")]
    all_masked = [RULES.mask(text)[0] for text in texts]
    for gone in (0, 17, 49):
        assert [RULES.mask(text)[0] for text in texts[:gone] + texts[gone + 1 :]] == all_masked[:gone] + all_masked[
            gone + 1 :
        ]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["Mr", "John", "Smith", "took", "5", "mg", "."], ["Mr", "[NAME]", "[NAME]", "took", "5", "mg", "."]),
        (["on", "12", "/", "03", "/", "2024", "by"], ["on", *["[DATE]"] * 5, "by"]),
        (list("患者张伟因发热"), [*"患者", "[NAME]", "[NAME]", *"因发热"]),
        (["mail", "j", ".", "doe", "@", "example", ".", "org", "now"], ["mail", *["[EMAIL]"] * 7, "now"]),
        ([], []),
        (["nothing", "", "here"], ["nothing", "", "here"]),
    ],
)
def test_tokens_keep_their_number(tokens: list[str], expected: list[str]) -> None:
    before = list(tokens)
    assert RULES.mask_tokens(tokens)[0] == expected
    assert tokens == before


def test_a_name_of_two_tokens_counts_once() -> None:
    assert RULES.mask_tokens(["Mr", "John", "Smith"])[1] == {"name": 1}
    assert RULES.mask("Mr John Smith, 5 May 2020, Mr Jones")[1] == {"name": 2, "date": 1}


def test_only_the_named_roles_change() -> None:
    record = {"text": "Mr Smith", "label": "Mr Smith", "person": "Mr Smith", "pair": None}
    found = RULES.mask_record(record, ["text", "pair"], place="x.csv, row 1")
    assert found.record == {"text": "Mr [NAME]"}
    assert record["text"] == "Mr Smith"


@pytest.mark.parametrize("value", [12, 1.5, {"a": "Mr Smith"}, ["Mr", 3], b"Mr Smith"])
def test_what_is_no_text_is_refused_without_showing_it(value: Any) -> None:
    with pytest.raises(DataError, match=r"x\.csv, row 7") as caught:
        RULES.mask_record({"text": value}, ["text"], place="x.csv, row 7")
    assert "Smith" not in str(caught.value)
    assert type(value).__name__ in str(caught.value)


@pytest.mark.parametrize(
    ("given", "kinds"),
    [(True, KINDS), (["date", "name"], ("date", "name")), ({"kinds": ["ip"]}, ("ip",)), ({}, KINDS)],
)
def test_short_forms_of_the_setting(given: Any, kinds: tuple[str, ...]) -> None:
    source = DataSource.model_validate({"path": "a.csv", "columns": {"text": "note"}, "deidentify": given})
    assert source.deidentify is not None
    assert source.deidentify.kinds == kinds


def test_off_is_the_default_and_is_not_written_out() -> None:
    plain = DataSource.model_validate({"path": "a.csv", "columns": {"text": "note"}})
    off = DataSource.model_validate({"path": "a.csv", "columns": {"text": "note"}, "deidentify": False})
    assert plain == off
    assert "deidentify" not in plain.model_dump(mode="json")


@pytest.mark.parametrize(
    ("given", "columns", "said"),
    [
        (["names"], {"text": "note"}, "'name'"),
        ([], {"text": "note"}, "at least 1"),
        ({"engine": "magic"}, {"text": "note"}, "'auto', 'rules' or 'presidio'"),
        ({"engine": "rules", "models": {"en": "x"}}, {"text": "note"}, "models are for Presidio"),
        ({"engine": "presidio", "kinds": ["date"]}, {"text": "note"}, "Presidio finds names"),
        (True, {"label": "stars"}, "columns names none of them"),
        ({"kind": ["date"]}, {"text": "note"}, "kind"),
    ],
)
def test_bad_settings_are_refused(given: Any, columns: dict[str, str], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        DataSource.model_validate({"path": "a.csv", "columns": columns, "deidentify": given})
