"""Rounds under secure aggregation against sites that fail, lie, or say something else than they should."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict

from server.records.privacy import SiteRecord, read_site
from server.rounds.loop import Coordinator, TooFewSites, run_rounds
from server.rounds.observer import Observer
from server.rounds.secure.attempts import ATTEMPTS_FILE
from server.rounds.secure.round import SecurePrivacy
from server.store.checkpoint import Checkpoint
from shared.errors import PrivacyError, RunError, RunHeld
from shared.job.job import Job
from shared.privacy.statement import run_statement
from shared.secure_sum.messages import Masked, unpack_roster
from shared.wire.messages import Refusal, TrainRequest, pack_ready, pack_refusal
from tests.server.rounds.secure.secure_sites import GRID_STEPS, NUM_WORDS, SimpleSite, grid_of, secure_job

INITIAL = {"w": torch.zeros(2, 3), "head.b": torch.zeros(2)}


class Told(Observer):
    """What the coordinator's observer heard."""

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.problems: dict[str, str] = {}

    def waiting(self, reason: str) -> None:
        self.waits.append(reason)

    def site_ready(self, round_number: int, site: str, problem: str | None) -> None:
        if problem:
            self.problems[site] = problem


def coordinator(
    job: Job, folder: Path, *, observer: Observer | None = None, saved: list[Checkpoint] | None = None
) -> Coordinator:
    return Coordinator(
        job=job,
        initial_adapter=INITIAL,
        update_shapes={name: tensor.shape for name, tensor in INITIAL.items()},
        privacy=SecurePrivacy(job, folder),
        evaluate=lambda adapter: {"loss": float(adapter["w"].sum())},
        evaluate_every=1,
        save=lambda checkpoint: None if saved is None else saved.append(checkpoint),
        observer=observer or Observer(),
    )


def expected(job: Job, totals: list[float], declared: int) -> float:
    """The value of each coordinate after rounds whose sums were `totals` in units of C, by plain SGD from zero."""
    q, rate = job.privacy.sample_rate, job.training.learning_rate
    return -rate * sum(totals) / (q * declared)


def test_the_adapter_moves_by_the_sum_and_nothing_else(tmp_path: Path) -> None:
    job, sites = secure_job(), [SimpleSite(n, k * GRID_STEPS) for n, k in (("a", 1), ("b", -3), ("c", 7))]
    sites[1].declared = 40
    last = run_rounds(grid_of(sites), coordinator(job, tmp_path), None)
    value = expected(job, [5.0, 5.0], 8 + 40 + 8)
    for tensor in last.adapter.values():
        assert torch.allclose(tensor, torch.full_like(tensor, value), rtol=1e-6)
    record = last.history[-1]
    assert record.sites == ["a", "b", "c"]
    assert record.failed == {}
    assert record.bytes_up == sum(len(site.sent[-1]) for site in sites)
    # What came from one site alone tells nothing of what it added: two rounds with the same sum have other words.
    for site in sites:
        first, second = (Masked.from_bytes(update).words for update in site.sent)
        assert first != second
        assert len(first) == 8 * NUM_WORDS
    assert [release.rounds for release in last.releases.values()] == [(1, 2)] * 3
    assert all(release.steps == 2 for release in last.releases.values())


def test_who_is_not_ready_costs_nobody_anything(tmp_path: Path) -> None:
    job, sites = secure_job(training={"rounds": 1}), [SimpleSite(n, GRID_STEPS) for n in "abc"]

    def refuse(site: SimpleSite, request: TrainRequest) -> RecordDict:
        return pack_refusal(Refusal(site=site.name, code="PolicyError", reason="not now"))

    last = run_rounds(grid_of(sites, at_ready={"b": refuse}), coordinator(job, tmp_path), None)
    assert last.history[-1].sites == ["a", "c"]
    assert last.history[-1].failed == {"b": "PolicyError: not now"}
    assert "b" not in last.releases
    assert torch.allclose(last.adapter["w"], torch.full((2, 3), expected(job, [2.0], 16)))


def test_too_few_that_are_ready_end_the_attempt_before_anybody_is_charged(tmp_path: Path) -> None:
    job, sites = secure_job(training={"rounds": 1}), [SimpleSite(n, GRID_STEPS) for n in "ab"]

    def refuse(site: SimpleSite, request: TrainRequest) -> RecordDict:
        return pack_refusal(Refusal(site=site.name, code="PolicyError", reason="not now"))

    with pytest.raises(TooFewSites, match=r"1 sites are ready, federation\.min_sites is 2") as caught:
        run_rounds(grid_of(sites, at_ready={"b": refuse}), coordinator(job, tmp_path), None)
    assert caught.value.releases == {}
    assert not (tmp_path / ATTEMPTS_FILE).exists()


