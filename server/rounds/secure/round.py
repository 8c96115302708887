"""A round under secure aggregation: who is ready, one roster, one sum that opens with all of it, one optimiser step.

Nothing is charged before the roster goes out, so a site that fails before costs nothing. One that fails after voids the attempt:
everybody else has been charged for it, and the next attempt has fresh keys, samples and noise. Such a site is left out from then
on, unless too few would be left. One that refuses the roster, and says why, voids the attempt as well: it is left out until a
person resumes the run, who has read why. A hostile site gains nothing by it that silence would not give it.

Guarantees (tests: tests/server/rounds/secure/test_round.py)
    * The next adapter depends on the sites through the opened sum and the public sizes of who is in it only.
    * Where one site's randomness was injected for a test, no epsilon is stated of any
      (test_one_injected_source_leaves_nothing_to_state).
    * Every masked input that came, or may have been made, counts as a release, whether its sum opened or not
      (test_an_input_of_a_voided_attempt_that_never_came_counts).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message

from server.aggregation import Adapter
from server.aggregation.gradient import gradient_step
from server.rounds.earlier_requests import EarlierRequests
from server.rounds.exchange import Question, collect
from server.rounds.local import LocalPrivacy, LocalRound, select_sites
from server.rounds.releases import Made, Releases
from server.rounds.roster import Authority
from server.rounds.secure.attempts import ATTEMPTS_FILE, Attempts
from server.rounds.secure.sum_bounds import SumBounds
from server.rounds.updates import Arrived, AtHand
from server.store.checkpoint import Checkpoint
from shared.errors import RunError, RunHeld, TrustError
from shared.job.job import Job
from shared.limits import MAX_ADAPTER_VALUE
from shared.privacy.plan import PrivacyPlan
from shared.privacy.shares import check_sizes, gradient_of
from shared.privacy.statement import SiteRelease
from shared.secure_sum.coordinator import SecureCoordinator
from shared.secure_sum.keys import certificate_of, key_in_certificate, shown_key
from shared.secure_sum.messages import Masked, Ready, pack_roster
from shared.secure_sum.site import KeyOf
from shared.trust.certificates import identity
from shared.trust.receipts import Receipt
from shared.wire.messages import WITHHELD, Refusal, SiteDescription, TrainReply, unpack_ready

# What a site tells where it was not charged: of the roster, its policy, its people and its budget. Whoever dropped out tells
# another code.
_REFUSALS = ("RosterError", "PolicyError", "AwaitingApproval", "BudgetExceeded")
# Sites count from where the job's seed puts a value as well, which is nowhere near a hundredth of their limit.
_LARGEST_VALUE = 0.99 * MAX_ADAPTER_VALUE


class SecurePrivacy(LocalPrivacy):
    """What a coordinator needs where sites add shares of the noise; the interface of `LocalPrivacy`."""

    def __init__(self, job: Job, folder: Path) -> None:
        super().__init__(job)
        self._attempts = Attempts(folder / ATTEMPTS_FILE, job)

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise `RunError` if fewer attempts are noted than rounds are complete: the file was lost or put back."""
        if self._attempts.made < checkpoint.round_number:
            raise RunError(
                f"{ATTEMPTS_FILE} knows of {self._attempts.made} attempts, but the checkpoint has completed "
                f"{checkpoint.round_number} rounds. Restore the file, or start a new run."
            )

    def resume(self, checkpoint: Checkpoint, authority: Authority | None) -> Checkpoint:
        """Return the checkpoint to go on from: what was asked after it may have been executed."""
        self.check(checkpoint)
        resumed = super().resume(checkpoint, authority)
        self._check_noted(resumed.releases)
        return resumed

    def with_open_requests(self, checkpoint: Checkpoint, asked: EarlierRequests) -> Checkpoint:
        """See `LocalPrivacy`."""
        noted = super().with_open_requests(checkpoint, asked)
        return replace(noted, releases=_one_for_all(noted.releases))

    def _check_noted(self, releases: Releases) -> None:
        """Raise `RunError` if sites were shown more rosters of a round than are noted: they take part under no such number."""
        for release in releases.values():
            for number in {*release.rounds, *release.unanswered}:
                # What came, and what was never answered: of one roster it is never more than one of either.
                seen = max(release.rounds.count(number), release.unanswered.count(number))
                if seen > (noted := self._attempts.number_of_next(number) - 1):
                    raise RunError(
                        f"{ATTEMPTS_FILE} knows of {noted} attempts at round {number}, but site {release.site} was shown a "
                        f"roster in {seen}, and takes part under none of their numbers again. Restore the file, or start a new "
                        "run."
                    )

    def begin(self, round_number: int) -> SecureRound:
        """Return one attempt at a round.

        Raises:
            PrivacyError: the job declares no further attempt.
        """
        self._attempts.check_affordable(round_number)
        return SecureRound(self._job, round_number, self.earlier, self._attempts)


