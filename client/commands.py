"""`silotune site`: everything that a site engineer does."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tomli_w
import typer
from rich.console import Console
from rich.table import Table

from client.approval_commands import add_to
from client.console.commands import start_console
from client.node.status import read_status
from client.site.config import SiteConfig
from client.site.home import SiteHome, check_holder, open_log, open_site
from shared import terminal
from shared.data.datasets import PERSON_ROLE, DataSource
from shared.epsilons import as_set, delta_rounded_up, rounded_up
from shared.errors import RunError, TrustError
from shared.files.atomic import write_bytes, write_text
from shared.files.backup import told
from shared.files.outputs import JSON_MARK, check_file, check_new_files
from shared.job.parsing import parse
from shared.options import BackupArgument, JsonOption, NoPassphraseOption, named_once
from shared.service.logs import set_up
from shared.stopping import orderly
from shared.trust.audit_log import Event
from shared.trust.certificates import fingerprint, load_certificate, pem_bytes
from shared.trust.job_files import read_job
from shared.trust.key_changes import alone
from shared.trust.keystore import (
    load_secret,
    new_key,
    new_passphrase,
    old_passphrase,
    passphrase_changed,
    passphrase_from_environment,
    save_secret,
)
from shared.trust.node_keys import change_passphrase, load_private_key, save_private_key
from shared.trust.pki import make_request
from shared.trust.signing import SigningKey, find_verify_key, load_signing_key, save_signing_key
from shared.trust.trust_store import verify_certificate

if TYPE_CHECKING:
    from shared.privacy.ledger_export import ChargedSteps, LedgerExport

site_app = typer.Typer(
    name="site", help="Run a site: a node that trains on records that stay here.", no_args_is_help=True
)

HomeArgument = Annotated[Path, typer.Argument(help="The site's folder.")]
add_to(site_app)


@site_app.command()
def init(
    home: HomeArgument,
    name: Annotated[str, typer.Option(help="Name of the site, unique in the federation.")],
    coordinator: Annotated[str, typer.Option(help="Address of the coordinator, host:port.")],
    data: Annotated[Path, typer.Option(help="The records: CSV, TSV, JSONL or Parquet.")],
    columns: Annotated[
        list[str], typer.Option("--column", metavar="ROLE=COLUMN", help="For example text=note and label=outcome.")
    ],
    epsilon: Annotated[float, typer.Option(help="Budget: all releases together stay below this.")] = 8.0,
    unit: Annotated[
        Literal["record", "patient", "customer"],
        typer.Option(help="What the budget protects; patient and customer need --column person=ID_COLUMN."),
    ] = "record",
    signer: Annotated[
        list[str] | None,
        typer.Option("--signer", metavar="NAME=KEY", help="Who may sign jobs: NAME=ed25519:... or a file."),
    ] = None,
    composition: Annotated[
        Literal["adaptive", "fixed"],
        typer.Option(help="adaptive: later runs may be planned on earlier results. fixed: all plans are fixed before."),
    ] = "adaptive",
) -> None:
    """Make the folder, the keys, the certificate request and first versions of site.toml and policy.toml."""
    from client.ledger.largest_job import unfinished
    from client.link.handshake import split_address
    from client.policy.template import policy_template

    split_address(coordinator)
    place = SiteHome(home)
    if place.config.exists():
        raise RunError(f"{home} is a site's folder already; choose another, or remove it first.")
    pairs = named_once(columns, "--column", "NAME=VALUE", RunError)
    keys = named_once(signer or [], "--signer", "NAME=VALUE", RunError)
    signers = {who: find_verify_key(key).text for who, key in keys.items()}
    config = {
        "name": name,
        "dataset": f"{name}-records",
        "coordinator": coordinator,
        "data": {"path": str(data.resolve()), "columns": pairs},
        "budget": {"unit": unit, "epsilon": epsilon, "composition": composition},
    }
    budget = parse(SiteConfig, config, source="what was asked for").budget
    made = (place.key, place.storage_key, place.log_key, home / "log.pub", home / f"{name}.csr", place.policy)
    check_new_files(home, [path.relative_to(home).as_posix() for path in made])
    policy_text = policy_template(signers=signers or None, max_epsilon_per_job=epsilon)
    passphrase = passphrase_from_environment()
    for folder in (home, home / "keys"):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key, request = make_request(name=name, role="site")
    save_private_key(place.key, key, passphrase)
    save_secret(place.storage_key, new_key(), passphrase=passphrase)
    log_key = SigningKey.generate()
    save_signing_key(place.log_key, log_key, passphrase)
    write_text(home / "log.pub", log_key.verify_key.text + "\n")
    write_bytes(home / f"{name}.csr", request)
    write_text(place.policy, policy_text)
    write_text(place.config, tomli_w.dumps(config))  # last: it makes the folder count
    typer.echo(f"made {home}; its keys are {'encrypted' if passphrase else 'protected by file permissions'}.")
    typer.echo(f"1. send {home / f'{name}.csr'} to whoever runs the CA; read them the key's fingerprint by telephone:")
    typer.echo(f"   {fingerprint(key.public_key())}")
    typer.echo(f"2. read {place.config} and {place.policy}; they are yours alone")
    typer.echo(f"3. silotune site install {home} --certificate {name}.crt --ca ca.crt")
    if too_much := unfinished(budget.caps(), tomllib.loads(policy_text)):
        typer.echo(f"note: {too_much}.")


@site_app.command()
def install(
    home: HomeArgument,
    certificate: Annotated[Path, typer.Option(help="The site's certificate from the CA.")],
    ca: Annotated[Path | None, typer.Option(help="The CA's certificate.")] = None,
) -> None:
    """Install the certificate that the CA made; a running node takes it up after the message at hand."""
    place = SiteHome(home)
    config = place.load_config()
    if ca is None and not place.ca_certificate.exists():
        raise TrustError(f"{place.ca_certificate} is missing; give it with --ca the first time.")
    authority, loaded = load_certificate(ca or place.ca_certificate), load_certificate(certificate)
    verify_certificate(loaded, authority, datetime.now(UTC))
    check_holder(loaded, config.name)
    passphrase = passphrase_from_environment()
    with alone(place.key.parent):
        rotated = place.next_key.exists() and _belongs(place.next_key, loaded, passphrase)
        if not rotated and not _belongs(place.key, loaded, passphrase):
            raise TrustError(
                f"{certificate} was not made for this site's key; send {home / f'{config.name}.csr'} to the CA."
            )
        if rotated:
            os.replace(place.next_key, place.key)
    # Everything was checked: a node that runs takes up what is written from here on.
    if ca is not None:
        write_bytes(place.ca_certificate, pem_bytes(authority))
    write_bytes(place.certificate, pem_bytes(loaded))
    typer.echo(f"installed, valid until {loaded.not_valid_after_utc:%Y-%m-%d}. Next: silotune site check {home}")


@site_app.command()
def rotate(home: HomeArgument) -> None:
    """Make a new key and a request for it; the old one stays in use until the new certificate is installed."""
    place = SiteHome(home)
    name = place.load_config().name
    passphrase = passphrase_from_environment()
    # The new key is under the passphrase of the others, or there is none. The one that it replaces may be lost.
    load_secret(place.storage_key, passphrase=passphrase)
    key, request = make_request(name=name, role="site")
    save_private_key(place.next_key, key, passphrase, replace=True)
    write_bytes(home / f"{name}.csr", request)
    typer.echo(
        f"send {home / f'{name}.csr'} to whoever runs the CA (`silotune pki approve --role site --rotate`); the key's "
        "fingerprint:"
    )
    typer.echo(f"   {fingerprint(key.public_key())}")


@site_app.command()
def passphrase(home: HomeArgument, none: NoPassphraseOption = False) -> None:
    """Change the passphrase of the site's keys, all or none; the node must be stopped.

    The old one is read as ever, the new one from SILOTUNE_NEW_PASSPHRASE_FILE or SILOTUNE_NEW_PASSPHRASE, or typed twice.
    """
    place = SiteHome(home)
    place.load_config()
    with place.locked():
        old = old_passphrase(place.key_files)
        new = None if none else new_passphrase()
        change_passphrase(place.key_files, old=old, new=new)
        open_log(place, passphrase=new).append(Event.KEYS_ENCRYPTED, encrypted=new is not None)
    typer.echo(passphrase_changed(len(place.key_files), new))


@site_app.command("backup")
def take_backup(
    home: HomeArgument, destination: Annotated[Path, typer.Argument(metavar="FILE", help="A new tar file.")]
) -> None:
    """Back up the folder, without the records, while the node runs; checked before it appears, and needs no passphrase."""
    from client.backup import back_up

    typer.echo(f"{destination}: {told(back_up(SiteHome(home), destination))}")


@site_app.command("verify-backup")
def check_backup(backup: BackupArgument) -> None:
    """Check a backup: every file, the audit log, the ledger, and that the two agree."""
    from client.backup import verify_backup

    typer.echo(f"{backup}: {told(verify_backup(backup))}; nothing was changed since")


@site_app.command()
def restore(
    backup: BackupArgument,
    home: Annotated[Path, typer.Argument(help="A new folder.")],
    newest_log: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The site's audit log as it was last; it takes the place of the backup's."),
    ] = None,
    entries: Annotated[
        int | None, typer.Option(min=0, help="How many entries the log had, as somebody else last noted it.")
    ] = None,
    nothing_released_since: Annotated[
        bool, typer.Option("--nothing-released-since", help="You declare it; the log notes that you did.")
    ] = False,
) -> None:
    """Put a backup back into a new folder, unless a charge is missing in it: what was spent since could be spent again."""
    from client.backup import put_back

    contents = put_back(
        backup,
        SiteHome(home),
        passphrase=passphrase_from_environment(),
        newest_log=newest_log,
        num_entries=entries,
        nothing_released=nothing_released_since,
    )
    typer.echo(f"put back {home}: {told(contents)}")
    typer.echo(
        "site.toml and policy.toml are of then, too: whom you struck out of the signers since is in again; read both"
    )
    typer.echo(f"next: silotune site check {home}")


@site_app.command("bundle")
def write_bundle(
    destination: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    source: Annotated[Path, typer.Option(help="Checkout of Silotune, whose locks/ say what belongs to it.")] = Path(),
    extra: Annotated[list[str] | None, typer.Option(help="Extra of pyproject.toml; by default demo.")] = None,
    backbone: Annotated[list[Path] | None, typer.Option(metavar="FOLDER", help="A backbone to copy.")] = None,
    wheels: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Take packages from here alone, not from pip's index.")
    ] = None,
    sign: Annotated[Path | None, typer.Option(metavar="KEY", help="Ed25519 key that signs the folder.")] = None,
) -> None:
    """Collect what a site without a network needs: wheels, locks, backbones, hashes, and how to check and install it."""
    from client.bundle.bundle import make_bundle

    key = None if sign is None else load_signing_key(sign, passphrase_from_environment())
    sha256 = make_bundle(
        destination,
        source=source,
        extras=["demo"] if extra is None else extra,
        backbones=backbone or [],
        wheels=wheels,
        key=key,
    )
    typer.echo(f"made {destination}; how to check and install it stands in {destination / 'README.txt'}")
    typer.echo(f"read this to whoever installs it, by telephone; sha256sum SHA256SUMS says it there:\n   {sha256}")


@site_app.command("verify-bundle")
def check_bundle(
    folder: Annotated[Path, typer.Argument(help="A bundle.")],
    key: Annotated[str | None, typer.Option(help="Who must have signed it: a .pub file or ed25519:...")] = None,
) -> None:
    """Check a bundle: every file, that nothing else lies there, and its signature."""
    from client.bundle.bundle import verify_bundle

    num_files, num_bytes, sha256 = verify_bundle(folder, None if key is None else find_verify_key(key))
    typer.echo(f"{num_files} files, {num_bytes:,} bytes, all as they were; sha256 of SHA256SUMS: {sha256}")
    if key is None:
        typer.echo("whose bundle that is was not checked; give --key, or compare this number with its maker's")


@site_app.command()
def check(
    home: HomeArgument,
    offline: Annotated[
        bool, typer.Option("--offline", help="Do not connect, for example while the node runs.")
    ] = False,
    job: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A job (run file, scenario, signed job): which rules does it break, which records could it not use?",
        ),
    ] = None,
    public: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Public records, such as the coordinator's: how many are this site's as well?"
        ),
    ] = None,
    public_column: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=COLUMN", help="Columns of --public; by default those of the site's own file."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Test certificate, clock, connection, device, data, disk and ledger, and say what to mend."""
    from client.check import check_site

    asked = None if job is None else read_job(job, [])
    styles = {"ok": "green", "warning": "yellow", "failed": "red"}
    console = Console()
    findings = []
    passphrase = passphrase_from_environment()
    for finding in check_site(
        SiteHome(home),
        passphrase=passphrase,
        connect=not offline,
        job=asked,
        public=None if public is None else _public_source(SiteHome(home), public, public_column or []),
    ):
        findings.append(finding)
        if not as_json:
            mark = f"[{styles[finding.outcome]}]{finding.outcome:<8}[/]"
            console.print(f"{mark} [bold]{finding.name}[/]: ", end="", highlight=False)
            console.print(finding.text, highlight=False, markup=False, soft_wrap=True)
    if as_json:
        terminal.print_json([vars(finding) for finding in findings])
    if any(finding.outcome == "failed" for finding in findings):
        raise typer.Exit(1)


