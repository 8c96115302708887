"""Releases as a console keeps and shows them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from client.console.audit.packed import PackedReleases, Release
from client.console.audit.releases import Releases
from client.site.home import open_log
from shared.trust.audit_log import Event
from tests.client.console.conftest import Serving, text_of

ONE = Release(
    sequence=7,
    time="2026-10-05T13:10:00.000+00:00",
    sent="2026-10-05T13:11:00.000+00:00",
    job="ab" * 32,
    name="triage",
    round=3,
    bytes=37_000,
    sha256="cd" * 32,
    epsilon=0.1 + 0.2,
    repeated=False,
)
ODD: list[dict[str, Any]] = [
    {},
    {"sent": None, "round": None, "bytes": None, "epsilon": None},
    {"sent": "", "round": 0, "bytes": 0, "epsilon": 0.0},
    {"repeated": True, "declined": True},
    {"sha256": "no hash"},
    {"sha256": "CD" * 32},
    {"sha256": ""},
    {"time": "t" * 40},
    {"time": "ends in a zero\0"},
    {"name": "\ud800 <b>", "job": "\u202e"},
    {"time": "\ud800"},
    {"round": 2**70, "bytes": -(2**70)},
    {"epsilon": float("inf")},
]


@pytest.mark.parametrize("odd", ODD)
def test_what_is_kept_is_read_as_it_was(odd: dict[str, Any]) -> None:
    kept, one = PackedReleases(), replace(ONE, **odd)
    kept.append(ONE)
    kept.append(one)
    kept.append(ONE)
    assert [kept[0], kept[1], kept[2], len(kept)] == [ONE, one, ONE, 3]
    kept[1] = ONE
    assert kept[1] == ONE
    kept[0] = one
    assert [kept[0], kept[1]] == [one, ONE]
    with pytest.raises(IndexError):
        kept[3]


def test_a_release_takes_little_memory() -> None:
    kept = PackedReleases()
    for number in range(1000):
        kept.append(replace(ONE, sequence=number))
    assert len(kept._rows) < 160 * 1000
    assert (kept._others, len(kept._names)) == ({}, 1)


def test_pages_are_those_of_the_whole(serving: Serving) -> None:
    releases = Releases(serving.home)
    every = list(releases.all())
    assert [one.sequence for one in every] == sorted((one.sequence for one in every), reverse=True)
    for search in ("", "triage", every[0].sha256[:9].upper(), "nothing of this"):
        found = list(releases.all(search))
        assert releases.page(search, first=0, most=10**6) == (found, len(found))
        assert releases.page(search, first=2, most=3) == (found[2:5], len(found))
        assert releases.page(search, first=10**6, most=3) == ([], len(found))


def test_what_the_coordinator_did_not_take_is_told(serving: Serving) -> None:
    log = open_log(serving.home, passphrase=None)
    log.append(Event.RELEASE_STORED, job="ef" * 32, round=1, sha256="01" * 32, bytes=5, epsilon_spent=1.0)
    log.append(Event.RELEASE_SENT, message_type="train", bytes=9, declined=True)
    assert next(Releases(serving.home).all()).declined
    page = text_of(serving.signed_in("officer").get("/releases?q=0101").text)
    assert "not taken" in page
    assert "the coordinator declined it" in page
