"""A federation under secure aggregation as separate processes: what each side keeps, and what nobody but a site ever holds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from client.ledger.audit_mirror import recount
from client.link.handshake import TlsFacts
from client.site.home import open_site
from server.records.privacy import read_sites
from server.rounds.secure.attempts import ATTEMPTS_FILE
from server.store.submission import Submission
from shared.job.job import Job
from shared.privacy.plan import PrivacyPlan
from shared.tools.compare_logs import compare
from shared.trust.certificates import spki
from shared.trust.node_keys import load_private_key
from shared.trust.receipts import proven_releases, read_receipts
from simulations.federation.processes import Federation, summary
from tests.integration.books import assert_books_agree, rounds_of
from tests.integration.eventually import eventually
from tests.integration.sniffer import LoopbackSniffer, may_sniff
from tests.simulations.test_json_line import OF_OTHER_JOBS, explained

SITES = ("a", "b", "c", "d")
SHARED: dict[str, Any] = {
    "privacy": {
        "mechanism": "distributed",
        "max_colluding": 1,
        "noise_multiplier": 1.0,
        "sample_rate": 0.25,
        "epsilon": 50.0,
        "epsilon_alone": 50.0,
    },
    "federation": {"min_sites": 3, "round_timeout_seconds": 60.0},
}

# A site that writes down what must never leave it: keys, mask keys, and its sum before the masks.
TELLTALE = """
import os, sys
from client.site.secure import shares
from shared.secure_sum import site as machine
file = open(os.environ["TELLTALE"] + "." + str(os.getpid()), "ab", buffering=0)
made, masks = machine.SecureSite.__init__, machine.add_masks
def init(self, **how):
    made(self, **how)
    file.write(self._secret.private_bytes_raw())
def add(words, *, plus, minus):
    file.write(words.tobytes())
    for key in (*plus, *minus):
        file.write(key)
    masks(words, plus=plus, minus=minus)
machine.SecureSite.__init__, machine.add_masks = init, add
import cli
cli.main(sys.argv[1:])
"""

# A coordinator that keeps every byte that it reads of a site, in the clear.
HOARDER = """
import os, sys
from server.rounds import exchange
from server.rounds.secure import round as secure_round
file = open(os.environ["HOARD"], "ab", buffering=0)
reply, ready = secure_round.Arrived.unpack, secure_round.unpack_ready
def unpack(self, message):
    answer = reply(self, message)
    file.write(getattr(answer, "update", b""))
    return answer
def unpack_ready(message):
    answer = ready(message)
    file.write(answer.to_bytes() if hasattr(answer, "to_bytes") else b"")
    return answer
