"""Names that look the same, or hide something, are no two people."""

from __future__ import annotations

import pytest

from shared.names import is_plain, name_key

UNSEEN = (
    "officer\u034f",
    "officer\ufe0f",
    "officer\U000e0100",
    "\u3164officer",
    "off\u115ficer",
    "off\uffa0icer",
    "o\u200bfficer",
)
LOOK_ALIKE = (*UNSEEN, "\u043efficer", "offi\u03f2er\u0455", "\u13aama")
"""Also of Cyrillic, Greek and Cherokee letters among Latin ones."""


@pytest.mark.parametrize("name", LOOK_ALIKE)
def test_what_looks_like_another_name_is_not_plain(name: str) -> None:
    assert not is_plain(name)
    assert (name_key(name) == "officer") == (name in UNSEEN)


def test_spellings_of_one_name_have_one_key() -> None:
    assert name_key("e\u034f\u0301") == name_key(" \u00c9 "), (
        "what hides between two characters does not keep them apart"
    )
    assert name_key("\uff21da  Lovelace") == "ada lovelace"
    assert name_key("ada") != name_key("adam")


@pytest.mark.parametrize("name", ["José", "Ольга Новак", "Ωμέγα 2", "王 Wang", "Şükrü Åse", "김민수", "O'Brien (0042)"])
def test_peoples_names_are_plain(name: str) -> None:
    assert is_plain(name)
