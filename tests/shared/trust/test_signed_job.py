"""A signed job that was changed anywhere is refused."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError, TrustError
from shared.files.json_files import canonical_json
from shared.job.job import Job
from shared.job.parsing import parse
from shared.trust.signed_job import SignedJob, round_fields, sign_job
from shared.trust.signing import Purpose, SigningKey

ISSUED = datetime(2026, 1, 31, 12, tzinfo=UTC)
END = ISSUED + timedelta(days=7)
SIGNER = SigningKey.from_bytes(bytes(32))
COORDINATOR = SigningKey.from_bytes(b"\1" * 32)
ROUND: dict[str, Any] = {"job_sha256": "a" * 64, "round_number": 3, "adapter": b"adapter", "sent_at": "2026-01-31"}


def make_job(**changes: Any) -> Job:
    raw = {
        "name": "t",
        "task": {"kind": "sequence_classification", "labels": ["a", "ü"]},
        "training": {"rounds": 2},
    }
    return parse(Job, raw | changes, source="test")


SIGNED = sign_job(make_job(), signer=SIGNER, coordinator=COORDINATOR.verify_key, issued=ISSUED, not_after=END)


def forge(**changes: Any) -> str:
    """Return the signed job with changed fields, signed anew by the right key."""
    fields = json.loads(SIGNED.to_json()) | changes
    del fields["signature"]
    signature = base64.urlsafe_b64encode(SIGNER.sign(Purpose.JOB, fields)).decode().rstrip("=")
    return canonical_json(fields | {"signature": signature})


def test_a_signed_job_comes_back() -> None:
    back = SignedJob.from_json(SIGNED.to_json(), source="job.json")
    assert back == SIGNED
    assert back.job.sha256 == make_job().sha256
    assert back.to_json() == SIGNED.to_json()
    pretty = json.dumps(json.loads(SIGNED.to_json()), indent=2)  # the layout of the envelope is not signed
    assert SignedJob.from_json(pretty, source="job.json") == SIGNED


def test_times_are_kept_in_utc_and_whole_seconds() -> None:
    local = ISSUED.astimezone(timezone(timedelta(hours=5))) + timedelta(microseconds=999_999)
    signed = sign_job(make_job(), signer=SIGNER, coordinator=COORDINATOR.verify_key, issued=local, not_after=END)
    assert signed == SIGNED
    with pytest.raises(TrustError, match="has no time zone"):
        sign_job(
            make_job(),
            signer=SIGNER,
            coordinator=COORDINATOR.verify_key,
            issued=datetime(2026, 1, 1),
            not_after=END,
        )
    with pytest.raises(TrustError, match="is not after it was issued"):
        sign_job(make_job(), signer=SIGNER, coordinator=COORDINATOR.verify_key, issued=ISSUED, not_after=ISSUED)


@pytest.mark.parametrize(
    "changes",
    [
        {"job": make_job(name="other")},
        {"coordinator": SIGNER.verify_key},
        {"issued": ISSUED - timedelta(seconds=1)},
        {"not_after": END + timedelta(seconds=1)},
        {"signer": COORDINATOR.verify_key},
        {"signature": "A" * 86},
    ],
)
def test_an_instance_cannot_hold_a_wrong_signature(changes: dict[str, Any]) -> None:
    with pytest.raises(TrustError, match="signature of the job is not one by"):
        replace(SIGNED, **changes)


FIELDS = sorted(json.loads(SIGNED.to_json()))


@settings(max_examples=300, deadline=None)
@given(field=st.sampled_from(FIELDS), data=st.data())
def test_any_changed_field_is_refused(field: str, data: st.DataObject) -> None:
    document = json.loads(SIGNED.to_json())
    value = str(document[field])
    position = data.draw(st.integers(0, len(value)))
    end = data.draw(st.integers(position, min(len(value), position + 3)))
    changed = value[:position] + data.draw(st.text(max_size=3)) + value[end:]
    document[field] = int(changed) if field == "version" and changed.isascii() and changed.isdecimal() else changed
    if str(document[field]) != value:
        with pytest.raises(TrustError):
            SignedJob.from_json(json.dumps(document), source="job.json")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_changed_character_is_refused_or_means_the_same(data: st.DataObject) -> None:
    text = SIGNED.to_json()
    position = data.draw(st.integers(0, len(text) - 1))
    changed = text[:position] + data.draw(st.characters()) + text[position + 1 :]
    try:
        found = SignedJob.from_json(changed, source="job.json")
    except TrustError:
        return
    assert found == SIGNED


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_another_type_is_refused(field: str) -> None:
    for value in (None, 7, 1.0, True, [], {}, {"name": "t"}):
        document = json.loads(SIGNED.to_json())
        if (type(value), value) != (type(document[field]), document[field]):
            with pytest.raises(TrustError, match=r"job\.json"):
                SignedJob.from_json(json.dumps(document | {field: value}), source="job.json")


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_refused(field: str) -> None:
    document = json.loads(SIGNED.to_json())
    del document[field]
    with pytest.raises(TrustError, match=r"job\.json is (not a signed job|a signed job of version None)"):
        SignedJob.from_json(json.dumps(document), source="job.json")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not a signed job"),
        ("[]", "is not a signed job"),
        ("{}", "is not a signed job"),
        ("[" * 100_000, "nested too deep"),
        ('{"format": NaN}', "is not a signed job"),
        ("9" * 10_000, "is not a signed job"),
        (SIGNED.to_json()[:-1], "is not a signed job"),
        (SIGNED.to_json()[:-1] + ',"extra":1}', "unknown key 'extra'"),
        (SIGNED.to_json()[:-1] + ',"version":1}', "it holds a key twice"),
        ("\ud800" * 10, "is not a signed job"),
        (" " * (1 << 20) + SIGNED.to_json(), "longer than 1048576 bytes"),
        ("ü" * (1 << 19) + "x", "longer than 1048576 bytes"),
    ],
)
def test_what_is_no_signed_job_is_refused(text: str, reason: str) -> None:
    with pytest.raises(TrustError, match=reason):
        SignedJob.from_json(text, source="job.json")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 2}, "version: .* less than or equal to 1 .found 2.*Use the version of silotune that signed it"),
        ({"version": True}, "version: .*found True"),
        ({"format": "x"}, "is not a signed job"),
        ({"job": SIGNED.job.canonical_json() + " "}, "tampered with or made by another version"),
        ({"job": SIGNED.job.canonical_json().replace('"rounds":2', '"rounds":2.0')}, "tampered with"),
        ({"job": SIGNED.job.canonical_json().replace('"seed":0,', "")}, "tampered with"),
        ({"job": '{"name":"x",' + SIGNED.job.canonical_json()[1:]}, "tampered with"),
        ({"job": "[]"}, "its job is not a JSON object"),
        ({"job": "{"}, "its job is not a JSON object"),
        ({"job": "[" * 100_000}, "its job is not a JSON object"),
        ({"coordinator": "x"}, "is not a public key"),
        ({"signer": "x"}, "is not a public key"),
        ({"issued": "2026-01-31"}, "issued is '2026-01-31'; expected a UTC time"),
        ({"not_after": "2026-02-30T12:00:00Z"}, "not_after is"),
        ({"not_after": "2026-2-3T12:00:00Z"}, "not_after is"),
        ({"not_after": "2026-01-31T12:00:00Z"}, "is not after it was issued"),
    ],
)
def test_a_signature_does_not_make_a_bad_job_good(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(TrustError, match=reason):
        SignedJob.from_json(forge(**changes), source="job.json")


def test_an_invalid_job_keeps_its_own_error() -> None:
    job = SIGNED.job.canonical_json().replace('"rounds":2', '"rounds":0')
    with pytest.raises(ConfigError, match=r"the job in job\.json is not valid:\n.*training\.rounds"):
        SignedJob.from_json(forge(job=job), source="job.json")
    unsigned = json.dumps(json.loads(SIGNED.to_json()) | {"job": job})
    with pytest.raises(TrustError, match="signature"):  # an invalid job of a stranger is not even read
        SignedJob.from_json(unsigned, source="job.json")


def test_half_a_character_in_a_field_is_refused() -> None:
    text = json.dumps(json.loads(SIGNED.to_json()) | {"job": "\ud800"})
    with pytest.raises(TrustError, match="half a character"):
        SignedJob.from_json(text, source="job.json")


def test_time_limits() -> None:
    SIGNED.check_time(ISSUED)
    SIGNED.check_time(ISSUED - timedelta(minutes=5))
    SIGNED.check_time(END - timedelta(seconds=1))
    with pytest.raises(TrustError, match=r"'t' expired on 2026-02-07T12:00:00Z, 1 day, 2:00:00 ago.*check the clock"):
        SIGNED.check_time(END + timedelta(days=1, hours=2))
    with pytest.raises(TrustError, match="expired"):
        SIGNED.check_time(END)
    with pytest.raises(TrustError, match=r"issued on 2026-01-31T12:00:00Z, 0:05:01 in the future; check the clock"):
        SIGNED.check_time(ISSUED - timedelta(minutes=5, seconds=1))


# --- rounds -------------------------------------------------------------------------------------------------------


def test_a_signed_round() -> None:
    assert round_fields(**ROUND) == {
        "job_sha256": "a" * 64,
        "round": 3,
        "adapter_sha256": hashlib.sha256(b"adapter").hexdigest(),
        "sent_at": "2026-01-31",
    }
    COORDINATOR.verify_key.verify(
        Purpose.ROUND, round_fields(**ROUND), COORDINATOR.sign(Purpose.ROUND, round_fields(**ROUND))
    )


@pytest.mark.parametrize(
    "changes", [{"job_sha256": "b" * 64}, {"round_number": 4}, {"adapter": b"adapter2"}, {"sent_at": "2026-02-01"}]
)
def test_any_change_of_a_round_is_refused(changes: dict[str, Any]) -> None:
    signature = COORDINATOR.sign(Purpose.ROUND, round_fields(**ROUND))
    with pytest.raises(TrustError, match="signature of the round is not one by"):
        COORDINATOR.verify_key.verify(Purpose.ROUND, round_fields(**(ROUND | changes)), signature)
    with pytest.raises(TrustError, match="signature of the round"):
        SIGNER.verify_key.verify(Purpose.ROUND, round_fields(**ROUND), signature)


def test_a_job_signature_is_no_round_signature() -> None:
    signature = COORDINATOR.sign(Purpose.JOB, round_fields(**ROUND))
    with pytest.raises(TrustError, match="signature of the round"):
        COORDINATOR.verify_key.verify(Purpose.ROUND, round_fields(**ROUND), signature)


def test_half_a_character_in_a_round_is_refused() -> None:
    with pytest.raises(TrustError, match="half a character"):
        COORDINATOR.verify_key.verify(Purpose.ROUND, round_fields(**(ROUND | {"sent_at": "\ud800"})), bytes(64))
