"""Which figures a run report has, and what each one says in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from server.records.results import EvaluationRecord
from server.records.rounds import RoundRecord
from server.reports.run import formats, plots
from server.reports.run.noise import arm_shares, of_shares
from server.reports.run.run_data import RunData
from server.reports.run.tables import total
from shared.site_weights import SiteShare


def figures(data: RunData, titles: Sequence[str]) -> dict[str, Any]:
    """All figures that have something to show, each with a description in words."""
    arm = data.federated
    shares = arm_shares(arm)
    return {
        "rounds": _by_round(data, titles),
        "spent": _by_epsilon(data, titles),
        **_of_evaluation(arm.evaluation),
        "sites": [
            plots.site_spend(page, prefix=f"sites{number}", alt=_site_alt(page))
            for number, page in enumerate(plots.site_pages(arm.sites if arm.private else ()))
        ],
        "shares": plots.noise_shares(shares, units=arm.declared, alt=_shares_alt(shares)) if shares else None,
        "traffic": _traffic(arm.rounds),
    }


def _by_round(data: RunData, titles: Sequence[str]) -> Markup | None:
    metric, arm = data.primary_metric, data.federated
    if not any(record.metrics.get(metric) is not None for record in arm.rounds):
        return None
    finals = "; ".join(
        f"{title} {formats.format_metric(metric, one.final(metric))}"
        for title, one in zip(titles, data.arms, strict=True)
    )
    return plots.metric_by_round(
        metric=metric,
        federated=arm,
        baselines=data.baselines,
        titles=titles,
        alt=f"Line plot of {formats.metric_title(metric)} against the round. Final values: {finals}.",
    )


def _by_epsilon(data: RunData, titles: Sequence[str]) -> Markup | None:
    metric, arm = data.primary_metric, data.federated
    if not arm.private or all(record.epsilon_max is None for record in arm.rounds):
        return None
    # What is stated of shares of the noise is what was promised.
    recorded = [record.epsilon_max for record in arm.rounds if record.epsilon_max is not None]
    so_far = recorded[-1] if of_shares(arm) and recorded else arm.epsilon
    spent = "Epsilon spent, unit site" if arm.central_sites else "Epsilon spent, largest of all sites"
    return plots.metric_by_epsilon(
        metric=metric,
        titles=titles,
        arms=data.arms,
        budget=arm.budget,
        label=spent,
        alt=f"Line plot of {formats.metric_title(metric)} against epsilon spent. {spent.replace(' spent', '')}, so far: "
        f"{formats.format_epsilon(so_far)}, budget {formats.format_budget(arm.budget)}.",
    )


def _of_evaluation(found: EvaluationRecord | None) -> dict[str, Markup | None]:
    if found is None:
        return {"roc": None, "reliability": None, "pairs": None}
    roc = reliability = pairs = None
    if found.roc is not None and found.labels is not None:
        auc = formats.format_metric("auc", found.metrics.get("auc"))
        alt = f"ROC curve. {formats.metric_title('auc')} {auc}."
        roc = plots.roc_curve(found.roc, positive=found.labels[-1], alt=alt)
    if (sure := found.calibration) is not None:
        after = f", {sure.error_after:.1%} after the temperature." if sure.fitted_on else "."
        reliability = plots.reliability(
            sure.bins_before,
            sure.bins_after if sure.fitted_on else None,
            alt="Reliability diagram: how often answers are right against how sure the model is of them. Expected "
            f"calibration error {sure.error_before:.1%}{' before' if sure.fitted_on else ''}{after}",
        )
    if found.pairs is not None:
        alt = f"Scatter plot of {len(found.pairs):,} predicted numbers against the true ones."
        pairs = plots.true_and_predicted(found.pairs, alt=alt)
    return {"roc": roc, "reliability": reliability, "pairs": pairs}


def _traffic(rounds: Sequence[RoundRecord]) -> Markup | None:
    measured = [r for r in rounds if r.bytes_up is not None or r.bytes_down is not None]
    if not measured:
        return None
    up, down = (formats.format_bytes(total(measured, key)) for key in ("bytes_up", "bytes_down"))
    alt = f"Bar plot of bytes in every round. In total {up} from the sites and {down} to the sites."
    return plots.traffic(measured, alt=alt)


def _site_alt(sites: Sequence[Any]) -> str:
    names = f"{sites[0].site} to {sites[-1].site}" if len(sites) > 1 else sites[0].site
    shown = formats.printable(names)
    promised = " and promised" if any(plots.promised(site) is not None for site in sites) else ""
    return f"Bar plot of epsilon spent{promised} against the budget, {shown}. Every value is in the table below."


def _shares_alt(shares: Sequence[SiteShare]) -> str:
    loudest = max(shares, key=lambda share: share.noise)
    return (
        "Bar plot of each site's share of the declared records and of the noise. The largest share of the noise, "
        f"{loudest.noise:.1%}, comes from {formats.printable(loudest.site)} with {loudest.records:.1%} of the records."
    )