def test_a_roster_whose_sum_could_wrap_around_does_not_go_out(tmp_path: Path) -> None:
    """Each site would refuse it, and who is ready would have failed for nothing."""
    job = secure_job(federation={"max_declared_records": 1_000_000_000})
    sites = [SimpleSite(f"site-{number:03}", 0, declared=1_000_000_000) for number in range(140)]
    with pytest.raises(PrivacyError, match="Admit fewer or smaller sites"):
        run_rounds(grid_of(sites), coordinator(job, tmp_path), None)
    assert not (tmp_path / ATTEMPTS_FILE).exists()
    assert not any(site.sent for site in sites)


def silent_once(name: str) -> tuple[Any, list[tuple[int, int]]]:
    """A site that does not send for its first roster."""
    seen: list[tuple[int, int]] = []

    def act(site: SimpleSite, request: TrainRequest) -> RecordDict:
        seen.append((request.round_number, request.attempt))
        if len(seen) == 1:
            return pack_refusal(Refusal(site=name, code="DroppedOut", reason="it was started anew"))
        return site.masked(request)

    return act, seen


def test_a_late_drop_out_voids_the_attempt_and_is_left_out_from_then_on(tmp_path: Path) -> None:
    job, sites, told = secure_job(), [SimpleSite(n, GRID_STEPS) for n in "abc"], Told()
    act, seen = silent_once("b")
    last = run_rounds(grid_of(sites, at_masked={"b": act}), coordinator(job, tmp_path, observer=told), None)
    assert len(told.waits) == 1
    assert "the sum does not open without b: DroppedOut" in told.waits[0]
    assert seen == [(1, 1)]  # never asked again
    assert [record.sites for record in last.history[1:]] == [["a", "c"], ["a", "c"]]
    assert sites[0].attempts == [(1, 1), (1, 2), (2, 1)]
    assert last.releases["a"].rounds == (1, 1, 2)  # the voided attempt counts as a release
    assert last.releases["a"].steps == 3
    assert "b" not in last.releases  # it refused, and its refusal came: it released nothing
    assert torch.allclose(last.adapter["w"], torch.full((2, 3), expected(job, [2.0, 2.0], 16)))


def refuses_once(code: str) -> Any:
    """A site that refuses its first roster before it is charged, and says so."""
    seen: list[int] = []

    def act(site: SimpleSite, request: TrainRequest) -> RecordDict:
        seen.append(request.attempt)
        if len(seen) == 1:
            return pack_refusal(Refusal(site=site.name, code=code, reason="c on the roster was revoked"))
        return site.masked(request)

    return act


