"""What a person needs to know to decide on a job: who asks for what, what it promises, costs and changes. Nothing of a record.

The command line and pages show the same object, so nobody approves less than another was shown.

Guarantee (tests: tests/client/approval/test_facts.py): all of it follows from the signed job as it is kept, the site's settings,
policy and ledger; no record is read for it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter

from client.approval.request import Approval, Refused, Request, RequestState, Rules
from client.ledger.account import Promise
from client.policy.policy import Policy
from client.policy.verdicts import Verdict, verdicts
from shared.errors import PrivacyError
from shared.job.job import Job
from shared.privacy.accounting import GaussianSteps
from shared.privacy.planned import PlannedPrivacy
from shared.trust.signed_job import SignedJob

_MOST_CHARACTERS = 120  # of one value that changed
_MOST_LABELS, _MOST_LABEL = 20, 40  # how many are named, and characters of each


@dataclass(frozen=True, kw_only=True)
class Here:
    """What the site brings to a decision.

    Attributes:
        site, dataset, unit: its name, its data set and what its budget protects.
        columns: of the data set, by role.
        settings: what site.toml says no to in this job; "" if nothing.
    """

    site: str
    dataset: str
    unit: str
    columns: Mapping[str, str]
    settings: str


@dataclass(frozen=True, kw_only=True)
class Promised:
    """What a job promises about each unit of this site's data, and how.

    Attributes:
        mechanism: of the job.
        epsilon: of the whole plan at `delta`; of sums over sites the promise against the coordinator and `colluding` sites.
        alone: of what this site sends by itself; None where that is `epsilon`.
        noise_multiplier: in what leaves this site, or in a trusted coordinator's sum.
        honest, colluding: of sums over sites, on how many the noise counts, and how many may work together; else None.
    """

    mechanism: str
    epsilon: float
    alone: float | None
    delta: float
    noise_multiplier: float
    honest: int | None = None
    colluding: int | None = None


@dataclass(frozen=True, kw_only=True)
class BudgetLine:
    """One cap of the site, before the job and after all of it.

    Attributes:
        promise: which cap: sums over sites counted as sums ("together"), or each input by itself ("alone").
        spent: epsilon that counts now, what this job spent already included.
        after: once the job has run to its end.
        cap: the limit.
    """

    promise: Promise
    spent: float
    after: float
    cap: float

    @property
    def left(self) -> float:
        """What is left afterwards, 0 if the job does not fit."""
        return max(self.cap - self.after, 0.0)

    @property
    def fits(self) -> bool:
        """Whether the whole job fits."""
        return self.after <= self.cap


Lines = Callable[[Job, Policy], tuple[BudgetLine, ...]]
"""Tells what a job does to both caps, by a site's policy; nothing where it is not charged, or that cannot be told."""


