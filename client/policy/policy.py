"""What this site accepts: `policy.toml` in the site's folder, written by the site engineer and nobody else.

Guarantees (tests: tests/client/policy/test_policy.py)
    * A job that passes `check_job` breaks none of the policy's limits; one that breaks several is told of all at once.
    * Every text speaks of the job and of the policy's own limits only, never of records or of what was spent, so it
      may be sent to the coordinator.
    * A value that is not a number never passes a limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, time
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from client.policy.limits import Limits, broken_limits
from client.policy.peers import knows_enough, num_known, pinned
from shared.epsilons import as_set, delta_rounded_up, noise_rounded_down, rounded_up
from shared.errors import ConfigError, PolicyError, PrivacyError, TrustError
from shared.job.job import Job
from shared.job.kinds import RULES
from shared.job.parsing import Section, load_toml, nearest, parse, toml_of
from shared.job.privacy import METRICS
from shared.job.values import SHA256_PATTERN, Name, Probability
from shared.privacy.planned import PlannedPrivacy
from shared.trust.signed_job import SignedJob
from shared.trust.signing import VerifyKey, check_keys

TASK_KINDS: tuple[str, ...] = tuple(RULES)
SIGNER_PLACEHOLDER = "ed25519:PUT-THE-KEY-HERE"

_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")
# Sums of floating-point numbers may end a hair above a limit that they meet exactly.
_SLACK = 1e-9


class Policy(Section):
    """`policy.toml`: which jobs this site accepts, from whom and when."""

    signers: dict[Name, str] = Field(min_length=1)
    """Who may sign jobs: a name of your choice and the public key, `ed25519:...`."""
    tasks: tuple[str, ...] = Field(min_length=1)
    """Accepted kinds of task, such as `sequence_classification`; docs/tasks.md has them all."""
    backbones: dict[str, Annotated[str, Field(pattern=SHA256_PATTERN)]] = Field(min_length=1)
    """Accepted backbones: a job's `model.backbone`, word for word, and the SHA-256 of its files (64 hex digits); of a network for
    images, which has none, of its description."""
    max_epsilon_per_job: float = Field(gt=0)
    """Largest epsilon of one job, its repeated rounds included. The cap over all jobs is `budget.epsilon` in site.toml."""
    max_epsilon_alone: float | None = Field(default=None, gt=0)
    """Likewise of a job of the mechanism `distributed`, if each masked input of this site counts by itself, as it does once
    secure aggregation fails and all other sites collude; from `max_epsilon_per_job` up. None: as much as that."""
    min_noise_multiplier: float = Field(default=0.3, gt=0)
    """Smallest noise multiplier (sigma) in what leaves this site, whether the job names it or it follows from the job's epsilon;
    of the mechanism `distributed`, the smallest share."""
    max_steps: int = Field(ge=1)
    """Most noisy steps that one job may plan: rounds times local steps, and the spare attempts of `distributed`."""
    max_sample_rate: Probability = 1.0
    """Largest probability with which a record (or patient, customer: the unit in site.toml) may enter a step."""
    hours: str | None = None
    """`HH:MM-HH:MM`, the site's local time in which rounds may begin, past midnight if it ends earlier; none: always. A round of
    `distributed` begins when the site is asked to get ready; what it was ready for it still sends within the time-out."""
    metrics: tuple[str, ...] = ()
    """Metrics that may be released, with noise and charged to the ledger: `accuracy`, `confusion`, `loss`; none: none."""
    min_sites: int = Field(default=2, ge=1)
    """A job whose `federation.min_sites` is lower is refused: alone, a site's update would be the result."""
    min_colluding: int = Field(default=1, ge=0)
    """A job of the mechanism `distributed` whose `privacy.max_colluding` is lower is refused: its epsilon would not hold if so
    many sites work together with the coordinator."""
    max_attempts_per_round: int = Field(default=3, ge=1)
    """Most attempts at one round of such a job that this site computes, charged or not, and sends a masked input for, charged."""
    peers: dict[Name, str] = {}
    """Sites that this site knows by another way than the CA: name, and fingerprint of their certificate's key (SHA-256). None:
    every site with a certificate of the CA counts. If some are named, no sum is entered in which one of them has another key, or
    in which fewer than `federation.min_sites` are named here, this site included."""
    max_clock_skew_seconds: float = Field(default=300.0, gt=0)
    """Largest accepted difference between the coordinator's clock and this site's, in seconds."""
    approval: Literal["none", "required"] = "none"
    """`required`: a job that breaks no rule waits until people of this site approve it (`silotune site requests`), and nothing is
    loaded for it before. The coordinator learns that it waits, never why. `none`: the rules alone decide."""
    approvals_needed: int = Field(default=1, ge=1, le=2)
    """How many people must approve a job; `2` is four eyes: two different accounts."""
    approval_days: float = Field(default=7.0, gt=0, le=365)
    """Days after which a request that nobody decided, and an approval whose job has not begun its first round, are void."""
    policy_approvals_needed: int = Field(default=1, ge=1, le=2)
    """How many people must stand behind a change of this file that is made in the console: `1`, an officer; `2` is four eyes: who
    proposes it, and an officer who is somebody else. A change by which people decide less strictly takes `approvals_needed`
    officers at least. Whoever may write the file itself is not asked."""
    limits: Limits = Limits()

    @field_validator("signers")
    @classmethod
    def _check_signers(cls, signers: dict[str, str]) -> dict[str, str]:
        for name, text in signers.items():
            if text == SIGNER_PLACEHOLDER:
                raise ValueError(
                    f"{name!r} still holds the placeholder of the template. Replace it by the public key (ed25519:...) of "
                    "whoever signs the jobs; ask them for it by telephone or in person, not through the coordinator"
                )
        check_keys(signers)
        return signers

    @field_validator("peers")
    @classmethod
    def _check_peers(cls, peers: dict[str, str]) -> dict[str, str]:
        return pinned(peers)

    @field_validator("tasks", "metrics")
    @classmethod
    def _check_known(cls, names: tuple[str, ...], field: ValidationInfo) -> tuple[str, ...]:
        what, known = ("task", TASK_KINDS) if field.field_name == "tasks" else ("metric", tuple(METRICS))
        for name in names:
            if name not in known:
                raise ValueError(f"no {what} is called {name!r}; {nearest(name, known)}")
        return names

    @property
    def largest_epsilon_alone(self) -> float:
        """`max_epsilon_alone`, or what holds where it is not set."""
        return self.max_epsilon_per_job if self.max_epsilon_alone is None else self.max_epsilon_alone

    @property
    def uneven_eyes(self) -> str:
        """What is to be minded if a job takes more people than the rules that it is judged by; "" if not."""
        if self.approvals_needed <= self.policy_approvals_needed:
            return ""
        return (
            f"a job takes {self.approvals_needed} people, but one officer alone may change the rules for jobs in the console, "
            f"such as who signs them and what they may spend: set policy_approvals_needed = {self.approvals_needed}"
        )

    def signer_name(self, key: VerifyKey) -> str | None:
        """Return the name of whoever signs with this key; None if it may sign nothing here."""
        return next((name for name, text in self.signers.items() if VerifyKey.parse(text) == key), None)

    @model_validator(mode="after")
    def _check_epsilons(self) -> Self:
        if self.largest_epsilon_alone < self.max_epsilon_per_job:
            raise ValueError(
                f"max_epsilon_alone is {as_set(self.largest_epsilon_alone)}, below max_epsilon_per_job "
                f"{as_set(self.max_epsilon_per_job)}; what a job releases counts at least as much by itself. Lower "
                "max_epsilon_per_job, or raise max_epsilon_alone"
            )
        return self

    @model_validator(mode="after")
    def _check_approvals(self) -> Self:
        if self.approval == "none" and self.approvals_needed != 1:
            raise ValueError(
                f'approvals_needed is {self.approvals_needed}, but approval is "none", so nobody would be asked. Set approval = '
                '"required", or remove approvals_needed'
            )
        return self

    @model_validator(mode="after")
    def _check_hours(self) -> Self:
        if self.hours is not None and _parse_hours(self.hours) is None:
            raise ValueError(
                f"hours is {self.hours!r}; expected two different times as HH:MM-HH:MM, for example 20:00-06:00 (midnight "
                "is 00:00). Remove it to allow rounds at any time"
            )
        return self


