"""The sections of the compliance report that prove its guarantee: statements, accountants, audits, hashes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from server.reports.compliance.checks import shown
from server.reports.compliance.document import (
    HASH,
    Block,
    Bullets,
    Column,
    Notice,
    Paragraph,
    Table,
    entries,
    numbers,
    wide,
)
from server.reports.compliance.facts import Accounted, CentralFacts, Facts, Guarantee, accountants_agree
from server.reports.run.formats import NOT_RECORDED, format_budget, format_bytes, format_delta, printable
from server.reports.run.run_data import FileHash
from shared.epsilons import bound_rounded_down, noise_rounded_down, rate_rounded_up, rounded_up
from shared.privacy.statement import without_uncovered

# More statements than these would fill page after page with the words of the table above them.
MAX_SITE_STATEMENTS = 24

_OF_SHARES = (
    " Noise multipliers are those of the honest sites' sum. Both promises are of all planned attempts, not of the executed "
    "ones; they stand under “Accountants compared”."
)
_PRV = (
    "PRV gives an upper bound that is itself only right to about 0.01, so it may lie a little above a cap that PLD keeps to. "
    "Where it would take long, or delta is too small for it, it gives none."
)
_ANEW = (
    "For this report every epsilon was computed anew from what was executed, by two accountants of different construction: "
    "privacy loss distributions (PLD) and the PRV accountant of Opacus. PLD is what is stated. "
)
_ANEW_OF_SHARES = (
    "For this report every epsilon was computed anew: both promises from all planned attempts, what was spent from those that "
    "were made. The table below has two accountants of different construction: privacy loss distributions (PLD) and the PRV "
    "accountant of Opacus. For a person at several sites, whose data are in one sum several times, there is PLD only. PLD is "
    "what is stated. "
)


def guarantee(facts: Facts) -> Iterator[Block]:
    """The statement for each unit of privacy, what was executed, and the statement of each site."""
    for found in facts.guarantees:
        if len(facts.guarantees) > 1:
            yield Paragraph(text=f"Unit of privacy: one {found.unit}. Sites: {facts.join_sites(found.sites)}.")
        yield Paragraph(text=facts.data.named(found.statement.one_site), role="statement")
        if len(found.composed) > 1:
            yield _sites_table(found, shares=facts.epsilon_alone is not None)
    if facts.central is not None:
        yield _central_table(facts.central)
        return
    if facts.sites:
        yield _mechanism_table(facts)
    if len(facts.sites) <= MAX_SITE_STATEMENTS:
        yield Paragraph(
            text="The statement of each site; what they do not cover stands under “Limits of the guarantee”:"
        )
        claims = (without_uncovered(site.statement, facts.not_covered) for site in facts.sites)
        yield Bullets(items=tuple(map(facts.data.named, claims)))
    else:
        yield Paragraph(
            text=f"The statements of the {len(facts.sites)} sites say the same as this table; each stands in the site's "
            "privacy.json.",
            role="note",
        )


def _sites_table(guarantee: Guarantee, *, shares: bool) -> Table:
    about = "sites, those with the largest epsilon first; check: the second accountant."
    if shares:
        about = (
            "sites, the first promise; check: the second accountant, which has no number for whoever is in one sum several "
            "times."
        )
    return Table(
        caption=f"Whoever is at several sites is protected less. Epsilon for one {guarantee.unit} at each of up to so many "
        f"{about}",
        columns=(Column(title="Sites"), *numbers("Epsilon", "Check (PRV)"), Column(title="Agree")),
        rows=tuple(
            (
                str(row.sites),
                rounded_up(row.epsilon),
                shown(row.epsilon_prv),
                "not compared" if row.epsilon_prv is None else _yes_no(accountants_agree(row.epsilon, row.epsilon_prv)),
            )
            for row in guarantee.composed
        ),
    )


def _central_table(central: CentralFacts) -> Table:
    record = central.record
    titles = ("Sampling rate of sites", "Noise multiplier", "Noise events", "Delta", "Epsilon")
    return Table(
        caption="What the coordinator executed over all sites together, and the epsilon that follows from it.",
        columns=(wide("Unit"), *numbers(*titles)),
        rows=(
            (
                record.unit,
                _each(rate_rounded_up(event.sample_rate) for event in record.events),
                _each(noise_rounded_down(event.noise_multiplier) for event in record.events),
                _each(str(event.steps) for event in record.events),
                format_delta(record.delta),
                "none" if central.epsilon is None else rounded_up(central.epsilon),
            ),
        ),
    )


def _mechanism_table(facts: Facts) -> Table:
    rows = []
    for site in facts.sites:
        release = site.release
        events = release.possible_events if release.private else ()
        rows.append(
            (
                facts.called(release.site),
                release.unit,
                _each(rate_rounded_up(event.sample_rate) for event in events),
                _each(noise_rounded_down(event.noise_multiplier) for event in events),
                _each(str(event.steps) for event in events),
                rate_rounded_up(release.max_grad_norm),
                format_delta(release.delta),
                "none" if site.epsilon is None else rounded_up(site.epsilon),
                format_budget(release.epsilon_budget or None),
            )
        )
    titles = ("Sampling rate", "Noise multiplier", "Steps", "Clipping norm", "Delta", "Epsilon", "Cap")
    return Table(
        caption="What was executed at each site, and the epsilon that follows from it. Steps of requests never answered "
        "are included; where lines differ, each is a mechanism of its own."
        + (_OF_SHARES if facts.epsilon_alone is not None else ""),
        columns=(wide("Site"), Column(title="Unit"), *numbers(*titles)),
        rows=tuple(rows),
    )


def accountants(facts: Facts) -> Iterator[Block]:
    """Epsilon by two accountants, beside what the run had recorded."""
    shares = facts.epsilon_alone is not None
    yield Paragraph(text=(_ANEW_OF_SHARES if shares else _ANEW) + _PRV)
    if shares:
        yield _promises_table(facts)
    elif facts.private:
        yield Table(
            caption="Epsilon of each site." if facts.central is None else "Epsilon of what the coordinator published.",
            columns=(
                wide("Site"),
                *numbers("PLD", "PRV", "Recorded by the run", "What arrived (PLD)"),
                Column(title="Agree"),
            ),
            rows=tuple(
                _accountant_row(facts.called(site.release.site), site, site.epsilon_arrived) for site in facts.sites
            )
            + _central_row(facts.central),
        )
    else:
        yield Paragraph(text="No epsilon is stated for this run, so there is none to check.")
        return
    whose = "each site's" if facts.central is None else "the run's"
    source = "take" if shares else "take sampling rate, noise multiplier and steps from the table above, or"
    yield Paragraph(
        text=f"To check it with software that is not ours, {source} the events in {whose} privacy.json; docs/privacy.md has the "
        "few lines for it.",
        role="note",
    )


def _promises_table(facts: Facts) -> Table:
    rows = []
    for site in facts.sites:
        name = facts.called(site.release.site)
        for promise in site.promises:
            rows.append((name, promise.title, *_compared(promise)))
        rows.append((name, "first promise, attempts made", *_compared(site)))
        if site.epsilon_arrived != site.epsilon:
            rows.append(
                (name, "first promise, what arrived", shown(site.epsilon_arrived), "none", "none", "not compared")
            )
    return Table(
        caption="Both promises of each site, and what was spent of the first.",
        columns=(
            wide("Site"),
            wide("Epsilon of"),
            *numbers("PLD", "PRV", "Recorded by the run"),
            Column(title="Agree"),
        ),
        rows=tuple(rows),
    )


def _compared(found: Accounted) -> tuple[str, ...]:
    agree = _yes_no(found.accountants_agree and found.record_agrees)
    if found.epsilon_prv is None and found.record_agrees:
        agree = "not compared"
    return (shown(found.epsilon), shown(found.epsilon_prv), shown(found.recorded), agree)


def _central_row(central: CentralFacts | None) -> tuple[tuple[str, ...], ...]:
    if central is None:
        return ()
    return (_accountant_row("coordinator", central, central.epsilon),)


def _accountant_row(name: str, found: Accounted, arrived: float | None) -> tuple[str, ...]:
    epsilons = map(shown, (found.epsilon, found.epsilon_prv, found.recorded, arrived))
    return (name, *epsilons, _yes_no(found.accountants_agree and found.record_agrees))


def audits(facts: Facts) -> Iterator[Block]:
    """What audits of this run found."""
    if not facts.data.audits:
        text = "No audit of this run was made. “silotune audit RUN” makes one and changes nothing that was released."
        yield Paragraph(text=text)
        return
    if any(audit.verdict == "violated" for audit in facts.data.audits):
        yield Notice(level="danger", title="An audit refutes the claim.", items=("Do not rely on epsilon.",))
    yield Paragraph(
        text="An audit attacks the mechanism and bounds epsilon from below by what it sees. Violated: the bound reaches the "
        "claim. Inconclusive: the claim lies above the ceiling, which no attack of this kind could reach, or too little was "
        "seen; that speaks neither for the claim nor against it. Consistent: it could have refuted the claim, and did not."
    )
    yield Table(
        caption="Audits of this run.",
        columns=(
            Column(title="Tier"),
            *numbers("Claim", "Lower bound", "Ceiling", "Alpha"),
            Column(title="Verdict"),
            wide("What was audited"),
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
            for audit in facts.data.audits
        ),
    )
    for audit in facts.data.audits:
        if audit.reasons:
            yield Paragraph(text=f"Tier {audit.tier}:")
            yield Bullets(items=audit.reasons)


def versions(facts: Facts) -> Iterator[Block]:
    """Software, machine, and the hash of every file that was read or produced."""
    run, log = facts.data.run, facts.log
    machine = ", ".join(filter(None, [run.machine.system, run.machine.device, run.machine.precision]))
    packages = ", ".join(f"{name} {version}" for name, version in sorted(run.versions.items()) if version)
    yield entries(
        ("Software", packages or NOT_RECORDED),
        ("Machine", printable(machine) or NOT_RECORDED),
        ("Mode", printable(run.mode or NOT_RECORDED)),
        ("Adapter signed by", facts.adapter_signer),
        ("Coordinator's audit log", _log_text(facts)),
        ("Its last entry (SHA-256)", log.sha256 if log else None),
        mono=("Adapter signed by", "Its last entry (SHA-256)"),
    )
    yield _file_table("Files that this report was made from.", facts.sources)
    if facts.data.adapter:
        yield _file_table("The adapter that was trained.", facts.data.adapter)


def _file_table(caption: str, files: Sequence[FileHash]) -> Table:
    rows = tuple((printable(file.name), format_bytes(file.num_bytes), file.sha256) for file in files)
    return Table(caption=caption, columns=(wide("File"), *numbers("Size"), HASH), rows=rows)


def _log_text(facts: Facts) -> str | None:
    log = facts.log
    if log is None:
        return None
    signed = "its end signed by the coordinator" if log.signature_checked else "its end not checked for a signature"
    if log.job_entries is None:
        return f"unbroken, {signed}; how many entries it has would tell how many sites were drawn"
    return f"unbroken, {signed}; {log.job_entries:,} entries of this job"


def _each(values: Iterator[str]) -> str:
    """Return one value a line."""
    return "\n".join(values) or "none"


def _bound(value: float | None) -> str:
    return "none" if value is None else bound_rounded_down(value)


def _yes_no(value: bool) -> str:
    return "yes" if value else "NO"
