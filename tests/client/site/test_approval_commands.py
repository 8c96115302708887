"""`silotune site requests`, `request`, `approve`, `refuse`: what they show, do, and say to a mistake."""

from __future__ import annotations

import getpass
import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import click
import pytest
import typer

from client.ledger.account import Charge
from client.site.home import SiteHome
from shared.job.job import Job
from shared.privacy.accounting import GaussianSteps
from shared.trust.audit_log import Event
from shared.trust.keystore import load_secret, save_secret
from shared.trust.signed_job import SignedJob
from shared.wire.messages import Refusal, SiteDescription
from simulations.federation.processes import change_toml
from tests.client.site.test_guard import World, world
from tests.conftest import Outcome

__all__ = ["world"]
Command = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _required(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SILOTUNE_PASSPHRASE", "SILOTUNE_PASSPHRASE_FILE"):
        monkeypatch.delenv(variable, raising=False)
    change_toml(world.home.policy, approval="required", approval_days=365)


@pytest.fixture
def ask(world: World, private_job: Callable[..., Job]) -> Callable[..., SignedJob]:
    """Return what asks a running site for a job, which then waits."""

    def make(name: str = "triage", **sections: Any) -> SignedJob:
        signed = world.signed(private_job(**{"name": name, "federation": {"min_sites": 2}} | sections), days=2000)
        answer = world.site.accept(signed)
        assert isinstance(answer, Refusal)
        assert answer.reason == "waiting for approval"
        return signed

    return make


def said(outcome: Outcome) -> str:
    assert (outcome.status, outcome.err) == (0, ""), outcome
    return outcome.out


def refused(outcome: Outcome, text: str) -> None:
    assert outcome.status in (1, 2), outcome
    assert "Traceback" not in outcome.err
    assert text in " ".join(outcome.err.split())


def test_a_job_is_listed_read_and_approved(world: World, ask: Callable[..., SignedJob], silotune: Command) -> None:
    signed = ask()
    home = world.home.path
    listed = said(silotune("site", "requests", home))
    assert signed.job.sha256[:12] in listed
    assert "waits for approval" in listed
    assert "0 of 1" in listed
    whole = said(silotune("site", "request", home, "triage"))
    assert f"triage ({signed.job.sha256}): waits for approval" in whole
    assert f"signed by consortium ({world.signer.verify_key.text})" in whole
    assert f"for the coordinator with the key {world.coordinator.verify_key.text}" in whole
    assert "on the data set north-records (text as text, label as label), which is read here and stays here" in whole
    assert "epsilon 0.0000 of 50 is spent" in whole
    approved = said(silotune("site", "approve", home, signed.job.sha256[:8], "--by", "ada", "--reason", "as agreed"))
    assert f"triage ({signed.job.sha256[:12]}) is approved; its first round has to begin before" in approved
    # The site that runs sees it at the next question.
    assert isinstance(world.site.accept(signed), SiteDescription)
    assert "approved, not begun" in said(silotune("site", "requests", home))
    assert "approved by ada on" in said(silotune("site", "request", home, "triage"))
    (given,) = world.entries(Event.APPROVAL_GIVEN)
    assert (given.details["by"], given.details["reason"]) == ("ada", "as agreed")


def test_a_job_is_refused_withdrawn_and_taken_up_again(
    world: World, ask: Callable[..., SignedJob], silotune: Command
) -> None:
    signed, home = ask(), world.home.path
    refuse = ("site", "refuse", home, "triage", "--by", "ada", "--reason", "not in this term")
    assert "is refused; the coordinator is told that people said no, and nothing else" in said(silotune(*refuse))
    assert "refused by ada" in said(silotune("site", "requests", home))
    refused(silotune(*refuse), "was refused already, by ada")
    answer = world.site.accept(signed)
    assert isinstance(answer, Refusal)
    assert answer.reason == "site north refuses the job triage: its people said no."
    said(silotune("site", "approve", home, "triage", "--by", "ada"))
    assert isinstance(world.site.accept(signed), SiteDescription)
    assert "is no longer approved: its next round is refused" in said(silotune(*refuse))
    assert "withdrawn by ada" in said(silotune("site", "requests", home))
    assert "withdrawn by ada on" in said(silotune("site", "request", home, "triage"))


def test_four_eyes(world: World, ask: Callable[..., SignedJob], silotune: Command) -> None:
    change_toml(world.home.policy, approvals_needed=2)
    signed, home = ask(), world.home.path
    first = said(silotune("site", "approve", home, "triage", "--by", "ada"))
    assert "still waits for the approval of another account" in first
    assert "1 of 2: ada" in said(silotune("site", "requests", home))
    refused(silotune("site", "approve", home, "triage", "--by", "Ada"), "the next one is somebody else's")
    assert isinstance(world.site.accept(signed), Refusal)
    assert "is approved" in said(silotune("site", "approve", home, "triage", "--by", "bob"))
    assert isinstance(world.site.accept(signed), SiteDescription)


def test_what_is_approved_is_shown_first(
    world: World, ask: Callable[..., SignedJob], silotune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask()
    home, answers = world.home.path, list[Callable[[], None]]()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))

    def confirm(*_: object, abort: bool) -> None:
        assert (abort, world.entries(Event.APPROVAL_GIVEN)) == (True, [])
        answers.pop()()

    def no() -> None:
        raise click.Abort

    monkeypatch.setattr(typer, "confirm", confirm)
    answers.append(no)
    outcome = silotune("site", "approve", home, "triage", "--by", "ada")
    assert outcome.status == 1
    assert "epsilon 0.0000 of 50 is spent" in outcome.out
    answers.append(lambda: change_toml(world.home.policy, max_steps=199))
    refused(silotune("site", "approve", home, "triage", "--by", "ada"), "changed meanwhile, so nothing was approved")
    answers.append(lambda: said(silotune("site", "refuse", home, "triage", "--by", "bob", "--reason", "no")))
    assert silotune("site", "approve", home, "triage", "--by", "ada").status == 1
    assert world.entries(Event.APPROVAL_GIVEN) == []
    shown = said(silotune("site", "approve", home, "triage", "--by", "ada", "--yes"))
    assert shown.index("epsilon 0.0000 of 50 is spent") < shown.index("is approved")


