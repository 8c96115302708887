"""The site: charge before release, one release per request, and refusals that tell nothing about the data."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import client.site.outbox as outbox_module
import client.site.release as release_module
from client.ledger.ledger import Ledger
from client.site.site import Site
from client.training.trainer import LocalRound, train_local_rounds
from shared.errors import BudgetExceeded, ConfigError, DataError, LedgerError, PolicyError, PrivacyError
from shared.job.job import Job
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.randomness import SiteRandomness
from shared.tensors.adapters import decode, encode, shapes_of
from shared.wire.messages import WITHHELD, Refusal, TrainReply, TrainRequest
from shared.wire.updates import decode_update

MakeHome = Callable[..., Path]
MakeJob = Callable[..., Job]
MakeRequest = Callable[..., TrainRequest]

MARKER = "zyxomma"


def injected() -> SiteRandomness:
    return SiteRandomness.injected("seed")


def steps_charged(site: Site) -> int:
    return sum(event.steps for event in site.ledger().events())


def epsilon_of(steps: int) -> float:
    return compose_epsilon([GaussianSteps(noise_multiplier=1.0, sample_rate=0.25, steps=steps)], 1e-5)


# --- charging ---


def test_a_round_is_charged_before_it_is_trained(
    site_home: MakeHome, private_job: MakeJob, request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(site_home())
    order: list[str] = []

    def traced(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            order.append(name)
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(Ledger, "reserve", traced("reserve", Ledger.reserve))
    monkeypatch.setattr(Ledger, "commit", traced("commit", Ledger.commit))
    monkeypatch.setattr(release_module, "train_local_rounds", traced("train", train_local_rounds))
    monkeypatch.setattr(outbox_module, "write_bytes", traced("store", outbox_module.write_bytes))
    reply = site.update.make(request_for(private_job()))
    assert order == ["reserve", "train", "store", "commit"]
    assert reply.steps == 2
    assert steps_charged(site) == 2
    commit = site.ledger().entries()[-1]
    assert commit.kind == "commit"
    assert commit.payload["release_sha256"] == hashlib.sha256(reply.update).hexdigest()


def test_the_salt_on_the_wire_is_no_other_stream(
    site_home: MakeHome, private_job: MakeJob, request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads the wire must not learn bits of noise or coins: the salt is all of it that a release shows."""
    reply = Site(site_home(), new_randomness=injected).update.make(request_for(private_job()))
    header = reply.update[reply.update.index(b'{"__metadata__"') :]
    salt = json.JSONDecoder().raw_decode(header.decode(errors="replace"))[0]["__metadata__"]["salt"]
    assert salt == injected().stream("salt", round_number=1, step=0).uint64(2).tobytes().hex()
    stream = SiteRandomness.stream
    for other in ("noise", "sampling"):
        monkeypatch.setattr(
            SiteRandomness,
            "stream",
            lambda self, purpose, other=other, **where: stream(self, other if purpose == "salt" else purpose, **where),
        )
        with pytest.raises(PrivacyError, match="was used before"):
            Site(site_home(other), new_randomness=injected).update.make(request_for(private_job()))


def test_the_same_request_gets_the_same_bytes_and_one_charge(
    site_home: MakeHome, private_job: MakeJob, request_for: MakeRequest
) -> None:
    home, request = site_home(), request_for(private_job())
    first = Site(home).update.make(request)
    again = Site(home).update.make(request)  # another process: nothing but the folder is remembered
    assert again == first
    assert steps_charged(Site(home)) == 2
    assert first.randomness == "os"


@pytest.mark.parametrize("difference", ["adapter", "round", "job"])
def test_another_request_is_another_release_and_another_charge(
    site_home: MakeHome, private_job: MakeJob, request_for: MakeRequest, difference: str
) -> None:
    site, job = Site(site_home()), private_job()
    first = site.update.make(request_for(job))
    other = {
        "adapter": lambda: request_for(job, shift=1e-6),
        "round": lambda: request_for(job, 2),
        "job": lambda: request_for(private_job(name="other")),
    }[difference]()
    second = site.update.make(other)
    assert second.update != first.update
    assert steps_charged(site) == 4


