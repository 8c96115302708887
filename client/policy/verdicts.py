"""Each rule of a policy beside what one job asks: for the people who decide, in words.

Guarantee (tests: tests/client/policy/test_verdicts.py): a rule is said to be kept exactly where `client.policy.policy.check_job`
finds nothing wrong with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from client.policy.peers import knows_enough, num_known
from client.policy.policy import JudgedPlan, Policy, exceeds, judged_plan
from shared.epsilons import as_set, delta_rounded_up, noise_rounded_down, rounded_up
from shared.errors import PrivacyError, TrustError
from shared.job.job import Job
from shared.trust.signed_job import SignedJob

_METRICS = "metrics"
WORDS: Mapping[str, str] = {
    "signed_by": "signed by {name} ({signer})",
    "signed_by_nobody": "signed by somebody unknown here ({signer})",
    "signed_for": "signed for {since} to {until} UTC",
    "now": "the time now, {time}",
    "listed": "those listed by their hash",
    "any_time": "rounds at any time",
    "within": "rounds that begin within {hours}",
    "none": "none",
    "at_most": "at most {most}",
    "at_most_unset": "at most {most} (max_epsilon_per_job, because max_epsilon_alone is not set)",
    "at_least": "at least {least}",
    "known": "{needed} sites that are known here",
    "named": "[peers] names {known} with this one",
    "no_noise": "no noise, so no epsilon",
    "left_to_site": "left to site.toml",
    "unknown": "cannot be told: {reason}",
    "epsilon": "epsilon {epsilon} at delta {delta}",
    "epsilon_cut": "epsilon {epsilon} at delta {delta}, cut to {steps} steps",
}
"""What is said in words, in English; consoles have the same in their languages."""


class Told(str):
    """A text that is one of `WORDS` with its values, so that it can be said in another language; `key` is "" of what is none."""

    __slots__ = ("given", "key")
    key: str
    given: Mapping[str, str]

    def __new__(cls, text: str, key: str = "", given: Mapping[str, str] | None = None) -> Told:
        """Return a text as it is."""
        told = super().__new__(cls, text)
        told.key, told.given = key, given or {}
        return told

    @classmethod
    def of(cls, key: str, **given: str) -> Told:
        """Return one of `WORDS`."""
        return cls(WORDS[key].format(**given), key, given)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One rule.

    Attributes:
        rule: its key in policy.toml; "validity" is that of the signed job itself.
        asked: what the job asks for.
        allowed: what the policy accepts.
        kept: whether the one is within the other.
    """

    rule: str
    asked: str
    allowed: str
    kept: bool

    @property
    def sentence(self) -> str:
        """Both beside each other, for a line of text."""
        if self.rule == "peers":
            return f"the job needs {self.asked}, {self.allowed}"
        if self.rule == "max_epsilon_alone":
            return f"the job's masked inputs alone cost {self.asked}, this site accepts {self.allowed}"
        return f"{self.rule} asks {self.asked}, accepted is {self.allowed}"

    @property
    def refuses(self) -> bool:
        """Whether the job is refused for it; a job whose metrics the policy keeps back is trained all the same."""
        return not self.kept and self.rule != _METRICS


def verdicts(policy: Policy, signed: SignedJob, *, now: datetime, site: str) -> list[Verdict]:
    """Return the verdict of every rule on a job, in the order of policy.toml; takes seconds of accounting.

    Args:
        signed: a job whose signature was verified when it was read.
        now: this site's clock, with time zone.
        site: name of this site.
    """
    return [*_of_signature(policy, signed, now), *job_verdicts(policy, signed.job, site=site)]


def job_verdicts(policy: Policy, job: Job, *, site: str) -> list[Verdict]:
    """Return those of the rules that do not ask who signed a job, or when."""
    return list(_of_job(policy, job, site))


def _of_signature(policy: Policy, signed: SignedJob, now: datetime) -> Iterator[Verdict]:
    name = policy.signer_name(signed.signer)
    yield Verdict(
        rule="signers",
        asked=Told.of("signed_by", name=name, signer=signed.signer.text)
        if name
        else Told.of("signed_by_nobody", signer=signed.signer.text),
        allowed=", ".join(policy.signers),
        kept=name is not None,
    )
    yield _time(signed, now)


def _of_job(policy: Policy, job: Job, site: str) -> Iterator[Verdict]:
    tasks, kind = policy.tasks, job.task.kind
    yield Verdict(rule="tasks", asked=kind, allowed=", ".join(tasks), kept=kind in tasks)
    backbone = job.model.backbone
    listed = backbone in policy.backbones
    yield Verdict(rule="backbones", asked=backbone, allowed=Told.of("listed"), kept=listed)
    yield from numbers(policy, job, site=site)
    yield from _limits(policy, job)
    if policy.hours is not None:
        yield Verdict(rule="hours", asked=Told.of("any_time"), allowed=Told.of("within", hours=policy.hours), kept=True)
    if names := job.site_metrics.names:
        allowed = [name for name in names if name in policy.metrics]
        enough = job.site_metrics.noise_multiplier >= policy.min_noise_multiplier
        yield Verdict(
            rule=_METRICS,
            asked=", ".join(names),
            allowed=", ".join(policy.metrics) or Told.of("none"),
            kept=len(allowed) == len(names) and enough,
        )