def test_a_round_that_is_charged_meanwhile_keeps_nobody_from_approving(
    world: World, ask: Callable[..., SignedJob], silotune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask()
    home = world.home.path
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))

    def charge(*_: object, **__: object) -> None:
        step = GaussianSteps(noise_multiplier=1.0, sample_rate=0.05, steps=1)
        world.site.ledger().reserve(Charge(job_id="a" * 64, round=1, request_sha256="b" * 64, mechanism=step))

    monkeypatch.setattr(typer, "confirm", charge)
    shown = said(silotune("site", "approve", home, "triage", "--by", "ada"))
    assert "a round was charged meanwhile: once this job has run, " in shown
    (given,) = world.entries(Event.APPROVAL_GIVEN)
    both = given.details["budget"]["together"]
    assert both["shown"]["spent"] == 0 < both["now"]["spent"] < both["now"]["after"]


def test_without_a_name_it_is_the_user_who_is_logged_in(
    world: World, ask: Callable[..., SignedJob], silotune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask()
    monkeypatch.setattr(getpass, "getuser", lambda: "carol")
    said(silotune("site", "approve", world.home.path, "triage"))
    assert world.entries(Event.APPROVAL_GIVEN)[-1].details["by"] == "carol"

    def nobody() -> str:
        raise KeyError("uid not found: 4711")

    monkeypatch.setattr(getpass, "getuser", nobody)
    refused(silotune("site", "refuse", world.home.path, "triage", "--reason", "x"), "name yourself with --by")


def test_programs_get_json(world: World, ask: Callable[..., SignedJob], silotune: Command) -> None:
    first, home = ask("first"), world.home.path
    said(silotune("site", "approve", home, "first", "--by", "ada"))
    second = ask("second", training={"rounds": 5})
    listed = json.loads(said(silotune("site", "requests", home, "--json")))
    assert [(one["name"], one["state"]) for one in listed] == [("second", "waiting"), ("first", "approved")]
    assert listed[0]["job"] == second.job.sha256
    assert "signed_job" not in listed[0]
    whole = json.loads(said(silotune("site", "request", home, "second", "--json")))
    assert whole["compared_with"] == ["first", first.job.sha256]
    changed = {one["setting"]: (one["before"], one["after"]) for one in whole["changes"]}
    assert changed == {"name": ('"first"', '"second"'), "training.rounds": (f"{first.job.training.rounds}", "5")}
    assert all(rule["kept"] for rule in whole["rules"])
    assert whole["here"]["settings"] == ""
    assert whole["promised"]["epsilon"] > 0
    assert [line["fits"] for line in whole["budget"]] == [True, True]


def test_an_empty_list_says_why(world: World, silotune: Command) -> None:
    home = world.home.path
    assert said(silotune("site", "requests", home)).strip() == "no job was asked for"
    assert json.loads(said(silotune("site", "requests", home, "--json"))) == []
    change_toml(world.home.policy, approval="none")
    assert 'policy.toml has approval = "none"' in said(silotune("site", "requests", home))
    assert not world.home.approvals.exists()
    assert not (home / "ledger.db").exists()


def test_mistakes_are_explained(world: World, ask: Callable[..., SignedJob], silotune: Command) -> None:
    ask()
    home = world.home.path
    for command, options in (("request", ()), ("approve", ("--by", "ada")), ("refuse", ("--reason", "x"))):
        refused(silotune("site", command, home, "nothing", *options), "no request is called 'nothing'")
        refused(silotune("site", command, home / "nowhere", "triage", *options), "site.toml")
    refused(silotune("site", "refuse", home, "triage"), "--reason")
    refused(silotune("site", "refuse", home, "triage", "--reason", " "), "a refusal needs a reason")
    refused(silotune("site", "refuse", home, "triage", "--reason", "a\x1b[2J"), "printable")
    refused(silotune("site", "approve", home, "triage", "--by", "a\nb\x07"), "printable")
    world.home.approvals.write_bytes(b"SILOSEAL")
    for command in (("requests", home), ("request", home, "triage"), ("approve", home, "triage", "--by", "ada")):
        refused(silotune("site", *command), "Nothing counts as approved")
    assert len(world.entries(Event.APPROVAL_GIVEN)) == 0


def test_keys_under_a_passphrase_want_it(
    world: World, ask: Callable[..., SignedJob], silotune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask()
    secret = load_secret(world.home.storage_key, passphrase=None)
    word = "correct horse"
    save_secret(world.home.storage_key, secret, passphrase=word, replace=True)
    refused(silotune("site", "requests", world.home.path), "is encrypted and there is no passphrase")
    monkeypatch.setenv("SILOTUNE_PASSPHRASE", word)
    assert "triage" in said(silotune("site", "requests", world.home.path))


def test_looking_reads_no_record(world: World, ask: Callable[..., SignedJob], silotune: Command) -> None:
    ask()
    home = SiteHome(world.home.path)
    data = home.path.parent / "notes.jsonl"
    data.unlink()
    assert "what is left" in said(silotune("site", "request", home.path, "triage"))


def test_a_job_that_no_longer_fits_the_rules_is_shown_so(
    world: World, ask: Callable[..., SignedJob], silotune: Command
) -> None:
    ask()
    change_toml(world.home.policy, max_epsilon_per_job=0.5, max_steps=1)
    change_toml(world.home.config, budget={"epsilon": 50.0, "delta": 1e-9})
    shown = said(silotune("site", "request", world.home.path, "triage"))
    assert "BROKEN max_steps" in shown
    assert "BROKEN site.toml: the job's delta 1e-05 is weaker than this site's 1e-09" in shown


def test_site_check_says_what_waits(world: World, ask: Callable[..., SignedJob], silotune: Command) -> None:
    home = world.home.path

    def found() -> dict[str, tuple[str, str]]:
        listed = json.loads(silotune("site", "check", home, "--offline", "--json").out)
        return {one["name"]: (one["outcome"], one["text"]) for one in listed}

    assert "; each job needs 1 approvals of people here" in found()["policy"][1]
    assert "approvals" not in found()
    ask()
    outcome, text = found()["approvals"]
    assert (outcome, "1 of 1 jobs wait for people here; see: silotune site requests" in text) == ("warning", True)
    said(silotune("site", "approve", home, "triage", "--by", "ada"))
    assert found()["approvals"] == ("ok", "0 of 1 jobs wait for people here")
    world.home.approvals.write_bytes(b"x")
    assert found()["approvals"][0] == "failed"
