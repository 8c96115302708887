"""What a compliance report states about one run; `server.reports.compliance.reading` finds it out.

Every epsilon in here was composed anew from what was executed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from server.records.privacy import CoordinatorRecord, SiteRecord
from server.reports.compliance import checks
from server.reports.compliance.ledgers import LedgerFacts
from server.reports.compliance.log import LogFacts
from server.reports.run.formats import join_names, printable
from server.reports.run.run_data import FileHash, RunData
from shared.job.job import Job
from shared.privacy.shared_noise import largest_at
from shared.privacy.statement import SiteRelease, SitesEpsilon, Statement
from shared.trust.signed_job import SignedJob

# PRV's epsilon carries an error bound of 0.01 in either direction, and PLD rounds up by less than that.
PRV_TOLERANCE = 0.03


@dataclass(frozen=True, kw_only=True)
class Accounted:
    """What was released under one guarantee, and its epsilon by two accountants (None where nothing may be stated).

    Attributes:
        epsilon: PLD, requests of unknown outcome counted as executed.
        epsilon_prv: PRV of the same; None also if that accountant gave no number.
        recorded: what the run had written down for `epsilon`.
    """

    epsilon: float | None
    epsilon_prv: float | None
    recorded: float | None

    @property
    def accountants_agree(self) -> bool:
        """Whether PRV gives the same as PLD, within its own error."""
        return accountants_agree(self.epsilon, self.epsilon_prv)

    @property
    def record_agrees(self) -> bool:
        """Whether the run's own record says the same as what is computed now."""
        return checks.agree(self.epsilon, self.recorded)


@dataclass(frozen=True, kw_only=True)
class PromiseFacts(Accounted):
    """One of the two promises of a site that adds a share of the noise, of its whole plan; `title` says which."""

    title: str


@dataclass(frozen=True, kw_only=True)
class SiteFacts(Accounted):
    """One site.

    Attributes:
        record: as the run wrote it.
        release: what was executed, by the record, of what the job planned.
        statement: in words, made anew.
        epsilon_arrived: PLD of what arrived only.
        promises: both of a site that adds a share of the noise, `epsilon` being that of the attempts that were made.
    """

    record: SiteRecord
    release: SiteRelease
    statement: str
    epsilon_arrived: float | None
    promises: tuple[PromiseFacts, ...] = ()

    @property
    def over_budget(self) -> bool:
        """Whether more was spent than the site's cap for one run."""
        budget = self.release.epsilon_budget
        return self.epsilon is not None and budget > 0 and self.epsilon > budget * (1 + 1e-6)


