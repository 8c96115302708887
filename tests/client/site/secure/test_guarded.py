"""A real site in a secure round: what the coordinator signs, what the policy caps, before anything is computed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

import client.site.secure.shares as shares_module
from client.training.proof import load_proven
from shared.job.job import Job
from shared.secure_sum.messages import Ready, pack_roster
from shared.secure_sum.site import SecureSite
from shared.trust.audit_log import Event
from shared.trust.certificates import pem_bytes
from shared.trust.pki import approve, create_ca, make_request, publish, revoke
from shared.trust.signed_job import round_fields
from shared.trust.signing import Purpose
from shared.wire.messages import Order, Refusal, TrainReply, TrainRequest
from simulations.federation.processes import change_toml
from tests.client.site.test_guard import World, world

__all__ = ["world"]


def ordered(world: World, request: TrainRequest, kind: str = "ready") -> TrainRequest:
    """As a coordinator sends it: attempt and kind are signed with the round."""
    sent_at = world.now.isoformat(timespec="milliseconds")
    fields = round_fields(
        job_sha256=request.job.sha256,
        round_number=request.round_number,
        adapter=request.adapter,
        sent_at=sent_at,
        attempt=request.attempt,
        kind=kind,
    )
    signature = world.coordinator.sign(Purpose.ROUND, fields)
    return replace(request, order=Order(signed_job=world.signed(request.job), sent_at=sent_at, signature=signature))


@pytest.fixture
def asked(classification_job: Callable[..., Job], request_for: Callable[..., TrainRequest]) -> TrainRequest:
    job = classification_job(
        training={"rounds": 2, "local_steps": 1},
        privacy={"mechanism": "distributed", "max_colluding": 1, "noise_multiplier": 1.0, "sample_rate": 0.25},
        federation={"min_sites": 3},
    )
    return replace(request_for(job), attempt=1)


def reason(world: World, request: TrainRequest) -> str:
    answer = world.site.answer_ready(request)
    assert isinstance(answer, Refusal)
    assert [entry for entry in world.site.ledger().entries() if entry.kind == "reserve"] == []
    assert world.entries(Event.REQUEST_REFUSED)[-1].details["reason_sent"]
    return answer.reason


def test_the_number_of_the_attempt_is_signed(world: World, asked: TrainRequest) -> None:
    good = ordered(world, asked)
    assert "not signed by the coordinator" in reason(world, replace(good, attempt=2))
    assert "not signed by the coordinator" in reason(world, replace(good, attempt=0))
    assert "not signed by the coordinator" in reason(world, replace(good, round_number=2))


def test_a_policy_caps_what_an_upload_has_by_itself(world: World, asked: TrainRequest) -> None:
    change_toml(world.home.policy, max_epsilon_per_job=2.0)
    assert "epsilon_alone" in reason(world, ordered(world, asked))


def test_a_policy_wants_more_colluders_tolerated(world: World, asked: TrainRequest) -> None:
    change_toml(world.home.policy, min_colluding=2)
    assert "max_colluding is 1" in reason(world, ordered(world, asked))


def test_a_request_of_one_kind_is_none_of_another(world: World, asked: TrainRequest) -> None:
    """The kind is signed: whoever carries requests cannot pass one off as another, whatever the states of the site."""
    answers = {"ready": world.site.answer_ready, "masked": world.site.answer_masked, "train": world.site.answer}
    told = {"ready": "", "masked": "nothing ready for attempt 1", "train": "no update of its own"}
    for sent in answers:
        for taken, answer in answers.items():
            for attempt in (0, 1):
                request = ordered(world, replace(asked, attempt=attempt), sent)
                found = answer(request)
                if taken == sent == "ready" and attempt:
                    continue
                assert isinstance(found, Refusal)
                expected = told[taken] if taken == sent and (attempt or taken == "train") else None
                if taken == sent and expected is not None:
                    assert expected in found.reason
                elif taken != sent:
                    assert "the kind of request was changed on the way" in found.reason


# --- the second exchange ---


class Sites:
    """The guarded site and two more of its consortium, at one attempt."""

    def __init__(self, world: World, ca: Path, request: TrainRequest) -> None:
        self.world, self.ca, self.request = world, ca, request
        create_ca(ca, name="consortium", passphrase=None, now=world.now - timedelta(days=1))
        (world.home.path / "ca.crt").write_bytes((ca / "ca.crt").read_bytes())
        certificate = self.certified((world.home.path / "north.csr").read_bytes())
        (world.home.path / "site.crt").write_bytes(pem_bytes(certificate))
        self.peers = []
        for name in ("south", "west"):
            key, wanted = make_request(name=name, role="site", hosts=())
            self.peers.append((name, key, self.certified(wanted).public_bytes(Encoding.DER)))

    def certified(self, request: bytes) -> x509.Certificate:
        return approve(
            self.ca, request, role="site", hosts=(), days=365, passphrase=None, now=self.world.now - timedelta(days=1)
        )

    def ready(self, attempt: int = 1) -> list[Ready]:
        request = replace(self.request, attempt=attempt)
        own = self.world.site.answer_ready(ordered(self.world, request))
        assert isinstance(own, Ready), own
        common = {name: getattr(own, name) for name in ("job_sha256", "round_number", "attempt", "adapter_sha256")}
        others = [
            SecureSite(site=name, key=key, certificate=certificate, declared_records=8, **common).ready()
            for name, key, certificate in self.peers
        ]
        return sorted([own, *others], key=lambda entry: entry.site)

    def masked(self, entries: list[Ready], **changes: Any) -> TrainReply | Refusal:
        request = replace(self.request, adapter=pack_roster(tuple(entries)), attempt=entries[0].attempt)
        return self.world.site.answer_masked(replace(ordered(self.world, request, "masked"), **changes))

    def charged(self) -> int:
        return len([entry for entry in self.world.site.ledger().entries() if entry.kind == "reserve"])


@pytest.fixture
def sites(world: World, tmp_path: Path, asked: TrainRequest) -> Sites:
    return Sites(world, tmp_path / "ca", asked)


def test_a_roster_of_the_consortium_is_answered(sites: Sites) -> None:
    assert isinstance(sites.masked(sites.ready()), TrainReply)
    assert sites.charged() == 1


def test_the_policy_caps_what_is_computed_and_not_charged(sites: Sites) -> None:
    """However many attempts the job plans, for others wrote it."""
    job, world = sites.request.job, sites.world
    privacy = job.privacy.model_copy(update={"spare_attempts": 100})
    sites.request = replace(sites.request, job=job.model_copy(update={"privacy": privacy}))
    change_toml(world.home.policy, max_attempts_per_round=2)
    for attempt in (1, 2):
        sites.ready(attempt)
    told = reason(world, ordered(world, replace(sites.request, attempt=3)))
    assert "has computed 2 attempts at round 1, as many as the job plans and its policy allows" in told


def revoked(sites: Sites, entries: list[Ready]) -> None:
    revoke(sites.ca, "west", passphrase=None, now=sites.world.now)
    publish(sites.ca, sites.world.home.path)


def pinned(sites: Sites, entries: list[Ready]) -> None:
    change_toml(sites.world.home.policy, peers={"south": "0" * 64, "west": "1" * 64})


def by_another_clock(sites: Sites, entries: list[Ready]) -> None:
    key, wanted = make_request(name="south", role="site", hosts=())
    certificate = approve(
        sites.ca,
        wanted,
        role="site",
        hosts=(),
        days=365,
        passphrase=None,
        now=sites.world.now + timedelta(hours=1),
        rotate=True,
    )
    common = {name: getattr(entries[0], name) for name in ("job_sha256", "round_number", "attempt", "adapter_sha256")}
    shown = certificate.public_bytes(Encoding.DER)
    entries[1] = SecureSite(site="south", key=key, certificate=shown, declared_records=8, **common).ready()


def damaged(sites: Sites, entries: list[Ready]) -> None:
    (sites.world.home.path / "crl.pem").write_text("no list")


def forged(sites: Sites, entries: list[Ready]) -> None:
    entries[1] = replace(entries[1], signature=entries[2].signature)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (revoked, "west on the roster: "),
        (pinned, "south on the roster has a certificate for the key"),
        (by_another_clock, "not valid before"),
        (damaged, "is not in order; its own log says why"),
        (forged, "the ready message of south is not signed with the key of its certificate"),
        (lambda sites, entries: entries.pop(), "the roster has 2 sites, expected 3"),
        (lambda sites, entries: entries.reverse(), "not in the order of its names"),
        (lambda sites, entries: entries.clear(), "the roster has 0 sites"),
    ],
)
def test_why_a_roster_is_refused_is_told(sites: Sites, change: Callable[[Sites, list[Ready]], Any], told: str) -> None:
    """By what all on it see, and by the site's own trust: nothing of it follows from a record, and nothing is charged."""
    entries = sites.ready()
    changed = list(entries)
    change(sites, changed)
    request = replace(sites.request, adapter=pack_roster(tuple(changed)), attempt=1)
    answer = sites.world.site.answer_masked(ordered(sites.world, request, "masked"))
    assert isinstance(answer, Refusal)
    assert (answer.code, told in answer.reason) == ("RosterError", True), answer
    assert str(sites.world.home.path) not in answer.reason
    assert sites.charged() == 0
    noted = sites.world.entries(Event.REQUEST_REFUSED)[-1].details
    assert (noted["reason"], noted["reason_sent"]) == (answer.reason, True)


