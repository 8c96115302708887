"""Who takes part: asks every node that connects who it is and, for a signed job, whether it accepts and is prepared."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from flwr.serverapp.grid import Grid

from server.rounds.earlier_requests import Asked
from server.rounds.observer import Observer
from shared.errors import AwaitingApproval, RunError
from shared.job.job import Job
from shared.trust.signed_job import SignedJob, round_fields
from shared.trust.signing import Purpose, SigningKey
from shared.wire.messages import (
    DESCRIBE,
    Order,
    Refusal,
    RequestKind,
    SiteDescription,
    describe_request,
    unpack_description,
)

POLL_SECONDS = 0.1
DESCRIBE_TIMEOUT_SECONDS = 120.0
ASK_AGAIN_SECONDS = 60.0
RETRY_SECONDS, LONGEST_RETRY_SECONDS = 2.0, 60.0
_NUMBERS = re.compile(r"\d[\d.,:]*")


@dataclass(frozen=True, kw_only=True)
class Authority:
    """What makes requests binding for real sites; a simulation has none.

    Attributes:
        signed_job: the job as its signer signed it.
        key: the coordinator's key, which the signed job names.
        registered: returns node id -> name under which the node's key was admitted.
        may_repeat: returns whether the answer to the request with this id may be one to its repetition: a site's process that
            died may have made, and charged, a release that its next one does not tell of.
        keys: returns the keys of a site's certificates that count; releases must then come with a receipt by one of them.
        holder: returns the name of the site that a certificate lets in, or raises `TrustError`.
        asked_since: returns what earlier processes of this run asked of sites for rounds after the given one, oldest first.
        arrivals: returns node id -> how often it has connected; one that ends and comes back within seconds is never missing.
    """

    signed_job: SignedJob
    key: SigningKey
    registered: Callable[[], Mapping[int, str]]
    may_repeat: Callable[[str], bool] = lambda message_id: False
    keys: Callable[[str], Collection[bytes]] | None = None
    holder: Callable[[x509.Certificate], str] | None = None
    asked_since: Callable[[int], Sequence[Asked]] = lambda round_number: ()
    arrivals: Callable[[], Mapping[int, int]] = dict

    def order(self, round_number: int, adapter: bytes, attempt: int = 0, kind: RequestKind = "train") -> Order:
        """Return the signatures that go with one round's request."""
        sent_at = datetime.now(UTC).isoformat(timespec="milliseconds")
        fields = round_fields(
            job_sha256=self.signed_job.job.sha256,
            round_number=round_number,
            adapter=adapter,
            sent_at=sent_at,
            attempt=attempt,
            kind=kind,
        )
        return Order(signed_job=self.signed_job, sent_at=sent_at, signature=self.key.sign(Purpose.ROUND, fields))


