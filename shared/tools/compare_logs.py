"""A site's audit log held against the coordinator's: what each says of the same releases.

Neither log can be changed unseen (`shared.trust.audit_log`), but each tells only what its owner wrote. Held together, a round
that the coordinator counted and the site did not make, or made from another adapter, has a name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from shared.errors import TrustError
from shared.trust import audit_log
from shared.trust.audit_chain import Entry
from shared.trust.audit_log import Event
from shared.trust.signing import VerifyKey

# A process may die between storing a release and noting it; then the release is noted when it is asked for again.
_MADE = (Event.RELEASE_STORED, Event.RELEASE_REPEATED)
_ASKED = (Event.ROUND_ASKED, Event.READY_ASKED)
_ACCEPTED = (Event.UPDATE_ACCEPTED, Event.METRICS_ACCEPTED)


@dataclass(frozen=True, order=True)
class Difference:
    """Something that one log says and the other does not.

    Attributes:
        job: SHA-256 of the job.
        round: of the job; 0 where the log does not tell.
        text: what it is.
        contradicts: whether the logs cannot both be right; else something was on its way, and was lost or did not count.
        undecided: both say the same, and receipts were given, but none of this job.
    """

    job: str
    round: int
    text: str
    contradicts: bool
    undecided: bool = False


@dataclass
class _Books:
    """What a log says, by job: (round, SHA-256)."""

    adapters: dict[str, set[tuple[int, str]]] = field(default_factory=dict)
    releases: dict[str, set[tuple[int, str]]] = field(default_factory=dict)

    def note(self, kind: dict[str, set[tuple[int, str]]], job: object, number: object, sha256: object) -> None:
        kind.setdefault(str(job), set()).add((int(str(number or 0)), str(sha256)))


def compare(
    site_log: Path,
    coordinator_log: Path,
    *,
    site: str,
    proven: Collection[tuple[str, int, str]] | None = None,
    jobs: Collection[str] | None = None,
    site_key: VerifyKey | None = None,
    coordinator_key: VerifyKey | None = None,
) -> list[Difference]:
    """Return every difference between two logs about one site, in the order of jobs and rounds.

    Args:
        site_log, coordinator_log: folders; each is verified before anything of it is believed.
        site: its name in the coordinator's log.
        proven: (job, round, release) of what the site's key signed (`shared.trust.receipts.proven_releases`): it decides
            which of two logs is right. None: receipts are not looked at.
        jobs: of which receipts were given, by whomever signed: of others they decide nothing. None: of all.
        site_key, coordinator_key: of the logs' owners. None: whether the head is signed is not looked at, so the log may be one
            that somebody else wrote anew.

    Raises:
        TrustError: a log is broken, or its head is not signed with the key.
    """
    ours = _books(site_log, _note_site, site_key)
    theirs = _books(coordinator_log, partial(_note_coordinator, site=site), coordinator_key)
    unsigned = () if proven is None else _unsigned(theirs, proven, jobs)
    return sorted({*_adapters(ours, theirs), *_releases(ours, theirs, proven or ()), *unsigned})


def _books(folder: Path, note: Callable[[_Books, Entry], None], key: VerifyKey | None) -> _Books:
    audit_log.verify(folder, verify_head=key)
    books = _Books()
    for entry in audit_log.read(folder):
        try:
            note(books, entry)
        except (KeyError, TypeError, ValueError):  # its owner can write anything into a chain that is unbroken
            raise TrustError(
                f"{folder}: entry {entry.sequence} ({entry.event!r}) is not as Silotune writes it, so the log is not believed."
            ) from None
    return books


def _note_site(books: _Books, entry: Entry) -> None:
    details = entry.details
    if entry.event == Event.REQUEST_RECEIVED:
        books.note(books.adapters, details["job"], details["round"], details["adapter_sha256"])
    elif entry.event in _MADE:
        books.note(books.releases, details["job"], details["round"], details["sha256"])


def _note_coordinator(books: _Books, entry: Entry, site: str) -> None:
    details = entry.details
    if entry.event in _ASKED and site in list(details["sites"]):
        books.note(books.adapters, details["job"], details["round"], details["adapter_sha256"])
    elif entry.event in _ACCEPTED and details["site"] == site:
        books.note(books.releases, details["job"], details.get("round"), details["sha256"])


def _adapters(ours: _Books, theirs: _Books) -> Iterator[Difference]:
    for job in ours.adapters.keys() | theirs.adapters.keys():
        received, sent = ours.adapters.get(job, set()), theirs.adapters.get(job, set())
        for number, sha256 in received - sent:
            text = f"the site was asked with the adapter {sha256[:12]}; the coordinator's log names no such request"
            yield Difference(job, number, text, contradicts=True)
        for number, sha256 in sent - received:
            text = f"the coordinator asked with the adapter {sha256[:12]}; the request never came to the site"
            yield Difference(job, number, text, contradicts=False)


def _releases(ours: _Books, theirs: _Books, proven: Collection[tuple[str, int, str]]) -> Iterator[Difference]:
    signed = {(job, sha256) for job, _, sha256 in proven}
    for job in ours.releases.keys() | theirs.releases.keys():
        made, counted = ours.releases.get(job, set()), theirs.releases.get(job, set())
        round_of, counted_at_all = {sha256: number for number, sha256 in made}, {sha256 for _, sha256 in counted}
        for number, sha256 in counted:
            if sha256 not in round_of:
                text = f"the coordinator counts the release {sha256[:12]}, which the site did not make"
                if (job, sha256) in signed:
                    text = f"the site's log lacks the release {sha256[:12]}, which the site's key signed"
                yield Difference(job, number, text, contradicts=True)
            # Of site metrics the coordinator's log does not tell the round.
            elif number and (number, sha256) not in made:
                text = f"the release {sha256[:12]} of round {round_of[sha256]} is counted for round {number}"
                yield Difference(job, number, text, contradicts=True)
        for number, sha256 in made:
            if sha256 not in counted_at_all:
                text = f"the site made and charged the release {sha256[:12]}, which the coordinator did not count"
                yield Difference(job, number, text, contradicts=False)


def _unsigned(
    theirs: _Books, proven: Collection[tuple[str, int, str]], jobs: Collection[str] | None
) -> Iterator[Difference]:
    at_all = {(job, sha256) for job, _, sha256 in proven}
    for job, counted in theirs.releases.items():
        if jobs is not None and job not in jobs:
            text = (
                "no receipt of this job is among those given, so only the logs were compared; give those of its run too"
            )
            yield Difference(job, 0, text, contradicts=False, undecided=True)
            continue
        for number, sha256 in counted:
            if (job, number, sha256) not in proven if number else (job, sha256) not in at_all:
                text = f"the coordinator counts the release {sha256[:12]}, and no receipt by the site's key is for it"
                yield Difference(job, number, text, contradicts=True)
