"""A submitted job as a run: the coordinator's folder tells it everything, and hears what happens."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict

from server.app import Run, make_server_app, privacy_of, write_spent
from server.coordinator.progress import Progress
from server.coordinator.run_file import evaluation_records, settings_of
from server.coordinator.watching import watching
from server.link.grid import LinkGrid
from server.records.rounds import RoundRecord
from server.rounds.earlier_requests import Asked
from server.rounds.observer import Observer, Observers
from server.rounds.roster import Authority
from server.runs.folder import RunFolder
from server.store.checkpoint import Checkpoint
from server.store.home import CoordinatorHome
from server.store.submission import Submission
from server.tracking import Watched
from shared.files.atomic import append_line
from shared.job.job import Job
from shared.link.envelope import COORDINATOR_NODE_ID
from shared.site_weights import noise_warnings
from shared.trust.audit_log import AuditLog, Event, read
from shared.trust.keystore import passphrase_from_environment
from shared.trust.receipts import Receipt
from shared.trust.signed_folder import sign_folder
from shared.wire.messages import MetricsReply, SiteDescription, TrainReply

log = logging.getLogger("silotune.coordinator")

RECEIPTS_FILE = "receipts.jsonl"
_NAMES_AN_ENTRY = 200


def run_submission(
    grid: LinkGrid,
    home: CoordinatorHome,
    submission: Submission,
    progress: Progress | None = None,
    watched: Watched | None = None,
) -> None:
    """Run or resume a submitted job over `grid` until it is complete.

    Args:
        progress: is told what sites do.
        watched: trackers and the meter of energy; none by default.

    Raises:
        Halted: it was told to end before.
    """
    signed, settings = submission.signed_job(), settings_of(submission)
    key = home.load_round_key(passphrase_from_environment())
    observer = _Recorder(submission, signed.job, home.open_log(key), progress)
    authority = Authority(
        signed_job=signed,
        key=key,
        registered=grid.names,
        may_repeat=grid.may_repeat,
        keys=grid.keys,
        holder=grid.holder,
        asked_since=observer.asked_since,
        arrivals=grid.arrivals,
    )
    submission.note("running", problem=None, defect=False)
    run = Run(
        job=signed.job,
        folder=submission.run_folder,
        public_records=evaluation_records(submission, signed.job),
        compute=settings.compute,
        details={"mode": "federation", "signer": signed.signer.text, "coordinator_key": key.verify_key.text},
        resume=(submission.run_folder / "job.json").exists(),
        evaluate_every=settings.evaluate_every,
        observer=observer,
        authority=authority,
    )
    context = Context(
        run_id=grid.run_id, node_id=COORDINATOR_NODE_ID, node_config={}, state=RecordDict(), run_config={}
    )
    with watching(watched or Watched(), signed.job, run.folder, settings.compute, log.warning) as others:
        run.observer = Observers(observer, others)
        make_server_app(run)(grid, context)
    sign_folder(submission.run_folder / "adapter", key)
    submission.note("completed", problem=None, waiting=None)


def write_spent_of(submission: Submission, audit: Path) -> None:
    """State what the sites of a run that nobody goes on with may have spent, by its checkpoint and the audit log alone.

    A process that died in a round, or was told to end before it had loaded its model, stated nothing of it.

    Raises:
        SilotuneError: something of it cannot be read; what is complete is written.
    """
    path, job = submission.run_folder, submission.signed_job().job
    with RunFolder(path, job, resume=True) as folder:
        try:
            write_spent(folder, privacy_of(job, path), lambda number: asked_after(audit, job.sha256, number))
        finally:
            folder.mark_stopped()


def asked_after(audit: Path, job_sha256: str, round_number: int) -> list[Asked]:
    """Return what was asked of sites for rounds after the given one and what came, oldest first, from the audit log."""
    found: list[Asked] = []
    latest: dict[tuple[str, int], int] = {}
    tested: set[str] = set()
    for entry in read(audit):
        details = entry.details
        if details.get("job") != job_sha256:
            continue
        if details.get("randomness") == "injected":
            tested.add(details["site"])
        if not (details.get("round") or 0) > round_number:
            continue
        number = int(details["round"])
        if entry.event == Event.ROUND_ASKED:
            for name, size in zip(details["sites"], details["declared_records"], strict=True):
                site = SiteDescription(site=name, declared_records=size, version="")
                latest[name, number] = len(found)
                found.append(Asked(site=site, round_number=number, adapter_sha256=details["adapter_sha256"]))
        elif entry.event == Event.UPDATE_ACCEPTED and (details["site"], number) in latest:
            place = latest[details["site"], number]
            found[place] = replace(found[place], update_sha256=details["sha256"])
    return [replace(one, randomness="injected") if one.site.site in tested else one for one in found]


class _Recorder(Observer):
    """Writes what happens to the job's state and to the audit log, and reads there what an earlier process was at."""

    def __init__(self, submission: Submission, job: Job, log: AuditLog, progress: Progress | None = None) -> None:
        self._submission, self._job, self._log = submission, job, log
        self._progress = progress or Progress()
        self._progress.of(job)
        self._refused: dict[str, str] = {}
        self._awaiting: set[str] = set()
        self._sizes: dict[str, int] = {}
        self._job_sha256 = submission.state()["job_sha256"]
        self._warned: set[str] = set()
        self._doubted: dict[str, str] = dict(submission.state().get("doubted") or {})

    def asked_since(self, round_number: int) -> list[Asked]:
        """Return what earlier processes asked of sites for later rounds and what came."""
        return asked_after(self._log.folder, self._job_sha256, round_number)

    def _note(self, event: Event, **details: Any) -> None:
        """Note in the audit log what happened to this job."""
        self._log.append(event, job=self._job_sha256, **details)

    def resumed(self, checkpoint: Checkpoint) -> None:
        """See `Observer`; a round that became durable just before the process died gets its entry now."""
        record = checkpoint.history[-1]
        noted = {
            entry.details.get("round")
            for entry in read(self._log.folder)
            if entry.event == Event.ROUND_COMPLETED and entry.details.get("job") == self._job_sha256
        }
        if record.round not in noted:
            self._round_completed(record)

    def roster(self, sites: Sequence[SiteDescription]) -> None:
        """See `Observer`."""
        for site in sites:
            self._refused.pop(site.site, None)
            self._awaiting.discard(site.site)
            self._sizes[site.site] = site.declared_records
        if self._job.privacy.mechanism == "dp-sgd":
            found = noise_warnings({site.site: site.declared_records for site in sites}, self._job.aggregation)
            for text in sorted({*found} - self._warned):
                log.warning("%s", text)
            self._warned |= {*found}
        names = sorted(site.site for site in sites)
        self._submission.note(sites=names, refused=self._refused, awaiting=sorted(self._awaiting), waiting=None)

    def site_refused(self, site: str, reason: str) -> None:
        """See `Observer`."""
        log.warning("site %s refused: %s", site, reason, extra={"site": site})
        if self._refused.get(site) != reason:
            self._note(Event.SITE_REFUSED, site=site, reason=reason)
        self._refused[site] = reason
        self._awaiting.discard(site)
        self._submission.note(refused=self._refused, awaiting=sorted(self._awaiting))

    def site_awaits(self, site: str) -> None:
        """See `Observer`."""
        log.info("site %s is waiting for approval", site, extra={"site": site})
        if site not in self._awaiting:
            self._note(Event.SITE_AWAITS, site=site)
        self._awaiting.add(site)
        self._refused.pop(site, None)
        self._submission.note(refused=self._refused, awaiting=sorted(self._awaiting))

    def waiting(self, reason: str) -> None:
        """See `Observer`."""
        log.warning("waiting: %s", reason)
        self._submission.note(waiting=reason)

    def ready_asked(self, round_number: int, sites: Sequence[str], adapter: bytes) -> None:
        """See `Observer`."""
        self._note_asked(Event.READY_ASKED, round_number, sites, adapter)
        self._progress.asked(round_number, sites)

    def site_ready(self, round_number: int, site: str, problem: str | None) -> None:
        """See `Observer`."""
        if problem is None:
            self._progress.answered(site, "ready")
        else:
            self._progress.failed(site, problem, replied=False)
            log.warning(
                "round %d, site %s is not ready: %s", round_number, site, problem, extra=_about(round_number, site)
            )

    def round_started(self, round_number: int, sites: Sequence[str], adapter: bytes) -> None:
        """See `Observer`."""
        self._note_asked(Event.ROUND_ASKED, round_number, sites, adapter)
        shared = self._job.privacy.mechanism == "distributed" and round_number <= self._job.training.rounds
        self._progress.asked(round_number, sites, "ready" if shared else "training")

    def _note_asked(self, event: Event, round_number: int, sites: Sequence[str], adapter: bytes) -> None:
        sha256 = hashlib.sha256(adapter).hexdigest()
        # An entry of too many names would be cut, and with it what a later process must know was asked.
        for first in range(0, len(sites), _NAMES_AN_ENTRY):
            some = list(sites[first : first + _NAMES_AN_ENTRY])
            sizes = [self._sizes[site] for site in some]
            self._note(
                event,
                round=round_number,
                sites=some,
                declared_records=sizes,
                adapter_sha256=sha256,
                bytes=len(adapter),
            )

    def stopped_early(self, checkpoint: Checkpoint) -> None:
        """See `Observer`."""
        number = checkpoint.round_number
        log.info("stopped early after round %d, by the job's rule", number, extra={"round": number})
        self._submission.note(stopped_early=checkpoint.round_number)

    def receipt(self, receipt: Receipt) -> None:
        """See `Observer`; kept in the run folder, one line each."""
        append_line(self._submission.run_folder / RECEIPTS_FILE, receipt.line())

    def metrics_asked(self, number: int, sites: Sequence[str], adapter: bytes) -> None:
        """See `Observer`; the log names it like a round after the last one."""
        self.round_started(number, sites, adapter)

    def metrics_judged(self, site: str, reply: MetricsReply | None, problem: str | None) -> None:
        """See `Observer`."""
        if reply is not None:
            self._progress.answered(site, "sent")
            facts = _sha256_and_size(reply.canonical())
            self._note(Event.METRICS_ACCEPTED, site=site, randomness=reply.randomness, **facts)
        else:
            self._progress.failed(site, problem or "", replied=False)
            log.warning("metrics of site %s: %s", site, problem, extra={"site": site})
            self._note(Event.METRICS_REFUSED, site=site, reason=problem)

    def update_judged(self, round_number: int, site: str, reply: TrainReply | None, problem: str | None) -> None:
        """See `Observer`."""
        facts = {} if reply is None else _sha256_and_size(reply.update) | {"randomness": reply.randomness}
        if problem is None:
            self._progress.answered(site, "sent")
            self._note(Event.UPDATE_ACCEPTED, round=round_number, site=site, **facts)
        else:
            self._progress.failed(site, problem, replied=reply is not None)
            log.warning("round %d, site %s: %s", round_number, site, problem, extra=_about(round_number, site))
            self._note(Event.UPDATE_REFUSED, round=round_number, site=site, reason=problem, **facts)

    def update_doubted(self, round_number: int, site: str, doubt: str) -> None:
        """See `Observer`."""
        log.warning("round %d, site %s: %s", round_number, site, doubt, extra=_about(round_number, site))
        self._note(Event.UPDATE_DOUBTED, round=round_number, site=site, reason=doubt)
        self._doubted[site] = f"round {round_number}: {doubt}"
        self._submission.note(doubted=self._doubted)

    def round_done(self, checkpoint: Checkpoint) -> None:
        """See `Observer`."""
        record = checkpoint.history[-1]
        log.info(
            "round %d: %s, sites %s, %s",
            record.round,
            record.metrics,
            ", ".join(record.sites) or "not told",
            "time not told" if record.seconds is None else f"{record.seconds:.2f} s",
            extra={"round": record.round},
        )
        self._round_completed(record)
        self._submission.note(round=record.round, metrics=record.metrics, waiting=None)

    def _round_completed(self, record: RoundRecord) -> None:
        if record.round:  # 0 is before training
            sites, epsilon = record.sites, record.epsilon_max
            self._note(Event.ROUND_COMPLETED, round=record.round, sites=sites, epsilon_max=epsilon)


def _about(round_number: int, site: str) -> dict[str, Any]:
    """Return what a log line is about."""
    return {"round": round_number, "site": site}


def _sha256_and_size(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