@dataclass(frozen=True, kw_only=True)
class SettingChange:
    """A setting that differs from the last approved job of the same signer; as JSON writes it, "" where it was not set."""

    setting: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One request, whole.

    Attributes:
        id, job, name: of the request, of the job (SHA-256), and what the signer called it.
        state, arrived, ends: where it stands, since when, and until when it waits or an approval stands before the first
            round.
        begun, approvals, needed, refused: what was said to it.
        signer_name, signer, coordinator, issued, not_after: of the signed job; the name is the policy's, None if it has none.
        here: what the site brings.
        task, num_labels, labels, backbone, rounds, local_steps, steps, sample_rate, metrics: what it asks for; the first labels
            only, and the steps with spare attempts.
        promised: None where no noise is added, or it cannot be accounted for.
        budget: both caps; empty where the job is not charged here.
        rules: the verdict of every rule.
        compared_with: name and SHA-256 of the last approved job of the signer; None if there is none.
        changes: since then.
    """

    id: str
    job: str
    name: str
    state: RequestState
    arrived: datetime
    ends: datetime
    begun: datetime | None
    approvals: tuple[Approval, ...]
    needed: int
    refused: Refused | None
    signer_name: str | None
    signer: str
    coordinator: str
    issued: datetime
    not_after: datetime
    here: Here
    task: str
    num_labels: int
    labels: tuple[str, ...]
    backbone: str
    rounds: int
    local_steps: int
    steps: int
    sample_rate: float
    metrics: tuple[str, ...]
    promised: Promised | None
    budget: tuple[BudgetLine, ...]
    rules: tuple[Verdict, ...]
    compared_with: tuple[str, str] | None
    changes: tuple[SettingChange, ...]

    @property
    def told_apart(self) -> tuple[BudgetLine, ...]:
        """The caps; of two that agree the first."""
        first = self.budget[:1]
        same = {(line.spent, line.after, line.cap) for line in first}
        return (*first, *(line for line in self.budget[1:] if (line.spent, line.after, line.cap) not in same))


def as_json(facts: Facts) -> dict[str, Any]:
    """Return the same for a program: numbers as they were computed, None for one that is not finite."""
    found: dict[str, Any] = TypeAdapter(Facts).dump_python(facts, mode="json")
    found["budget"] = [
        line | {"left": of.left, "fits": of.fits} for line, of in zip(found["budget"], facts.budget, strict=True)
    ]
    finite: dict[str, Any] = _finite(found)
    return finite


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def facts_of(
    request: Request,
    *,
    policy: Policy,
    here: Here,
    lines: Lines,
    last: Request | None,
    now: datetime,
) -> Facts:
    """Return what is to be known of a request; takes seconds of accounting.

    Args:
        lines: tells what the job does to the budget.
        last: the last approved request of the same signer, if there is one.
        now: this site's clock, with time zone.

    Raises:
        TrustError, ConfigError: the signed job that was kept cannot be read by this version.
    """
    signed, rules = request.signed(), Rules.of(policy)
    job = signed.job
    return Facts(
        id=request.id,
        job=request.job,
        name=request.name,
        state=request.state(rules, now),
        arrived=request.arrived,
        ends=request.ends(rules, now),
        begun=request.begun,
        approvals=request.approvals,
        needed=rules.needed,
        refused=request.refused,
        signer_name=policy.signer_name(signed.signer),
        signer=signed.signer.text,
        coordinator=signed.coordinator.text,
        issued=signed.issued,
        not_after=signed.not_after,
        here=here,
        task=job.task.kind,
        labels=tuple(_bounded(label, _MOST_LABEL) for label in job.task.labels[:_MOST_LABELS]),
        num_labels=len(job.task.labels),
        backbone=job.model.backbone,
        rounds=job.training.rounds,
        local_steps=job.training.local_steps,
        steps=job.charged_steps,
        sample_rate=job.privacy.sample_rate,
        metrics=tuple(job.site_metrics.names),
        promised=promised_by(job, policy),
        budget=lines(job, policy),
        rules=tuple(verdicts(policy, signed, now=now, site=here.site)),
        compared_with=None if last is None else (last.name, last.job),
        changes=() if last is None else tuple(changes(last.signed(), signed)),
    )


def changes(before: SignedJob, after: SignedJob) -> Iterator[SettingChange]:
    """Yield every setting in which two signed jobs differ, the coordinator's key included, in order of the settings."""
    old, new = (dict(_flat(one.job.model_dump(mode="json"))) for one in (before, after))
    old["coordinator"], new["coordinator"] = before.coordinator.text, after.coordinator.text
    for setting in sorted(old.keys() | new.keys()):
        if old.get(setting) != new.get(setting) or (setting in old) != (setting in new):
            yield SettingChange(setting=setting, before=_shown(old, setting), after=_shown(new, setting))


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _bounded(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _shown(settings: Mapping[str, Any], setting: str) -> str:
    if setting not in settings:
        return ""
    text = json.dumps(settings[setting], ensure_ascii=False)
    if len(text) <= _MOST_CHARACTERS:
        return text
    # Two long values that differ must not look the same.
    sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{text[:_MOST_CHARACTERS]}... ({len(text):,} characters, SHA-256 {sha256[:12]})"


def _too_long(job: Job, policy: Policy) -> bool:
    """Return whether the job plans more than the policy accepts: accounting for billions of steps could take for ever."""
    return job.charged_steps > policy.max_steps


def promised_by(job: Job, policy: Policy) -> Promised | None:
    """Return what a job promises; None where no noise is added, it cannot be told, or the policy accepts no so many steps."""
    privacy = job.privacy
    if privacy.mechanism == "none" or _too_long(job, policy):
        return None
    try:
        plan = PlannedPrivacy.of_coordinator(job) if privacy.central else PlannedPrivacy.from_job(job)
        if plan.honest is None:
            epsilon, alone = plan.epsilon(), None
        else:
            epsilon, alone = plan.of_sum.epsilon(), plan.epsilon()
    except PrivacyError:
        return None
    return Promised(
        mechanism=privacy.mechanism,
        epsilon=epsilon,
        alone=alone,
        delta=plan.delta,
        noise_multiplier=plan.noise_multiplier,
        honest=plan.honest,
        colluding=privacy.max_colluding,
    )


def planned_charges(job: Job, policy: Policy) -> dict[Promise, Sequence[GaussianSteps]]:
    """Return what a job would charge here if it ran to its end, as each promise counts it; nothing where that cannot be told."""
    if not job.privacy.sites_add_noise or _too_long(job, policy):
        return {}
    try:
        plan = PlannedPrivacy.from_job(job)
        return {"together": plan.of_sum.events, "alone": plan.events}
    except PrivacyError:
        return {}