@site_app.command()
def start(home: HomeArgument) -> None:
    """Run the node in the foreground until it is stopped (Ctrl-C or SIGTERM; it finishes the round at hand)."""
    place = SiteHome(home)
    config = place.load_config()
    set_up(config.log_format, site=config.name)
    from client.node.node import Node

    node = Node(place, passphrase=passphrase_from_environment())
    with orderly(node.stop, f"go on with: silotune site start {home}"):
        node.run()


@site_app.command()
def status(home: HomeArgument, as_json: JsonOption = False) -> None:
    """Show what the running node does; exit status 1 if something is wrong with it, and what."""
    said = read_status(SiteHome(home))
    if as_json:
        terminal.print_json(said)
    else:
        console = terminal.console(soft_wrap=True)
        for key, value in said.items():
            if value is not None and not isinstance(value, dict | list):
                console.print(f"{key:>18}  {value}")
        for text in said["troubles"]:
            console.print(f"trouble: {text}", style="yellow")
    if not said["healthy"]:
        raise typer.Exit(1)


site_app.command("console")(start_console)


@site_app.command()
def ledger(
    home: HomeArgument,
    as_json: JsonOption = False,
    export: Annotated[
        Path | None,
        typer.Option(help="Write the account to this file, for a planner or another machine; charges nothing."),
    ] = None,
    import_from: Annotated[
        Path | None, typer.Option("--import", help="Take over the charges in this export; the account must have none.")
    ] = None,
    from_dataset: Annotated[
        str | None, typer.Option(help="With --import: the export's data set, if it has another name here.")
    ] = None,
) -> None:
    """Show the privacy budget: what was charged, for which job, and the cap; export it, or import it from another machine."""
    from shared.privacy.ledger_export import load_export, save_export

    if export is not None:
        check_file(export, JSON_MARK)
    if from_dataset is not None and import_from is None:
        raise RunError("--from-dataset says what an export is called; give the export with --import.")
    site = open_site(SiteHome(home), passphrase=passphrase_from_environment())
    opened = site.ledger()
    if import_from is not None:
        taken = load_export(import_from)
        opened.import_account(taken, from_dataset=from_dataset)
        typer.echo(
            f"took over {len(taken.charges)} charges of site {taken.site}, {taken.dataset}, as of {taken.exported_at} (its cap: "
            f"epsilon {as_set(taken.epsilon)}). The cap here is that of {home / 'site.toml'}. Stop the other machine for good: "
            "what it charges from now on is not counted here.",
            err=as_json,
        )
    account = opened.export(site=site.config.name, declared_records=site.declared_records)
    if export is not None:
        save_export(export, account)
        typer.echo(f"wrote {len(account.charges)} charges to {export}; this ledger stays in use.", err=as_json)
    _show_account(account, as_json=as_json)