def load_policy(path: Path) -> Policy:
    """Read a site's `policy.toml`.

    Raises:
        ConfigError: if it is missing, unreadable or not valid; without a policy a site accepts nothing.
    """
    if not path.exists():
        raise ConfigError(
            f"{path} does not exist, and without a policy this site accepts no job. `silotune site init` writes one to fill in."
        )
    return parse(Policy, load_toml(path), source=str(path))


def policy_of(text: str, *, source: str = "policy.toml") -> Policy:
    """Return the policy that a text is, judged as `load_policy` judges a file; `source` names it in errors.

    Raises:
        ConfigError: it is none.
    """
    return parse(Policy, toml_of(text, source=source), source=source)


def check_job(policy: Policy, signed: SignedJob, *, now: datetime, site: str) -> None:
    """Refuse a job that breaks any rule of `policy`; the text names every broken rule, in a fixed order.

    An unknown signer is told of everything but epsilon and noise, for accounting takes seconds and only known signers
    may ask for them. Whether the site accepts jobs without noise at all is decided by `allow_non_private` in site.toml, and
    whether it trusts a coordinator to add it by `allow_trusted_coordinator`.

    Args:
        signed: a job whose signature was verified when it was read.
        now: this site's clock, with time zone.
        site: name of this site, for the text.

    Raises:
        PolicyError: a rule is broken.
    """
    broken = list(_broken_rules(policy, signed, now, site))
    if broken:
        raise PolicyError(f"site {site} refuses the job {signed.job.name}:\n" + "\n".join(f"  - {b}" for b in broken))


