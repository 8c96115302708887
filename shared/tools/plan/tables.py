"""What `silotune plan` prints: tables, warnings and what its numbers mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shared.epsilons import as_set, delta_rounded_up, noise_rounded_down, rate_rounded_up, rounded_up
from shared.tools.plan.figure import UtilityPoint, number

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from shared.job.federation import AggregationConfig
    from shared.privacy.ledger_export import LedgerExport
    from shared.tools.plan.affordability import SiteAnswer
    from shared.tools.plan.planning import Setting
    from shared.tools.plan.sharing import SharesPlan

_NO_UTILITY = "Expected utility: not known. No measured points were given (--utility FILE), and none are made up."
_FILTER = (
    "Adaptive accounts are measured by a filter that also holds for runs chosen after seeing the last one; it counts more "
    "than PLD does."
)
_TWO_PROMISES = (
    "Epsilon holds against {against}, as long as secure aggregation does; epsilon "
    "alone if it fails and all other sites collude."
)
_CLAIM = (
    "Epsilon is an upper bound by PLD accounting, at delta {delta}, under {relation}, by a site that takes every step with "
    "Poisson sampling."
)
_CLAIM_OF_RECORDS = " A person with several records is protected less."
_CLAIM_OF_PERSONS = " All numbers count {unit}s, not records."


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What was found.

    Attributes:
        settings: one, or those of a sweep; of shares, what one site executes.
        sites: every site whose ledger was given, with its answer.
        shares: both promises, if sites share the noise.
    """

    settings: Sequence[Setting]
    sites: Sequence[tuple[LedgerExport, SiteAnswer]] = ()
    shares: SharesPlan | None = None

    def warnings(self, setting: Setting) -> dict[str, str]:
        """Return what is to be minded about one of the settings, by its subject."""
        return setting.warnings() if self.shares is None else self.shares.warnings()

    def site_warnings(self, export: LedgerExport) -> dict[str, str]:
        """Return what depends on the size of a site, as it is declared in its export."""
        judged = self.settings[0] if self.shares is None else self.shares.together
        known = self.warnings(self.settings[0])
        # How much the others bring to a sum is not known.
        left_out = {*known, *([] if self.shares is None else ["noise"])}
        of_site = replace(judged, records=export.declared_records).warnings()
        return {subject: text for subject, text in of_site.items() if subject not in left_out}


def print_answers(
    console: Console,
    planned: Planned,
    utility: Sequence[UtilityPoint] | None,
    *,
    swept: str | None,
    unit: str = "record",
) -> None:
    from shared.privacy.shared_noise import SharedNoise
    from shared.privacy.statement import relation

    settings, sites, shares = planned.settings, planned.sites, planned.shares
    if shares is not None:
        console.print(_shares_table(shares, unit))
        for text in _prices(shares):
            console.print(text)
    else:
        console.print(_setting_table(settings[0], unit) if swept is None else _sweep_table(settings))
    told: set[str] = set()
    for setting in settings:
        for subject, text in planned.warnings(setting).items():
            if subject not in told:
                told.add(subject)
                console.print(f"warning: {text}", style="yellow")
    if sites:
        console.print(_site_table([answer for _, answer in sites]))
    for export, answer in sites:
        name = f"{answer.site}, {answer.dataset}"
        if answer.advice:
            console.print(f"{name}: {answer.advice}", style="yellow")
        for text in planned.site_warnings(export).values():
            console.print(f"{name}: warning: {text}", style="yellow")
    if any(answer.composition == "adaptive" for _, answer in sites):
        console.print(_FILTER)
    if utility is None:
        console.print(_NO_UTILITY)
    else:
        console.print(_utility_table(utility))
    beyond = _CLAIM_OF_RECORDS if unit == "record" else _CLAIM_OF_PERSONS
    if shares is not None:
        noise = SharedNoise(honest=shares.sharing.honest, colluding=shares.sharing.colluding)
        console.print(_TWO_PROMISES.format(against=noise.against))
    delta = max(setting.delta for setting in settings)
    console.print((_CLAIM + beyond).format(delta=delta_rounded_up(delta), relation=relation(unit), unit=unit))


def _setting_table(setting: Setting, unit: str) -> Table:
    rows = [
        (f"{unit}s", "" if setting.records is None else f"{setting.records:,}", ""),
        ("expected batch size", number(setting.batch_size), "rate"),
        ("sample rate", rate_rounded_up(setting.sample_rate), "rate"),
        ("steps", f"{setting.steps:,}", "steps"),
        ("epochs", number(setting.epochs), "steps"),
        ("noise multiplier", noise_rounded_down(setting.noise_multiplier), "noise"),
        ("epsilon", rounded_up(setting.epsilon), "epsilon"),
        ("delta", delta_rounded_up(setting.delta, 3), ""),
        ("trainable parameters", "" if setting.parameters is None else f"{setting.parameters:,}", ""),
        ("signal to noise, one coordinate", number(setting.signal_to_noise), ""),
        ("signal to noise, all parameters", number(setting.signal_to_noise_vector), ""),
    ]
    return _quantities(rows, setting.solved_for)


