"""The privacy statement in words and numbers, computed from what was executed.

Formal guarantees
    * Every epsilon printed here is recomputed from the executed (noise_multiplier, sample_rate, steps)
      (test: tests/shared/privacy/test_statement.py::test_epsilon_follows_executed_steps).
    * Every statement names its unit of privacy; the releases of one are never summed up with those of another, and no
      epsilon by the record is printed as one by the person
      (test: tests/shared/privacy/test_statement.py::test_units_are_never_mixed).
    * No epsilon is printed for a release whose randomness was injected or that added no noise
      (test: tests/shared/privacy/test_statement.py::test_injected_randomness_prints_no_epsilon).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from shared.epsilons import delta_rounded_up, noise_rounded_down, rate_rounded_up, rounded_up
from shared.errors import PrivacyError
from shared.files.json_files import Count, Positive
from shared.job.values import PERSON_UNITS
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.randomness import Origin
from shared.privacy.shared_noise import ASSUMED_HONEST, COMPUTATIONAL, STILL_LEARNED, SharedNoise, largest_at

ACCOUNTANT = "PLD (connect the dots, rounding bounded and added), cross-checked with PRV (Opacus)"
RELATION = "add or remove one record"
AS_REPORTED = (
    "Epsilon is computed from the steps that sites reported as executed; what a site executed, its own account alone can "
    "tell."
)
_SEVERAL_RECORDS = (
    "Several records of one person: the unit is one record. With k records a person is protected far less than the epsilon "
    "says."
)
PRE_TRAINING = "The text on which the backbone was pre-trained."
CHOICE_OF_SETTINGS = (
    "The choice of settings: whoever tries several on private records and keeps the best releases more than the epsilon of the "
    "one run that is kept. Each run at a site is charged to its account there; runs elsewhere are not."
)
FINITE_PRECISION = (
    "The finite precision of floating-point noise: it is drawn in float64 and rounded to float32 after it was added; "
    "the accountant assumes real numbers."
)
_NOT_COVERED = "Not covered: "
NOT_COVERED = (
    "Metrics that were not released through a private mechanism. Silotune releases none such; training losses and clip "
    "fractions stay at the site.",
    PRE_TRAINING,
    _SEVERAL_RECORDS,
    CHOICE_OF_SETTINGS,
    "The declared size of each site, the job's settings, the backbone, the names of sites and the rounds in which they "
    "took part: all of these are public.",
    "How long a site takes to answer, and whether it answers at all: timing and failures carry no noise. A site with "
    "answers.slot_seconds hides the time of answers that fit into their slot; that one took a slot more is seen.",
    "What a site's people do about a job that was refused or a warning that they read there: whether they mend data, change "
    "their policy, or stop, shows outside, and they may have known the records when they decided.",
    FINITE_PRECISION,
    "Runs on the same data that are not in the same ledger, and anything that a site published by other means.",
)
STOPPED_EARLY = (
    "When this run ended, as far as the executed steps are concerned: it ended before its planned rounds, by a rule that reads "
    "what had been released. What is promised is the epsilon of all planned steps, which bounded the run before anybody knew "
    "where it would end. The epsilon of the executed steps holds of the run having ended there, and is a figure beside it."
)


_RELATIONS: dict[str, str] = {
    "record": RELATION,
    "site": "add or remove one site",
    **{unit: f"add or remove one {unit} with all their records" for unit in PERSON_UNITS},
}
_SEVERAL_IDS = (
    "A {unit} under several ids: whoever has one id at one site is protected as stated. Records under another id, or under a "
    "spelling that differs, count as another {unit}'s, and the same {unit} at several sites has the epsilon of the table for "
    "these. Which records a {unit} has who is known to be there: that exchanges one {unit} for another, a removal and an "
    "addition, and has about twice the epsilon. What a {unit}'s records tell about others, such as relatives."
)


def relation(unit: str) -> str:
    """Return in words which data sets are neighbours.

    Raises:
        PrivacyError: if nothing can be stated for such a unit.
    """
    if unit not in _RELATIONS:
        raise PrivacyError(
            f"no guarantee can be stated for the unit of privacy {unit!r}; known: {', '.join(_RELATIONS)}."
        )
    return _RELATIONS[unit]


def not_covered(unit: str, *, pretrained: bool = True, shared: bool = False) -> tuple[str, ...]:
    """Return what no statement for this unit covers.

    Args:
        pretrained: the model has a backbone that was trained on something before.
        shared: sites add shares of the noise, in whole numbers: their precision is part of what was proven.
    """
    items = [i for i in NOT_COVERED if (pretrained or i is not PRE_TRAINING) and not (shared and i is FINITE_PRECISION)]
    if shared:
        items += [COMPUTATIONAL, ASSUMED_HONEST, STILL_LEARNED]
    if unit not in PERSON_UNITS:
        return tuple(items)
    return tuple(_SEVERAL_IDS.format(unit=unit) if item is _SEVERAL_RECORDS else item for item in items)


class Release:
    """What stands behind one guarantee: the executed mechanisms of a site, or of a trusted coordinator."""

    delta: float
    randomness: Origin
    private: bool
    steps_planned: int
    rounds: tuple[int, ...]
    events: tuple[GaussianSteps, ...]

    @property
    def protected(self) -> bool:
        """True if a guarantee can be stated at all."""
        return self.private and self.randomness == "os"

    @property
    def steps(self) -> int:
        """Executed noisy steps of training."""
        return sum(event.steps for event in self.events)

    @property
    def arrived_events(self) -> tuple[GaussianSteps, ...]:
        """Everything that arrived, or was published."""
        return self.events

    @property
    def spent_events(self) -> tuple[GaussianSteps, ...]:
        """The same as the epsilon of a statement counts it."""
        return self.arrived_events

    @property
    def epsilon(self) -> float:
        """Epsilon of everything that arrived; infinite without protection."""
        return compose_epsilon(self.spent_events, self.delta) if self.protected else math.inf

    @property
    def epsilon_promised(self) -> float:
        """Epsilon of the whole plan, never below that of what was executed: what a run promises that may end early."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SiteRelease(Release):
    """Everything that one site released in one run.

    Attributes:
        site: name of the site.
        unit: unit of privacy, "record", "patient" or "customer".
        records_per_person: G, most records of one person in a step; None if the unit is the record.
        delta: failure probability.
        max_grad_norm: clipping bound.
        declared_records: public size.
        randomness: "os" or "injected"; of shares the latter if that of any site in its sums was.
        epsilon_budget: the site's cap; 0.0 if unknown.
        steps_planned: steps of a site that takes part in every round.
        events: executed mechanisms; a noise multiplier of 0 cannot stand here.
        rounds: rounds in which the site released an update.
        updates: SHA-256 of the update of each of these rounds.
        unanswered: rounds that the site was asked for and whose outcome the coordinator does not know.
        per_round: what the site executes in one such round, if it does; None if unknown or not private.
        metrics: site metrics that it was asked for after the last round.
        metrics_mechanism: their one release; None if it was not asked, or refused.
        metrics_sha256: of that release; None if its outcome is unknown.
        private: False if updates were released without noise.
        shared: set if the noise of each event of training is a share: then the epsilons are those of the sum, and `epsilon_alone`
            that of the share. How many attempts are made may depend on what was released, so the whole plan is what is stated.
    """

    site: str
    unit: str = "record"
    records_per_person: int | None = None
    delta: float
    max_grad_norm: float
    declared_records: int
    randomness: Origin
    epsilon_budget: float
    steps_planned: int
    events: tuple[GaussianSteps, ...] = ()
    rounds: tuple[int, ...] = ()
    updates: tuple[str, ...] = ()
    unanswered: tuple[int, ...] = ()
    per_round: GaussianSteps | None = None
    metrics: tuple[str, ...] = ()
    metrics_mechanism: GaussianSteps | None = None
    metrics_sha256: str | None = None
    private: bool = True
    shared: SharedNoise | None = None

    @property
    def arrived_events(self) -> tuple[GaussianSteps, ...]:
        """Everything that arrived: updates, and metrics; of shares, as each site executed it."""
        return (*self.events, *self._arrived_metrics)

    @property
    def spent_events(self) -> tuple[GaussianSteps, ...]:
        """See `Release`."""
        return (*self._counted(self.events), *self._arrived_metrics)

    @property
    def possible_events(self) -> tuple[GaussianSteps, ...]:
        """Everything that arrived and, as if executed, every request whose outcome is unknown."""
        return (*self._counted(self.events), *self._asked_metrics, *self._counted(self._unknown))

    @property
    def planned_events(self) -> tuple[GaussianSteps, ...]:
        """`possible_events` and the planned steps that were not taken: what bounded a run that could have ended anywhere."""
        return (*self.possible_events, *self._counted(self._left))

    @property
    def epsilon_alone(self) -> float | None:
        """Epsilon of the whole plan as the site executes it; None where the noise is not shared, infinite without protection."""
        if self.shared is None:
            return None
        alone = (*self.events, *self._asked_metrics, *self._unknown, *self._left)
        return compose_epsilon(alone, self.delta) if self.protected else math.inf

    def _counted(self, events: tuple[GaussianSteps, ...]) -> tuple[GaussianSteps, ...]:
        """Return steps of training as a statement counts them: of shares, with the noise of their sum."""
        return events if self.shared is None else self.shared.summed(events)

    @property
    def _asked_metrics(self) -> tuple[GaussianSteps, ...]:
        return () if self.metrics_mechanism is None else (self.metrics_mechanism,)

    @property
    def _arrived_metrics(self) -> tuple[GaussianSteps, ...]:
        return () if self.metrics_sha256 is None else self._asked_metrics

    @property
    def _unknown(self) -> tuple[GaussianSteps, ...]:
        """Requests whose outcome is unknown, as if executed."""
        if not self.unanswered or self.per_round is None:
            return ()
        return (replace(self.per_round, steps=self.per_round.steps * len(self.unanswered)),)

    @property
    def _left(self) -> tuple[GaussianSteps, ...]:
        """The planned steps that were not taken."""
        last = self.per_round or (self.events[-1] if self.events else None)
        left = self.steps_planned - self.steps - sum(event.steps for event in self._unknown)
        return (replace(last, steps=left),) if last and left > 0 else ()

    @property
    def epsilon_promised(self) -> float:
        """Epsilon of the whole plan, never below `epsilon_bound`: what a run promises that its own rule may end early."""
        return self.epsilon_stated(stopped_early=True)

    @property
    def epsilon_bound(self) -> float:
        """Epsilon if every request of unknown outcome was executed; never below `epsilon`."""
        return compose_epsilon(self.possible_events, self.delta) if self.protected else math.inf

    def stated_events(self, *, stopped_early: bool) -> tuple[GaussianSteps, ...]:
        """What the epsilon of a statement is composed of: everything that was possible, or promised if the run ended early."""
        return self.planned_events if stopped_early or self.shared else self.possible_events

    def epsilon_stated(self, *, stopped_early: bool) -> float:
        """Epsilon of `stated_events`; infinite without protection."""
        stated = self.stated_events(stopped_early=stopped_early)
        return compose_epsilon(stated, self.delta) if self.protected else math.inf