class Refusals(Told):
    """And what it heard of refusals."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: dict[str, str] = {}

    def site_refused(self, site: str, reason: str) -> None:
        self.refused[site] = reason


@pytest.mark.parametrize("code", ["RosterError", "PolicyError", "AwaitingApproval", "BudgetExceeded"])
def test_who_refuses_a_roster_says_why_and_is_asked_again_once_somebody_resumes_the_run(
    tmp_path: Path, code: str
) -> None:
    job, sites, told = secure_job(training={"rounds": 3}), [SimpleSite(n, GRID_STEPS) for n in "abc"], Refusals()
    grid = grid_of(sites, at_masked={"b": refuses_once(code)})
    first = run_rounds(grid, coordinator(job, tmp_path, observer=told), None, stop_after=2)
    assert f"the sum does not open without b: {code}: c on the roster was revoked" in told.waits[0]
    assert told.refused == {"b": f"{code}: c on the roster was revoked (it is asked again once the run is resumed)"}
    assert [record.sites for record in first.history[1:]] == [["a", "c"], ["a", "c"]]
    assert sites[1].attempts == [(1, 1)]
    assert "b" not in first.releases
    last = run_rounds(grid, coordinator(job, tmp_path), first)
    assert last.history[-1].sites == ["a", "b", "c"]


def test_refusing_again_gains_nothing_that_silence_would_not(tmp_path: Path) -> None:
    job = secure_job(training={"rounds": 3}, privacy={"spare_attempts": 3})
    sites = [SimpleSite(n, GRID_STEPS) for n in "abc"]

    def always(site: SimpleSite, request: TrainRequest) -> RecordDict:
        return pack_refusal(Refusal(site=site.name, code="RosterError", reason="no"))

    grid, last = grid_of(sites, at_masked={"b": always}), None
    for stop in (1, 2, 3):
        last = run_rounds(grid, coordinator(job, tmp_path), last, stop_after=stop)
    assert sites[0].attempts == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)]
    assert sites[1].attempts == [(1, 1), (2, 1)]


def test_a_run_without_enough_sites_that_enter_its_sums_is_held(tmp_path: Path) -> None:
    """Asking the same sites the same again would cost those that send a charge each time."""
    job, sites = secure_job(federation={"min_sites": 3}), [SimpleSite(n, GRID_STEPS) for n in "abc"]
    grid, saved = grid_of(sites, at_masked={"b": refuses_once("RosterError")}), []
    with pytest.raises(RunHeld) as caught:
        run_rounds(grid, coordinator(job, tmp_path, saved=saved), None)
    assert str(caught.value) == (
        "round 1: 1 sites refuse to enter a sum with the others (b: RosterError: c on the roster was revoked). Without them 2 "
        "are left, and federation.min_sites is 3. They were not charged; whoever sent for that roster was. The run stands at the "
        "last checkpoint: mend what they say, here or there, and resume it."
    )
    assert sites[0].attempts == [(1, 1)]
    assert saved[-1].releases["a"].rounds == (1,)
    last = run_rounds(grid, coordinator(job, tmp_path), saved[-1])
    assert last.history[-1].sites == ["a", "b", "c"]
    assert sites[0].attempts == [(1, 1), (1, 2), (2, 1)]


def test_it_is_asked_again_where_too_few_would_be_left(tmp_path: Path) -> None:
    job, sites = secure_job(federation={"min_sites": 3}), [SimpleSite(n, GRID_STEPS) for n in "abc"]
    act, seen = silent_once("b")
    last = run_rounds(grid_of(sites, at_masked={"b": act}), coordinator(job, tmp_path), None)
    assert seen == [(1, 1), (1, 2), (2, 1)]
    assert last.history[-1].sites == ["a", "b", "c"]


def test_attempts_end_with_what_the_job_declares(tmp_path: Path) -> None:
    job = secure_job(training={"rounds": 1}, privacy={"spare_attempts": 1}, federation={"min_sites": 2})
    sites = [SimpleSite(n, GRID_STEPS) for n in "ab"]

    def never(site: SimpleSite, request: TrainRequest) -> RecordDict:
        return pack_refusal(Refusal(site=site.name, code="Withheld", reason="see the site's own log"))

    with pytest.raises(PrivacyError, match="declares 1 spare attempts"):
        run_rounds(grid_of(sites, at_masked={"b": never}), coordinator(job, tmp_path), None)
    assert sites[0].attempts == [(1, 1), (1, 2)]


def test_a_coordinator_that_died_after_a_roster_goes_on_with_another_number(tmp_path: Path) -> None:
    job, sites = secure_job(), [SimpleSite(n, GRID_STEPS) for n in "ab"]

    class Dies(Observer):
        def round_started(self, round_number: int, sites: Any, adapter: bytes) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_rounds(grid_of(sites), coordinator(job, tmp_path, observer=Dies()), None)
    last = run_rounds(grid_of(sites), coordinator(job, tmp_path), None)
    assert sites[0].attempts == [(1, 1), (1, 2), (2, 1)]
    assert last.round_number == 2


def test_a_lost_file_of_attempts_is_noticed(tmp_path: Path) -> None:
    job, sites = secure_job(), [SimpleSite(n, GRID_STEPS) for n in "ab"]
    first = run_rounds(grid_of(sites), coordinator(job, tmp_path), None, stop_after=1)
    (tmp_path / ATTEMPTS_FILE).unlink()
    with pytest.raises(RunError, match="knows of 0 attempts, but the checkpoint has completed 1 rounds"):
        run_rounds(grid_of(sites), coordinator(job, tmp_path), first)


def test_a_sum_that_no_honest_sites_add_up_to_is_not_used_and_the_run_goes_on_without_it(tmp_path: Path) -> None:
    """One site adds 2^60; were the adapter saved, every site would refuse it for ever."""
    job, sites = secure_job(), [SimpleSite(n, GRID_STEPS) for n in "abc"]
    saved: list[Checkpoint] = []
    sites[1].steps = 1 << 60
    with pytest.raises(RunHeld, match="nobody can tell which one") as caught:
        run_rounds(grid_of(sites), coordinator(job, tmp_path, saved=saved), None)
    told = str(caught.value)
    assert "round 1, attempt 1: the sum of 3 sites is 1.94e+11 C long, where honest ones reach" in told
    assert "the run stands at round 0; everybody on the roster (a, b, c) was charged" in told
    # What the sites released is kept, and the adapter from before.
    assert saved[-1].round_number == 0
    assert all(torch.equal(tensor, INITIAL[name]) for name, tensor in saved[-1].adapter.items())
    assert [saved[-1].releases[name].rounds for name in "abc"] == [(1,)] * 3
    # The one at fault is stopped, and the run goes on with another attempt at the round.
    left = [sites[0], sites[2]]
    last = run_rounds(grid_of(left), coordinator(job, tmp_path), saved[-1])
    assert left[0].attempts == [(1, 1), (1, 2), (2, 1)]
    assert torch.allclose(last.adapter["w"], torch.full((2, 3), expected(job, [2.0, 2.0], 16)))
    assert last.releases["a"].rounds == (1, 1, 2)


def test_each_poisoned_attempt_counts(tmp_path: Path) -> None:
    job, sites = secure_job(privacy={"spare_attempts": 1}), [SimpleSite(n, -(1 << 50)) for n in "ab"]
    saved: list[Checkpoint] = [None]  # type: ignore[list-item]
    for attempt in (1, 2):
        with pytest.raises(RunHeld, match=f"attempt {attempt}:"):
            run_rounds(grid_of(sites), coordinator(job, tmp_path, saved=saved), saved[-1])
    with pytest.raises(PrivacyError, match="declares 1 spare attempts"):
        run_rounds(grid_of(sites), coordinator(job, tmp_path, saved=saved), saved[-1])


def test_an_adapter_that_no_site_would_take_is_not_saved(tmp_path: Path) -> None:
    """A sum that honest sites can have, on steps that are far too long."""
    job = secure_job(training={"learning_rate": 1000.0, "head_learning_rate_factor": 4.0})
    sites, saved = [SimpleSite(n, 2 * GRID_STEPS, declared=1) for n in "ab"], []
    with pytest.raises(RunHeld, match=r"a value of 3\.2e\+04, and sites take none above 10000"):
        run_rounds(grid_of(sites), coordinator(job, tmp_path, saved=saved), None)
    assert saved[-1].round_number == 0


def test_a_file_of_attempts_that_was_lost_in_the_first_round_is_noticed(tmp_path: Path) -> None:
    """Nothing is complete yet; the sites would refuse the numbers that they know, and be asked for ever."""
    job, sites, saved = secure_job(federation={"min_sites": 3}), [SimpleSite(n, GRID_STEPS) for n in "abc"], []
    sites[1].steps = 1 << 60
    with pytest.raises(RunHeld):
        run_rounds(grid_of(sites), coordinator(job, tmp_path, saved=saved), None)
    (tmp_path / ATTEMPTS_FILE).unlink()
    with pytest.raises(RunError, match="knows of 0 attempts at round 1, but site a was shown a roster in 1"):
        run_rounds(grid_of(sites), coordinator(job, tmp_path), saved[-1])


def test_what_came_and_was_never_answered_may_be_of_one_attempt(tmp_path: Path) -> None:
    """A false input counts as a release, and by the log of the coordinator it never came: this is no lost file."""
    job, sites, saved = secure_job(federation={"min_sites": 3}), [SimpleSite(n, GRID_STEPS) for n in "abc"], []
    sites[1].steps = 1 << 60
    with pytest.raises(RunHeld):
        run_rounds(grid_of(sites), coordinator(job, tmp_path, saved=saved), None)
    release = replace(saved[-1].releases["b"], unanswered=(1,))
    sites[1].steps = 0
    counted = replace(saved[-1], releases=saved[-1].releases | {"b": release})
    assert run_rounds(grid_of(sites), coordinator(job, tmp_path), counted).round_number == 2


def changed_word(site: SimpleSite, request: TrainRequest) -> RecordDict:
    site.masked(request)
    masked = Masked.from_bytes(site.sent.pop())
    return site.reply(request, replace(masked, words=masked.words[:-1] + b"\x00").to_bytes())


def shorter(site: SimpleSite, request: TrainRequest) -> RecordDict:
    site.masked(request)
    masked = Masked.from_bytes(site.sent.pop())
    roster = unpack_roster(request.adapter)
    own = next(entry for entry in roster if entry.site == site.name)
    return site.reply(request, replace(masked, words=masked.words[:-8]).signed_by(site.key, own).to_bytes())


def no_message(site: SimpleSite, request: TrainRequest) -> RecordDict:
    return site.reply(request, b"\x80\x04pickle")


LIES: Mapping[str, tuple[Any, str]] = {
    "a changed word": (changed_word, "not signed"),
    "a shorter input": (shorter, "words"),
    "no message at all": (no_message, ""),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_false_input_voids_the_attempt_and_counts_as_a_release(tmp_path: Path, lie: str) -> None:
    job, sites, told = secure_job(training={"rounds": 1}), [SimpleSite(n, GRID_STEPS) for n in "abc"], Told()
    act, reason = LIES[lie]
    last = run_rounds(grid_of(sites, at_masked={"b": act}), coordinator(job, tmp_path, observer=told), None)
    assert reason in told.waits[0]
    assert last.history[-1].sites == ["a", "c"]
    assert last.releases["b"].steps == 1  # what came may be noise of its records
    assert torch.allclose(last.adapter["w"], torch.full((2, 3), expected(job, [2.0], 16)))


@pytest.mark.parametrize(
    "numbers",
    [
        *({"epsilon_budget": value} for value in (-5.0, float("nan"), float("inf"), 0.0, 1.7e308)),
        *({"sample_rate": value} for value in (-1.0, 1 + 1e-9, float("nan"))),
        *({"delta": value} for value in (-1e-5, float("nan"))),
        *({"noise_multiplier": value} for value in (-1.0, 0.0, float("inf"))),
        *({"max_grad_norm": value} for value in (-1.0, float("inf"))),
        *({"steps": value} for value in (-1, 0, 2, 1 << 60)),
        *({"declared_records": value} for value in (-8, 0, 1 << 60)),
        *({"round_number": value} for value in (-1, 0, 1 << 60)),
    ],
)
def test_whatever_numbers_a_site_sends_what_is_stated_can_be_read_back(tmp_path: Path, numbers: dict[str, Any]) -> None:
    job = secure_job(training={"rounds": 1}, privacy={"sample_rate": 1.0, "noise_multiplier": 4.0})
    sites = [SimpleSite(n, 0) for n in "abc"]

    def says(site: SimpleSite, request: TrainRequest) -> RecordDict:
        site.masked(request)
        return site.reply(request, site.sent.pop(), **numbers)

    last = run_rounds(grid_of(sites, at_masked={"b": says}), coordinator(job, tmp_path), None)
    for name, release in last.releases.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(SiteRecord.of(release, "run").fields()))
        assert replace(read_site(path).release(job), per_round=release.per_round) == release


def test_one_injected_source_leaves_nothing_to_state(tmp_path: Path) -> None:
    """Whoever knows the seed takes that share out of the sum, and the others' promise counted on it."""
    job, sites = secure_job(), [SimpleSite(n, GRID_STEPS) for n in "abc"]

    def injected(site: SimpleSite, request: TrainRequest) -> RecordDict:
        site.masked(request)
        return site.reply(request, site.sent.pop(), randomness="injected" if request.round_number == 1 else "os")

    saved: list[Checkpoint] = []
    grid = grid_of(sites, at_masked={"b": injected})
    run_rounds(grid, coordinator(job, tmp_path, saved=saved), None, stop_after=1)
    # A checkpoint of an older version, in which only that site is marked.
    releases = saved[-1].releases
    older = replace(saved[-1], releases=releases | {n: replace(releases[n], randomness="os") for n in "ac"})
    for last in (saved[-1], run_rounds(grid, coordinator(job, tmp_path), older)):
        assert last.history[-1].epsilon_max is None
        for release in last.releases.values():
            record = SiteRecord.of(release, "run")
            assert record.epsilon_spent is record.epsilon_planned is record.epsilon_alone is None
            assert (record.statement or "").startswith("NOT PRIVATE: the randomness of site ")
            assert "or of a site whose share of the noise it counts on" in (record.statement or "")
        assert "NOT PRIVATE" in run_statement(list(last.releases.values()), "run").text