class SecureRound(LocalRound):
    """One attempt at one round."""

    def __init__(self, job: Job, round_number: int, earlier: EarlierRequests, attempts: Attempts) -> None:
        super().__init__(job, round_number, earlier)
        self._attempts = attempts

    def draw(self, sites: Mapping[int, SiteDescription]) -> list[int]:
        """Return the node ids to ask: all sites, or some by the public seed, that neither dropped out after a roster nor refused.

        Where that leaves fewer than `federation.min_sites`, those that dropped out least often are asked again.

        Raises:
            RunHeld: so many refuse that too few are left.
        """
        refusing, least = self._attempts.refusing, self._job.federation.min_sites
        willing = {node: site for node, site in sites.items() if site.site not in refusing}
        good = {node: site for node, site in willing.items() if not self._attempts.has_failed(site.site)}
        if len(willing) < least <= len(sites):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(refusing.items()))
            raise RunHeld(
                f"round {self._number}: {len(refusing)} sites refuse to enter a sum with the others ({reasons}). Without them "
                f"{len(willing)} are left, and federation.min_sites is {least}. They were not charged; whoever sent for that "
                "roster was. The run stands at the last checkpoint: mend what they say, here or there, and resume it."
            )
        if len(good) < least:
            by_name = {site.site: node for node, site in willing.items()}
            chosen = sorted(self._attempts.order_of_trust(by_name)[:least])
            good = {by_name[name]: sites[by_name[name]] for name in chosen}
        return select_sites(good, self._job, self._number)

    def _unanswered(self, release: SiteRelease, adapter_sha256: str, *, came: bool) -> tuple[int, ...]:
        """See `LocalRound`; no attempt repeats another, so what was not answered in one is never answered by the next."""
        return release.unanswered if came else (*release.unanswered, self._number)

    def account(
        self, releases: Releases, made: Mapping[str, Made], unknown: Sequence[SiteDescription], adapter_sha256: str
    ) -> dict[str, SiteRelease]:
        """See `LocalRound`."""
        return _one_for_all(super().account(releases, made, unknown, adapter_sha256))

    def collect(self, at_hand: AtHand) -> Arrived:
        """Ask who is ready, show them the roster, and return what came."""
        machine = SecureCoordinator(
            job_sha256=self._job.sha256,
            round_number=self._number,
            attempt=self._attempts.number_of_next(self._number),
            adapter_sha256=hashlib.sha256(at_hand.adapter).hexdigest(),
            num_words=sum(shape.numel() for shape in at_hand.shapes.values()),
            min_sites=self._job.federation.min_sites,
            key_of=keys_by(at_hand.authority),
        )
        ready = _GetReady(at_hand, self._attempts.number_of_next(self._number), machine)
        at_hand.ask(ready)
        ready.close()
        if len(ready.names) < self._job.federation.min_sites:
            return _NobodyAsked(at_hand, ready)
        roster = machine.close()
        # Every site would refuse a sum that could wrap around, and void the attempt.
        plan = PrivacyPlan.from_job(self._job)
        check_sizes([entry.declared_records for entry in roster], noise_multiplier=plan.noise_multiplier)
        self._attempts.begin(self._number)
        masked = _Send(at_hand, ready, roster, machine)
        at_hand.observer.round_started(self._number, [entry.site for entry in roster], masked.adapter)
        collect(at_hand.grid, masked, authority=at_hand.authority)
        masked.close()
        if machine.missing:
            refusals = {n: masked.failed[n] for n in sorted(machine.missing) if masked.codes.get(n) in _REFUSALS}
            self._attempts.failed(machine.missing - refusals.keys())
            self._attempts.refused(refusals)
            for name, reason in refusals.items():
                at_hand.observer.site_refused(name, f"{reason} (it is asked again once the run is resumed)")
        return masked


