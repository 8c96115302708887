"""Offline likelihood-ratio attack: how often does the best known membership test recognise a record at few false alarms?

Source: Carlini, Chien, Nasr, Song, Terzis, Tramer 2022, "Membership inference attacks from first principles", section VI
(offline variant). A record's confidence under the target is compared with a normal distribution fitted to models that did
not train on it; the variance is shared by all records, as advised for few shadow models.

Two figures, and which one decides
    * TPR at 0.1 % FPR, and (TPR - delta) / FPR <= e^epsilon with Clopper-Pearson limits. They treat the records of one
      model as independent trials. Under a private mechanism they need not be, so this figure alone accuses nobody.
    * The one-run bound (`simulations.audit.one_run`) on the same scores: the shadow models know nothing of the coins of
      the targets, so it holds without that assumption. "violated" needs this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from shared.epsilons import bound_rounded_down, rounded_up
from shared.errors import PrivacyError
from shared.privacy.accounting import GaussianSteps
from simulations.audit.one_run import Training, audit_one_run
from simulations.audit.result import AuditResult

Array = NDArray[np.float64]
Coins = NDArray[np.bool_]

FALSE_POSITIVE_RATE = 1e-3
_LEAST_OUT = 1  # shadow models without a record, to know its mean


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A rate with its Clopper-Pearson limits.

    Attributes:
        hits, trials: counts.
        low, high: limits of the rate; each holds with the confidence asked for.
    """

    hits: int
    trials: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """Observed rate; 0.0 without trials."""
        return self.hits / self.trials if self.trials else 0.0


def clopper_pearson(hits: int, trials: int, *, tail: float) -> Rate:
    """Return `hits` of `trials` with one-sided limits that each fail with probability `tail` (Clopper, Pearson 1934)."""
    low = float(stats.beta.ppf(tail, hits, trials - hits + 1)) if hits else 0.0
    high = float(stats.beta.isf(tail, hits + 1, trials - hits)) if hits < trials else 1.0
    return Rate(hits=hits, trials=trials, low=low, high=high)


def logit_confidence(losses: Array) -> Array:
    """Return ln p / (1 - p) of the true class from cross-entropies -ln p, same shape; finite for any finite loss."""
    floored = np.maximum(losses, 1e-12)
    # -ln(e^loss - 1), without overflow for large losses.
    confidence: Array = -(floored + np.log(-np.expm1(-floored)))
    return confidence


def lira_scores(target: Array, shadows: Array, shadow_included: Coins) -> Array:
    """Return (confidence - mean) / standard deviation over the shadow models without the record: N(0, 1) if it is out.

    Args:
        target: confidence of the target model in every record, [records].
        shadows: confidences of the shadow models, [models, records].
        shadow_included: which record each shadow model trained on, [models, records].

    Raises:
        PrivacyError: if a record is in all shadow models.
    """
    outside = ~shadow_included
    counts = outside.sum(axis=0)
    if counts.min() < _LEAST_OUT:
        raise PrivacyError(
            f"a record is outside of only {counts.min()} of {len(shadows)} shadow models; use more shadow models."
        )
    means = np.where(outside, shadows, 0.0).sum(axis=0) / counts
    squares = np.where(outside, (shadows - means) ** 2, 0.0)
    variance = squares.sum() / max(int((counts - 1).sum()), 1)
    # The mean itself is uncertain: a new draw differs from it by a little more than one standard deviation.
    deviation = np.sqrt(max(float(variance), 1e-24) * (1 + 1 / counts))
    scores: Array = (target - means) / deviation
    return scores


def roc(scores: Array, included: Coins) -> tuple[Array, Array]:
    """Return (false positive rates, true positive rates) over all thresholds, rising from (0, 0) to (1, 1)."""
    order = np.argsort(-scores, kind="stable")
    hits = included[order]
    ends = np.append(np.diff(scores[order]) != 0, True)  # equal scores pass a threshold together
    true = np.cumsum(hits)[ends] / max(int(hits.sum()), 1)
    false = np.cumsum(~hits)[ends] / max(int((~hits).sum()), 1)
    return np.insert(false, 0, 0.0), np.insert(true, 0, 0.0)


def tpr_at_fpr(scores: Array, included: Coins, *, fpr: float, tail: float) -> Rate:
    """Return the true positive rate at the lowest threshold whose false positive rate is at most `fpr`."""
    out = np.sort(scores[~included])[::-1]
    allowed = math.floor(fpr * len(out))
    threshold = out[allowed] if allowed < len(out) else -math.inf
    members = scores[included]
    return clopper_pearson(int((members > threshold).sum()), len(members), tail=tail)


def epsilon_from_rates(tpr: Rate, fpr: Rate, *, delta: float) -> float:
    """Return ln((TPR - delta) / FPR) from the lower limit of TPR and the upper one of FPR; 0.0 if it is negative."""
    if tpr.low <= delta:
        return 0.0
    return max(0.0, math.log((tpr.low - delta) / fpr.high))


def audit_lira(
    targets: Sequence[Training],
    plan: GaussianSteps,
    *,
    claim: float,
    delta: float,
    alpha: float,
    audited: str,
) -> AuditResult:
    """Judge `claim` by the LiRA scores of independent target models.

    Args:
        targets: scores of `lira_scores` against shadow models that are none of the targets, with the targets' coins.
        plan, claim, delta, alpha, audited: see `audit_one_run`.
    """
    result = audit_one_run(targets, plan, claim=claim, delta=delta, alpha=alpha, audited=audited, tier=3)
    scores = np.concatenate([target.scores for target in targets])
    included = np.concatenate([target.included for target in targets])
    # A threshold that does not look at these scores: where a normal distribution has this tail.
    above = scores > stats.norm.isf(FALSE_POSITIVE_RATE)
    members, others = int(included.sum()), int((~included).sum())
    true = clopper_pearson(int((above & included).sum()), members, tail=alpha / 2)
    false = clopper_pearson(int((above & ~included).sum()), others, tail=alpha / 2)
    bound = epsilon_from_rates(true, false, delta=delta)
    best = epsilon_from_rates(
        clopper_pearson(members, members, tail=alpha / 2), clopper_pearson(0, others, tail=alpha / 2), delta=delta
    )
    measured = tpr_at_fpr(scores, included, fpr=FALSE_POSITIVE_RATE, tail=alpha / 2)
    details = {
        **result.details,
        "tpr_at_0.1%_fpr": measured.value,
        "tpr_interval": [measured.low, measured.high],
        "members": members,
        "non_members": others,
        "fixed_threshold": {"tpr": true.value, "fpr": false.value, "tpr_low": true.low, "fpr_high": false.high},
        "epsilon_if_records_were_independent": bound,
        "ceiling_if_records_were_independent": best,
    }
    result = replace(result, details=details)
    if bound >= claim and result.verdict != "violated":
        reason = (
            f"(TPR - delta) / FPR gives epsilon {bound_rounded_down(bound)}, not below the claimed {rounded_up(claim)}, if the "
            "records are independent trials; the bound that does not need this stays below. Repeat with more records or "
            "other seeds."
        )
        return replace(result, verdict="inconclusive", reasons=(reason,))
    return result
