"""What every kind of signed document refuses: other kinds, keys, fields, layouts and lengths. The attacks are made here."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from shared.errors import TrustError
from shared.files.json_files import canonical_json
from shared.job.job import Job
from shared.job.parsing import parse
from shared.trust.signed_file import FileSignature, Signer, sign_file, signature_file, verify_file
from shared.trust.signed_folder import SIGNATURE_FILE, _FolderSignature, sign_folder, verify_folder
from shared.trust.signed_job import SignedJob, _JobDocument, sign_job
from shared.trust.signing import Purpose, SignedDocument, SigningKey

KEY = SigningKey.from_bytes(bytes(32))
NOW = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)
KINDS = ("job", "file", "folder")
CLASSES: dict[str, type[SignedDocument]] = {"job": _JobDocument, "file": FileSignature, "folder": _FolderSignature}


class Signed:
    """One signed thing of a kind, its document, and the product's way of reading it."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.place = kind, folder / "job.json"
        if kind == "job":
            task = {"kind": "sequence_classification", "labels": ["a", "ü"]}
            job = parse(Job, {"name": "t", "task": task, "training": {"rounds": 2}}, source="test")
            end = NOW + timedelta(days=7)
            signed = sign_job(job, signer=KEY, coordinator=KEY.verify_key, issued=NOW, not_after=end)
            self.place.write_text(signed.to_json())
        elif kind == "file":
            (folder / "report.html").write_text("a report")
            self.place = sign_file(folder / "report.html", Signer(role="site", name="Köln", key=KEY), now=NOW)
        else:
            (folder / "sub").mkdir()
            (folder / "sub" / "ü.bin").write_bytes(b"\0\1")
            sign_folder(folder, KEY)
            self.place = folder / SIGNATURE_FILE

    @property
    def document(self) -> dict[str, Any]:
        """The document as it lies there."""
        return dict(json.loads(self.place.read_text()))

    def write(self, document: Any) -> None:
        """Replace the document, in the layout of its kind."""
        indent = None if self.kind == "job" else 2
        self.place.write_text(
            json.dumps(document, indent=indent, sort_keys=True, ensure_ascii=False) + ("\n" if indent else "")
        )

    def read(self) -> object:
        """Read and verify it."""
        if self.kind == "job":
            return SignedJob.from_json(self.place.read_text(errors="surrogateescape"), source=str(self.place))
        if self.kind == "file":
            return verify_file(self.place.with_name("report.html"))
        return verify_folder(self.place.parent)


@pytest.fixture(params=KINDS)
def signed(request: pytest.FixtureRequest, tmp_path: Path) -> Signed:
    made = Signed(request.param, tmp_path)
    made.read()
    made.write(made.document)
    made.read()  # so each refusal below is for what was changed, not for the layout
    return made


def signature(signed: Signed, purpose: Purpose, payload: Any) -> str:
    """Return a signature by the right key, written as this kind writes it."""
    made = KEY.sign(purpose, payload)
    return (
        base64.urlsafe_b64encode(made).decode().rstrip("=") if signed.kind == "job" else base64.b64encode(made).decode()
    )


def payload(signed: Signed) -> Any:
    """Return what this kind signs."""
    fields = {name: value for name, value in signed.document.items() if name != "signature"}
    return fields["files"] if signed.kind == "folder" else fields


def test_the_right_signature_is_accepted(signed: Signed) -> None:
    purpose = CLASSES[signed.kind].purpose
    assert signed.document["signature"] == signature(signed, purpose, payload(signed))


def test_a_signature_of_one_kind_is_none_of_another(signed: Signed) -> None:
    for purpose in Purpose:
        if purpose != CLASSES[signed.kind].purpose:
            signed.write(signed.document | {"signature": signature(signed, purpose, payload(signed))})
            with pytest.raises(TrustError, match="is not one by ed25519"):
                signed.read()