@dataclass(frozen=True, kw_only=True)
class SitesEpsilon:
    """Epsilon of one person, record or the like at each of up to so many sites."""

    sites: Annotated[Count, Field(ge=1)]
    epsilon: Positive


@dataclass(frozen=True, kw_only=True)
class Statement:
    """The statement of a run, as `statement.json` holds it.

    Attributes:
        one_site: guarantee for a person whose records are at one site.
        up_to_m_sites: epsilon for a person with one record (or, if persons are the unit, with records) at each of up to m
            sites, worst sites first.
        not_covered: what the guarantee does not say.
        text: all of it in words.
    """

    one_site: str
    up_to_m_sites: tuple[SitesEpsilon, ...] = ()
    not_covered: tuple[str, ...] = ()
    text: str

    @classmethod
    def of(
        cls,
        one_site: str,
        up_to_m_sites: tuple[SitesEpsilon, ...] = (),
        *,
        not_covered: tuple[str, ...] = NOT_COVERED,
        unit: str = "record",
    ) -> Statement:
        """Return the statement with all of it put into words."""
        parts = [one_site]
        if up_to_m_sites:
            rows = ", ".join(f"{row.sites}: {rounded_up(row.epsilon)}" for row in up_to_m_sites)
            who = f"A {unit} with records" if unit in PERSON_UNITS else "A person with one record"
            parts.append(f"{who} at each of m sites is protected with epsilon (m: epsilon) {rows}.")
        parts.append(_NOT_COVERED + " ".join(not_covered))
        return cls(one_site=one_site, up_to_m_sites=up_to_m_sites, not_covered=not_covered, text="\n\n".join(parts))


