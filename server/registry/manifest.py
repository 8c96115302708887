"""`manifest.json` of a version: what it is, where it comes from, and the SHA-256 of its every file, signed."""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import Literal

from pydantic import BaseModel, ConfigDict

from shared.trust.signing import Purpose, SignedDocument

MANIFEST_FILE = "manifest.json"


class Summary(BaseModel):
    """What the files of a version say, for lists; verification compares it with them.

    Attributes:
        format: "adapter", "merged" or "onnx".
        precision: of the weights, "float32" or "int8".
        task: kind of task.
        metric, value, higher_is_better: the primary metric on public records; None where there is none.
        epsilon, delta, unit: as the statement has them; None where it states no privacy.
        epsilon_alone: the statement's second promise, if secure aggregation fails; None where noise is not shared.
        job, job_sha256: name and hash of the job.
        job_signer: the key that signed the job; None of a simulation.
        data, sites: what the run calls its data, and its sites.
        audits: "tier 1: consistent".
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: str
    precision: str
    task: str
    metric: str | None
    value: float | None
    higher_is_better: bool | None
    epsilon: float | None
    epsilon_alone: float | None
    delta: float | None
    unit: str | None
    job: str
    job_sha256: str
    job_signer: str | None
    data: str | None
    sites: list[str]
    audits: list[str]


class Parent(BaseModel):
    """What a version was made from.

    Attributes:
        reference: NAME:N; None of a run that is not registered.
        manifest_sha256: of that version's manifest.
        model_sha256: of the model that it was made from.
        same_evaluation: whether the metric is the one that was measured on that model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    reference: str | None
    manifest_sha256: str | None
    model_sha256: str | None
    same_evaluation: bool


class Manifest(SignedDocument):
    """`manifest.json`; `added` and `note` are the signer's own words.

    Attributes:
        name, version: the place in the registry that it was signed for.
        added: ISO 8601, UTC.
        num_bytes: of the model's files.
        files: SHA-256 of every other file of the version, by its place.
    """

    purpose = Purpose.MODEL
    what = "the manifest of a registered model"
    advice = "Do not use this version; add the model anew."
    most_bytes = 16 << 20
    header = MappingProxyType({"format": "silotune-registered-model/1"})

    format: Literal["silotune-registered-model/1"]
    name: str
    version: int
    added: str
    note: str
    summary: Summary
    parent: Parent | None
    num_bytes: int
    files: dict[str, str]

    def text(self) -> str:
        """Return the content of the file."""
        return json.dumps(self.model_dump(), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