@pytest.mark.parametrize("other", KINDS)
def test_a_document_of_one_kind_is_none_of_another(signed: Signed, other: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    there = Signed(other, tmp_path / "other")
    signed.place.write_bytes(there.place.read_bytes())
    if other == signed.kind == "folder":
        (signed.place.parent / "other" / "sub" / "ü.bin").unlink()  # the folder around holds more than was signed
    if other != signed.kind:
        with pytest.raises(TrustError, match=f"is not {CLASSES[signed.kind].what}"):
            signed.read()


def test_a_signature_over_a_part_is_refused(signed: Signed) -> None:
    whole = payload(signed)
    for name in whole:
        part = {key: value for key, value in whole.items() if key != name}
        signed.write(signed.document | {"signature": signature(signed, CLASSES[signed.kind].purpose, part)})
        with pytest.raises(TrustError, match="is not one by ed25519"):
            signed.read()


def test_a_signature_over_a_prefix_is_refused(signed: Signed) -> None:
    # The bytes that are signed start alike; a signature of fewer of them, made below the product, is none of them.
    text = f"silotune/{CLASSES[signed.kind].purpose}\0{canonical_json(payload(signed))}".encode()
    for cut in (text[:-1], text[: len(text) // 2], text[:13], b"", text + b"}"):
        made = KEY._key.sign(cut)
        as_text = (
            base64.urlsafe_b64encode(made).decode().rstrip("=")
            if signed.kind == "job"
            else base64.b64encode(made).decode()
        )
        signed.write(signed.document | {"signature": as_text})
        with pytest.raises(TrustError, match="is not one by ed25519"):
            signed.read()


@pytest.mark.parametrize(
    "signer",
    [
        "",
        "rsa:AAAA",
        "ed448:" + "A" * 76,
        "none:",
        "ed25519:",
        "ED25519:" + "A" * 43,
        KEY.verify_key.text + "=",
        "\x1b[2J",
    ],
)
def test_an_unknown_algorithm_is_refused(signed: Signed, signer: str) -> None:
    signed.write(signed.document | {"signer": signer})
    with pytest.raises(TrustError, match="is not a public key"):
        signed.read()


def test_a_signature_is_written_in_one_way(signed: Signed) -> None:
    text = signed.document["signature"]
    data = base64.urlsafe_b64decode(text.replace("+", "-").replace("/", "_") + "==")
    ways = {base64.urlsafe_b64encode(data).decode(), base64.b64encode(data).decode(), data.hex()}
    ways |= {way.rstrip("=") for way in ways}
    last = text.rstrip("=")[-1]
    ways |= {
        text.rstrip("=")[:-1] + chr(ord(last) + 1) + "=" * text.count("="),
        f" {text}",
        f"{text}\n",
        text + text,
        text + "=",
    }
    for way in ways - {text}:
        signed.write(signed.document | {"signature": way})
        with pytest.raises(TrustError, match=r"the signature is not base64|is not one by"):
            signed.read()


def test_a_key_that_stands_twice_is_refused(signed: Signed) -> None:
    text = signed.place.read_text().rstrip()
    for name, value in signed.document.items():
        for other in (value, "x"):
            twice = f'{text[:-1].rstrip()}, "{name}": {json.dumps(other)}}}'
            for found in (twice, "{" + f'"{name}": {json.dumps(other)}, ' + text[1:]):
                signed.place.write_text(found)
                with pytest.raises(TrustError, match="it holds a key twice"):
                    signed.read()


def test_each_field_is_needed_and_of_its_type(signed: Signed) -> None:
    whole = signed.document
    for name, value in whole.items():
        others: list[Any] = [None, 7, 1.0, True, [], {"x": 1}, [value], {"x": value}]
        for changed in (
            {key: whole[key] for key in whole if key != name},
            *(whole | {name: other} for other in others),
        ):
            signed.write(changed)
            with pytest.raises(TrustError):
                signed.read()


MANY: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a second signature": lambda d: d | {"signature2": d["signature"]},
    "a list of signatures": lambda d: d | {"signatures": [{"sig": d["signature"], "keyid": d["signer"]}]},
    "signatures as a list": lambda d: d | {"signature": [d["signature"], d["signature"]]},
    "signers as a list": lambda d: d | {"signer": [d["signer"]]},
    "a field more": lambda d: d | {"also": "\x1b[2J" * 10_000},
    "a field without a name": lambda d: d | {"": 1},
    "a list of documents": lambda d: [d, d],
    "a document in a document": lambda d: {"payload": d, "signer": d["signer"], "signature": d["signature"]},
}


@pytest.mark.parametrize("what", MANY)
def test_what_is_no_such_document_is_refused(signed: Signed, what: str) -> None:
    signed.write(MANY[what](signed.document))
    with pytest.raises(TrustError, match=f"is not {CLASSES[signed.kind].what}") as refused:
        signed.read()
    assert "\x1b" not in str(refused.value), "what others wrote does not steer the terminal"
    assert len(str(refused.value)) < 1000


def test_long_deep_and_strange_texts_are_refused(signed: Signed) -> None:
    most = CLASSES[signed.kind].most_bytes
    whole = signed.place.read_bytes().rstrip()
    texts = [
        *(b"", b"null", b"[]", b"{}", b"{", b"\xff\xfe", b'{"signer": NaN}', b"[" * 100_000, b'{"a":' * 20_000),
        *(b"9" * 10_000, b'{"version": ' + b"9" * 10_000 + b"}", b'{"bytes": 1e999}', b"\xef\xbb\xbf" + whole),
        *(whole[:-1], whole + whole, whole + b"x", b" " * most + whole),
    ]
    for text in texts:
        signed.place.write_bytes(text)
        with pytest.raises(TrustError, match=f"is not {CLASSES[signed.kind].what}"):
            signed.read()


def test_any_changed_byte_is_refused_or_means_the_same(signed: Signed) -> None:
    content, before = signed.place.read_bytes(), signed.read()
    for place in range(len(content)):
        for bit in (1, 32):
            changed = bytes([content[place] ^ bit])
            signed.place.write_bytes(content[:place] + changed + content[place + 1 :])
            try:
                found = signed.read()
            except TrustError:
                continue
            assert found == before
            assert signed.kind != "file", "of the signature beside a file every byte counts"


def test_only_the_expected_key_counts(signed: Signed) -> None:
    other = SigningKey.generate()
    kind, content = CLASSES[signed.kind], signed.place.read_bytes()
    assert kind.open(content, source="it", key=KEY.verify_key).signer == KEY.verify_key.text
    with pytest.raises(TrustError, match=f"it was signed by {KEY.verify_key.text}, expected {other.verify_key.text}"):
        kind.open(content, source="it", key=other.verify_key)
    # The expected key's name over another's signature.
    mine = {name: value for name, value in signed.document.items() if name not in (*kind.header, "signer", "signature")}
    forged = kind.sign(other, **mine).model_copy(update={"signer": KEY.verify_key.text})
    signed.write(forged.model_dump())
    with pytest.raises(TrustError, match="is not one by ed25519"):
        signed.read()


def test_a_text_that_is_no_unicode_cannot_be_signed(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("x")
    with pytest.raises(TrustError, match="half a character"):
        sign_file(tmp_path / "report", Signer(role="site", name="\udcff", key=KEY), now=NOW)
    assert not signature_file(tmp_path / "report").exists()
