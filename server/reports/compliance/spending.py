"""The sections of the compliance report on what was spent and what left: the sites' ledgers, and every release."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from server.reports.compliance.document import HASH, Block, Bullets, Column, Paragraph, Table, numbers, wide
from server.reports.compliance.facts import Facts, Release
from server.reports.compliance.ledgers import LedgerFacts
from server.reports.run.formats import NOT_RECORDED, format_delta, printable
from shared.epsilons import as_set, rounded_up


def ledgers(facts: Facts) -> Iterator[Block]:
    """Each given account before and after the job."""
    if facts.central is not None:
        text = "The coordinator accounts for this run, and for this run only; the sites' ledgers were not charged."
        yield Paragraph(text=text)
    if facts.ledgers:
        yield Paragraph(
            text="A site's ledger keeps what everything that was ever released from a data set has spent, across runs, and "
            "refuses what would cross the cap. Before: up to this job's first charge. After: up to its last one."
        )
        yield _ledger_table(facts)
        yield _ledger_hashes(facts)
        yield from _ledger_notes(facts)
    given = {ledger.export.site for ledger in facts.ledgers}
    missing = [site.release.site for site in facts.sites if site.release.site not in given]
    if missing:
        yield Paragraph(
            text=f"Not given: the {'ledger' if len(missing) == 1 else 'ledgers'} of {facts.join_sites(missing)}. A ledger "
            "stays at its site; what it holds before and after this job is not known here. The site can hand out an export "
            "(“silotune site ledger HOME --export FILE”), and this report be made again with “--ledger FILE”."
        )


def _counts_sums(ledger: LedgerFacts) -> bool:
    """Whether the account holds masked inputs, which its first cap counts as the sums that they went into."""
    return any(charge.together for charge in ledger.export.charges)


def _ledger_table(facts: Facts) -> Table:
    shares = any(map(_counts_sums, facts.ledgers))
    return Table(
        caption="Epsilon spent of each account, by the account's own rule, at its delta.",
        columns=(
            wide("Site, data set"),
            Column(title="Unit"),
            Column(title="Rule"),
            *numbers("Cap", "Before", "After", "At export"),
            *(numbers("By itself", "Its cap") if shares else ()),
            *numbers("Charged steps", "Delta"),
        ),
        rows=tuple(
            (
                f"{facts.called(ledger.export.site)}, {printable(ledger.export.dataset)}",
                ledger.export.unit,
                ledger.export.composition,
                as_set(ledger.export.epsilon),
                _spend(ledger.before),
                _spend(ledger.after),
                _spend(ledger.now),
                *((_spend(ledger.now_alone), as_set(ledger.export.cap_alone)) if shares else ()),
                str(ledger.steps),
                format_delta(ledger.export.delta),
            )
            for ledger in facts.ledgers
        ),
    )


def _ledger_hashes(facts: Facts) -> Table:
    return Table(
        caption="The state of each ledger: its last entry names all before it. Compare it with the ledger at the site.",
        columns=(wide("Site"), *numbers("Entries"), HASH),
        rows=tuple(
            (facts.called(ledger.export.site), str(ledger.export.num_entries), ledger.export.head_sha256)
            for ledger in facts.ledgers
        ),
    )


def _ledger_notes(facts: Facts) -> Iterator[Block]:
    ledgers, notes = facts.ledgers, []
    if any(ledger.export.composition == "adaptive" for ledger in ledgers):
        notes.append(
            "Rule adaptive: a Rényi filter, which holds also if a run is planned on the results of earlier ones. What it has "
            "spent is the used part of the cap and larger than the epsilon of the run alone; only the cap is a guarantee."
        )
    if any(ledger.export.composition == "fixed" for ledger in ledgers):
        notes.append(
            "Rule fixed: PLD over all charges, valid if the plans of all runs were fixed before the first one started."
        )
    if any(map(_counts_sums, ledgers)):
        notes.append(
            "Before, after and at export: masked inputs to sums over sites count as the sums do. By itself: everything at the "
            "export, with each of them by itself, as if secure aggregation had failed and all other sites colluded."
        )
    for ledger in ledgers:
        site = facts.called(ledger.export.site)
        if ledger.others_between:
            notes.append(f"{site}: {ledger.others_between} charges of other jobs lie between and count into after.")
        if ledger.uncommitted:
            notes.append(f"{site}: {ledger.uncommitted} charges were reserved and never confirmed; they count in full.")
    if any(not ledger.account.from_ledger for ledger in ledgers):
        notes.append("An export is the site's own word; nobody signed it.")
    if notes:
        yield Bullets(items=tuple(notes))


def releases(facts: Facts) -> Iterator[Block]:
    """Every update that left a site, and every request that brought none."""
    if facts.central is not None:
        rounds = ", ".join(map(str, facts.central.record.rounds)) or "none"
        text = (
            f"The coordinator published the adapter after these rounds: {rounds}. A round that was recomputed stands here twice "
            "and counts twice. The sites' updates went to the coordinator only and are recorded nowhere."
        )
        yield Paragraph(text=text)
        return
    shares = facts.job.privacy.shares_noise
    more = ", certificate, the public keys of its masks and its" if shares else " and"
    released = [release for release in facts.releases if release.sha256 is not None]
    others = [release for release in facts.releases if release.sha256 is None]
    yield Paragraph(
        text=f"All that left a site for this job, beside its name, version{more} declared size. {_what_left(facts)}"
    )
    if released:
        yield _release_table(facts, released)
    if others:
        yield Table(
            caption="Requests that brought no update. Those never answered count as executed: what was computed may "
            "have been seen by somebody.",
            columns=(Column(title="Round"), wide("Site"), Column(title="Outcome"), wide("Reason")),
            rows=tuple(
                (
                    str(release.round),
                    facts.called(release.site),
                    release.outcome,
                    printable(release.reason) or NOT_RECORDED,
                )
                for release in others
            ),
        )
    if not facts.releases:
        yield Paragraph(text="Nothing was released yet.")
    if facts.at_hand is not None and facts.at_hand <= facts.job.training.rounds:
        yield Paragraph(
            text=f"The run goes on: round {facts.at_hand:,} is the round at hand. What sites send in it is counted once it is "
            "complete, or given up."
        )


def _what_left(facts: Facts) -> str:
    mechanism = facts.job.privacy.mechanism
    if mechanism == "distributed":
        return (
            "Each update is the site's sum of clipped gradients with its share of the noise, under the masks of one attempt; it "
            "is named by the SHA-256 of the message of these masked words. If the masks fail, it keeps to the second promise."
        )
    noise = "without clipping and noise" if mechanism == "none" else "after clipping and noise"
    return f"Each update is the trained adapter {noise}, and is named by the SHA-256 of its bytes."


def _release_table(facts: Facts, releases: Sequence[Release]) -> Table:
    sized = any(release.num_bytes is not None for release in releases)
    rows = []
    for release in releases:
        outcome = release.outcome
        if release.outcome == "refused" and release.reason:
            outcome += f": {printable(release.reason)}"
        size = ("unknown" if release.num_bytes is None else f"{release.num_bytes:,}",) if sized else ()
        rows.append((str(release.round), facts.called(release.site), outcome, *size, release.sha256 or ""))
    source = " Compared with the coordinator's audit log." if facts.log is not None else ""
    return Table(
        caption=f"{len(releases):,} updates.{source}",
        columns=(
            Column(title="Round"),
            wide("Site"),
            Column(title="Outcome"),
            *(numbers("Bytes") if sized else ()),
            HASH,
        ),
        rows=tuple(rows),
    )


def _spend(value: float) -> str:
    return rounded_up(value) if math.isfinite(value) else "unbounded"
