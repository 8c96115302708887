"""Typed messages <-> Flower records: the only place that knows record keys.

The exchanges: `describe` (who is there, and do you accept this job), `train` (one round) and `metrics` (what the sites
measure on their own held-out records, once, after the last round); where sites add shares of the noise (`privacy.mechanism`
"distributed") a round is `ready` (compute, and say so) and `masked` (this is the roster: send) instead. A refusal can answer any.
A message is one record, its adapter one value in it: Flower sends every object with a call of its own, and this makes three of
them where an array of the adapter makes six and one of every tensor a hundred. A refusal carries a code and a text that was
written for the coordinator's eyes: it never holds data of the site.

Guarantee: `unpack_*` never raises on what a site sent, allocates nothing that the message does not hold, and lets no
name through that could leave a folder, and no number that is not finite, beyond every count, or nothing that it could stand for:
what was read can be accounted for, recorded and read back (tests: tests/shared/wire/test_messages.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from flwr.app import ConfigRecord, Message, RecordDict

from shared.errors import RunError, TrustError, printable
from shared.files.json_files import canonical_json
from shared.job.job import Job
from shared.job.parsing import parse
from shared.job.values import NAME_PATTERN
from shared.limits import MAX_RECORDS, MAX_STEPS
from shared.link.envelope import EXPIRED, FAILED, LOST, UNREADABLE
from shared.privacy.randomness import Origin
from shared.secure_sum.messages import Ready
from shared.trust.receipts import MOST_RECEIPT_BYTES, Released
from shared.trust.signed_job import SignedJob

TRAIN = "train"
DESCRIBE = "query.describe"
METRICS = "query.metrics"
READY = "train.ready"
MASKED = "train.masked"
MALFORMED = "Malformed"
WITHHELD = "Withheld"
WITHHELD_REASON = "see the site's own log"
KEPT_ROUNDS = 3
"""A site answers a repeated request for one of so many of its last rounds with what it stored, at no charge."""
_CONTENT, _RECEIPT = "silotune", "receipt"
_MOST_REASON_CHARACTERS = 600
_MOST_VERSION_CHARACTERS = 64
_MOST_METRICS_CHARACTERS = 1 << 22
_MOST_JOB_CHARACTERS = 1 << 20  # as of a signed one
_MOST_COUNTED = 1 << 53
_ERRORS = {EXPIRED: "Expired", UNREADABLE: "Unreadable", LOST: "NotConnected", FAILED: "Failed"}
"""No count in a message is greater, nor a noisy one: all of them, and sums of thousands, are then numbers of every kind."""
# What reading a malformed header may raise; int(inf) overflows.
_MALFORMED = (KeyError, ValueError, TypeError, OverflowError, RunError, TrustError)

RequestKind = Literal["train", "metrics", "ready", "masked"]


@dataclass(frozen=True, kw_only=True)
class Order:
    """What makes a request binding: who ordered the job, and that this round was sent by whom the job names.

    Attributes:
        signed_job: the job with its signer's signature, checked.
        sent_at: ISO time at which the coordinator sent the round.
        signature: of the coordinator over the job's hash, round, adapter and time; see `shared.trust.signed_job.round_fields`.
    """

    signed_job: SignedJob
    sent_at: str
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class SiteDescription:
    """What a site says of itself before a run. All of it is public.

    Attributes:
        site: name of the site.
        declared_records: the site's public size.
        version: version of Silotune at the site.
    """

    site: str
    declared_records: int
    version: str


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """One round of one job.

    Attributes:
        job: the whole declarative job.
        round_number: 1-based.
        adapter: the global adapter, encoded by `shared.tensors.adapters`; of `masked` the roster of those who are ready.
        attempt: of `ready` and `masked`, 1-based; else 0.
        order: signatures; None in a simulation, which real sites refuse.
        waited_seconds: how long it has been here, behind another request; the site's own measure.
    """

    job: Job
    round_number: int
    adapter: bytes
    attempt: int = 0
    order: Order | None = None
    waited_seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True, kw_only=True)
class TrainReply:
    """A site's release for one round.

    Attributes:
        site: name of the site.
        round_number: the round that was asked for.
        job_sha256: hash of the job that was executed.
        update: the noised delta, encoded by `shared.tensors.adapters`; of `masked` the masked input, a `Masked` as bytes.
        declared_records: the site's public size.
        noise_multiplier, sample_rate, max_grad_norm, delta, steps: the mechanism as executed in this round; noise
            multiplier 0 means that nothing was protected.
        randomness: where sampling and noise came from.
        epsilon_budget: the site's cap, or 0.0 if it keeps that to itself.
    """

    site: str
    round_number: int
    job_sha256: str
    update: bytes
    declared_records: int
    noise_multiplier: float
    sample_rate: float
    max_grad_norm: float
    delta: float
    steps: int
    randomness: Origin
    epsilon_budget: float

    def released(self) -> bytes:
        """Return the bytes that ledger, logs and receipts name by their hash."""
        return self.update


@dataclass(frozen=True, kw_only=True)
class MetricsReply:
    """A site's release of metrics.

    Attributes:
        site: name of the site.
        job_sha256: hash of the job.
        adapter_sha256: hash of the encoded global adapter that was measured.
        counts: noisy counts by metric, see `shared.runtime.site_metrics`.
        noise_multiplier: of every count, as executed.
        randomness: where the noise came from.
    """

    site: str
    job_sha256: str
    adapter_sha256: str
    counts: dict[str, list[float]]
    noise_multiplier: float
    randomness: Origin

    def canonical(self) -> bytes:
        """Return the bytes that ledger, logs and receipts name by their hash."""
        return canonical_json(asdict(self)).encode()

    released = canonical


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A site's "no".

    Attributes:
        site: name of the site, or "" if it could not even be told.
        code: name of the error's class where it was decided by declared numbers and the request alone, else `WITHHELD`.
        reason: text that reveals nothing about the data.
    """

    site: str
    code: str
    reason: str

    @classmethod
    def withheld(cls, site: str) -> Refusal:
        """Return the one refusal for whatever might have to do with records: its code and text are always the same."""
        return cls(site=site, code=WITHHELD, reason=WITHHELD_REASON)