def check_hours(policy: Policy, local_time: datetime) -> None:
    """Refuse to begin a round outside the policy's hours; the start belongs to them, the end does not.

    Args:
        local_time: now, in the site's own time zone.

    Raises:
        PolicyError: with the hours, since waiting mends it.
    """
    hours = _parse_hours(policy.hours) if policy.hours is not None else None
    if hours is None:
        return
    (start, end), at = hours, local_time.time()
    inside = start <= at < end if start < end else at >= start or at < end
    if not inside:
        raise PolicyError(
            f"this site runs rounds only between {start:%H:%M} and {end:%H:%M} (site's local time); the round will be "
            "accepted then."
        )


def check_clock(policy: Policy, sent_at: datetime, now: datetime) -> None:
    """Refuse a message whose time of sending is too far from this site's clock, before or after.

    Args:
        sent_at, now: both with time zone.

    Raises:
        PolicyError: with the difference in seconds.
    """
    skew = (sent_at - now).total_seconds()
    if not abs(skew) <= policy.max_clock_skew_seconds:
        raise PolicyError(
            f"the coordinator's message is dated {abs(skew):,.0f} seconds {'ahead of' if skew > 0 else 'behind'} this site's "
            f"clock; at most {policy.max_clock_skew_seconds:g} are accepted. One of the two clocks is wrong: set both by NTP."
        )


def check_backbone(policy: Policy, job: Job, sha256: str) -> None:
    """Refuse a backbone whose files are not those that the policy names.

    Args:
        sha256: of what is loaded, by `shared.models.backbones.backbone_sha256` or `shared.models.images.image_network_sha256`.

    Raises:
        PolicyError: the backbone is not listed, or its hash differs.
    """
    expected = policy.backbones.get(job.model.backbone)
    if expected is None:
        raise PolicyError(_unlisted_backbone(job))
    if sha256 != expected:
        raise PolicyError(
            f"the files of backbone {job.model.backbone!r} at this site have SHA-256 {sha256}, but its policy expects "
            f"{expected}. Restore the files, or have the site engineer review them and change the policy."
        )


