"""What earlier processes of a run asked of the sites after the checkpoint that it resumes from: all of it may be released.

A coordinator that died in a round asks for it again, and sites answer with the bytes that they stored. One whose folder was put
back to an older checkpoint asks for several rounds again, and if an adapter differs from the earlier one by a bit, because other
sites answered this time, that is another release with another charge. The audit log, which is not put back with the run folder,
knows what was asked and what came.

Guarantee (tests: tests/server/rounds/test_interrupted_rounds.py): `epsilon_bound` counts every release that a request in the
log may have led to, of however many timelines; what came and was accepted counts as executed, once for each different update. A
site that said of any of it that its randomness was a test's has no epsilon for that.

Not guaranteed: a log that was put back as well, or a checkpoint of a timeline that was itself put back and left. The sites' own
ledgers still have every charge.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from server.rounds.releases import unknown_release, with_update
from shared.job.job import Job
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import Origin
from shared.privacy.statement import SiteRelease
from shared.wire.messages import KEPT_ROUNDS, SiteDescription


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request of an earlier process to one site.

    Attributes:
        site: whom.
        round_number: for which round; the one after the last for site metrics.
        adapter_sha256: what it had to start from.
        update_sha256: of the update that came and was accepted; None if none is known of.
        randomness: "injected" if anything that came from the site was made with a test's; else as of all that nobody saw.
    """

    site: SiteDescription
    round_number: int
    adapter_sha256: str
    update_sha256: str | None = None
    randomness: Origin = "os"


@dataclass
class _Request:
    """Requests that a site answers alike, since it keeps what it answered the first: for one round, from one adapter."""

    adapter_sha256: str
    updates: set[str] = field(default_factory=set)
    answer_is_kept: bool = True


class EarlierRequests:
    """What was asked after a checkpoint, oldest first."""

    def __init__(self, asked: Iterable[Asked] = ()) -> None:
        self._sites: dict[str, SiteDescription] = {}
        self._requests: dict[tuple[str, int], list[_Request]] = {}
        self._injected: set[str] = set()
        for one in asked:
            self._take(one)

    def _take(self, one: Asked) -> None:
        name, number = one.site.site, one.round_number
        self._sites[name] = one.site
        if one.randomness == "injected":
            self._injected.add(name)
        same_round = self._requests.setdefault((name, number), [])
        for (other, earlier), requests in self._requests.items():
            for request in requests:
                # A site keeps the last request of each of its last rounds.
                replaced = earlier == number and request.adapter_sha256 != one.adapter_sha256
                if other == name and (replaced or number >= earlier + KEPT_ROUNDS):
                    request.answer_is_kept = False
        asked = self._repeated(name, number, one.adapter_sha256)
        if asked is None:
            asked = _Request(one.adapter_sha256)
            same_round.append(asked)
        if one.update_sha256 is not None:
            asked.updates.add(one.update_sha256)

    def _repeated(self, site: str, round_number: int, adapter_sha256: str) -> _Request | None:
        """Return the earlier request that a site takes this one for a repetition of."""
        for request in self._requests.get((site, round_number), []):
            if request.answer_is_kept and request.adapter_sha256 == adapter_sha256:
                return request
        return None

    def lost(self, site: str, round_number: int, adapter_sha256: str) -> int:
        """Return how many requests have no known outcome and cannot be what an answer to this one answers."""
        repeated = self._repeated(site, round_number, adapter_sha256)
        return sum(
            not request.updates and request is not repeated for request in self._requests.get((site, round_number), [])
        )

    def came_from_others(self, site: str, round_number: int, adapter_sha256: str) -> int:
        """Return how many updates of a round came from requests that this one does not repeat."""
        repeated = self._repeated(site, round_number, adapter_sha256)
        requests = self._requests.get((site, round_number), [])
        return sum(len(request.updates) for request in requests if request is not repeated)

    def adapters_asked(self, site: str, round_number: int) -> set[str]:
        """Return the hashes of the adapters from which a site was asked for a round."""
        return {request.adapter_sha256 for request in self._requests.get((site, round_number), [])}

    def sites_asked(self, round_number: int) -> set[str]:
        """Return the names of the sites that were asked for a round."""
        return {site for site, number in self._requests if number == round_number}

    def accounted(self, releases: dict[str, SiteRelease], job: Job) -> dict[str, SiteRelease]:
        """Return the releases of a checkpoint with all of this noted; noting it twice changes nothing."""
        result = dict(releases)
        plan = PrivacyPlan.from_job(job)
        for (name, number), requests in sorted(self._requests.items()):
            release = result.get(name) or unknown_release(name, self._sites[name].declared_records, plan)
            if name in self._injected:
                release = replace(release, randomness="injected")
            if number > job.training.rounds:  # one release of metrics, however often it is asked for
                result[name] = replace(release, metrics=job.site_metrics.names, metrics_mechanism=plan.metrics)
                continue
            others = tuple(n for n in release.unanswered if n != number)
            open_requests = sum(not request.updates for request in requests)
            per_round = plan.mechanism(job.training.local_steps) if plan.private else None
            release = replace(release, unanswered=(*others, *[number] * open_requests), per_round=per_round)
            for update in sorted({update for request in requests for update in request.updates}):
                release = with_update(release, number, update, per_round)
            result[name] = release
        return result