def test_an_input_of_a_voided_attempt_that_never_came_counts(tmp_path: Path) -> None:
    """Its site was charged for each attempt; that it answers a later one says nothing of the earlier ones."""
    job = secure_job(privacy={"spare_attempts": 3})
    sites, seen = [SimpleSite(n, GRID_STEPS) for n in "ab"], []

    def lost_twice(site: SimpleSite, request: TrainRequest) -> RecordDict:
        seen.append((request.round_number, request.attempt))
        answer = site.masked(request)
        return RecordDict() if len(seen) <= 2 else answer

    last = run_rounds(grid_of(sites, at_masked={"b": lost_twice}), coordinator(job, tmp_path), None)
    assert seen == [(1, 1), (1, 2), (1, 3), (2, 1)]
    assert last.releases["b"].unanswered == (1, 1)
    for site in sites:
        executed = sum(event.steps for event in last.releases[site.name].possible_events)
        assert executed == len(site.sent) == 4


def test_an_input_that_a_site_made_and_then_withheld_counts(tmp_path: Path) -> None:
    """Its disk was full once the input was charged and stored; the site is left out from then on."""
    job, sites = secure_job(), [SimpleSite(n, GRID_STEPS) for n in "abc"]

    def withholds(site: SimpleSite, request: TrainRequest) -> RecordDict:
        site.masked(request)
        return pack_refusal(Refusal.withheld(site.name))

    last = run_rounds(grid_of(sites, at_masked={"b": withholds}), coordinator(job, tmp_path), None)
    assert (last.releases["b"].rounds, last.releases["b"].unanswered) == ((), (1,))
    for site in sites:
        assert sum(event.steps for event in last.releases[site.name].possible_events) == len(site.sent)


