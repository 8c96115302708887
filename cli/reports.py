"""`silotune report write`, `report sign` and `silotune ensemble`: they take the coordinator's part of Silotune and, where a
simulation is at hand, that of simulations too, so no single room can hold them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from shared.errors import ConfigError, TrustError
from shared.options import (
    DelimiterOption,
    EncodingOption,
    JsonAtEndOption,
    OptionalQuotingOption,
    RunArgument,
    how_to_read,
)
from shared.tools.report_commands import report_app
from shared.tools.report_commands import sign_report as sign_file
from shared.trust.keystore import passphrase_from_environment
from shared.trust.signed_file import Signer
from shared.trust.signing import load_signing_key


def ensemble(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, at least two.")],
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Public evaluation records; by default those submitted with the first run."),
    ] = None,
    columns: Annotated[
        list[str] | None, typer.Option("--column", metavar="ROLE=NAME", help="Column of --data, such as text=review.")
    ] = None,
    scenario: Annotated[
        Path | None,
        typer.Option("--scenario", help="The evaluation records of a scenario file, for runs of a simulation."),
    ] = None,
    delimiter: DelimiterOption = None,
    encoding: EncodingOption = None,
    quoting: OptionalQuotingOption = None,
    as_json: JsonAtEndOption = False,
) -> None:
    """Measure the average of several runs' outputs beside each of them, on public records.

    Predict with it by `silotune predict RUN --with RUN`. Records that several runs trained on are protected with the
    composition of the runs, which is printed.
    """
    from server.reports.ensembles import measure_ensemble

    records = None
    reading = how_to_read("--data", data, delimiter=delimiter, encoding=encoding, quoting=quoting)
    if scenario is not None:
        from simulations.scenario import load_scenario

        if data is not None or columns:
            raise ConfigError("--scenario and --data both name evaluation records; give one of them.")
        records = load_scenario(scenario).load_data()[1]
    measure_ensemble(runs, records=records, data=data, columns=columns or [], reading=reading, as_json=as_json)


@report_app.command("write")
def write_report(
    run: RunArgument,
    report_format: Annotated[
        str | None,
        typer.Option("--format", help="html or pdf: the compliance report; without it, report.html of the run anew."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File; by default RUN/report.html, or RUN/compliance-report.FORMAT.")
    ] = None,
    ledgers: Annotated[
        list[Path] | None, typer.Option("--ledger", help="Export of a site's ledger; may be repeated.")
    ] = None,
    sign: Annotated[
        Path | None, typer.Option("--sign", help="Who signs: a coordinator's or a site's folder, or a key file.")
    ] = None,
) -> None:
    """Write the compliance report of a run (--format), or its report.html anew. The word "write" can be left out."""
    if report_format is None:
        if ledgers or sign:
            raise ConfigError("--ledger and --sign are for the compliance report; add --format html or --format pdf.")
        from server.reports.run import write_report as write_run_report

        typer.echo(write_run_report(run, out))
        return
    if report_format not in ("html", "pdf"):
        raise ConfigError(f"--format is {report_format!r}; expected html or pdf.")
    from server.reports.compliance import load_account, write_compliance_report

    accounts = [load_account(path) for path in ledgers or []]
    if any(run.glob("sites/*/home/site.toml")):
        from simulations.running.accounts import simulated_accounts

        accounts += simulated_accounts(run, without={account.export.site for account in accounts})
    signer = _signer(sign) if sign is not None else None
    chosen: Literal["html", "pdf"] = "pdf" if report_format == "pdf" else "html"
    written = write_compliance_report(run, chosen, out=out, accounts=accounts, signer=signer)
    typer.echo(written)
    if signer is not None:
        typer.echo(f"signed with {signer.verify_key.text}: {written}.sig.json", err=True)


@report_app.command("sign")
def sign_report(
    file: Annotated[Path, typer.Argument(help="The report.")],
    signer: Annotated[Path, typer.Argument(help="Who signs: a coordinator's or a site's folder, or a key file.")],
) -> None:
    """Sign a report that was made elsewhere; a site's key never leaves the site, so the report goes there."""
    typer.echo(sign_file(file, _signer(signer)))


def _signer(place: Path) -> Signer:
    """Return who signs: the owner of a folder, or whoever holds a key file."""
    passphrase = passphrase_from_environment()
    if not place.is_dir():
        return Signer(role="key holder", name=place.stem, key=load_signing_key(place, passphrase))
    # An image holds one of the two sides, so neither is imported at the top.
    if (place / "coordinator.toml").exists():
        from server.store.home import CoordinatorHome

        return CoordinatorHome(place).signer(passphrase)
    if (place / "site.toml").exists():
        from client.site.home import SiteHome

        return SiteHome(place).signer(passphrase)
    raise TrustError(f"{place} is no folder of a coordinator or a site; give one of these, or a key file.")
