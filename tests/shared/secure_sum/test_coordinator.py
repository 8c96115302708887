"""The coordinator adds one input of every site of one roster, and opens the sum with all of them only."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shared.errors import PrivacyError, RunError, TrustError
from shared.secure_sum import coordinator as coordinator_module
from shared.secure_sum.coordinator import SecureCoordinator
from shared.secure_sum.messages import MOST_WORDS, Masked, Ready, context
from tests.shared.secure_sum.attempts import Attempt, attempt, new_key, plain_sum, site, words

A, B, C = "site-000", "site-001", "site-002"


def collected(here: Attempt) -> SecureCoordinator:
    """Return a coordinator that has closed the roster of all sites."""
    found = here.coordinator()
    for name in here.names:
        found.take_ready(here.sites[name].ready())
    found.close()
    return found


def check_ready_refused(found: SecureCoordinator, ready: Ready, match: str) -> None:
    before = dict(found._ready), set(found._holders)
    with pytest.raises(TrustError, match=match):
        found.take_ready(ready)
    assert (found._ready, found._holders) == before


def check_masked_refused(found: SecureCoordinator, masked: Masked, match: str) -> None:
    before, missing = found._sum.copy(), found.missing
    with pytest.raises(TrustError, match=match):
        found.take_masked(masked)
    assert (found._sum == before).all()
    assert found.missing == missing


def test_inputs_that_no_message_holds_are_not_asked_for() -> None:
    for count in (0, MOST_WORDS + 1):
        with pytest.raises(PrivacyError, match="cannot be summed"):
            attempt(2).coordinator(num_words=count)
    for count in (1, MOST_WORDS):
        attempt(2).coordinator(num_words=count)


# --- ready ---


def test_whoever_is_ready_is_on_the_roster_in_order() -> None:
    here = attempt(4)
    for order in itertools.permutations(here.names):
        found = here.coordinator()
        for name in order:
            found.take_ready(here.sites[name].ready())
            found.take_ready(here.sites[name].ready())  # a repeated message changes nothing
        assert found.close() == here.roster()
        assert found.close() is found.close()
        assert found.context == context(here.roster())
        assert found.missing == frozenset(here.names)


def test_too_few_close_no_roster_and_more_may_come() -> None:
    here = attempt(3, min_sites=3)
    found = here.coordinator()
    for name in (A, B):
        found.take_ready(here.sites[name].ready())
        with pytest.raises(RunError, match=r"\d sites are ready, expected 3 or more"):
            found.close()
    for read in (lambda: found.missing, lambda: found.context, found.open):
        with pytest.raises(RunError, match="the roster is not closed"):
            read()
    with pytest.raises(RunError, match="the roster is not closed"):
        found.take_masked(Masked(site=A, context=bytes(32), words=bytes(40)))
    found.take_ready(here.sites[C].ready())
    assert len(found.close()) == 3


def test_a_roster_of_one_is_not_asked_for() -> None:
    for least in (1, 0, -1):
        with pytest.raises(PrivacyError, match="hides nothing; expected min_sites of two or more"):
            attempt(2).coordinator(min_sites=least)


@pytest.mark.parametrize(
    ("name", "value"), [("job_sha256", "2" * 64), ("round_number", 4), ("attempt", 2), ("adapter_sha256", "2" * 64)]
)
def test_who_answers_something_else_is_refused(name: str, value: Any) -> None:
    here = attempt(2)
    other = site(A, here.keys[A], **{name: value}).ready()
    check_ready_refused(here.coordinator(), other, f"the ready message of {A} has the {name}")


def test_what_cannot_be_on_a_roster_is_refused() -> None:
    here = attempt(4)
    found = here.coordinator()
    found.take_ready(here.sites[A].ready())
    ready = here.sites[B].ready()
    check_ready_refused(found, site("stranger", new_key()).ready(), "stranger is not admitted")
    check_ready_refused(found, replace(ready, declared_records=65), f"message of {B} is not signed")
    check_ready_refused(
        found, ready_with(here, B, public_key=here.sites[A].ready().public_key), "X25519 key of another"
    )
    for low in (0, 1, 2**255 - 20):
        check_ready_refused(found, ready_with(here, B, public_key=low.to_bytes(32, "little")), "everybody knows")
    check_ready_refused(found, site(A, here.keys[A]).ready(), f"{A} was ready before with another message")
    here.keys[B] = here.keys[A]
    check_ready_refused(found, site(B, here.keys[A]).ready(), f"{B} has the certified key of another site")
    here.keys[B] = new_key()
    found.take_ready(site(B, here.keys[B]).ready())
    found.close()
    check_ready_refused(found, here.sites[C].ready(), f"{C} was ready after the roster was closed; it can")


def ready_with(here: Attempt, name: str, **changes: Any) -> Ready:
    return replace(here.sites[name].ready(), **{"signature": b"", **changes}).signed_by(here.keys[name])


def test_a_roster_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator_module, "MOST_SITES", 2)
    here = attempt(3)
    found = here.coordinator()
    for name in (A, B):
        found.take_ready(here.sites[name].ready())
    check_ready_refused(found, here.sites[C].ready(), "2 sites are ready already, the most of one roster")


# --- masked ---


def test_the_sum_opens_only_when_all_came() -> None:
    here = attempt(4, num_words=7)
    inputs = here.inputs()
    for order in itertools.islice(itertools.permutations(here.names), 0, 24, 5):
        found, masked = collected(here), here.masked(inputs)
        for name in order:
            left = set(found.missing)
            with pytest.raises(RunError, match=rf"{len(left)} of 4 masked inputs are missing \({min(left)}"):
                found.open()
            found.take_masked(masked[name])
            assert found.missing == left - {name}
        opened = found.open()
        assert opened.dtype == np.int64
        assert (opened == plain_sum(inputs.values())).all()
        assert (found.open() == opened).all()
        with pytest.raises(ValueError, match="read-only"):
            opened[0] = 0


def test_who_is_missing_is_named_as_far_as_it_fits_a_line() -> None:
    found = collected(attempt(7))
    with pytest.raises(
        RunError, match=r"7 of 7 .* \(site-000, site-001, site-002, site-003, site-004\); the sum opens"
    ):
        found.open()


def test_a_refused_input_does_not_touch_the_sum() -> None:
    here, other = attempt(3), attempt(3)
    inputs = here.inputs()
    found, masked = collected(here), here.masked(inputs)
    stranger = new_key()
    genuine = masked[A]
    cases = [
        (replace(genuine, signature=masked[B].signature), f"the masked message of {A} is not signed"),
        (replace(genuine, words=masked[B].words), f"the masked message of {A} is not signed"),
        (replace(genuine, site=B), f"the masked message of {B} is not signed"),
        (genuine.signed_by(stranger, here.sites[A].ready()), f"the masked message of {A} is not signed"),
        (
            replace(genuine, site="site-009").signed_by(stranger, here.sites[A].ready()),
            "site-009 sent .* not on the roster",
        ),
        (other.masked(inputs)[A], "is for another roster"),
        (replace(genuine, context=bytes(32)).signed_by(here.keys[A], here.sites[A].ready()), "is for another roster"),
    ]
    for length in (8, 32, 48, 80):
        wrong = replace(genuine, words=bytes(length)).signed_by(here.keys[A], here.sites[A].ready())
        cases.append((wrong, f"input of {A} has {length // 8} words, expected 5"))
    for case, match in cases:
        check_masked_refused(found, case, match)
    for name in here.names:
        found.take_masked(masked[name])
        check_masked_refused(found, masked[name], f"{name} sent a masked input twice")
    assert (found.open() == plain_sum(inputs.values())).all()


def test_another_input_of_a_site_that_came_is_refused() -> None:
    here = attempt(3)
    found, masked = collected(here), here.masked(here.inputs())
    found.take_masked(masked[A])
    again = replace(masked[A], words=bytes(40)).signed_by(here.keys[A], here.sites[A].ready())
    check_masked_refused(found, again, f"{A} sent a masked input twice")


def test_a_certificate_that_is_revoked_meanwhile_takes_its_input_with_it() -> None:
    here = attempt(3)
    found, masked = collected(here), here.masked(here.inputs())
    key = here.keys.pop(B)
    check_masked_refused(found, masked[B], f"{B} is not admitted")
    here.keys[B] = key
    found.take_masked(masked[B])


def test_what_comes_late_is_refused() -> None:
    here = attempt(2)
    found, masked = collected(here), here.masked(here.inputs())
    for name in here.names:
        found.take_masked(masked[name])
    found.open()
    check_masked_refused(found, masked[A], f"a masked input of {A} came after the attempt was opened; it is not used")


def test_a_voided_attempt_never_opens() -> None:
    here = attempt(2)
    found, masked = collected(here), here.masked(here.inputs())
    found.take_masked(masked[A])
    found.void()
    assert found._sum.nbytes == 0
    check_masked_refused(found, masked[B], f"a masked input of {B} came after the attempt was voided")
    with pytest.raises(RunError, match="the attempt was voided; its sum does not open"):
        found.open()
    early = here.coordinator()
    early.void()
    check_ready_refused(early, here.sites[A].ready(), f"{A} was ready after the attempt was voided")


def test_a_late_input_of_a_voided_attempt_does_not_reach_the_next() -> None:
    here, after = attempt(2), attempt(2)
    masked = here.masked(here.inputs())
    after.keys = here.keys
    after.sites = {name: site(name, here.keys[name], attempt=2) for name in here.names}
    found = after.coordinator(attempt=2)
    for name in after.names:
        found.take_ready(after.sites[name].ready())
    found.close()
    check_masked_refused(found, masked[A], "is for another roster")
    forged = replace(masked[A], context=found.context)
    check_masked_refused(found, forged, f"the masked message of {A} is not signed")


def test_memory_is_one_sum_and_the_roster() -> None:
    """Bytes held after all came: those of one sum, and about a kilobyte a site; not one input a site."""
    held = []
    for count in (3, 30):
        here = attempt(count, num_words=20_000)
        found, masked = collected(here), here.masked({name: words(20_000) for name in here.names})
        for name in here.names:
            found.take_masked(masked[name])
        state = {key: value for key, value in vars(found).items() if key != "_key_of"}
        held.append(len(pickle.dumps(state)))
    assert held[0] < 8 * 20_000 + 10_000
    assert held[1] - held[0] < 27 * 1000