secure_round.Arrived.unpack, secure_round.unpack_ready = unpack, unpack_ready
import cli
cli.main(sys.argv[1:])
"""


@dataclass
class Finished:
    """A federation whose one job is complete, one site of which was killed on the way."""

    federation: Federation
    submission: Submission
    job: Job
    secrets: list[bytes]
    hoard: bytes
    sniffed: LoopbackSniffer | None


@pytest.fixture(scope="module")
def finished(
    found_federation: Callable[..., Federation],
    federation_job: Callable[..., Job],
    evaluation_records: list[dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Finished:
    folder = tmp_path_factory.mktemp("telltale")
    environment = {"TELLTALE": str(folder / "secrets"), "HOARD": str(folder / "hoard")}
    federation = found_federation(SITES, epsilon=50.0, environment=environment)
    job = federation_job(training={"rounds": 3, "local_steps": 1}, **SHARED)
    sniffed = LoopbackSniffer() if may_sniff() else None
    if sniffed is not None:
        sniffed.__enter__()
    try:
        federation._spawn(
            "coordinator", ["coordinator", "start", str(federation.coordinator.path)], program=("-c", HOARDER)
        )
        eventually(federation._coordinator_runs)
        for name in SITES:
            federation.start_site(name, program=("-c", TELLTALE))
        submission = federation.submit(job, evaluation_records)
        eventually(lambda: len(rounds_of(submission)) >= 2)
        federation.kill("d")
        state = federation.wait(submission, timeout=240)
        federation.stop()
    finally:
        if sniffed is not None:
            sniffed.__exit__()
    assert state["state"] == "completed", state
    found = b"".join(path.read_bytes() for path in sorted(folder.glob("secrets.*")))
    return Finished(federation, submission, job, _cut(found), (folder / "hoard").read_bytes(), sniffed)


def _cut(found: bytes) -> list[bytes]:
    """Return windows of 16 bytes, of keys whole and of sums a part."""
    windows = [found[start : start + 16] for start in range(0, len(found) - 16, 32)]
    return random.Random(0).sample(windows, min(len(windows), 400))


def test_the_run_is_complete_without_the_site_that_was_killed(finished: Finished) -> None:
    records = rounds_of(finished.submission)
    assert [record["round"] for record in records] == [0, 1, 2, 3]
    assert records[1]["sites"] == [*SITES]
    assert records[-1]["sites"] == ["a", "b", "c"]
    attempts = json.loads((finished.submission.run_folder / ATTEMPTS_FILE).read_text())
    assert len(attempts["rounds"]) in (3, 4)  # it may have died between its two answers


def test_both_promises_are_stated_charged_and_recounted(finished: Finished) -> None:
    plan = PrivacyPlan.from_job(finished.job)
    for record in read_sites(finished.submission.run_folder):
        assert record.shared is not None
        assert (record.shared.honest, record.shared.colluding) == (2, 1)
        assert record.epsilon_planned == pytest.approx(plan.of_sum.epsilon(), rel=1e-9)
        assert record.epsilon_alone == pytest.approx(plan.epsilon(), rel=1e-9)
        assert "finite precision" not in (record.statement or "")
    for name in SITES:
        home = finished.federation.site(name)
        ledger = open_site(home, passphrase=None).ledger()
        config = home.load_config()
        spent = {}
        for promise in ("together", "alone"):
            spent[promise] = recount(
                home.audit, delta=config.budget.delta, dataset=config.dataset, unit="record", promise=promise
            )
            assert ledger.spent_epsilon(promise=promise) == pytest.approx(spent[promise], rel=1e-9)
        assert spent["together"] < spent["alone"]
    assert_books_agree(finished.federation, finished.submission, sites=SITES)


def test_the_line_of_figures_names_the_run_and_both_promises(finished: Finished) -> None:
    federation, submission = finished.federation, finished.submission
    figures = summary(
        federation, submission, finished.job, SITES, TlsFacts(tls_version="TLSv1.3", alpn="h2", cipher="any")
    )
    assert explained("federation") - OF_OTHER_JOBS - {"METRIC_federated_dp"} == figures.keys() - {
        "accuracy_federated_dp"
    }
    assert figures["run_dir"] == str(federation.folder / "coordinator" / "jobs" / submission.name / "run")
    records = read_sites(submission.run_folder)
    assert figures["delta"] == finished.job.privacy.delta == records[0].delta
    assert figures["epsilon"] < figures["epsilon_alone"]
    assert (figures["rounds"], figures["dropped"], figures["max_colluding"]) == (3, 1, 1)


def test_the_logs_of_both_sides_tell_the_same(finished: Finished) -> None:
    receipts = read_receipts(finished.submission.run_folder / "receipts.jsonl")
    for name in ("a", "b", "c"):
        home = finished.federation.site(name)
        key = spki(load_private_key(home.key, None).public_key())
        found = compare(
            home.audit,
            finished.federation.coordinator.audit,
            site=name,
            proven=proven_releases(receipts, [key], site=name),
        )
        assert [difference for difference in found if difference.contradicts] == []


def test_no_secret_of_a_site_is_anywhere_but_there(finished: Finished) -> None:
    """Planted: what a site drew and the keys that hide it; looked for in all that the coordinator read, keeps, or was sent."""
    assert len(finished.secrets) > 100
    assert len(finished.hoard) > 10_000
    kept = b"".join(
        path.read_bytes()
        for path in sorted(finished.federation.coordinator.path.rglob("*"))
        if path.is_file() and not path.is_symlink()
    )
    for secret in finished.secrets:
        assert secret not in finished.hoard
        assert secret not in kept
    if finished.sniffed is not None:
        assert finished.sniffed.flows
        assert not any(finished.sniffed.holds(secret) for secret in finished.secrets)


def test_the_search_would_find_what_is_there(finished: Finished) -> None:
    """The planted marker is one that a site sends: were it unmasked, the search above would find it."""
    public = finished.hoard[200:216]
    assert public in finished.hoard
    assert any(window in b"".join(finished.secrets) for window in [finished.secrets[0]])