def describe_request(signed_job: SignedJob | None = None) -> RecordDict:
    """Return the content that asks a site to describe itself and, given a job, to check and prepare it."""
    header: dict[str, Any] = {"kind": "describe"}
    if signed_job is not None:
        header["signed_job"] = signed_job.to_json()
    return RecordDict({_CONTENT: ConfigRecord(header)})


def unpack_describe(content: RecordDict) -> SignedJob | None:
    """Return the job that a site is asked to prepare, or None.

    Raises:
        RunError: if this is no such request.
        TrustError, ConfigError: if the job's signature or the job is not valid.
    """
    text = _header(content, "describe").get("signed_job")
    return None if text is None else SignedJob.from_json(str(text), source="the job in the request")


def pack_description(description: SiteDescription) -> RecordDict:
    """Return the content of a description."""
    return RecordDict({_CONTENT: ConfigRecord({"kind": "description", **asdict(description)})})


def pack_request(request: TrainRequest, kind: RequestKind = "train") -> RecordDict:
    """Return the content of a request to train one round, or for the site metrics of the adapter."""
    header: dict[str, Any] = {"kind": kind, "round_number": request.round_number, "adapter": request.adapter}
    if request.attempt:
        header["attempt"] = request.attempt
    if request.order is None:
        header["job"] = request.job.canonical_json()
    else:
        header["signed_job"] = request.order.signed_job.to_json()
        header["sent_at"] = request.order.sent_at
        header["signature"] = request.order.signature
    return RecordDict({_CONTENT: ConfigRecord(header)})


def unpack_request(content: RecordDict, kind: RequestKind = "train") -> TrainRequest:
    """Return the request in `content`; of a signed job the signature holds, that of the round is not checked here.

    Raises:
        RunError: if it is not one.
        TrustError: if it names a job whose signature does not hold.
        ConfigError: if its job is not valid.
    """
    header = _header(content, kind)
    order = None
    try:
        round_number = int(header["round_number"])
        attempt = _whole(header.get("attempt", 0), most=MAX_STEPS)
        if "signed_job" in header:
            signed = SignedJob.from_json(str(header["signed_job"]), source="the job in the request")
            order = Order(signed_job=signed, sent_at=str(header["sent_at"]), signature=bytes(header["signature"]))
            job = signed.job
        else:
            text = str(header["job"])
            if len(text) > _MOST_JOB_CHARACTERS:
                raise ValueError("too long")
            job = parse(Job, json.loads(text), source="the job in the request")
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError):
        raise RunError("the request has no readable job or round number.") from None
    return TrainRequest(
        job=job, round_number=round_number, adapter=_bytes(header, "adapter"), attempt=attempt, order=order
    )