def test_a_size_that_was_not_signed_is_not_stated(tmp_path: Path) -> None:
    job, sites, told = secure_job(training={"rounds": 1}), [SimpleSite(n, GRID_STEPS) for n in "abc"], Told()

    def grows(site: SimpleSite, request: TrainRequest) -> RecordDict:
        site.masked(request)
        return site.reply(request, site.sent.pop(), declared_records=10**9)

    last = run_rounds(grid_of(sites, at_masked={"b": grows}), coordinator(job, tmp_path, observer=told), None)
    assert "it declares 1,000,000,000 and said 8 when it was ready" in told.waits[0]
    assert last.releases["b"].declared_records == 8
    assert last.history[-1].sites == ["a", "c"]


def other_name(site: SimpleSite, request: TrainRequest) -> RecordDict:
    site.name = "a"
    answer = site.ready(request)
    site.name = "b"
    return answer


def other_size(site: SimpleSite, request: TrainRequest) -> RecordDict:
    site.declared = 800
    answer = site.ready(request)
    site.declared = 8
    return answer


def other_attempt(site: SimpleSite, request: TrainRequest) -> RecordDict:
    return site.ready(replace(request, attempt=7))


def other_adapter(site: SimpleSite, request: TrainRequest) -> RecordDict:
    return site.ready(replace(request, adapter=b"another"))


