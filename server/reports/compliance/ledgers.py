"""A site's account before and after a job, from its ledger.

"Before" is everything that was charged before the job's first charge, "after" everything up to its last one, both measured
by the account's own rule. Charges of other jobs in between count into "after" and are named.

An export of a ledger is the site's own word: nobody signed it. What can be compared with what the coordinator counted, is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.epsilons import as_set, rounded_up
from shared.privacy.ledger_export import ChargedSteps, LedgerExport, load_export
from shared.privacy.statement import SiteRelease


@dataclass(frozen=True, kw_only=True)
class Account:
    """One account and where it was read.

    Attributes:
        file: the export, or the ledger itself.
        from_ledger: whether it was read from the ledger, whose chain was verified on opening.
    """

    file: Path
    export: LedgerExport
    from_ledger: bool = False


def load_account(path: Path) -> Account:
    """Read what `silotune site ledger HOME --export FILE` wrote.

    Raises:
        LedgerError: if the file is no export.
    """
    return Account(file=path, export=load_export(path))


@dataclass(frozen=True, kw_only=True)
class LedgerFacts:
    """One account around one job.

    Attributes:
        before, after, now: spend by the account's rule before the job's first charge, after its last, and at the export.
        now_alone: spend at the export against the second cap, where each masked input to a sum counts by itself.
        charges: of the job; `steps`: their sum.
        others_between: charges of other jobs between the job's first and last.
        uncommitted: charges of the job whose release was reserved and never confirmed; they count in full.
        problems: what does not fit to the run, in sentences.
    """

    account: Account
    before: float
    after: float
    now: float
    now_alone: float
    charges: int
    steps: int
    others_between: int
    uncommitted: int
    problems: tuple[str, ...]

    @property
    def export(self) -> LedgerExport:
        """The account itself."""
        return self.account.export


def ledger_facts(account: Account, job_sha256: str, releases: Sequence[SiteRelease]) -> LedgerFacts:
    """Measure an account around the job."""
    export = account.export
    own = [index for index, charge in enumerate(export.charges) if charge.job_id == job_sha256]
    first, last = (own[0], own[-1] + 1) if own else (len(export.charges), len(export.charges))
    charges = [export.charges[index] for index in own]
    mechanisms, rule = export.mechanisms, export.rule
    now, now_alone = rule.epsilon(mechanisms), export.rule_alone.epsilon(export.mechanisms_alone)
    return LedgerFacts(
        account=account,
        before=rule.epsilon(mechanisms[:first]),
        after=rule.epsilon(mechanisms[:last]),
        now=now,
        now_alone=now_alone,
        charges=len(own),
        steps=sum(charge.steps for charge in charges),
        others_between=last - first - len(own),
        uncommitted=sum(not charge.committed for charge in charges),
        problems=tuple(_problems(export, charges, releases, now, now_alone)),
    )


def _problems(
    export: LedgerExport,
    charges: Sequence[ChargedSteps],
    releases: Sequence[SiteRelease],
    now: float,
    now_alone: float,
) -> list[str]:
    """Compare what the site charged with what the coordinator counted: never less may be charged than was released."""
    about = f"The ledger of site {export.site} ({export.dataset})"
    found = []
    if now > export.epsilon * (1 + 1e-9):
        found.append(f"{about} stands at {rounded_up(now, 4)}, above its cap of {as_set(export.epsilon)}.")
    if now_alone > export.cap_alone * (1 + 1e-9):
        found.append(
            f"{about} stands at {rounded_up(now_alone, 4)} with each masked input by itself, above its cap of "
            f"{as_set(export.cap_alone)}."
        )
    release = next((release for release in releases if release.site == export.site), None)
    if release is None:
        return [*found, f"{about}: the run has no record of a site of this name."]
    if release.unit != export.unit:
        found.append(f"{about} counts the unit {export.unit}, the run {release.unit}.")
    if release.declared_records != export.declared_records:
        found.append(
            f"{about} declares the size {export.declared_records:,}, the run was told {release.declared_records:,}."
        )
    if not release.private:
        return found
    short = _uncovered_steps(release, charges)
    if short:
        found.append(
            f"{about} does not cover what the coordinator received: {short} of {release.steps} executed steps of this job are "
            "not charged in it with their noise and sampling rate. Either the export is older than the run, or it is of "
            "another data set, or something was released without being charged."
        )
    return found


def _uncovered_steps(release: SiteRelease, charges: Sequence[ChargedSteps]) -> int:
    charged: Counter[tuple[float, float]] = Counter()
    executed: Counter[tuple[float, float]] = Counter()
    for charge in charges:
        charged[charge.noise_multiplier, charge.sample_rate] += charge.steps
    for event in release.arrived_events:
        executed[event.noise_multiplier, event.sample_rate] += event.steps
    return sum((executed - charged).values())
