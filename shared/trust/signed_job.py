"""Signed jobs, and the coordinator's signature of each round.

A person's key signs a job; the job names the coordinator's key, which signs the rounds. See `shared.trust.signing` for what a
signature is, and `client.site.guard` for what a site makes of it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field

from shared.errors import TrustError
from shared.files.json_files import canonical_json
from shared.job.job import Job
from shared.job.parsing import parse
from shared.trust.signing import Purpose, SignedDocument, SigningKey, VerifyKey

CLOCK_TOLERANCE = timedelta(minutes=5)  # how far the clocks of two machines may be apart

_TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


class _JobDocument(SignedDocument):
    """A signed job as it is written."""

    purpose = Purpose.JOB
    what = "a signed job"
    advice = "Use the version of silotune that signed it, or ask its sender for the file again."
    most_bytes = 1 << 20
    header = MappingProxyType({"format": "silotune-signed-job", "version": 1})
    url_safe = True

    format: Literal["silotune-signed-job"]
    version: int = Field(ge=1, le=1)  # a Literal would take 1.0 as well
    job: str  # as text: these bytes are signed, whatever a later version makes of them
    coordinator: str
    issued: str
    not_after: str


@dataclass(frozen=True, kw_only=True)
class SignedJob:
    """A job, how long it stands, and the key that will sign its rounds; every instance has a valid signature.

    Attributes:
        job: what the sites are asked to do.
        coordinator: the key that will sign the rounds.
        issued: when it was signed (UTC, whole seconds).
        not_after: when it ceases to be valid (UTC, whole seconds).
        signer: the key that signed. Whether it may sign jobs is for the reader to decide.
        signature: by `signer`, over all the other fields, as text.
    """

    job: Job
    coordinator: VerifyKey
    issued: datetime
    not_after: datetime
    signer: VerifyKey
    signature: str

    def __post_init__(self) -> None:
        if self.not_after <= self.issued:
            raise TrustError(
                f"the signed job is valid until {_time_text(self.not_after)}, which is not after it was issued, "
                f"{_time_text(self.issued)}; choose a later end."
            )
        self._document().verify()

    def to_json(self) -> str:
        """Return the document that `from_json` reads."""
        return canonical_json(self._document().model_dump())

    @classmethod
    def from_json(cls, text: str, *, source: str) -> SignedJob:
        """Read and verify a signed job; `source` names it in errors.

        Raises:
            TrustError: if it is longer than 1 MiB, malformed, has unknown or missing keys, or its signature is wrong.
            ConfigError: if it is signed and the job in it is not valid.
        """
        # 1. Verify the document before anything reads the job.
        document = _JobDocument.open(text.encode(errors="surrogatepass"), source=source)

        # 2. Read the job; what was signed and what will be executed must be one and the same text.
        try:
            raw = json.loads(document.job)
        except (ValueError, RecursionError):
            raw = None
        if not isinstance(raw, dict):
            raise TrustError(f"{source}: its job is not a JSON object; ask its sender for the file again.")
        job = parse(Job, raw, source=f"the job in {source}")
        if job.canonical_json() != document.job:
            raise TrustError(
                f"{source}: the job was tampered with or made by another version: written out by this silotune it is "
                "not the text that was signed. Use the version that signed it, or have it signed anew."
            )
        return cls(
            job=job,
            coordinator=VerifyKey.parse(document.coordinator, source=source),
            issued=_parse_time(document.issued, f"{source}: issued"),
            not_after=_parse_time(document.not_after, f"{source}: not_after"),
            signer=VerifyKey.parse(document.signer),
            signature=document.signature,
        )

    def check_time(self, now: datetime) -> None:
        """Check that the job is valid at `now` (with a time zone).

        Raises:
            TrustError: if it has expired, or was issued more than 5 minutes in the future.
        """
        if now >= self.not_after:
            raise TrustError(
                f"the signed job {self.job.name!r} expired on {_time_text(self.not_after)}, "
                f"{_duration(now - self.not_after)} ago; have it signed anew, or check the clock of this machine."
            )
        if self.issued - now > CLOCK_TOLERANCE:
            raise TrustError(
                f"the signed job {self.job.name!r} was issued on {_time_text(self.issued)}, "
                f"{_duration(self.issued - now)} in the future; check the clock of this machine and of the signer's."
            )

    def _document(self) -> _JobDocument:
        return _JobDocument(
            **_JobDocument.header,
            job=self.job.canonical_json(),
            coordinator=self.coordinator.text,
            issued=_time_text(self.issued),
            not_after=_time_text(self.not_after),
            signer=self.signer.text,
            signature=self.signature,
        )


def sign_job(
    job: Job, *, signer: SigningKey, coordinator: VerifyKey, issued: datetime, not_after: datetime
) -> SignedJob:
    """Sign `job`; fractions of a second in the times are cut off.

    Raises:
        TrustError: if a time has no time zone, or `not_after` is not after `issued`.
    """
    document = _JobDocument.sign(
        signer,
        job=job.canonical_json(),
        coordinator=coordinator.text,
        issued=_time_text(issued),
        not_after=_time_text(not_after),
    )
    return SignedJob.from_json(canonical_json(document.model_dump()), source="the signed job")


def round_fields(
    *, job_sha256: str, round_number: int, adapter: bytes, sent_at: str, attempt: int = 0, kind: str = "train"
) -> dict[str, Any]:
    """Return what the coordinator signs, for `Purpose.ROUND`, when it sends `adapter` out for one round.

    Args:
        attempt: at the round, where sites are told; 0 where they are not.
        kind: of the request. Only the two exchanges of an attempt say theirs: what else is asked for, the number of the round
            tells, and what was signed before there were attempts stays valid.
    """
    fields = {
        "job_sha256": job_sha256,
        "round": round_number,
        "adapter_sha256": hashlib.sha256(adapter).hexdigest(),
        "sent_at": sent_at,
    }
    return fields | ({"attempt": attempt} if attempt else {}) | ({"kind": kind} if kind in ("ready", "masked") else {})


def _parse_time(text: str, what: str) -> datetime:
    try:
        time = datetime.strptime(text, _TIME_FORMAT).replace(tzinfo=UTC)
        if _time_text(time) == text:
            return time
    except ValueError:
        pass
    raise TrustError(f"{what} is {text!r}; expected a UTC time such as 2026-01-31T12:00:00Z.")


def _time_text(time: datetime) -> str:
    # strftime would write the year 999 with three digits on some systems
    return _whole_seconds(time).isoformat().removesuffix("+00:00") + "Z"


def _whole_seconds(time: datetime) -> datetime:
    if time.tzinfo is None:
        raise TrustError(f"the time {time} has no time zone; expected one in UTC.")
    return time.astimezone(UTC).replace(microsecond=0)


def _duration(length: timedelta) -> str:
    return str(timedelta(seconds=int(length.total_seconds())))