def _shares_table(shares: SharesPlan, unit: str) -> Table:
    share, sharing, whole = shares.share, shares.sharing, shares.whole_sum
    rows = [
        ("sites in a sum, at least", f"{sharing.sites:,}", ""),
        ("of which may collude", f"{sharing.colluding:,}", ""),
        ("so that stay honest", f"{sharing.honest:,}", ""),
        (f"{unit}s of a site", "" if share.records is None else f"{share.records:,}", ""),
        ("expected batch size of a site", number(share.batch_size), ""),
        ("sample rate", rate_rounded_up(share.sample_rate), ""),
        ("rounds, of one step each", f"{shares.rounds:,}", ""),
        ("spare attempts", f"{shares.spare_attempts:,}", ""),
        ("noise multiplier of a site's share", noise_rounded_down(share.noise_multiplier), "noise"),
        ("noise multiplier of the honest sum", noise_rounded_down(shares.together.noise_multiplier), "noise"),
        ("epsilon", rounded_up(shares.together.epsilon), "epsilon"),
        ("epsilon alone", rounded_up(share.epsilon), "epsilon"),
        ("delta", delta_rounded_up(share.delta, 3), ""),
        ("trainable parameters", "" if share.parameters is None else f"{share.parameters:,}", ""),
        ("signal to noise of a sum, one coordinate", "" if whole is None else number(whole.signal_to_noise), ""),
        ("signal to noise of a sum, all parameters", "" if whole is None else number(whole.signal_to_noise_vector), ""),
    ]
    return _quantities(rows, share.solved_for)


def _quantities(rows: Iterable[tuple[str, str, str]], solved_for: str | None) -> Table:
    """Return a table of (name, value, quantity) without those that have no value; what was solved for is told apart."""
    from rich import box
    from rich.table import Table

    table = Table("quantity", box=box.SIMPLE_HEAD)
    table.add_column("value", justify="right")
    table.add_column("")
    for name, value, quantity in rows:
        if value:
            found = quantity == solved_for
            table.add_row(name, value, "found" if found else "", style="bold" if found else None)
    return table


def _prices(shares: SharesPlan) -> Iterator[str]:
    """Yield a sentence for what each of the two promises costs, and the spare attempts."""
    by_epsilon, by_alone = shares.by_epsilon, shares.by_epsilon_alone
    if by_epsilon is not None and by_alone is not None:
        rules = "Epsilon" if shares.ruled_by == "epsilon" else "Epsilon alone"
        yield (
            f"{rules} rules. Epsilon asks for shares of noise {noise_rounded_down(by_epsilon.noise_multiplier)}, at which "
            f"epsilon alone would be {rounded_up(by_epsilon.epsilon_alone)}; epsilon alone asks for "
            f"{noise_rounded_down(by_alone.noise_multiplier)}, at which epsilon would be {rounded_up(by_alone.epsilon)}."
        )
    if shares.spare_attempts:
        yield (
            f"Without the {shares.spare_attempts} spare attempts the same noise would cost epsilon "
            f"{rounded_up(shares.without_spare.epsilon)}, alone {rounded_up(shares.without_spare.epsilon_alone)}."
        )


def _sweep_table(settings: Sequence[Setting]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    found = settings[0].solved_for
    for title, quantity in (
        ("epochs", "steps"),
        ("steps", "steps"),
        ("batch", "rate"),
        ("rate", "rate"),
        ("noise", "noise"),
        ("epsilon", "epsilon"),
        ("delta", ""),
        ("signal", ""),
    ):
        table.add_column(title, justify="right", style="bold" if quantity == found else None)
    table.add_column("mind")
    for setting in settings:
        table.add_row(
            number(setting.epochs),
            f"{setting.steps:,}",
            number(setting.batch_size),
            rate_rounded_up(setting.sample_rate),
            noise_rounded_down(setting.noise_multiplier),
            rounded_up(setting.epsilon),
            delta_rounded_up(setting.delta, 3),
            number(setting.signal_to_noise),
            ", ".join(setting.warnings()),
        )
    return table


def _table_of_sites(title: str, numbers: Sequence[str]) -> Table:
    """Return an empty table of a site a row, with columns of numbers."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("site", overflow="fold")
    for number_of in numbers:
        table.add_column(number_of, justify="right")
    return table


def _site_table(answers: Sequence[SiteAnswer]) -> Table:
    table = _table_of_sites(
        "Epsilon of each site: now, after this run, and after more like it",
        ("spent", "after it", "+1 more", "+2 more", "cap", "steps left"),
    )
    table.add_column("fits?", overflow="fold", min_width=8)
    for answer in answers:
        style = None if answer.num_runs and not answer.refusal else "bold"
        table.add_row(
            f"{answer.site}, {answer.dataset} ({answer.composition})",
            *(rounded_up(epsilon) for epsilon in (answer.epsilon_now, *answer.epsilon_after)),
            as_set(answer.cap),
            f"{answer.steps_affordable:,}",
            answer.verdict,
            style=style,
        )
        if answer.has_two_caps:
            table.add_row(
                "  each input alone",
                *(rounded_up(epsilon) for epsilon in (answer.alone_now, *answer.alone_after)),
                as_set(answer.cap_alone),
                "",
                "",
                style=style,
            )
    return table


def print_shares(console: Console, sizes: Mapping[str, int], aggregation: AggregationConfig) -> None:
    """Print who brings the noise of a round, and what is to be minded about it."""
    from shared.site_weights import noise_warnings, site_shares

    table = _table_of_sites("Who brings the noise of a round", ("declared", "of all", "weight", "of the noise"))
    for share in site_shares(sizes, aggregation):
        parts = (f"{part:.1%}" for part in (share.records, share.weight, share.noise))
        table.add_row(share.site, f"{sizes[share.site]:,}", *parts, style="bold" if share.far_above else None)
    console.print(table)
    for text in noise_warnings(sizes, aggregation):
        console.print(f"warning: {text}", style="yellow")


def _utility_table(utility: Sequence[UtilityPoint]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title="Measured utility, as given", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for title in ("epsilon", "mean", "sd"):
        table.add_column(title, justify="right")
    table.add_column("name", overflow="fold")
    for point in utility:
        table.add_row(as_set(point.epsilon), f"{point.mean:.4g}", f"{point.sd:.2g}", point.title)
    return table