def without_uncovered(statement: str, listed: Iterable[str]) -> str:
    """Return a statement without its last part, what is not covered, if the reader has every item of it in `listed`.

    A document that quotes many statements lists once what none of them covers.
    """
    claim, _, rest = statement.rpartition(_NOT_COVERED)
    for item in listed:
        rest = rest.replace(item, "", 1)
    return statement if rest.strip() else claim.rstrip() or statement


def site_statement(release: SiteRelease, run: str, *, stopped_early: bool = False, pretrained: bool = True) -> str:
    """Return the statement of one site in words; see `run_statement` for the two flags."""
    if not release.private:
        return (
            f"Site {release.site} released updates of run {run} WITHOUT noise. Nothing about its records is protected."
        )
    if release.randomness != "os":
        others = ", or of a site whose share of the noise it counts on," if release.shared is not None else ""
        return (
            f"NOT PRIVATE: the randomness of site {release.site}{others} in run {run} was injected for a test. Whoever knows the "
            "seed can remove the noise, so no epsilon is stated."
        )
    if not release.possible_events and not release.unanswered:
        return f"Site {release.site} released nothing in run {run}."
    parts = "; ".join(
        f"Poisson sampling rate {rate_rounded_up(e.sample_rate)}, noise multiplier {noise_rounded_down(e.noise_multiplier)}, "
        f"{e.steps} executed steps"
        for e in release.events
    )
    if release.unanswered:
        parts = parts or "no update that arrived"
        rounds = ", ".join(str(number) for number in release.unanswered)
        parts += (
            f" (and, counted as executed, the requests of round {rounds}, which were never answered here; the site's own ledger "
            "knows)"
        )
    if release.metrics_mechanism is not None:
        names = ", ".join(release.metrics)
        parts += f"; and one release of counts ({names}) with noise of standard deviation "
        parts += noise_rounded_down(release.metrics_mechanism.noise_multiplier) + (
            "" if release.metrics_sha256 else ", which was asked for and never arrived here"
        )
    epsilon = release.epsilon_stated(stopped_early=stopped_early)
    planned, uncovered = "", not_covered(release.unit, pretrained=pretrained, shared=release.shared is not None)
    if release.shared is not None:
        return (
            f"Site {release.site}, run {run}, secure aggregation with shared noise. {_promises_of_shares(release)} Executed: "
            f"{parts}, clipping norm {rate_rounded_up(release.max_grad_norm)}. {AS_REPORTED} {_sampling_in_words(release)}"
            f"{_NOT_COVERED}{' '.join(uncovered)}"
        )
    if stopped_early:
        planned = (
            f"That is the epsilon of all {release.steps_planned} planned steps, which is what was promised; of the executed ones "
            f"it is {rounded_up(release.epsilon_bound)}. "
        )
    return (
        f"Everything site {release.site} released in run {run} is ({rounded_up(epsilon)}, {delta_rounded_up(release.delta)})-"
        f"differentially private under {relation(release.unit)}, for {parts}, clipping norm "
        f"{rate_rounded_up(release.max_grad_norm)}, by PLD accounting, against an observer of every update. "
        f"{planned}{AS_REPORTED} {_sampling_in_words(release)}"
        f"{_NOT_COVERED}{' '.join(uncovered)}"
    )