@site_app.command()
def policy(home: HomeArgument) -> None:
    """Check policy.toml and show what it allows."""
    from client.policy.policy import load_policy

    loaded = load_policy(SiteHome(home).policy)
    typer.echo(json.dumps(loaded.model_dump(mode="json"), indent=2, ensure_ascii=False))
    if loaded.uneven_eyes:
        typer.echo(f"warning: {loaded.uneven_eyes}", err=True)


def _public_source(home: SiteHome, file: Path, columns: Sequence[str]) -> DataSource:
    own = home.load_config().data.columns
    named = named_once(columns, "--public-column", "NAME=VALUE", RunError)
    asked = {"path": str(file.resolve()), "columns": named or {role: own[role] for role in own if role != PERSON_ROLE}}
    return parse(DataSource, asked, source="what was asked for")


def _show_account(account: LedgerExport, *, as_json: bool) -> None:
    from shared.privacy.accounting import compose_epsilon

    spent, spent_alone = account.rule.epsilon(account.mechanisms), account.rule_alone.epsilon(account.mechanisms_alone)
    jobs: dict[str, list[ChargedSteps]] = {}
    for charged in sorted(account.charges, key=lambda charged: charged.job_id):
        jobs.setdefault(charged.job_id, []).append(charged)
    epsilons = {
        job: compose_epsilon([c.together or c.mechanism for c in of_job], account.delta) for job, of_job in jobs.items()
    }
    alone = {job: compose_epsilon([c.mechanism for c in of_job], account.delta) for job, of_job in jobs.items()}
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "epsilon_spent": spent,
                    "epsilon_budget": account.epsilon,
                    "epsilon_alone_spent": spent_alone,
                    "epsilon_alone_budget": account.cap_alone,
                    "delta": account.delta,
                    "unit": account.unit,
                    "composition": account.composition,
                    "orders": account.orders,
                    "orders_alone": account.rule_alone.orders,
                    "entries": account.num_entries,
                    "jobs": epsilons,
                    "jobs_alone": alone,
                }
            )
        )
        return
    console = terminal.console(soft_wrap=True)
    console.print(
        f"epsilon {rounded_up(spent, 4)} of {as_set(account.epsilon)} spent at delta {delta_rounded_up(account.delta)} for each "
        f"{account.unit}; the chain is unbroken"
    )
    # Without sums over sites, and with one cap, there is nothing more to tell.
    shares = any(charged.together for charged in account.charges)
    if shares or account.cap_alone != account.epsilon:
        console.print(
            f"epsilon {rounded_up(spent_alone, 4)} of {as_set(account.cap_alone)} spent with each masked input by itself: if "
            "secure aggregation fails, and all other sites collude"
        )
    console.print(_explain_composition(account.composition, account.orders))
    table = Table("job", "charges", "steps", "its epsilon", *(["by itself"] if shares else []), box=None)
    for job, of_job in jobs.items():
        cells = [
            job[:12],
            str(len(of_job)),
            str(sum(charged.steps for charged in of_job)),
            rounded_up(epsilons[job], 4),
        ]
        table.add_row(*cells, *([rounded_up(alone[job], 4)] if shares else []))
    console.print(table)
    for held in account.held_back:
        console.print(
            f"job {held.job_id[:12]} may take fewer steps, or did: the {held.steps} steps that it has not taken count as spent, "
            "and no other job gets them (composition fixed)"
        )


def _explain_composition(composition: str, orders: Sequence[int]) -> str:
    if composition == "fixed":
        return (
            "composition fixed: this holds only if the plans of all runs were fixed before the first one started; if not, set "
            'budget.composition = "adaptive" in site.toml'
        )
    return (
        f"composition adaptive: a Rényi filter of orders {', '.join(map(str, orders))}; the cap holds also if runs are planned "
        "on the results of earlier ones. The first step counts for much, later ones for less"
    )


def _belongs(key_file: Path, certificate: Any, passphrase: str | None) -> bool:
    return bool(load_private_key(key_file, passphrase).public_key() == certificate.public_key())