def test_who_has_nothing_ready_says_that_it_dropped_out(sites: Sites) -> None:
    entries = sites.ready()
    sites.world.opened.clear()  # another process
    answer = sites.masked(entries)
    assert isinstance(answer, Refusal)
    assert answer.code == "DroppedOut"


def within_the_next_hour(sites: Sites) -> None:
    local = sites.world.now.astimezone()
    change_toml(sites.world.home.policy, hours=f"{local:%H:%M}-{local + timedelta(hours=1):%H:%M}")


def test_an_attempt_that_began_within_the_hours_is_finished(sites: Sites) -> None:
    within_the_next_hour(sites)
    entries = sites.ready()
    sites.world.now += timedelta(hours=1)
    reply = sites.masked(entries)
    assert isinstance(reply, TrainReply)
    # Also asked again, for the answer may have been lost; and no other attempt begins.
    assert sites.masked(entries) == reply
    answer = sites.world.site.answer_ready(ordered(sites.world, replace(sites.request, attempt=2)))
    assert isinstance(answer, Refusal)
    assert "runs rounds only between" in answer.reason
    assert sites.charged() == 1


def test_after_the_hours_nothing_else_is_admitted(sites: Sites) -> None:
    within_the_next_hour(sites)
    entries = sites.ready()
    other = [replace(entry, attempt=2) for entry in entries]
    sites.world.now += timedelta(hours=1)
    late = sites.request.job.federation.round_timeout_seconds + 60.0
    for answer in (
        sites.masked(other),  # what it never said ready to
        *[sites.masked(entries, order=None)],
    ):
        assert isinstance(answer, Refusal)
    assert "runs rounds only between" in sites.masked(other).reason  # type: ignore[union-attr]
    # Nobody waits for it any more.
    sites.world.site.shares._asked[sites.request.job.sha256].until -= late
    answer = sites.masked(entries)
    assert isinstance(answer, Refusal)
    assert "runs rounds only between" in answer.reason
    # It was here in time, behind another request.
    assert isinstance(sites.masked(entries, waited_seconds=60.0), TrainReply)
    assert sites.charged() == 1