def pack_reply(reply: TrainReply) -> RecordDict:
    """Return the content of a training reply."""
    return RecordDict({_CONTENT: ConfigRecord({"kind": "update", **asdict(reply)})})


def pack_ready(ready: Ready) -> RecordDict:
    """Return the content of a site's word that it is ready."""
    return RecordDict({_CONTENT: ConfigRecord({"kind": "ready", "site": ready.site, "ready": ready.to_bytes()})})


def pack_metrics(reply: MetricsReply) -> RecordDict:
    """Return the content of a release of site metrics."""
    return RecordDict({_CONTENT: ConfigRecord({"kind": "metrics", "release": reply.canonical().decode()})})


def released(request: TrainRequest, sent_at: str, release: TrainReply | MetricsReply) -> Released:
    """Return what the receipt of a release is for."""
    return Released(
        site=release.site,
        job_sha256=request.job.sha256,
        round=request.round_number,
        sent_at=sent_at,
        adapter_sha256=hashlib.sha256(request.adapter).hexdigest(),
        release_sha256=hashlib.sha256(release.released()).hexdigest(),
        declared_records=release.declared_records if isinstance(release, TrainReply) else 0,
    )


def with_receipt(content: RecordDict, receipt: bytes) -> RecordDict:
    """Return the content of a release with what proves whose it is; see `shared.trust.receipts`."""
    return RecordDict({**content, _RECEIPT: ConfigRecord({"signature": receipt})})


def unpack_receipt(message: Message) -> bytes:
    """Return the receipt in an answer; empty if there is none that could be one."""
    try:
        found = message.content.config_records[_RECEIPT]["signature"]
    except (KeyError, ValueError):
        return b""
    return found if isinstance(found, bytes) and len(found) <= MOST_RECEIPT_BYTES else b""


def pack_refusal(refusal: Refusal) -> RecordDict:
    """Return the content of a refusal."""
    return RecordDict({_CONTENT: ConfigRecord({"kind": "refusal", **asdict(refusal)})})


def unpack_description(message: Message) -> SiteDescription | Refusal:
    """Return what a site answered to `describe_request`."""
    answer = _refusal(message)
    if answer is not None:
        return answer
    try:
        header = _header(message.content, "description")
        return SiteDescription(
            site=_site_name(header),
            declared_records=_whole(header["declared_records"], least=1, most=MAX_RECORDS),
            version=printable(str(header["version"])[:_MOST_VERSION_CHARACTERS]),
        )
    except _MALFORMED:
        return Refusal(site="", code=MALFORMED, reason="the site's description could not be read")


def unpack_reply(message: Message) -> TrainReply | Refusal:
    """Return what a site answered to a training request; anything malformed becomes a refusal."""
    answer = _refusal(message)
    if answer is not None:
        return answer
    try:
        header = _header(message.content, "update")
        randomness = str(header["randomness"])
        return TrainReply(
            site=_site_name(header),
            round_number=_whole(header["round_number"], most=MAX_STEPS),
            job_sha256=_sha256(header["job_sha256"]),
            update=_bytes(header, "update"),
            declared_records=_whole(header["declared_records"], least=1, most=MAX_RECORDS),
            noise_multiplier=_finite(header["noise_multiplier"], least=0.0),
            sample_rate=_finite(header["sample_rate"], least=0.0, most=1.0),
            max_grad_norm=_finite(header["max_grad_norm"], least=0.0),
            delta=_finite(header["delta"], least=0.0, most=1.0),
            steps=_whole(header["steps"], most=MAX_STEPS),
            randomness="os" if randomness == "os" else "injected",
            epsilon_budget=_finite(header["epsilon_budget"], least=0.0),
        )
    except _MALFORMED:
        return Refusal(site="", code=MALFORMED, reason="the site's reply could not be read")