@dataclass(frozen=True, kw_only=True)
class CentralFacts(Accounted):
    """What a trusted coordinator published about all sites together (central DP), as the run wrote it."""

    record: CoordinatorRecord


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The largest epsilon of a run, for its summary.

    Attributes:
        where: the site that it is of, or all of them.
    """

    epsilon: float
    delta: float
    unit: str
    where: str


@dataclass(frozen=True, kw_only=True)
class ComposedEpsilon(SitesEpsilon):
    """Epsilon for a person at up to so many sites, by both accountants."""

    epsilon_prv: float | None


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """What holds for one unit of privacy.

    Attributes:
        unit: "record", or whatever the sites of this guarantee recorded.
        sites: their names.
        statement: made anew.
        composed: the statement's table over sites, cross-checked; empty if no epsilon is stated.
    """

    unit: str
    sites: tuple[str, ...]
    statement: Statement
    composed: tuple[ComposedEpsilon, ...]


@dataclass(frozen=True, kw_only=True)
class Release:
    """One update that a site handed over, or was asked for.

    Attributes:
        sha256, num_bytes: of the update; None if not recorded.
        outcome: "accepted", "round at hand", "not counted", "refused", "failed" or "never answered".
        reason: why it does not count, or how it does.
    """

    round: int
    site: str
    sha256: str | None
    num_bytes: int | None
    outcome: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that the report states about one run.

    Attributes:
        data: the run folder as the run report reads it.
        signed_job: with its signature checked; None outside a coordinator's folder.
        coordinator: name of the coordinator; None outside its folder.
        sites: natural order.
        central: of a run whose coordinator is trusted to add the noise; None elsewhere.
        guarantees: one for each unit of privacy.
        log: the coordinator's audit log of this job; None outside a coordinator's folder.
        adapter_signer: the key that signed the adapter's folder, every file checked; None if it is not signed.
        sources: every file that was read, with its hash.
        discrepancies: what does not fit together, in sentences.
        at_hand: number of the round that was going on; None of a run that is over, and of simulations.
    """

    data: RunData
    job: Job
    signed_job: SignedJob | None
    coordinator: str | None
    sites: tuple[SiteFacts, ...]
    central: CentralFacts | None
    guarantees: tuple[Guarantee, ...]
    releases: tuple[Release, ...]
    ledgers: tuple[LedgerFacts, ...]
    log: LogFacts | None
    adapter_signer: str | None
    sources: tuple[FileHash, ...]
    discrepancies: tuple[str, ...]
    at_hand: int | None = None

    def called(self, site: str) -> str:
        """What people call a site, for a page; see `RunData.called`."""
        return printable(self.data.called(site))

    def join_sites(self, sites: Iterable[str]) -> str:
        """Names of sites in one phrase, runs of numbers shortened."""
        return join_names(map(self.called, sites))

    @property
    def simulated(self) -> bool:
        """Whether all sites were simulated on one machine."""
        return (self.data.run.mode or "").startswith("simulation")

    @property
    def unprotected(self) -> tuple[str, ...]:
        """Sites about which no privacy can be stated."""
        return tuple(site.release.site for site in self.sites if not site.release.protected)

    @property
    def not_covered(self) -> tuple[str, ...]:
        """What the guarantees do not cover, each sentence once."""
        return tuple(dict.fromkeys(text for one in self.guarantees for text in one.statement.not_covered))

    @property
    def private(self) -> bool:
        """Whether an epsilon may be stated for the run."""
        if self.central is not None:
            return self.central.epsilon is not None
        return bool(self.sites) and self.job.privacy.mechanism != "none" and not self.unprotected

    @property
    def headline(self) -> Headline | None:
        """The largest epsilon, None if none is stated."""
        if not self.private:
            return None
        if self.central is not None and self.central.epsilon is not None:
            record = self.central.record
            where = f"over {record.num_sites_declared:,} declared sites, the coordinator being trusted"
            epsilon = record.epsilon_promised if self.data.stopped_early else self.central.epsilon
            return Headline(epsilon=epsilon, delta=record.delta, unit=record.unit, where=where)
        epsilon, _, worst = max(
            ((self._stated(site), -index, site.release) for index, site in enumerate(self.sites)),
            key=lambda item: item[:2],
        )
        where = f"at one site; the largest of all sites, {self.called(worst.site)}"
        if worst.shared is not None:
            where = f"at one honest site, against {worst.shared.against}"
        return Headline(epsilon=epsilon, delta=worst.delta, unit=worst.unit, where=where)

    def _stated(self, site: SiteFacts) -> float:
        """A run that its own rule ended early, or whose noise is shared, promised the epsilon of its whole plan."""
        promised = self.data.stopped_early or site.release.shared is not None
        return site.release.epsilon_promised if promised else site.epsilon or 0.0

    @property
    def epsilon_alone(self) -> float | None:
        """The largest epsilon of what a site sends by itself, where the noise is shared and an epsilon is stated."""
        found = [site.release.epsilon_alone for site in self.sites]
        known = [epsilon for epsilon in found if epsilon is not None]
        return max(known) if self.private and known else None

    @property
    def largest_at(self) -> str:
        """Of which sites both promises are, in words; only where the noise is shared and an epsilon is stated."""
        sites = [(s.release.site, s.release.epsilon_promised, s.release.epsilon_alone or 0.0) for s in self.sites]
        return printable(self.data.named(largest_at(sites)))


def accountants_agree(pld: float | None, prv: float | None) -> bool:
    """Whether PRV says nothing else than PLD, within its own error; None of PRV is no number, so nothing to disagree with."""
    if prv is None:
        return True
    if pld is None:
        return False
    return abs(pld - prv) <= max(PRV_TOLERANCE, 0.01 * pld)