def check_metrics(policy: Policy, job: Job) -> None:
    """Refuse to release metrics that the policy does not name, or with less noise than it wants.

    Raises:
        PolicyError: the job itself may go on; nothing but its updates leaves.
    """
    asked = job.site_metrics
    if forbidden := [name for name in asked.names if name not in policy.metrics]:
        allowed = ", ".join(policy.metrics) or "none"
        raise PolicyError(
            f"this site does not release the metrics {', '.join(forbidden)}; its policy allows {allowed}."
        )
    if asked.noise_multiplier < policy.min_noise_multiplier:
        raise PolicyError(
            f"site_metrics.noise_multiplier is {as_set(asked.noise_multiplier)}; this site accepts no less than "
            f"{as_set(policy.min_noise_multiplier)}."
        )


def check_spend(policy: Policy, epsilon_after: float, alone_after: float) -> None:
    """Refuse a release after which this job alone would have spent more than the policy allows one job.

    Args:
        epsilon_after: epsilon of all of this job's releases, repeated rounds and the next one included.
        alone_after: the same where each masked input counts by itself.

    Raises:
        PolicyError: with the limit; what was spent is not told.
    """
    if exceeds(epsilon_after, policy.max_epsilon_per_job):
        raise PolicyError(
            f"with this round, repeated ones included, the job would exceed this site's limit of epsilon "
            f"{as_set(policy.max_epsilon_per_job)} per job. Stop the run, or plan fewer repetitions."
        )
    if exceeds(alone_after, policy.largest_epsilon_alone):
        raise PolicyError(
            f"with this round, repeated ones included, the job's masked inputs by themselves would exceed this site's limit of "
            f"epsilon {as_set(policy.largest_epsilon_alone)} per job. Stop the run, or plan fewer repetitions."
        )


def _broken_rules(policy: Policy, signed: SignedJob, now: datetime, site: str) -> Iterator[str]:
    job, training = signed.job, signed.job.training
    known_signer = policy.signer_name(signed.signer) is not None
    if not known_signer:
        yield (
            f"it is signed by {signed.signer.text}, which is not among this site's signers. Have it signed by one of "
            "them, or ask the site engineer to add that key."
        )
    try:
        signed.check_time(now)
    except TrustError as error:
        yield f"{error} This site's clock shows {now:%Y-%m-%d %H:%M:%S %Z}; if that is wrong, its engineer sets it."
    if job.task.kind not in policy.tasks:
        yield f"its task.kind is {job.task.kind!r}; this site accepts {', '.join(policy.tasks)}."
    if job.model.backbone not in policy.backbones:
        yield _unlisted_backbone(job)
    if known_signer and job.privacy.mechanism != "none":
        yield from _broken_privacy_rules(policy, job)
    if job.charged_steps > policy.max_steps:
        spare = f" and {job.spare_attempts} spare attempts" if job.spare_attempts else ""
        yield (
            f"it plans {job.charged_steps:,} steps ({training.rounds} rounds of {training.local_steps}{spare}); this site "
            f"accepts at most {policy.max_steps:,}."
        )
    if exceeds(job.privacy.sample_rate, policy.max_sample_rate):
        yield (
            f"its privacy.sample_rate is {as_set(job.privacy.sample_rate)}; this site accepts at most "
            f"{as_set(policy.max_sample_rate)}."
        )
    if job.federation.min_sites < policy.min_sites:
        yield (
            f"its federation.min_sites is {job.federation.min_sites}; this site takes part only from "
            f"{policy.min_sites} sites on."
        )
    colluding = job.privacy.max_colluding
    if colluding is not None and colluding < policy.min_colluding:
        yield (
            f"its privacy.max_colluding is {colluding}; this site takes part only if at least {policy.min_colluding} may work "
            "together with the coordinator. Raise it; the same epsilon then takes more noise, or more sites."
        )
    if not knows_enough(policy.peers, job, site=site):
        yield (
            f"its federation.min_sites is {job.federation.min_sites}, and this site knows {num_known(policy.peers, site)} sites, "
            "itself included. Its engineer names those that are known under [peers] in policy.toml."
        )
    yield from broken_limits(policy.limits, job)