def unpack_ready(message: Message) -> Ready | Refusal:
    """Return what a site answered when it was asked to get ready; its signature is not checked here."""
    answer = _refusal(message)
    if answer is not None:
        return answer
    try:
        return Ready.from_bytes(_bytes(_header(message.content, "ready"), "ready"))
    except _MALFORMED:
        return Refusal(site="", code=MALFORMED, reason="the site's word that it is ready could not be read")


def unpack_metrics(message: Message) -> MetricsReply | Refusal:
    """Return what a site answered to a request for its metrics; anything malformed becomes a refusal."""
    answer = _refusal(message)
    if answer is not None:
        return answer
    try:
        text = str(_header(message.content, "metrics")["release"])
        if len(text) > _MOST_METRICS_CHARACTERS:
            raise ValueError("too long")
        fields: dict[str, Any] = json.loads(text)
        found = MetricsReply(
            site=_site_name(fields),
            job_sha256=_sha256(fields["job_sha256"]),
            adapter_sha256=_sha256(fields["adapter_sha256"]),
            counts={
                str(name): [_finite(value, least=-_MOST_COUNTED, most=_MOST_COUNTED) for value in values]
                for name, values in fields["counts"].items()
            },
            noise_multiplier=_finite(fields["noise_multiplier"], least=0.0),
            randomness="os" if fields["randomness"] == "os" else "injected",
        )
        found.canonical()  # half a character has no bytes
        return found
    except (*_MALFORMED, AttributeError, RecursionError):
        return Refusal(site="", code=MALFORMED, reason="the site's metrics could not be read")


def carries_release(message: Message) -> bool:
    """Return whether a reply holds an update or metrics, not a description, a refusal or an error."""
    if not message.has_content():
        return False
    record = message.content.config_records.get(_CONTENT)
    return record is not None and record.get("kind") in ("update", "metrics")


def _refusal(message: Message) -> Refusal | None:
    if message.has_error():
        return Refusal(
            site="",
            code=_ERRORS.get(message.error.code, f"Error{message.error.code}"),
            reason=_shortened(message.error.reason or "the site did not answer"),
        )
    try:
        header = _header(message.content, "refusal")
        site, code, reason = (_shortened(str(header[key])) for key in ("site", "code", "reason"))
        return Refusal(site=site.replace("\n", " "), code=code.replace("\n", " "), reason=reason)
    except _MALFORMED:
        return None


def _whole(value: Any, *, least: int = 0, most: int = _MOST_COUNTED) -> int:
    number = int(value)
    if not least <= number <= most:
        raise ValueError("a number that no count can be")
    return number


def _finite(value: Any, *, least: float, most: float = math.inf) -> float:
    number = float(value)
    if not (math.isfinite(number) and least <= number <= most):
        raise ValueError("not a finite number, or not one that it can be")
    return number


def _sha256(value: Any) -> str:
    if not re.fullmatch("[0-9a-f]{64}", str(value)) or str(value).endswith("\n"):
        raise ValueError("not a SHA-256")
    return str(value)


def _site_name(header: dict[str, Any]) -> str:
    """Return the site's name; it becomes part of a path, so only a plain name passes."""
    name = str(header["site"])
    if not re.fullmatch(NAME_PATTERN, name) or name.endswith("\n"):
        raise RunError("the site's name is not a plain name.")
    return name


def _shortened(text: str) -> str:
    """Return `text` bounded, and without what a terminal would act on.

    Lines after the first are indented, so that none of them looks like a line of ours in a log or a table.
    """
    plain = printable(text[: _MOST_REASON_CHARACTERS + 1], "?", lines=True)
    short = plain if len(plain) <= _MOST_REASON_CHARACTERS else plain[:_MOST_REASON_CHARACTERS] + "…"
    return "\n    ".join(line.strip() for line in short.split("\n"))


def _header(content: RecordDict, kind: str) -> dict[str, Any]:
    record = content.config_records.get(_CONTENT)
    if record is None or record.get("kind") != kind:
        raise RunError(
            f"expected a message of kind {kind!r}, found {None if record is None else record.get('kind')!r}."
        )
    return dict(record)


def _bytes(header: dict[str, Any], key: str) -> bytes:
    data = header.get(key)
    if not isinstance(data, bytes):
        raise RunError(f"the message carries no {key}.")
    return data