def test_what_is_said_again_holds_from_then_on(sites: Sites) -> None:
    """A coordinator that died before the roster asks again, within the hours, and gets the same word."""
    within_the_next_hour(sites)
    entries = sites.ready()
    shares, job = sites.world.site.shares, sites.request.job
    for noted in (shares._asked[job.sha256], shares._drawn[job.sha256]):
        noted.until -= job.federation.round_timeout_seconds + 60.0
    assert sites.world.site.answer_ready(ordered(sites.world, sites.request)) in entries
    assert shares._drawn[job.sha256].until == shares._asked[job.sha256].until > time.monotonic()
    sites.world.now += timedelta(hours=1)
    assert isinstance(sites.masked(entries), TrainReply)


def test_after_a_restart_the_hours_hold_again(sites: Sites) -> None:
    within_the_next_hour(sites)
    entries = sites.ready()
    sites.world.opened.clear()
    sites.world.now += timedelta(hours=1)
    answer = sites.masked(entries)
    assert isinstance(answer, Refusal)
    assert "runs rounds only between" in answer.reason


def test_a_signature_may_end_while_a_site_gets_ready(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    def takes_a_day(*arguments: Any) -> Any:
        sites.world.now += timedelta(days=1)
        return load_proven(*arguments)

    monkeypatch.setattr(shares_module, "load_proven", takes_a_day)
    assert isinstance(sites.world.site.answer_ready(ordered(sites.world, sites.request)), Ready)


def test_what_was_drawn_goes_with_the_signature_of_its_job(
    sites: Sites, request_for: Callable[..., TrainRequest]
) -> None:
    entries = sites.ready()
    sites.world.now += timedelta(days=1)
    other = replace(request_for(sites.request.job.model_copy(update={"name": "other"})), attempt=1)
    assert isinstance(sites.world.site.answer_ready(ordered(sites.world, other)), Ready)
    shares = sites.world.site.shares
    assert list(shares._drawn) == list(shares._asked) == [other.job.sha256]
    # The same job, signed once more, has a draw of its own.
    again = sites.world.site.answer_ready(ordered(sites.world, sites.request))
    assert isinstance(again, Ready)
    assert again not in entries


def test_what_was_computed_is_remembered_until_the_signature_of_its_job_ends(
    sites: Sites, request_for: Callable[..., TrainRequest]
) -> None:
    """Forgotten earlier, a job would be computed more often than it plans, by a coordinator that takes turns between two."""
    jobs = [sites.request.job.model_copy(update={"name": name}) for name in ("other", "third")]
    shares = sites.world.site.shares
    sites.ready()
    for number, job in enumerate(jobs, 2):
        answer = sites.world.site.answer_ready(ordered(sites.world, replace(request_for(job), attempt=1)))
        assert isinstance(answer, Ready)
        assert len(shares._asked) == number
    sites.ready(2)
    assert len(shares._asked) == 3
    sites.world.now += timedelta(days=1)
    sites.request = replace(sites.request, round_number=2)
    sites.ready()
    assert list(shares._asked) == [sites.request.job.sha256]