def test_a_new_release_has_new_noise(site_home: MakeHome, private_job: MakeJob, request_for: MakeRequest) -> None:
    site, job = Site(site_home()), private_job()
    one, two, three = (site.update.make(request_for(job, shift=shift)) for shift in (0.0, 1e-6, 0.0))
    shapes = shapes_of(decode_any(one))
    difference = decode(one.update, shapes)["head.linear.weight"] - decode(two.update, shapes)["head.linear.weight"]
    assert float(difference.abs().max()) > 1e-3
    # The first file was replaced by the second, so the third is a release of its own again.
    assert three.update != one.update
    assert steps_charged(site) == 6


def decode_any(reply: TrainReply) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(reply.update[40:])


def test_the_budget_stops_and_says_how_many_steps_fit(
    site_home: MakeHome, private_job: MakeJob, request_for: MakeRequest
) -> None:
    job = private_job(training={"rounds": 9})
    site = Site(site_home(budget={"epsilon": epsilon_of(5) + 1e-6, "delta": 1e-5}))
    assert isinstance(site.answer(request_for(job, 1)), TrainReply)
    assert isinstance(site.answer(request_for(job, 2)), TrainReply)
    refusal = site.answer(request_for(job, 3))
    assert isinstance(refusal, Refusal)
    assert refusal.code == "BudgetExceeded"
    assert "asks for 2 steps" in refusal.reason
    assert "1 such steps still fit" in refusal.reason
    assert steps_charged(site) == 4
    with pytest.raises(BudgetExceeded) as stop:
        site.update.make(request_for(job, 3))
    assert stop.value.steps_affordable == 1
    # What was released before is still sent again, at no charge.
    assert isinstance(site.answer(request_for(job, 2)), TrainReply)
    assert steps_charged(site) == 4
    # Another job and another run draw on the same budget.
    assert isinstance(site.answer(request_for(private_job(name="other", training={"local_steps": 2}))), Refusal)
    one_step = private_job(name="other", training={"local_steps": 1})
    assert isinstance(site.answer(request_for(one_step)), TrainReply)
    assert steps_charged(site) == 5