def unsigned(site: SimpleSite, request: TrainRequest) -> RecordDict:
    site.ready(request)
    assert site.machine is not None
    return pack_ready(replace(site.machine.ready(), declared_records=8, signature=b"\x30\x06\x02\x01\x01\x02\x01\x01"))


@pytest.mark.parametrize("lie", [other_name, other_size, other_attempt, other_adapter, unsigned])
def test_a_false_word_that_it_is_ready_is_not_on_the_roster(tmp_path: Path, lie: Any) -> None:
    job, sites, told = secure_job(training={"rounds": 1}), [SimpleSite(n, GRID_STEPS) for n in "abc"], Told()
    last = run_rounds(grid_of(sites, at_ready={"b": lie}), coordinator(job, tmp_path, observer=told), None)
    assert last.history[-1].sites == ["a", "c"]
    assert "b" in told.problems
    assert "b" not in last.releases
    assert told.waits == []


def test_a_run_that_goes_on_gives_the_same_adapter(tmp_path: Path) -> None:
    job = secure_job(training={"rounds": 3, "momentum": 0.9, "schedule": "linear"})

    def sites() -> list[SimpleSite]:
        return [SimpleSite(n, k * GRID_STEPS) for n, k in (("a", 1), ("b", 2))]

    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = run_rounds(grid_of(sites()), coordinator(job, tmp_path / "whole"), None)
    part: Checkpoint | None = None
    for stop in (1, 2, 3):
        part = run_rounds(grid_of(sites()), coordinator(job, tmp_path / "parts"), part, stop_after=stop)
    assert part is not None
    for name, tensor in whole.adapter.items():
        assert torch.equal(tensor, part.adapter[name])
