"""A site in rounds under secure aggregation: what it says, what it charges, what it keeps, and what is left after a kill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import client.site.outbox as outbox_module
import client.site.secure.shares as shares_module
import shared.privacy.shares as sums_module
from client.ledger.account import Charge
from client.ledger.ledger import Ledger
from client.site.guard import NoGuard
from client.site.secure.shares import Shares
from client.site.site import Site
from shared.errors import BudgetExceeded, DroppedOut, LedgerError, PolicyError, TrustError
from shared.job.job import Job
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.privacy.shares import GRID_STEPS
from shared.secure_sum.coordinator import SecureCoordinator
from shared.secure_sum.keys import shown_key
from shared.secure_sum.messages import Masked, Ready, pack_roster
from shared.secure_sum.site import SecureSite
from shared.wire.messages import Refusal, TrainReply, TrainRequest

MakeHome = Callable[..., Path]
MakeRequest = Callable[..., TrainRequest]
NAMES = ("north", "south", "west")


@pytest.fixture
def secure_job(classification_job: Callable[..., Job]) -> Callable[..., Job]:
    def build(**sections: Any) -> Job:
        privacy = {"mechanism": "distributed", "max_colluding": 0, "noise_multiplier": 1.0, "sample_rate": 0.25}
        return classification_job(
            **{
                **sections,
                "training": {"rounds": 3, "local_steps": 1, **sections.get("training", {})},
                "privacy": privacy | sections.get("privacy", {}),
                "federation": {"min_sites": 2, **sections.get("federation", {})},
            }
        )

    return build


@pytest.fixture
def sites(site_home: MakeHome) -> list[Site]:
    return [Site(site_home(name)) for name in NAMES]


def attempt_of(request: TrainRequest, attempt: int = 1) -> TrainRequest:
    return replace(request, attempt=attempt)


def roster_request(request: TrainRequest, entries: Sequence[Ready]) -> TrainRequest:
    return replace(request, adapter=pack_roster(tuple(sorted(entries, key=lambda entry: entry.site))))


def opened(request: TrainRequest, entries: Sequence[Ready], replies: Sequence[TrainReply]) -> np.ndarray:
    first = entries[0]
    machine = SecureCoordinator(
        job_sha256=first.job_sha256,
        round_number=first.round_number,
        attempt=first.attempt,
        adapter_sha256=first.adapter_sha256,
        num_words=len(Masked.from_bytes(replies[0].update).words) // 8,
        min_sites=2,
        key_of=shown_key,
    )
    for entry in entries:
        machine.take_ready(entry)
    machine.close()
    for reply in replies:
        machine.take_masked(Masked.from_bytes(reply.update))
    return machine.open()


def charges(site: Site) -> list[tuple[int, int | None]]:
    entries = [entry.payload for entry in site.ledger().entries() if entry.kind == "reserve"]
    return [(payload["round"], payload.get("attempt")) for payload in entries]


def test_the_sum_opens_to_what_the_sites_drew(
    sites: list[Site], secure_job: Callable[..., Job], request_for: MakeRequest
) -> None:
    job = secure_job()
    request = attempt_of(request_for(job))
    entries = [site.shares.ready(request) for site in sites]
    drawn = [next(iter(site.shares._drawn.values())).words for site in sites]
    replies = [site.shares.masked(roster_request(request, entries)) for site in sites]
    total = opened(request, entries, replies)
    assert np.array_equal(total.view(np.uint64), drawn[0] + drawn[1] + drawn[2])
    for words, reply in zip(drawn, replies, strict=True):
        # Nothing of what it drew is in what it sent, nor is it kept anywhere.
        assert not np.any(np.frombuffer(Masked.from_bytes(reply.update).words, "<u8") == words)
    assert all(not site.shares._drawn for site in sites)
    assert 0.8 < total.std() / (3**0.5 * GRID_STEPS) < 1.3


def test_a_lone_label_is_no_doubt_of_a_sum(
    site_home: MakeHome, secure_job: Callable[..., Job], request_for: MakeRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """Site and job as in docs/decisions/0027; a job whose sites step by themselves is doubted, by the same site too."""
    site = Site(site_home(rows=[{"text": f"film {number}", "label": "good"} for number in range(20)]))
    alone = secure_job(privacy={"mechanism": "dp-sgd", "max_colluding": None})
    with caplog.at_level("WARNING", logger="silotune.site"):
        assert isinstance(site.answer_ready(attempt_of(request_for(secure_job()))), Ready)
        assert "one and the same label" not in caplog.text
        assert not site.left_out
        assert isinstance(site.answer(request_for(alone)), TrainReply)
    assert "Add records of other labels, or leave the site out. The coordinator is not told." in caplog.text
    assert ".." not in caplog.text


def test_being_ready_charges_nothing_and_being_masked_charges_both_accounts(
    sites: list[Site], secure_job: Callable[..., Job], request_for: MakeRequest
) -> None:
    job, site = secure_job(), sites[0]
    plan, request = PrivacyPlan.from_job(job), attempt_of(request_for(job))
    entries = [s.shares.ready(request) for s in sites]
    assert charges(site) == []
    site.shares.masked(roster_request(request, entries))
    assert charges(site) == [(1, 1)]
    (charged,) = site.ledger().charges(job.sha256)
    assert charged.mechanism == plan.mechanism(1)
    assert charged.together == plan.of_sum.mechanism(1)
    assert charged.planned_steps == job.charged_steps
    assert charged.committed


def test_asked_again_it_says_the_same(
    sites: list[Site], secure_job: Callable[..., Job], request_for: MakeRequest
) -> None:
    request = attempt_of(request_for(secure_job()))
    entries = [site.shares.ready(request) for site in sites]
    assert [site.shares.ready(request) for site in sites] == entries
    masked = roster_request(request, entries)
    first = sites[0].shares.masked(masked)
    assert sites[0].shares.masked(masked) == first
    # Another process: nothing but the folder is remembered.
    again = Site(sites[0].home)
    assert again.shares.masked(masked) == first
    assert charges(again) == [(1, 1)]


def test_an_attempt_is_masked_once(sites: list[Site], secure_job: Callable[..., Job], request_for: MakeRequest) -> None:
    request = attempt_of(request_for(secure_job()))
    entries = [site.shares.ready(request) for site in sites]
    sites[0].shares.masked(roster_request(request, entries))
    with pytest.raises(PolicyError, match="nothing ready for attempt 1"):
        sites[0].shares.masked(roster_request(request, entries[:2]))
    assert charges(sites[0]) == [(1, 1)]
    # The next attempt has another key, other coins and another share.
    second = attempt_of(request, 2)
    entry = sites[0].shares.ready(second)
    assert entry.public_key != entries[0].public_key


def test_a_retry_has_fresh_words(sites: list[Site], secure_job: Callable[..., Job], request_for: MakeRequest) -> None:
    site, request = sites[0], attempt_of(request_for(secure_job()))
    drawn = []
    for attempt in (1, 2):
        site.shares.ready(attempt_of(request, attempt))
        drawn.append(next(iter(site.shares._drawn.values())).words)
    difference = (drawn[0] - drawn[1]).view(np.int64) / GRID_STEPS
    assert 1.2 < difference.std() < 1.7  # two independent shares of 1: their difference has sqrt 2


def test_what_was_drawn_is_dropped_once_nobody_can_ask_for_it(
    sites: list[Site], secure_job: Callable[..., Job], request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(shares_module.time, "monotonic", lambda: now[0])
    site, first, second = sites[0], secure_job(), secure_job(name="another")
    shares, lasts = site.shares, first.federation.round_timeout_seconds
    entries = [one.shares.ready(attempt_of(request_for(first))) for one in sites]
    # Another job begins while the first is waited for: both go on.
    shares.ready(attempt_of(request_for(second)))
    assert {*shares._drawn} == {first.sha256, second.sha256}
    now[0] += lasts
    masked = roster_request(attempt_of(request_for(first)), entries)
    assert shares.masked(masked) == shares.masked(masked)
    assert {*shares._drawn} == {second.sha256}
    # The first begins its next attempt when the other was given up.
    now[0] += 60
    shares.ready(attempt_of(request_for(first), 2))
    assert {*shares._drawn} == {first.sha256}
    late = roster_request(attempt_of(request_for(second)), entries)
    with pytest.raises(DroppedOut):
        shares.masked(late)
    with pytest.raises(PolicyError, match="nothing ready for attempt 1"):
        shares.masked(roster_request(attempt_of(request_for(first)), entries[:2]))


def test_what_was_drawn_does_not_survive_the_process(
    sites: list[Site], secure_job: Callable[..., Job], request_for: MakeRequest
) -> None:
    request = attempt_of(request_for(secure_job()))
    entries = [site.shares.ready(request) for site in sites]
    restarted = Site(sites[0].home)
    with pytest.raises(PolicyError, match="was started anew"):
        restarted.shares.masked(roster_request(request, entries))
    assert charges(restarted) == []
    # Ready again for the same attempt: another key, so the old roster is none of it.
    assert restarted.shares.ready(request).public_key != entries[0].public_key
    with pytest.raises(TrustError, match="does not have north as north signed it"):
        restarted.shares.masked(roster_request(request, entries))
    assert charges(restarted) == []


class Killed(BaseException):
    """A process that ends here."""


@pytest.mark.parametrize("place", ["before the charge", "after the charge", "after storing"])
def test_a_kill_at_any_line_loses_no_charge(
    sites: list[Site],
    secure_job: Callable[..., Job],
    request_for: MakeRequest,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    request, site = attempt_of(request_for(secure_job())), sites[0]
    entries = [s.shares.ready(request) for s in sites]
    masked = roster_request(request, entries)

    def dying(real: Callable[..., Any], *, before: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not before:
                real(*args, **kwargs)
            raise Killed

        return call

    with monkeypatch.context() as patch:
        if place == "after storing":
            patch.setattr(outbox_module, "write_bytes", dying(outbox_module.write_bytes, before=False))
        else:
            patch.setattr(Ledger, "reserve", dying(Ledger.reserve, before=place == "before the charge"))
        with pytest.raises(Killed):
            site.shares.masked(masked)
    after = Site(site.home)
    assert charges(after) == ([] if place == "before the charge" else [(1, 1)])
    if place == "after storing":
        reply = after.shares.masked(masked)
        replies = [reply, *(s.shares.masked(masked) for s in sites[1:])]
        assert opened(request, entries, replies).shape
        assert charges(after) == [(1, 1)]
    else:
        with pytest.raises(PolicyError, match="started anew"):
            after.shares.masked(masked)
        # The next attempt counts beside it.
        after.shares.ready(attempt_of(request, 2))


@pytest.mark.parametrize("reservation", [None, 0, 1])
def test_fault_an_attempt_that_is_not_charged(
    sites: list[Site],
    secure_job: Callable[..., Job],
    request_for: MakeRequest,
    monkeypatch: pytest.MonkeyPatch,
    reservation: int | None,
) -> None:
    """Planted: nothing is charged for the second attempt. It does not leave, or the site notices when it is opened again."""
    request, site = attempt_of(request_for(secure_job())), sites[0]
    first = [s.shares.ready(request) for s in sites]
    site.shares.masked(roster_request(request, first))
    second = attempt_of(request, 2)
    entries = [s.shares.ready(second) for s in sites]
    monkeypatch.setattr(Shares, "_charge", lambda *_: reservation)
    answer = site.answer_masked(roster_request(second, entries))
    assert charges(site) == [(1, 1)]
    if isinstance(answer, TrainReply):
        monkeypatch.undo()
        again = Site(site.home)
        with pytest.raises(LedgerError, match="charged"):
            again.shares.ready(attempt_of(request, 3))


def test_a_full_disk_leaves_the_site_out_of_the_attempt(
    sites: list[Site], secure_job: Callable[..., Job], request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = attempt_of(request_for(secure_job()))
    entries = [site.shares.ready(request) for site in sites]

    def full(*args: Any, **kwargs: Any) -> int:
        raise LedgerError("no space left on the device")

    monkeypatch.setattr(Ledger, "reserve", full)
    answer = sites[0].answer_masked(roster_request(request, entries))
    assert isinstance(answer, Refusal)
    assert answer.code == "Withheld"
    monkeypatch.undo()
    with pytest.raises(PolicyError, match="sent for another roster"):
        sites[0].shares.masked(roster_request(request, entries))


def test_a_budget_that_is_spent_refuses_before_others_are_charged(
    site_home: MakeHome, secure_job: Callable[..., Job], request_for: MakeRequest
) -> None:
    job = secure_job()
    plan = PrivacyPlan.from_job(job)
    poor = Site(site_home("poor", budget={"epsilon": plan.of_sum.epsilon() / 2, "epsilon_alone": 90.0, "delta": 1e-5}))
    rich = Site(site_home("rich"))
    request = attempt_of(request_for(job))
    with pytest.raises(BudgetExceeded):
        poor.shares.ready(request)
    # Spent by another job in between, it is too late for that; then at least nothing is charged.
    late = Site(site_home("late", budget={"epsilon": plan.of_sum.epsilon(), "epsilon_alone": 90.0, "delta": 1e-5}))
    entries = [site.shares.ready(request) for site in (late, rich)]
    late.charge(
        job,
        Charge(job_id="e" * 64, round=1, request_sha256="a" * 64, mechanism=plan.of_sum.mechanism(1)),
    )
    before = charges(late)
    with pytest.raises(BudgetExceeded):
        late.shares.masked(roster_request(request, entries))
    assert charges(late) == before


@pytest.mark.parametrize("promise", ["epsilon", "epsilon_alone"])
def test_each_cap_stops_the_job_by_itself(
    site_home: MakeHome, secure_job: Callable[..., Job], request_for: MakeRequest, promise: str
) -> None:
    job = secure_job()
    plan = PrivacyPlan.from_job(job)
    enough = {"epsilon": plan.of_sum.epsilon(), "epsilon_alone": plan.epsilon(), "delta": 1e-5}
    for factor, refused in ((1.0, False), (0.9, True)):
        budget = enough | {promise: enough[promise] * factor}
        if budget["epsilon_alone"] < budget["epsilon"]:
            continue
        site, other = Site(site_home(f"a-{factor}", budget=budget)), Site(site_home("b"))
        request = attempt_of(request_for(job))
        ready = site.answer_ready(request)
        assert isinstance(ready, Refusal) == refused
        if isinstance(ready, Ready):
            assert isinstance(
                site.answer_masked(roster_request(request, [ready, other.shares.ready(request)])), TrainReply
            )


def test_a_job_whose_gradients_no_masked_input_holds_is_refused_before_anything_is_charged(
    sites: list[Site], secure_job: Callable[..., Job], request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.site.secure.shares.MOST_WORDS", 100)
    answer = sites[0].answer_ready(attempt_of(request_for(secure_job())))
    assert isinstance(answer, Refusal)
    assert "a secure sum has room for 100" in answer.reason
    assert charges(sites[0]) == []


def test_what_failed_before_a_record_was_read_is_no_computation(
    sites: list[Site], secure_job: Callable[..., Job], request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, site = attempt_of(request_for(secure_job(privacy={"spare_attempts": 0}))), sites[0]

    def full(*args: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("client.site.secure.shares.load_proven", full)
        assert isinstance(site.answer_ready(request), Refusal)
    assert isinstance(site.answer_ready(replace(request, adapter=b"no adapter")), Refusal)
    entry = site.answer_ready(request)
    assert isinstance(entry, Ready)
    # Nor does a request that is refused take away what was drawn.
    assert isinstance(site.answer_ready(replace(request, adapter=b"no adapter")), Refusal)
    assert site.answer_ready(request) == entry


def test_with_a_new_certificate_it_is_ready_anew(
    sites: list[Site], secure_job: Callable[..., Job], request_for: MakeRequest
) -> None:
    """Nobody takes the old one any more, and without an answer there is no next attempt."""
    request, site = attempt_of(request_for(secure_job())), sites[0]
    old = site.shares.ready(request)
    site.guard = NoGuard()  # a simulated site makes a key of its own
    new = site.shares.ready(request)
    assert new.certificate == site.guard.certified_key()[1] != old.certificate
    assert new.public_key != old.public_key
    entries = [other.shares.ready(request) for other in sites[1:]]
    with pytest.raises(TrustError, match="does not have north as north signed it"):
        site.shares.masked(roster_request(request, [old, *entries]))
    assert isinstance(site.shares.masked(roster_request(request, [new, *entries])), TrainReply)


# --- requests that are not what they should be ---


def changed(entry: Ready, site: Site, **changes: Any) -> Ready:
    key, certificate = site.guard.certified_key()
    return replace(entry, **{"certificate": certificate, **changes}).signed_by(key)


def test_a_roster_that_is_not_what_it_should_be_is_refused_and_nothing_is_charged(
    sites: list[Site], secure_job: Callable[..., Job], request_for: MakeRequest
) -> None:
    job = secure_job()
    request = attempt_of(request_for(job))
    entries = [site.shares.ready(request) for site in sites]
    other = SecureSite(
        site="south",
        job_sha256=job.sha256,
        round_number=1,
        attempt=1,
        adapter_sha256="0" * 64,
        declared_records=8,
        key=sites[1].guard.certified_key()[0],
        certificate=sites[1].guard.certified_key()[1],
    ).ready()
    bad: dict[str, Sequence[Ready]] = {
        "one site": entries[:1],
        "without itself": entries[1:],
        "another adapter": [entries[0], other, entries[2]],
        "another attempt": [entries[0], changed(entries[1], sites[1], attempt=2)],
        "a copied key": [entries[0], changed(entries[1], sites[1], public_key=entries[0].public_key)],
        "an alias of a key": [entries[0], entries[1]],
        "signed by another": [entries[0], replace(entries[1], signature=entries[2].signature)],
        "own entry altered": [
            changed(entries[0], sites[0], declared_records=entries[0].declared_records + 1),
            entries[1],
        ],
    }
    for why, roster in bad.items():
        if why == "an alias of a key":
            continue  # cannot even be written: see tests/shared/secure_sum/test_messages.py
        with pytest.raises(TrustError):
            sites[0].shares.masked(roster_request(request, roster))
        assert charges(sites[0]) == [], why
    # None of it used up the attempt.
    sites[0].shares.masked(roster_request(request, entries))


def test_a_roster_whose_sum_could_wrap_around_is_refused_in_words(
    sites: list[Site], secure_job: Callable[..., Job], request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No roster of today's bounds can: so with words that reach less far."""
    request = attempt_of(request_for(secure_job()))
    entries = [site.shares.ready(request) for site in sites]
    declared = sum(entry.declared_records for entry in entries)
    monkeypatch.setattr(sums_module, "_REACH", 2 * declared * GRID_STEPS)
    answer = sites[0].answer_masked(roster_request(request, entries))
    assert isinstance(answer, Refusal)
    assert (answer.code, "could pass" in answer.reason) == ("RosterError", True), answer
    assert charges(sites[0]) == []
    monkeypatch.undo()
    assert isinstance(sites[0].answer_masked(roster_request(request, entries)), TrainReply)