@pytest.mark.parametrize("where", ["train_local_rounds", "write_bytes"])
def test_a_crash_before_the_release_is_stored_keeps_the_charge(
    site_home: MakeHome,
    private_job: MakeJob,
    request_for: MakeRequest,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    class Crash(BaseException):
        """Nothing in the product may catch this."""

    def crash(*_: Any, **__: Any) -> None:
        raise Crash

    home, request = site_home(), request_for(private_job())
    with monkeypatch.context() as patch:
        patch.setattr(outbox_module if where == "write_bytes" else release_module, where, crash)
        with pytest.raises(Crash):
            Site(home).answer(request)
    site = Site(home)
    assert steps_charged(site) == 2
    assert [entry.kind for entry in site.ledger().entries()] == ["open", "budget", "reserve"]
    assert isinstance(site.answer(request), TrainReply)
    assert steps_charged(site) == 4, "the lost noise may have been seen, so the second attempt costs again"


def test_a_crash_after_the_release_is_stored_costs_nothing_more(
    site_home: MakeHome, private_job: MakeJob, request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crash(BaseException):
        pass

    def crash(*_: Any, **__: Any) -> None:
        raise Crash

    home, request = site_home(), request_for(private_job())
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "commit", crash)
        with pytest.raises(Crash):
            Site(home).answer(request)
    assert isinstance(Site(home).answer(request), TrainReply)
    assert steps_charged(Site(home)) == 2


def test_nothing_is_charged_for_what_is_refused(
    site_home: MakeHome, private_job: MakeJob, request_for: MakeRequest
) -> None:
    job = private_job()
    site = Site(site_home())
    good = request_for(job)
    refused = [
        replace(good, adapter=good.adapter[:-1]),
        replace(good, adapter=encode({"x": torch.zeros(2)})),
        replace(good, round_number=0),
        replace(good, round_number=4),
        request_for(private_job(privacy={"delta": 1e-3})),
        request_for(private_job(privacy={"mechanism": "none"})),
    ]
    codes = [answer.code for answer in map(site.answer, refused) if isinstance(answer, Refusal)]
    assert codes == ["AdapterError", "AdapterError", "PolicyError", "PolicyError", "PolicyError", "PolicyError"]
    assert not (site.home / "ledger.db").exists() or steps_charged(site) == 0
    assert not (site.home / "rounds").exists()


# --- policy ---


def test_a_job_without_noise_needs_the_sites_own_consent(
    site_home: MakeHome, private_job: MakeJob, request_for: MakeRequest
) -> None:
    request = request_for(private_job(privacy={"mechanism": "none"}))
    with pytest.raises(PolicyError, match=r"accepts only private jobs, but privacy\.mechanism is 'none'"):
        Site(site_home()).update.make(request)
    reply = Site(site_home("open", allow_non_private=True)).update.make(request)
    assert reply.noise_multiplier == 0
    assert reply.epsilon_budget == 0


def test_a_trusted_coordinator_needs_a_consent_of_its_own(
    site_home: MakeHome, private_job: MakeJob, request_for: MakeRequest
) -> None:
    """Allowing unprotected updates for public data does not hand them to a coordinator that promises to protect them."""
    privacy = {"mechanism": "central", "unit": "site", "central": {"num_sites": 100}}
    request = request_for(private_job(privacy=privacy, federation={"min_sites": 100}))
    for name, consent in (("none", {}), ("other", {"allow_non_private": True})):
        site = Site(site_home(name, **consent))
        with pytest.raises(PolicyError, match=r"protects its own records, but privacy\.mechanism is 'central'"):
            site.update.make(request)
        assert not (site.home / "rounds").exists()
    site = Site(site_home("trusting", allow_trusted_coordinator=True))
    reply = site.update.make(request)
    assert (reply.noise_multiplier, reply.epsilon_budget) == (0, 0)
    assert not (site.home / "ledger.db").exists(), "the account of the unit 'site' is the coordinator's"
    with pytest.raises(PolicyError, match=r"privacy\.mechanism is 'none'"):
        site.update.make(request_for(private_job(privacy={"mechanism": "none"})))


SHARES = {"mechanism": "distributed", "max_colluding": 1, "epsilon": 2.0, "epsilon_alone": 8.0, "unit": "record"}


def test_no_update_of_its_own_can_be_asked_of_a_site_that_adds_a_share(
    site_home: MakeHome, private_job: MakeJob, request_for: MakeRequest
) -> None:
    """The plan's noise is then a share, which protects less than `privacy.epsilon` says."""
    more = {"training": {"rounds": 3, "local_steps": 1}, "federation": {"min_sites": 3}}
    site = Site(site_home(budget={"epsilon": 8.0, "delta": 0.02}))
    with pytest.raises(PolicyError, match="sends nothing of a round but what is masked"):
        site.update.make(request_for(private_job(privacy=SHARES, **more)))
    with pytest.raises(PolicyError, match="up to twice as many, so the job's delta 0"):
        site.update.make(request_for(private_job(privacy=SHARES | {"delta": 0.02}, **more)))
    assert not (site.home / "rounds").exists()
    assert not (site.home / "ledger.db").exists()


def test_a_weaker_delta_than_the_sites_is_refused(
    site_home: MakeHome, private_job: MakeJob, request_for: MakeRequest
) -> None:
    site = Site(site_home(budget={"epsilon": 50.0, "delta": 1e-6}))
    with pytest.raises(PolicyError, match="delta 1e-05 is weaker than this site's 1e-06"):
        site.update.make(request_for(private_job()))
    assert isinstance(site.answer(request_for(private_job(privacy={"delta": 1e-6}))), TrainReply)


# --- refusals tell nothing ---


def secret_rows(**change: Any) -> list[dict[str, Any]]:
    rows = [{"text": f"{MARKER} film {i}", "label": ["good", "bad"][i % 2]} for i in range(20)]
    rows[7] = rows[7] | change
    return rows


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (secret_rows(label=MARKER), "1 of 20 records cannot be used and are left out; record 8: has a label"),
        ([row | {"label": "good"} for row in secret_rows()], "one and the same label"),
    ],
)
def test_what_records_are_like_refuses_nothing_and_is_told_at_the_site(
    site_home: MakeHome,
    private_job: MakeJob,
    request_for: MakeRequest,
    caplog: pytest.LogCaptureFixture,
    rows: list[dict[str, Any]],
    told: str,
) -> None:
    """A refusal here told for nothing whether such a record is there (docs/decisions/0014); tests/client/site/test_oracles.py."""
    site = Site(site_home(rows=rows))
    with caplog.at_level(logging.WARNING, logger="silotune.site"):
        assert isinstance(site.answer(request_for(private_job())), TrainReply)
    assert told in caplog.text
    assert MARKER not in caplog.text
    assert steps_charged(site) == 2