class Roster:
    """The sites of one run.

    Without an authority (simulation) every node is asked once and too few are an error. With one, sites come and go:
    those that join late take part from the next round on, and too few are waited for.
    """

    def __init__(self, grid: Grid, job: Job, *, authority: Authority | None = None, observer: Observer) -> None:
        self._grid, self._job, self._authority, self._observer = grid, job, authority, observer
        self._asked: dict[str, int] = {}  # message id -> node
        self._sites: dict[int, SiteDescription] = {}
        self._refused: dict[int, tuple[float, int, Refusal]] = {}  # when, and how often it had connected
        self._online: list[int] = []
        self._told: list[SiteDescription] = []
        self._names: dict[int, str] = {}  # under which keys were admitted
        self._arrivals: Mapping[int, int] = {}  # before the round at hand
        self._patience, self._problem = RETRY_SECONDS, ("", "")

    def present(self) -> dict[int, SiteDescription]:
        """Return node id -> description of the sites that are connected and take part, ordered by name.

        Raises:
            RunError: if two nodes bear one name and no authority tells which is right.
        """
        by_name: dict[str, int] = {}
        for node, description in self._sites.items():  # in the order in which they answered
            if node not in self._online:
                continue
            if description.site in by_name and self._authority is None:
                raise RunError(
                    f"two nodes call themselves {description.site!r}; every site needs a name of its own in site.toml."
                )
            # Under one registered name a newer key takes the place of an older one.
            by_name[description.site] = node
        return {node: self._sites[node] for _, node in sorted(by_name.items())}

    def wait(self) -> dict[int, SiteDescription]:
        """Wait for at least `federation.min_sites` sites and for everyone who was asked; return them.

        Raises:
            RunError: without an authority, if too few come.
        """
        started, told, patient = time.monotonic(), "", False
        while True:
            arrived = self.update()
            sites = self.present()
            enough = len(sites) >= self._job.federation.min_sites
            late = time.monotonic() - started > self._longest_wait()
            if enough and (late or not self._asked):
                return sites
            if self._authority is None and (late or self._everyone_answered()):
                raise RunError(self._shortage())
            if not enough and not self._asked and (problem := self._shortage()) != told:
                told = problem
                self._observer.waiting(problem)
            if self._asked and not patient and time.monotonic() - started > DESCRIBE_TIMEOUT_SECONDS:
                patient = True
                self._observer.waiting(f"{len(self._asked)} of {len(self._online)} nodes have not answered yet.")
            if not arrived:
                time.sleep(POLL_SECONDS if self._asked else 5 * POLL_SECONDS)

    def _longest_wait(self) -> float:
        """Return for how many seconds those who were asked are waited for; others, who may never connect, for less."""
        if self._authority is None and self._asked:
            # Of a simulation, so each one will answer, once its process has loaded what it needs: a result must not depend on
            # how fast the machine is.
            return max(DESCRIBE_TIMEOUT_SECONDS, self._job.federation.round_timeout_seconds)
        return DESCRIBE_TIMEOUT_SECONDS

    def pause(self, problem: str) -> None:
        """Wait before the same sites are asked the same again, the longer the more often that brought the same problem.

        Every question is an entry in a site's audit log, and a refusal may last for days. The wait ends early when a site comes,
        comes back or leaves, also if it did so while the round was on.

        Args:
            problem: what the last round ended with, its number included. Other numbers of seconds or records make no other
                problem of it.
        """
        kept = _NUMBERS.sub("", problem), problem.partition(":")[0]
        if kept != self._problem:
            self._problem, self._patience = kept, RETRY_SECONDS
        started, before, sites = time.monotonic(), self._arrivals, list(self.present())
        while (waited := time.monotonic() - started) < self._patience:
            time.sleep(min(5 * POLL_SECONDS, self._patience - waited))
            self.update()
            if waited >= RETRY_SECONDS and (self._arrivals != before or list(self.present()) != sites):
                self._patience = RETRY_SECONDS
                return
        self._patience = min(2 * self._patience, LONGEST_RETRY_SECONDS)

    def update(self) -> bool:
        """Ask nodes that are new, read the answers that came, and return whether any did; never waits."""
        self._online = sorted(self._grid.get_node_ids())
        self._arrivals = self._authority.arrivals() if self._authority else {}
        now = time.monotonic()
        pending = set(self._asked.values())
        for node, (when, arrivals, _) in list(self._refused.items()):
            is_back = self._arrivals.get(node, 0) != arrivals
            if node not in self._online or is_back or now - when > ASK_AGAIN_SECONDS:
                del self._refused[node]
        new = [n for n in self._online if n not in self._sites and n not in pending and n not in self._refused]
        if new:
            content = describe_request(self._authority.signed_job if self._authority else None)
            requests = [self._grid.create_message(content, DESCRIBE, n, "0") for n in new]
            identifiers = self._grid.push_messages(requests)
            self._asked |= {identifier: node for identifier, node in zip(identifiers, new, strict=True) if identifier}
        messages = list(self._grid.pull_messages(list(self._asked))) if self._asked else []
        for message in messages:
            node = self._asked.pop(message.metadata.reply_to_message_id or "", -1)
            if node >= 0:
                self._note(node, unpack_description(message))
        present = list(self.present().values())
        if present != self._told:
            self._told = present
            self._observer.roster(present)
        return bool(messages)

    def _note(self, node: int, answer: SiteDescription | Refusal) -> None:
        if self._authority:
            self._names |= self._authority.registered()
        registered = self._names.get(node)
        if isinstance(answer, SiteDescription) and registered is None and self._authority and self._authority.keys:
            # Its certificate ended between its answer and now: it may not pass for another site.
            answer = Refusal(site=f"node {node}", code="TrustError", reason="its key is not admitted any more")
        if isinstance(answer, SiteDescription) and registered is not None and answer.site != registered:
            answer = Refusal(
                site=registered,
                code="TrustError",
                reason=f"its key was admitted for {registered!r}, but it calls itself {answer.site!r}; mend site.toml there",
            )
        most = self._job.federation.max_declared_records
        if isinstance(answer, SiteDescription) and answer.declared_records > most:
            answer = Refusal(
                site=answer.site,
                code="RunError",
                reason=f"it declares {answer.declared_records:,} records; federation.max_declared_records of the job is "
                f"{most:,}. If it has so many, have the job signed anew with a higher limit; else mend declared_records in "
                "site.toml there",
            )
        if isinstance(answer, SiteDescription):
            self._sites[node] = answer
            return
        name = registered or answer.site or f"node {node}"
        awaits = answer.code == AwaitingApproval.__name__
        if awaits:  # in our own words, whatever came with it
            answer = Refusal(site=name, code=answer.code, reason=str(AwaitingApproval()))
        self._refused[node] = (time.monotonic(), self._arrivals.get(node, 0), answer)
        if awaits:
            self._observer.site_awaits(name)
        else:
            self._observer.site_refused(name, f"{answer.code}: {answer.reason}")

    def _everyone_answered(self) -> bool:
        return not self._asked and len(self._online) >= self._job.federation.min_sites

    def _shortage(self) -> str:
        least = self._job.federation.min_sites
        if len(self._online) < least:
            return f"{len(self._online)} nodes are connected, federation.min_sites is {least}; start more sites or lower it."
        reasons = "; ".join(
            sorted(f"{refusal.site or node}: {refusal.reason}" for node, (*_, refusal) in self._refused.items())
        )
        return (
            f"{len(self.present())} of {len(self._online)} nodes take part, federation.min_sites is {least}"
            f"{f' ({reasons})' if reasons else ''}; look into the sites' logs."
        )