@pytest.mark.parametrize("roster", [b"", b"roster", b"\x00" * 100])
def test_bytes_that_are_no_roster_are_refused(
    sites: list[Site], secure_job: Callable[..., Job], request_for: MakeRequest, roster: bytes
) -> None:
    request = attempt_of(request_for(secure_job()))
    sites[0].shares.ready(request)
    answer = sites[0].answer_masked(replace(request, adapter=roster))
    assert isinstance(answer, Refusal)
    assert charges(sites[0]) == []


def test_a_late_roster_of_a_voided_attempt_gets_nothing(
    sites: list[Site], secure_job: Callable[..., Job], request_for: MakeRequest
) -> None:
    request = attempt_of(request_for(secure_job()))
    old = [site.shares.ready(request) for site in sites]
    new = [site.shares.ready(attempt_of(request, 2)) for site in sites]
    with pytest.raises(PolicyError, match="nothing ready for attempt 1"):
        sites[0].shares.masked(roster_request(request, old))
    # A roster of the old keys under the new number is none of the new attempt.
    with pytest.raises(TrustError):
        sites[0].shares.masked(roster_request(attempt_of(request, 2), old))
    sites[0].shares.masked(roster_request(attempt_of(request, 2), new))
    assert charges(sites[0]) == [(1, 2)]