def test_refusals_do_not_tell_the_number_of_records(
    site_home: MakeHome, private_job: MakeJob, request_for: MakeRequest
) -> None:
    """20 records are declared as 16, which may stand for up to 32."""
    for delta, refused in ((0.05, True), (1 / 32, True), (0.03, False)):
        site = Site(site_home(f"at-{delta}", rows=secret_rows(), budget={"epsilon": 50.0, "delta": 0.06}))
        answer = site.answer(request_for(private_job(privacy={"delta": delta})))
        assert isinstance(answer, Refusal) == refused
        if isinstance(answer, Refusal):
            assert "declares 16 records and may have up to twice as many" in answer.reason


def test_unexpected_errors_tell_nothing(
    site_home: MakeHome, private_job: MakeJob, request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> LocalRound:
        raise RuntimeError(f"CUDA error near {MARKER}")

    monkeypatch.setattr(release_module, "train_local_rounds", fail)
    refusal = Site(site_home()).answer(request_for(private_job()))
    assert refusal == Refusal(site="north", code=WITHHELD, reason="see the site's own log")


# --- the folder ---


def test_a_bad_site_file_or_data_file_is_named(site_home: MakeHome, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"site\.toml does not exist"):
        Site(tmp_path)
    with pytest.raises(ConfigError, match="unknown key 'bugdet'; did you mean 'budget'"):
        Site(site_home(bugdet={}))
    with pytest.raises(DataError, match="does not exist"):
        Site(site_home(data={"path": "none.jsonl", "columns": {"text": "text", "label": "label"}}))


def test_the_declared_size_is_a_bucket_or_the_sites_own_word(site_home: MakeHome) -> None:
    assert Site(site_home()).describe().declared_records == 32  # of 60
    assert Site(site_home(declared_records=50)).describe().declared_records == 50


def test_a_damaged_stored_release_is_not_replaced_silently(
    site_home: MakeHome, private_job: MakeJob, request_for: MakeRequest
) -> None:
    home, request = site_home(), request_for(private_job())
    Site(home).update.make(request)
    (stored,) = (home / "rounds").glob("*/*.safetensors")
    stored.write_bytes(stored.read_bytes()[:-10])
    with pytest.raises(LedgerError, match="already charged"):
        Site(home).update.make(request)


def test_only_the_last_rounds_are_kept_and_an_older_one_can_be_asked_again(
    site_home: MakeHome, private_job: MakeJob, request_for: MakeRequest
) -> None:
    site, job = Site(site_home()), private_job(training={"rounds": 6, "local_steps": 1})
    for number in range(1, 6):
        site.update.make(request_for(job, number))
    names = sorted(path.name for path in (site.home / "rounds").glob("*/*"))
    assert [re.findall(r"\d+", name)[0] for name in names] == ["00003", "00004", "00005"]
    # A coordinator that went back to a backup asks for round 1 anew: charged once, then repeatable.
    first = site.update.make(request_for(job, 1))
    assert site.update.make(request_for(job, 1)) == first
    assert steps_charged(site) == 6


def test_the_next_round_continues_from_the_sites_own_moments(
    site_home: MakeHome, private_job: MakeJob, request_for: MakeRequest
) -> None:
    job = private_job()
    request = request_for(job, 2)
    cold = Site(site_home("cold"), new_randomness=injected).update.make(request)
    warm_site = Site(site_home("warm"), new_randomness=injected)
    warm_site.update.make(request_for(job, 1))
    warm = warm_site.update.make(request)
    shapes = shapes_of(decode_any(cold))
    assert not torch.equal(
        decode(cold.update, shapes)["head.linear.weight"], decode(warm.update, shapes)["head.linear.weight"]
    )


def test_injected_randomness_is_marked_and_repeatable(
    site_home: MakeHome, private_job: MakeJob, request_for: MakeRequest
) -> None:
    request = request_for(private_job())
    one = Site(site_home("one"), new_randomness=injected).update.make(request)
    two = Site(site_home("two"), new_randomness=injected).update.make(request)
    assert one.randomness == "injected"
    assert one.update == two.update


def test_examples_follow_the_runtime_that_asks(site_home: MakeHome, private_job: MakeJob) -> None:
    """Labels are encoded for the job at hand, also when models come and go from the cache."""
    site = Site(site_home())
    for turn in range(6):
        labels = ["bad", "good"] if turn % 2 else ["good", "bad"]
        job = private_job(seed=turn, task={"labels": labels})
        examples = site.usable(site.prepare(job), job).examples
        assert examples[0].target == labels.index("good")


# --- compressed updates ---


def observed(monkeypatch: pytest.MonkeyPatch) -> list[LocalRound]:
    """Return a list that collects what training gave, before it is encoded."""
    results: list[LocalRound] = []

    def kept(*args: Any, **options: Any) -> list[LocalRound]:
        found = train_local_rounds(*args, **options)
        results.extend(found)
        return found

    monkeypatch.setattr(release_module, "train_local_rounds", kept)
    return results


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("mechanism", ["dp-sgd", "none"])
def test_what_an_encoding_lost_comes_with_the_next_round(
    site_home: MakeHome,
    private_job: MakeJob,
    request_for: MakeRequest,
    monkeypatch: pytest.MonkeyPatch,
    dtype: Any,
    mechanism: str,
) -> None:
    """Over rounds, and over processes, what left the site is what training gave, but for the last residual."""
    job = private_job(federation={"update_dtype": dtype}, privacy={"mechanism": mechanism})
    home, results = site_home(allow_non_private=True), observed(monkeypatch)
    sent = []
    for number in (1, 2, 3):
        request = request_for(job, number, shift=0.01 * (number - 1))
        reply = Site(home).update.make(request)
        assert Site(home).update.make(request) == reply, "a repeated request is answered with what was stored"
        sent.append(decode_update(reply.update, shapes_of(results[0].delta), dtype))
    assert len(results) == 3
    last = Site(home).outbox.kept("residual", job.sha256, 4)
    for name in results[0].delta:
        missing = sum(result.delta[name].double() for result in results) - sum(part[name].double() for part in sent)
        torch.testing.assert_close(missing, last[name].double(), rtol=1e-4, atol=1e-6)
    # Not of each: a bias whose two entries are opposite is exact in int8.
    assert any(float(residual.abs().max()) > 0 for residual in last.values())


def test_a_crash_leaves_the_residual_of_the_last_stored_round(
    site_home: MakeHome, private_job: MakeJob, request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Release, moments and residual are one file: nothing of a round that was not stored is carried on."""

    class Crash(BaseException):
        pass

    def crash(*_: Any, **__: Any) -> None:
        raise Crash

    job, home, results = private_job(federation={"update_dtype": "int8"}), site_home(), observed(monkeypatch)
    Site(home).update.make(request_for(job, 1))
    before = Site(home).outbox.kept("residual", job.sha256, 2)
    with monkeypatch.context() as patch:
        patch.setattr(outbox_module, "write_bytes", crash)
        with pytest.raises(Crash):
            Site(home).answer(request_for(job, 2))
    again = Site(home).outbox.kept("residual", job.sha256, 2)
    assert again.keys() == before.keys() == results[0].delta.keys()
    assert all(torch.equal(again[name], before[name]) for name in before)
    # The round that is computed again starts from it.
    reply = Site(home).update.make(request_for(job, 2))
    after = Site(home).outbox.kept("residual", job.sha256, 3)
    decoded = decode_update(reply.update, shapes_of(before), "int8")
    for name, lost in before.items():
        torch.testing.assert_close(decoded[name] + after[name], results[-1].delta[name] + lost, rtol=1e-4, atol=1e-6)


def test_plain_updates_leave_no_residual(site_home: MakeHome, private_job: MakeJob, request_for: MakeRequest) -> None:
    site, job = Site(site_home()), private_job()
    site.update.make(request_for(job, 1))
    assert site.outbox.kept("residual", job.sha256, 2) == {}
    assert site.outbox.kept("optimizer", job.sha256, 2)