def beside_numbers(policy: Policy) -> tuple[str, ...]:
    """Return the rules that `numbers` does not judge: on who signs a job, when, what it is on, and who is in its sums."""
    hours = ("hours",) if policy.hours is not None else ()
    return ("signers", "validity", "tasks", "backbones", "limits", *hours, _METRICS)


def numbers(policy: Policy, job: Job, *, site: str) -> Iterator[Verdict]:
    """Yield the verdicts on what a job costs and how many take part in it; takes seconds of accounting."""
    yield from _privacy(policy, job)
    steps = job.charged_steps
    yield Verdict(
        rule="max_steps",
        asked=f"{steps:,}",
        allowed=Told.of("at_most", most=f"{policy.max_steps:,}"),
        kept=steps <= policy.max_steps,
    )
    rate = job.privacy.sample_rate
    yield Verdict(
        rule="max_sample_rate",
        asked=as_set(rate),
        allowed=Told.of("at_most", most=as_set(policy.max_sample_rate)),
        kept=not exceeds(rate, policy.max_sample_rate),
    )
    sites = job.federation.min_sites
    yield Verdict(
        rule="min_sites",
        asked=f"{sites:,}",
        allowed=Told.of("at_least", least=f"{policy.min_sites:,}"),
        kept=sites >= policy.min_sites,
    )
    if (colluding := job.privacy.max_colluding) is not None:
        least = policy.min_colluding
        yield Verdict(
            rule="min_colluding",
            asked=f"{colluding:,}",
            allowed=Told.of("at_least", least=f"{least:,}"),
            kept=colluding >= least,
        )
    if policy.peers and job.privacy.shares_noise:
        yield Verdict(
            rule="peers",
            asked=Told.of("known", needed=f"{sites:,}"),
            allowed=Told.of("named", known=f"{num_known(policy.peers, site):,}"),
            kept=knows_enough(policy.peers, job, site=site),
        )


def _time(signed: SignedJob, now: datetime) -> Verdict:
    try:
        signed.check_time(now)
        kept = True
    except TrustError:
        kept = False
    asked = Told.of("signed_for", since=f"{signed.issued:%Y-%m-%d %H:%M}", until=f"{signed.not_after:%Y-%m-%d %H:%M}")
    return Verdict(rule="validity", asked=asked, allowed=Told.of("now", time=f"{now:%Y-%m-%d %H:%M %Z}"), kept=kept)


def _privacy(policy: Policy, job: Job) -> Iterator[Verdict]:
    if job.privacy.mechanism == "none":
        yield Verdict(rule="max_epsilon_per_job", asked=Told.of("no_noise"), allowed=Told.of("left_to_site"), kept=True)
        return
    allowed = Told.of("at_most", most=as_set(policy.max_epsilon_per_job))
    try:
        judged = judged_plan(policy, job)
    except PrivacyError as error:
        yield Verdict(
            rule="max_epsilon_per_job", asked=Told.of("unknown", reason=str(error)), allowed=allowed, kept=False
        )
        return
    yield Verdict(
        rule="max_epsilon_per_job",
        asked=_cost(policy, judged, judged.epsilon),
        allowed=allowed,
        kept=not exceeds(judged.epsilon, policy.max_epsilon_per_job),
    )
    if judged.plan.honest is not None:
        yield Verdict(
            rule="max_epsilon_alone",
            asked=_cost(policy, judged, judged.alone),
            allowed=Told.of(
                "at_most_unset" if policy.max_epsilon_alone is None else "at_most",
                most=as_set(policy.largest_epsilon_alone),
            ),
            kept=not exceeds(judged.alone, policy.largest_epsilon_alone),
        )
    yield Verdict(
        rule="min_noise_multiplier",
        asked=noise_rounded_down(judged.plan.noise_multiplier),
        allowed=Told.of("at_least", least=as_set(policy.min_noise_multiplier)),
        kept=judged.plan.noise_multiplier >= policy.min_noise_multiplier,
    )


def _cost(policy: Policy, judged: JudgedPlan, epsilon: float) -> Told:
    told = {"epsilon": rounded_up(epsilon, 4), "delta": delta_rounded_up(judged.plan.delta)}
    if judged.cut:
        return Told.of("epsilon_cut", **told, steps=f"{policy.max_steps:,}")
    return Told.of("epsilon", **told)


def _limits(policy: Policy, job: Job) -> Iterator[Verdict]:
    limits = policy.limits
    for rule, asked, most in (
        ("limits.max_labels", len(job.task.labels), limits.max_labels),
        ("limits.max_rank", job.lora.rank, limits.max_rank),
        ("limits.max_length", job.model.max_length, limits.max_length),
    ):
        yield Verdict(rule=rule, asked=f"{asked:,}", allowed=Told.of("at_most", most=f"{most:,}"), kept=asked <= most)