def _promises_of_shares(*releases: SiteRelease) -> str:
    """Return both promises of sites that add shares of the noise, each the largest of any of them; the worst comes first."""
    worst = releases[0]
    assert worst.shared is not None  # noqa: S101 (the callers looked)
    return worst.shared.promises(
        epsilon=worst.epsilon_promised,
        executed=max(release.epsilon_bound for release in releases),
        alone=max(release.epsilon_alone or 0.0 for release in releases),
        delta=worst.delta,
        relation=relation(worst.unit),
        planned=worst.steps_planned,
        at_most=len({rounded_up(release.epsilon_bound) for release in releases}) > 1,
    )


def _sampling_in_words(release: SiteRelease) -> str:
    if release.unit not in PERSON_UNITS:
        return ""
    most = release.records_per_person
    if most is None:
        raise PrivacyError(f"the unit is the {release.unit}, but how many records of each enter a step is not known.")
    return (
        f"Each {release.unit} enters a step by one coin, with at most {most} record{'s' if most > 1 else ''} of theirs, drawn "
        f"anew each time; the mean of their gradients is clipped. Over a run more of them may be used. Epsilon holds for a "
        f"{release.unit} with any number of records. "
    )


def run_statement(
    releases: Sequence[SiteRelease], run: str, *, stopped_early: bool = False, pretrained: bool = True
) -> Statement:
    """Return the statement of a whole run over disjoint or overlapping sites.

    Args:
        stopped_early: the run ended before its planned rounds because of what it had released: the planned epsilon is stated.
        pretrained: the model has a backbone that was trained on something before.

    Raises:
        PrivacyError: if the releases are of different units; their epsilons say different things.
    """
    if not releases:
        return Statement.of(f"Run {run} released nothing yet.")
    if any(not release.protected for release in releases):
        worst = next(release for release in releases if not release.protected)
        uncovered = not_covered(worst.unit, pretrained=pretrained)
        return Statement.of(site_statement(worst, run, pretrained=pretrained), unit=worst.unit, not_covered=uncovered)
    if len(units := {release.unit for release in releases}) > 1:
        raise PrivacyError(
            f"the releases of run {run} are by different units ({', '.join(sorted(units))}); none is stated."
        )
    worst = worst_first(releases, stopped_early=stopped_early)[0]
    if worst.shared is not None:
        return _run_statement_of_shares(releases, run, pretrained=pretrained)
    stated = rounded_up(worst.epsilon_stated(stopped_early=stopped_early))
    table = tuple(
        SitesEpsilon(
            sites=count,
            epsilon=compose_epsilon(events_at_sites(releases, count, stopped_early=stopped_early), worst.delta),
        )
        for count in _counts(len(releases))
    )
    about = "A person with one record at one site: everything released about it is"
    if worst.unit in PERSON_UNITS:
        about = f"A {worst.unit} whose records are all at one site: everything released about them is"
    sentence = (
        f"Run {run}, {len(releases)} sites. {about} ({stated}, {delta_rounded_up(worst.delta)})-differentially private "
        f"under {relation(worst.unit)}, by PLD accounting, against an observer of every update of every site; the "
        f"largest epsilon of a site, {worst.site}. {AS_REPORTED}"
    )
    if stopped_early:
        sentence += (
            f" The run ended early: this is the epsilon of all {worst.steps_planned} planned steps, which is what was "
            f"promised; of the executed ones it is {rounded_up(max(release.epsilon_bound for release in releases))}."
        )
    if any(release.unanswered for release in releases):
        sentence += " Requests that were never answered here are counted as executed."
    uncovered = (*not_covered(worst.unit, pretrained=pretrained), *([STOPPED_EARLY] if stopped_early else []))
    return Statement.of(sentence, table, unit=worst.unit, not_covered=uncovered)


