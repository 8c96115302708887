"""The sections of the compliance report that hold its numbers: guarantee, ledgers, releases, accountants, audits, hashes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from server.compliance.checks import shown
from server.compliance.document import Block, Bullets, Column, Notice, Paragraph, Section, Table, entries, section
from server.compliance.facts import Facts, Guarantee, Release, SiteFacts, accountants_agree
from server.compliance.ledgers import LedgerFacts
from server.report.formats import (
    NOT_RECORDED,
    format_budget,
    format_bytes,
    format_delta,
    join_names,
    printable,
)
from shared.privacy.statement import rounded_up

# More statements than these would fill page after page with the words of the table above them.
MAX_SITE_STATEMENTS = 24
_HASH = Column(title="SHA-256", mono=True, width="wide")
_OUTCOMES = {
    "not counted": "accepted, not counted",
    "unanswered": "never answered",
}


def guarantee_section(facts: Facts) -> Section:
    """The statement for each unit of privacy, what was executed, and the statement of each site."""
    blocks: list[Block] = []
    for guarantee in facts.guarantees:
        if len(facts.guarantees) > 1:
            blocks.append(Paragraph(text=f"Unit of privacy: one {guarantee.unit}. Sites: {_names(guarantee.sites)}."))
        blocks.append(Paragraph(text=guarantee.statement.one_site, role="statement"))
        if len(guarantee.composed) > 1:
            blocks.append(_sites_table(guarantee))
    if facts.sites:
        blocks.append(_mechanism_table(facts.sites))
    if len(facts.sites) <= MAX_SITE_STATEMENTS:
        blocks.append(Paragraph(text="The statement of each site:"))
        blocks.append(Bullets(items=tuple(site.statement for site in facts.sites)))
    else:
        blocks.append(
            Paragraph(
                text=f"The statements of the {len(facts.sites)} sites say the same as this table; each stands in the site's "
                "privacy.json.",
                role="note",
            )
        )
    return section("guarantee", "The guarantee", blocks)


def _sites_table(guarantee: Guarantee) -> Table:
    return Table(
        caption=f"A {guarantee.unit} that is at several sites is protected less. Epsilon for up to so many sites, those with the "
        "largest epsilon first; check: the second accountant.",
        columns=(
            Column(title="Sites"),
            Column(title="Epsilon", number=True),
            Column(title="Check (PRV)", number=True),
            Column(title="Agree"),
        ),
        rows=tuple(
            (
                str(row.sites),
                rounded_up(row.epsilon),
                shown(row.epsilon_prv),
                _yes_no(accountants_agree(row.epsilon, row.epsilon_prv)),
            )
            for row in guarantee.composed
        ),
    )


def _mechanism_table(sites: Sequence[SiteFacts]) -> Table:
    rows = []
    for site in sites:
        release = site.release
        events = release.possible_events if release.private else ()
        rows.append(
            (
                printable(release.site),
                release.unit,
                _each(f"{event.sample_rate:g}" for event in events),
                _each(f"{event.noise_multiplier:.4f}" for event in events),
                _each(str(event.steps) for event in events),
                f"{release.max_grad_norm:g}",
                format_delta(release.delta),
                "none" if site.epsilon is None else rounded_up(site.epsilon),
                format_budget(release.epsilon_budget or None),
            )
        )
    titles = ("Sampling rate", "Noise multiplier", "Steps", "Clipping norm", "Delta", "Epsilon", "Cap")
    return Table(
        caption="What was executed at each site, and the epsilon that follows from it. Steps of requests never answered "
        "are included; where lines differ, each is a mechanism of its own.",
        columns=(
            Column(title="Site", width="wide"),
            Column(title="Unit"),
            *(Column(title=title, number=True) for title in titles),
        ),
        rows=tuple(rows),
    )


def ledger_section(facts: Facts) -> Section:
    """Each given account before and after the job."""
    blocks: list[Block] = []
    if facts.ledgers:
        blocks.append(
            Paragraph(
                text="A site's ledger keeps what everything that was ever released from a data set has spent, across runs, and "
                "refuses what would cross the cap. Before: up to this job's first charge. After: up to its last one."
            )
        )
        blocks.append(_ledger_table(facts.ledgers))
        blocks.append(_ledger_hashes(facts.ledgers))
        blocks += _ledger_notes(facts.ledgers)
    given = {ledger.export.site for ledger in facts.ledgers}
    missing = [site.release.site for site in facts.sites if site.release.site not in given]
    if missing:
        blocks.append(
            Paragraph(
                text=f"Not given: the {'ledger' if len(missing) == 1 else 'ledgers'} of {_names(missing)}. A ledger stays at its "
                "site; what it holds before and after this job is not known here. The site can hand out an export "
                "(“silotune site ledger HOME --export FILE”), and this report be made again with “--ledger FILE”."
            )
        )
    return section("ledger", "The sites' ledgers before and after", blocks)


def _ledger_table(ledgers: Sequence[LedgerFacts]) -> Table:
    numbers = ("Cap", "Before", "After", "At export", "Charged steps")
    return Table(
        caption="Epsilon spent of each account, by the account's own rule, at its delta.",
        columns=(
            Column(title="Site, data set", width="wide"),
            Column(title="Unit"),
            Column(title="Rule"),
            *(Column(title=title, number=True) for title in numbers),
            Column(title="Delta", number=True),
        ),
        rows=tuple(
            (
                f"{printable(ledger.export.site)}, {printable(ledger.export.dataset)}",
                ledger.export.unit,
                ledger.export.composition,
                f"{ledger.export.epsilon:g}",
                _spend(ledger.before),
                _spend(ledger.after),
                _spend(ledger.now),
                str(ledger.steps),
                format_delta(ledger.export.delta),
            )
            for ledger in ledgers
        ),
    )


def _ledger_hashes(ledgers: Sequence[LedgerFacts]) -> Table:
    return Table(
        caption="The state of each ledger: its last entry names all before it. Compare it with the ledger at the site.",
        columns=(Column(title="Site"), Column(title="Entries", number=True), _HASH),
        rows=tuple(
            (printable(ledger.export.site), str(ledger.export.num_entries), ledger.export.head_sha256)
            for ledger in ledgers
        ),
    )


def _ledger_notes(ledgers: Sequence[LedgerFacts]) -> Iterator[Block]:
    notes = []
    if any(ledger.export.composition == "adaptive" for ledger in ledgers):
        notes.append(
            "Rule adaptive: a Rényi filter, which holds also if a run is planned on the results of earlier ones. What it has "
            "spent is the used part of the cap and larger than the epsilon of the run alone; only the cap is a guarantee."
        )
    if any(ledger.export.composition == "fixed" for ledger in ledgers):
        notes.append(
            "Rule fixed: PLD over all charges, valid if the plans of all runs were fixed before the first one started."
        )
    for ledger in ledgers:
        site = printable(ledger.export.site)
        if ledger.others_between:
            notes.append(f"{site}: {ledger.others_between} charges of other jobs lie between and count into after.")
        if ledger.uncommitted:
            notes.append(f"{site}: {ledger.uncommitted} charges were reserved and never confirmed; they count in full.")
    if any(not ledger.account.from_ledger for ledger in ledgers):
        notes.append("An export is the site's own word; nobody signed it.")
    if notes:
        yield Bullets(items=tuple(notes))


def release_section(facts: Facts) -> Section:
    """Every update that left a site, and every request that brought none."""
    released = [release for release in facts.releases if release.sha256 is not None]
    others = [release for release in facts.releases if release.sha256 is None]
    blocks: list[Block] = [
        Paragraph(
            text="All that left a site for this job, beside its name, version and declared size. Each update is the trained "
            "adapter after clipping and noise, and is named by the SHA-256 of its bytes."
        )
    ]
    if released:
        blocks.append(_release_table(released, notes=facts.log is not None))
    if others:
        blocks.append(
            Table(
                caption="Requests that brought no update. Those never answered count as executed: what was computed may "
                "have been seen by somebody.",
                columns=(
                    Column(title="Round"),
                    Column(title="Site"),
                    Column(title="Outcome"),
                    Column(title="Reason", width="wide"),
                ),
                rows=tuple(
                    (
                        str(release.round),
                        printable(release.site),
                        _OUTCOMES.get(release.outcome, release.outcome),
                        printable(release.reason) or NOT_RECORDED,
                    )
                    for release in others
                ),
            )
        )
    if not facts.releases:
        blocks.append(Paragraph(text="Nothing was released yet."))
    return section("releases", "Every release", blocks)


def _release_table(releases: Sequence[Release], *, notes: bool) -> Table:
    sized = any(release.num_bytes is not None for release in releases)
    rows = []
    for release in releases:
        outcome = _OUTCOMES.get(release.outcome, release.outcome)
        if release.outcome == "refused" and release.reason:
            outcome += f": {printable(release.reason)}"
        size = (NOT_RECORDED if release.num_bytes is None else f"{release.num_bytes:,}",) if sized else ()
        rows.append((str(release.round), printable(release.site), outcome, *size, release.sha256 or ""))
    source = " Compared with the coordinator's audit log." if notes else ""
    return Table(
        caption=f"{len(releases):,} updates.{source}",
        columns=(
            Column(title="Round"),
            Column(title="Site"),
            Column(title="Outcome"),
            *((Column(title="Bytes", number=True),) if sized else ()),
            _HASH,
        ),
        rows=tuple(rows),
    )


def accountant_section(facts: Facts) -> Section:
    """Epsilon by two accountants, beside what the run had recorded."""
    blocks: list[Block] = [
        Paragraph(
            text="For this report every epsilon was computed anew from what was executed, by two accountants of different "
            "construction: privacy loss distributions (PLD, dp-accounting) and the PRV accountant of Opacus. PLD is what is "
            "stated. PRV is itself only right to about 0.01."
        )
    ]
    if facts.private:
        blocks.append(
            Table(
                caption="Epsilon of each site.",
                columns=(
                    Column(title="Site", width="wide"),
                    Column(title="PLD", number=True),
                    Column(title="PRV", number=True),
                    Column(title="Recorded by the run", number=True),
                    Column(title="What arrived (PLD)", number=True),
                    Column(title="Agree"),
                ),
                rows=tuple(
                    (
                        printable(site.release.site),
                        shown(site.epsilon),
                        shown(site.epsilon_prv),
                        shown(site.recorded),
                        shown(site.epsilon_arrived),
                        _yes_no(site.accountants_agree and site.record_agrees),
                    )
                    for site in facts.sites
                ),
            )
        )
        blocks.append(
            Paragraph(
                text="To check it with software that is not ours, take sampling rate, noise multiplier and steps from the table "
                "above, or the events in each site's privacy.json; docs/privacy.md has the few lines for it.",
                role="note",
            )
        )
    else:
        blocks.append(Paragraph(text="No epsilon is stated for this run, so there is none to check."))
    return section("accountants", "Accountants compared", blocks)


def audit_section(facts: Facts) -> Section:
    """What audits of this run found."""
    if not facts.audits:
        text = "No audit of this run was made. “silotune audit RUN” makes one and changes nothing that was released."
        return section("audits", "Audits", [Paragraph(text=text)])
    blocks: list[Block] = [
        Paragraph(
            text="An audit attacks the mechanism and bounds epsilon from below by what it sees. Violated: the bound reaches the "
            "claim. Inconclusive: the claim lies above the ceiling, which no attack of this kind could reach. Consistent: it "
            "could have refuted the claim, and did not."
        ),
        Table(
            caption="Audits of this run.",
            columns=(
                Column(title="Tier"),
                Column(title="Claim", number=True),
                Column(title="Lower bound", number=True),
                Column(title="Ceiling", number=True),
                Column(title="Alpha", number=True),
                Column(title="Verdict"),
                Column(title="What was audited", width="wide"),
            ),
            rows=tuple(
                (
                    str(audit.tier),
                    shown(audit.claim),
                    _bound(audit.lower_bound),
                    _bound(audit.ceiling),
                    f"{audit.alpha:g}",
                    audit.verdict,
                    printable(audit.audited),
                )
                for audit in facts.audits
            ),
        ),
    ]
    for audit in facts.audits:
        blocks += [Paragraph(text=f"Tier {audit.tier}:"), Bullets(items=audit.reasons)] if audit.reasons else []
    if any(audit.verdict == "violated" for audit in facts.audits):
        blocks.insert(
            0, Notice(level="danger", title="An audit refutes the claim.", items=("Do not rely on epsilon.",))
        )
    return section("audits", "Audits", blocks)


def version_section(facts: Facts) -> Section:
    """Software, machine, and the hash of every file that was read or produced."""
    run, log = facts.data.run, facts.log
    machine = ", ".join(filter(None, [run.machine.system, run.machine.device]))
    packages = ", ".join(f"{name} {version}" for name, version in sorted(run.versions.items()) if version)
    blocks: list[Block] = [
        entries(
            ("Software", packages or NOT_RECORDED),
            ("Machine", printable(machine) or NOT_RECORDED),
            ("Mode", printable(run.mode or NOT_RECORDED)),
            ("Adapter signed by", facts.adapter_signer),
            ("Coordinator's audit log", _log_text(facts)),
            ("Its last entry (SHA-256)", log.sha256 if log else None),
            mono=("Adapter signed by", "Its last entry (SHA-256)"),
        ),
        Table(
            caption="Files that this report was made from.",
            columns=(Column(title="File"), Column(title="Size", number=True), _HASH),
            rows=tuple((printable(file.name), format_bytes(file.num_bytes), file.sha256) for file in facts.sources),
        ),
    ]
    if facts.data.adapter:
        blocks.append(
            Table(
                caption="The adapter that was trained.",
                columns=(Column(title="File"), Column(title="Size", number=True), _HASH),
                rows=tuple(
                    (printable(file.name), format_bytes(file.num_bytes), file.sha256) for file in facts.data.adapter
                ),
            )
        )
    return section("versions", "Versions and hashes", blocks)


def _log_text(facts: Facts) -> str | None:
    log = facts.log
    if log is None:
        return None
    signed = "its end signed by the coordinator" if log.signature_checked else "its end not checked for a signature"
    return f"{log.entries:,} entries, unbroken, {signed}; {log.job_entries:,} of this job"


def _names(names: Sequence[str]) -> str:
    return join_names(map(printable, names))


def _each(values: Iterator[str]) -> str:
    """Return one value a line."""
    return "\n".join(values) or "none"


def _spend(value: float) -> str:
    return rounded_up(value) if math.isfinite(value) else "unbounded"


def _bound(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _yes_no(value: bool) -> str:
    return "yes" if value else "NO"