@dataclass(frozen=True, kw_only=True)
class JudgedPlan:
    """What the rules on privacy judge of a job that adds noise.

    Attributes:
        plan: what this site, or a trusted coordinator, would execute.
        summed: the same with the noise of the sum that it goes into; `plan` where it goes into none.
        epsilon, alone: of `summed`, and of `plan`.
        cut: words for a text if it was judged with fewer steps than the job asks for; else "".
    """

    plan: PlannedPrivacy
    summed: PlannedPrivacy
    epsilon: float
    alone: float
    cut: str


def judged_plan(policy: Policy, job: Job) -> JudgedPlan:
    """Return what the rules on privacy judge; takes seconds of accounting.

    Raises:
        PrivacyError: the job's privacy cannot be accounted for.
    """
    # A job with too many steps is judged as if cut to the limit, which its user has to do anyway: accounting for
    # billions of steps could keep the site busy for long.
    steps, spare, cut = (
        job.training.rounds if job.privacy.central else job.training.planned_steps,
        job.spare_attempts,
        "",
    )
    if steps + spare > policy.max_steps:
        steps, spare, cut = policy.max_steps, 0, f", cut to {policy.max_steps:,} steps,"
    judged = job.model_copy(
        update={
            "training": job.training.model_copy(update={"rounds": steps, "local_steps": 1}),
            "privacy": job.privacy.model_copy(update={"spare_attempts": spare}),
        },
    )
    # Of a trusted coordinator the limits bind what it adds over the sites, a step being a round.
    plan = PlannedPrivacy.of_coordinator(judged) if judged.privacy.central else PlannedPrivacy.from_job(judged)
    summed = plan.of_sum
    return JudgedPlan(plan=plan, summed=summed, epsilon=summed.epsilon(), alone=plan.epsilon(), cut=cut)


def _broken_privacy_rules(policy: Policy, job: Job) -> Iterator[str]:
    try:
        judged = judged_plan(policy, job)
    except PrivacyError as error:
        yield f"its privacy cannot be accounted for: {error}"
        return
    plan, summed, cut = judged.plan, judged.summed, judged.cut
    if exceeds(judged.epsilon, policy.max_epsilon_per_job):
        yield (
            f"its plan{cut} costs epsilon {rounded_up(judged.epsilon)} at delta {delta_rounded_up(plan.delta)}; this site "
            f"accepts at most {as_set(policy.max_epsilon_per_job)} per job."
        )
    if plan.honest is not None and exceeds(judged.alone, policy.largest_epsilon_alone):
        yield (
            f"its plan{cut} costs epsilon {rounded_up(judged.alone)} at delta {delta_rounded_up(plan.delta)} where each masked "
            f"input counts by itself; this site accepts at most {as_set(policy.largest_epsilon_alone)} per job. Lower "
            "privacy.epsilon_alone, or ask the site engineer for a larger max_epsilon_alone."
        )
    if plan.noise_multiplier < policy.min_noise_multiplier:
        advice = "Lower privacy.epsilon or raise privacy.noise_multiplier."
        if plan.honest is not None:
            advice = (
                f"It is one site's share; {plan.honest} of them make {noise_rounded_down(summed.noise_multiplier)}. Lower "
                "privacy.epsilon or privacy.epsilon_alone, or ask the site engineer for a smaller min_noise_multiplier."
            )
        yield (
            f"its noise multiplier{cut} is {noise_rounded_down(plan.noise_multiplier)}; this site accepts no less than "
            f"{as_set(policy.min_noise_multiplier)}. {advice}"
        )


def _parse_hours(text: str) -> tuple[time, time] | None:
    """Return start and end of `HH:MM-HH:MM`, or None if the text is not two different times of a day."""
    match = _HOURS.fullmatch(text)
    if match is None:
        return None
    hour, minute, end_hour, end_minute = map(int, match.groups())
    start, end = time(hour, minute), time(end_hour, end_minute)
    return (start, end) if start != end else None


def _unlisted_backbone(job: Job) -> str:
    return (
        f"its model.backbone {job.model.backbone!r} is not among those that this site has listed by hash; use one that is, "
        "or ask the site engineer to add it."
    )


def exceeds(value: float, limit: float) -> bool:
    """Return whether a value breaks a limit; one that is no number does."""
    # The negation makes NaN exceed every limit.
    return not value <= limit * (1 + _SLACK)