def _run_statement_of_shares(releases: Sequence[SiteRelease], run: str, *, pretrained: bool) -> Statement:
    """Return the two promises of a run whose sites add shares of the noise."""
    worst = worst_first(releases, stopped_early=False)[0]
    assert worst.shared is not None  # noqa: S101 (the caller looked)
    who = f"{worst.unit} whose records are all" if worst.unit in PERSON_UNITS else "record"
    names, few = ", ".join(release.site for release in releases), worst.shared.colluding
    at = largest_at([(release.site, release.epsilon_promised, release.epsilon_alone or 0.0) for release in releases])
    sentence = (
        f"Run {run}, {len(releases)} sites, secure aggregation with shared noise, for a {who} at one honest site; {at}. "
        f"{_promises_of_shares(worst, *releases)} Assumed honest{f' but for {few}' if few else ''}: {names}. {AS_REPORTED}"
    )
    if any(release.unanswered for release in releases):
        sentence += " Requests that were never answered here are counted as executed."
    shares = (*worst.events, *worst._unknown, *worst._left)
    rows = worst.shared.epsilon_at_sites(shares, len(releases), worst.delta, apart=worst._asked_metrics)
    table = tuple(SitesEpsilon(sites=count, epsilon=epsilon) for count, epsilon in rows.items())
    uncovered = not_covered(worst.unit, pretrained=pretrained, shared=True)
    return Statement.of(sentence, table, unit=worst.unit, not_covered=uncovered)


def worst_first(releases: Sequence[SiteRelease], *, stopped_early: bool) -> list[SiteRelease]:
    """Return the releases, those with the largest stated epsilon first."""
    return sorted(releases, key=lambda release: release.epsilon_stated(stopped_early=stopped_early), reverse=True)


def events_at_sites(releases: Sequence[SiteRelease], count: int, *, stopped_early: bool) -> tuple[GaussianSteps, ...]:
    """Return what is composed for a person at `count` sites: everything stated of those with the largest epsilons."""
    worst = worst_first(releases, stopped_early=stopped_early)[:count]
    return tuple(event for release in worst for event in release.stated_events(stopped_early=stopped_early))


def _counts(sites: int) -> list[int]:
    """Return 1, 2, 3, 4, 5, then doubling, then all."""
    counts = [*range(1, min(sites, 5) + 1)]
    while counts[-1] < sites:
        counts.append(min(counts[-1] * 2, sites))
    return counts