def _one_for_all(releases: Releases) -> dict[str, SiteRelease]:
    """Return `releases`, all as of injected randomness if one is: the noise that everybody counts on holds its share."""
    if all(release.randomness == "os" for release in releases.values()):
        return dict(releases)
    return {name: replace(release, randomness="injected") for name, release in releases.items()}


def keys_by(authority: Authority | None) -> KeyOf:
    """Return what gives the key of a roster's entry: of a certificate that is let in now; of simulated sites the shown one.

    The certificate counts, and not its key alone: another one of the same key every site would refuse, and void the attempt.
    """
    if authority is None or authority.holder is None:
        return shown_key
    holder = authority.holder

    def key_of(entry: Ready) -> ec.EllipticCurvePublicKey:
        certificate = certificate_of(entry)
        names = {holder(certificate), identity(certificate)[0]}
        if names != {entry.site}:
            raise TrustError(f"{entry.site} shows a certificate of {', '.join(sorted(names - {entry.site}))}.")
        return key_in_certificate(entry)

    return key_of


class _GetReady(Question[Ready]):
    """The first exchange: nothing that sites answer to it depends on a record.

    Attributes:
        names: of the sites that are ready.
    """

    kind = "ready"

    def __init__(self, at_hand: AtHand, attempt: int, machine: SecureCoordinator) -> None:
        super().__init__(at_hand.job, at_hand.number, at_hand.adapter, at_hand.asked)
        self.attempt, self._machine, self._observer = attempt, machine, at_hand.observer
        self.unknown.clear()  # nobody releases anything yet
        self.names: list[str] = []
        at_hand.observer.ready_asked(self.number, [site.site for site in at_hand.asked.values()], self.adapter)

    def unpack(self, message: Message) -> Ready | Refusal:
        return unpack_ready(message)

    def take(self, reply: Ready, site: SiteDescription) -> None:
        if reply.site != site.site:
            raise RunError(f"the node of site {site.site!r} answered as {reply.site!r}")
        if reply.declared_records != site.declared_records:
            raise RunError(f"declares {reply.declared_records:,} records now and declared {site.declared_records:,}")
        try:
            self._machine.take_ready(reply)
        except TrustError as error:
            raise RunError(str(error)) from None
        self.names.append(reply.site)

    def received(self, receipt: Receipt) -> None:
        """See `Question`; there are none."""

    def judged(self, site: str, reply: Ready | None) -> None:
        self._observer.site_ready(self.number, site, self.failed.get(site))

    def close(self) -> None:
        """Note those that said nothing."""
        answered = {*self.names, *self.failed}
        for name in sorted(site.site for site in self.sites.values() if site.site not in answered):
            self.failed[name] = f"not ready within {self.job.federation.round_timeout_seconds:g} s"
            self._observer.site_ready(self.number, name, self.failed[name])


class _NobodyAsked(Arrived):
    """What came of an attempt that ended before a roster went out: nothing, and nobody was charged."""

    kind = "masked"

    def __init__(self, at_hand: AtHand, ready: _GetReady) -> None:
        super().__init__(at_hand, ready.adapter, {})
        self.failed = dict(ready.failed)
        self._ready = len(ready.names)

    def take(self, reply: TrainReply, site: SiteDescription) -> None:
        raise RuntimeError("nobody was asked")

    def result(self) -> tuple[Adapter, Adapter]:
        raise RuntimeError("nobody was asked")

    def shortage(self) -> str:
        """See `Arrived`."""
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(self.failed.items())) or "none was asked"
        return (
            f"round {self.number}: {self._ready} sites are ready, federation.min_sites is {self.job.federation.min_sites} "
            f"({reasons}). Nobody was charged. The run stands at the last checkpoint; mend the sites and resume."
        )


