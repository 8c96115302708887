"""Who takes part: asks every node that connects who it is and, for a signed job, whether it accepts and is prepared."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from flwr.serverapp.grid import Grid

from server.rounds.earlier_requests import Asked
from server.rounds.observer import Observer
from shared.errors import RunError
from shared.job.job import Job
from shared.trust.signed_job import SignedJob, round_fields
from shared.trust.signing import Purpose, SigningKey
from shared.wire.messages import DESCRIBE, Order, Refusal, SiteDescription, describe_request, unpack_description

POLL_SECONDS = 0.1
DESCRIBE_TIMEOUT_SECONDS = 120.0
ASK_AGAIN_SECONDS = 60.0


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
        asked_since: returns what earlier processes of this run asked of sites for rounds after the given one, oldest first.
    """

    signed_job: SignedJob
    key: SigningKey
    registered: Callable[[], Mapping[int, str]]
    may_repeat: Callable[[str], bool] = lambda message_id: False
    keys: Callable[[str], Collection[bytes]] | None = None
    asked_since: Callable[[int], Sequence[Asked]] = lambda round_number: ()

    def order(self, round_number: int, adapter: bytes) -> Order:
        """Return the signatures that go with one round's request."""
        sent_at = datetime.now(UTC).isoformat(timespec="milliseconds")
        sha256 = self.signed_job.job.sha256
        fields = round_fields(job_sha256=sha256, round_number=round_number, adapter=adapter, sent_at=sent_at)
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
        self._refused: dict[int, tuple[float, Refusal]] = {}
        self._online: list[int] = []
        self._told: list[SiteDescription] = []
        self._names: dict[int, str] = {}  # under which keys were admitted

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
        started, told = time.monotonic(), ""
        while True:
            arrived = self.update()
            sites = self.present()
            enough = len(sites) >= self._job.federation.min_sites
            late = time.monotonic() - started > DESCRIBE_TIMEOUT_SECONDS
            if enough and (late or not self._asked):
                return sites
            if self._authority is None and (late or self._everyone_answered()):
                raise RunError(self._shortage())
            if not enough and not self._asked and (problem := self._shortage()) != told:
                told = problem
                self._observer.waiting(problem)
            if not arrived:
                time.sleep(POLL_SECONDS if self._asked else 5 * POLL_SECONDS)

    def update(self) -> bool:
        """Ask nodes that are new, read the answers that came, and return whether any did; never waits."""
        self._online = sorted(self._grid.get_node_ids())
        now = time.monotonic()
        pending = set(self._asked.values())
        for node, (when, _) in list(self._refused.items()):
            if node not in self._online or now - when > ASK_AGAIN_SECONDS:
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
        self._refused[node] = (time.monotonic(), answer)
        self._observer.site_refused(registered or answer.site or f"node {node}", f"{answer.code}: {answer.reason}")

    def _everyone_answered(self) -> bool:
        return not self._asked and len(self._online) >= self._job.federation.min_sites

    def _shortage(self) -> str:
        least = self._job.federation.min_sites
        if len(self._online) < least:
            return f"{len(self._online)} nodes are connected, federation.min_sites is {least}; start more sites or lower it."
        reasons = "; ".join(
            sorted(f"{refusal.site or node}: {refusal.reason}" for node, (_, refusal) in self._refused.items())
        )
        return (
            f"{len(self.present())} of {len(self._online)} nodes take part, federation.min_sites is {least}"
            f"{f' ({reasons})' if reasons else ''}; look into the sites' logs."
        )