def test_one_adapter_a_round_and_no_more_attempts_than_planned(
    sites: list[Site], secure_job: Callable[..., Job], request_for: MakeRequest
) -> None:
    """Computing is not charged, so whoever could ask for it at will would time it at will."""
    job = secure_job(privacy={"spare_attempts": 1})
    request, site = attempt_of(request_for(job, 2)), sites[0]
    site.shares.ready(request)
    with pytest.raises(PolicyError, match="from another adapter"):
        site.shares.ready(attempt_of(request_for(job, 2, shift=1e-6), 2))
    with pytest.raises(PolicyError, match="rounds go forward only"):
        site.shares.ready(attempt_of(request_for(job, 1)))
    site.shares.ready(attempt_of(request, 2))
    with pytest.raises(PolicyError, match="has computed 2 attempts at round 2"):
        site.shares.ready(attempt_of(request, 3))
    site.shares.ready(attempt_of(request_for(job, 3)))


def test_the_kinds_of_request_are_not_mixed_up(
    sites: list[Site], secure_job: Callable[..., Job], private_job: Callable[..., Job], request_for: MakeRequest
) -> None:
    shared, local = request_for(secure_job()), request_for(private_job())
    with pytest.raises(PolicyError, match="no update of its own can be asked for"):
        sites[0].update.make(shared)
    with pytest.raises(PolicyError, match="only 'distributed' has rounds of two exchanges"):
        sites[0].shares.ready(attempt_of(local))
    with pytest.raises(PolicyError, match="counted from 1"):
        sites[0].shares.ready(shared)
    with pytest.raises(PolicyError, match="outside the job's 3 rounds"):
        sites[0].shares.ready(attempt_of(replace(shared, round_number=4)))
    assert charges(sites[0]) == []


def test_injected_randomness_is_said(
    site_home: MakeHome, secure_job: Callable[..., Job], request_for: MakeRequest
) -> None:
    pair = [
        Site(site_home(name), new_randomness=lambda name=name: SiteRandomness.injected(name)) for name in ("a", "b")
    ]
    request = attempt_of(request_for(secure_job()))
    entries = [site.shares.ready(request) for site in pair]
    assert pair[0].shares.masked(roster_request(request, entries)).randomness == "injected"