class _Send(Arrived):
    """The second exchange: each site of the roster sends its masked input; the sum opens when all of them came."""

    kind = "masked"
    # A disk that is full once the input is made and stored: it was charged, and the same request would bring it.
    may_hide = Arrived.may_hide | {WITHHELD}

    def __init__(
        self, at_hand: AtHand, ready: _GetReady, roster: tuple[Ready, ...], machine: SecureCoordinator
    ) -> None:
        names = {entry.site for entry in roster}
        sites = {node: site for node, site in at_hand.asked.items() if site.site in names}
        super().__init__(at_hand, pack_roster(roster), sites)
        self.attempt, self._roster, self._machine = ready.attempt, roster, machine
        self._checkpoint, self._shapes = at_hand.checkpoint, at_hand.shapes
        self.failed |= ready.failed
        self._bytes_before = len(ready.adapter) * len(ready.sites)

    @property
    def bytes_down(self) -> int:
        return super().bytes_down + self._bytes_before

    def take(self, reply: TrainReply, site: SiteDescription) -> None:
        """See `Question`; an input counts as a release as soon as it is one, and is added if it is as it should be."""
        (declared,) = (entry.declared_records for entry in self._roster if entry.site == site.site)
        self.note(replace(reply, declared_records=declared), site)  # what it signed
        if reply.declared_records != declared:
            raise RunError(f"it declares {reply.declared_records:,} and said {declared:,} when it was ready")
        try:
            self._machine.take_masked(Masked.from_bytes(reply.update))
        except TrustError as error:
            raise RunError(str(error)) from None
        self.names.append(site.site)

    def close(self) -> None:
        """See `Arrived`; an attempt in which somebody is missing has no updates."""
        super().close()
        if self._machine.missing:
            self.voided, self.names = True, []

    def result(self) -> tuple[Adapter, Adapter]:
        """Return (next global adapter, next state of the optimiser) by the step of the opened sum.

        Raises:
            RunHeld: if no sites that follow the protocol add up to such a sum, or none would take the adapter.
        """
        declared, total = [entry.declared_records for entry in self._roster], self._machine.open()
        if problem := SumBounds(self._plan, declared, len(total)).problem(total):
            raise self._held(
                f"the sum of {len(self._roster)} sites {problem} (C is privacy.max_grad_norm): a site added what its records and "
                "its noise cannot be, and nobody can tell which one"
            )
        gradient = gradient_of(
            total,
            list(self._shapes.values()),
            max_grad_norm=self._plan.max_grad_norm,
            expected_batch_size=self._plan.expected_batch_size(sum(declared)),
        )
        adapter, state = gradient_step(
            self._checkpoint.adapter,
            dict(zip(self._shapes, gradient, strict=True)),
            self._checkpoint.server_state,
            training=self.job.training,
            step=self.number - 1,
        )
        # Of tensors, for Python's own would pass over what is no number.
        largest = float(torch.stack([value.abs().max() for value in adapter.values()]).max())
        if not largest <= _LARGEST_VALUE:
            raise self._held(
                f"the next adapter would have a value of {largest:.4g}, and sites take none above {MAX_ADAPTER_VALUE:g} or as "
                "far from its start: a site added too much, or training.learning_rate is too high"
            )
        return adapter, state

    def _held(self, reason: str) -> RunHeld:
        names = ", ".join(self.names)
        return RunHeld(
            f"round {self.number}, attempt {self.attempt}: {reason}. Nothing of it was used, and the run stands at round "
            f"{self.number - 1}; everybody on the roster ({names}) was charged for this attempt, and it counts. Have each site "
            "look into its node, take out the one that is at fault (revoke its certificate, or stop its node), and resume the "
            "run: the round is attempted anew."
        )

    def shortage(self) -> str:
        """See `Arrived`."""
        reasons = "; ".join(f"{name}: {self.failed.get(name, 'no answer')}" for name in sorted(self._machine.missing))
        return (
            f"round {self.number}, attempt {self.attempt}: the sum does not open without {reasons}. Everybody on the roster was "
            "charged for this attempt."
        )
