"""`silotune coordinator`: everything that whoever runs the coordinator does."""

from __future__ import annotations

import logging
import os
import signal
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import typer
from cryptography import x509
from rich.table import Table

from server.console.commands import start_console
from server.coordinator.health import troubles
from server.store.backup import back_up, put_back, verify_backup
from server.store.home import CoordinatorConfig, CoordinatorHome
from server.store.submission import OPEN, Submission, find, submissions
from shared import terminal
from shared.errors import ConfigError, RunError, TrustError
from shared.files.atomic import write_bytes, write_text
from shared.files.backup import told
from shared.files.outputs import check_new_files
from shared.job.parsing import parse
from shared.options import (
    BackupArgument,
    EnergyOption,
    HourPriceOption,
    JsonOption,
    KwhPriceOption,
    NoPassphraseOption,
    TrackOption,
    TrackWeightsOption,
    WattsOption,
)
from shared.service.logs import log_file, set_up
from shared.service.machine import is_alive
from shared.stopping import orderly, saying
from shared.trust.audit_log import Event
from shared.trust.certificates import expiry_warning, fingerprint, load_certificate, pem_bytes, read_file
from shared.trust.keystore import new_passphrase, old_passphrase, passphrase_changed, passphrase_from_environment
from shared.trust.node_keys import change_passphrase, load_server_key, save_server_key
from shared.trust.pki import make_request
from shared.trust.revocation import check_newer, load_crl
from shared.trust.signing import SigningKey, load_signing_key, load_verify_key, save_signing_key
from shared.trust.trust_store import TrustStore, verify_certificate

coordinator_app = typer.Typer(
    name="coordinator", help="Run the coordinator: admit sites, submit jobs, watch them.", no_args_is_help=True
)

HomeArgument = Annotated[Path, typer.Argument(help="The coordinator's folder.")]
JobOption = Annotated[str | None, typer.Option("--job", help="Number or name of the job; the newest by default.")]


@coordinator_app.command()
def init(
    home: HomeArgument,
    host: Annotated[list[str], typer.Option("--host", help="Name or address under which sites reach this machine.")],
    listen_host: Annotated[str, typer.Option(help="Address to listen on for sites.")] = "0.0.0.0",  # noqa: S104
    listen_port: Annotated[int, typer.Option(help="Port for sites, the only one that listens.")] = 9092,
    metrics_listen: Annotated[
        str, typer.Option(help="Where /metrics and /healthz are served, without a password; `off` for nowhere.")
    ] = "127.0.0.1:9492",
) -> None:
    """Make the folder, the keys and the certificate request."""
    place = CoordinatorHome(home)
    if place.config.exists():
        raise RunError(f"{home} is a coordinator's folder already; choose another, or remove it first.")
    config = parse(
        CoordinatorConfig,
        {
            "hosts": host,
            "listen_host": listen_host,
            "listen_port": listen_port,
            "metrics_listen": metrics_listen,
        },
        source="the options",
    )
    made = (place.server_key, place.round_key, home / "round.pub", home / "server.csr")
    passphrase = passphrase_from_environment()
    check_new_files(home, [path.relative_to(home).as_posix() for path in made])
    for folder in (home, place.trust / "sites", place.jobs, home / "keys", home / "logs"):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key, request = make_request(name=config.name, role="server", hosts=config.hosts)
    save_server_key(place.server_key, key, passphrase)
    round_key = SigningKey.generate()
    save_signing_key(place.round_key, round_key, passphrase)
    write_text(home / "round.pub", round_key.verify_key.text + "\n")
    write_bytes(home / "server.csr", request)
    write_text(place.config, tomli_w.dumps(config.model_dump(mode="json")))  # last: it makes the folder count
    typer.echo(f"made {home}; its keys are {'encrypted' if passphrase else 'protected by file permissions'}.")
    typer.echo(f"1. send {home / 'server.csr'} to whoever runs the CA; read them the key's fingerprint by telephone:")
    typer.echo(f"   {fingerprint(key.public_key())}")
    typer.echo(f"2. silotune coordinator install {home} --certificate server.crt --ca ca.crt --crl crl.pem")
    typer.echo(f"Adapters are signed with {round_key.verify_key.text} ({home / 'round.pub'}); publish that key.")


@coordinator_app.command()
def install(
    home: HomeArgument,
    certificate: Annotated[Path | None, typer.Option(help="The coordinator's certificate from the CA.")] = None,
    ca: Annotated[Path | None, typer.Option(help="The CA's certificate.")] = None,
    crl: Annotated[Path | None, typer.Option(help="The CA's list of revoked certificates.")] = None,
    site: Annotated[list[Path] | None, typer.Option("--site", help="Certificate of a site to admit.")] = None,
) -> None:
    """Install certificates and the revocation list; a running coordinator takes them up within a second."""
    place = CoordinatorHome(home)
    place.load_config()
    if not (certificate or ca or crl or site):
        raise RunError("nothing to install; give --certificate, --ca, --crl or --site.")
    now, authority = datetime.now(UTC), ca or place.trust / "ca.crt"
    if not authority.exists():
        raise TrustError(f"{authority} does not exist; give the CA's certificate with --ca the first time.")
    # Everything is checked first: a coordinator that runs takes up what is written from here on.
    root = load_certificate(authority)
    loaded = _own_certificate(place, certificate, root, now) if certificate is not None else None
    revoked = load_crl(crl, root) if crl is not None else None
    if revoked is not None:
        check_newer(place.trust, revoked, root)
    if ca is not None:
        write_bytes(place.trust / "ca.crt", pem_bytes(root))
    if loaded is not None:
        write_bytes(place.server_certificate, pem_bytes(loaded))
        typer.echo(f"installed the server certificate, valid until {loaded.not_valid_after_utc:%Y-%m-%d}")
    if revoked is not None:
        TrustStore(place.trust).install_list(revoked)
        typer.echo("installed the revocation list")
    for path in site or []:
        identity = TrustStore(place.trust).install(read_file(path, "certificate"), now)
        typer.echo(f"admitted {identity.name}, until {identity.not_after:%Y-%m-%d}")


@coordinator_app.command()
def passphrase(home: HomeArgument, none: NoPassphraseOption = False) -> None:
    """Change the passphrase of the coordinator's keys, both or none; the coordinator must be stopped.

    The old one is read as ever, the new one from SILOTUNE_NEW_PASSPHRASE_FILE or SILOTUNE_NEW_PASSPHRASE, or typed twice.
    """
    place = CoordinatorHome(home)
    place.load_config()
    with place.locked():
        old = old_passphrase([place.round_key, place.server_key])
        new = None if none else new_passphrase()
        change_passphrase([place.round_key], old=old, new=new, server_key=place.server_key)
        place.open_log(place.load_round_key(new)).append(Event.KEYS_ENCRYPTED, encrypted=new is not None)
    typer.echo(passphrase_changed(2, new))


@coordinator_app.command("backup")
def take_backup(
    home: HomeArgument, destination: Annotated[Path, typer.Argument(metavar="FILE", help="A new tar file.")]
) -> None:
    """Back up the folder while the coordinator runs; checked before it appears, and needs no passphrase."""
    typer.echo(f"{destination}: {told(back_up(CoordinatorHome(home), destination))}")


@coordinator_app.command("verify-backup")
def check_backup(backup: BackupArgument) -> None:
    """Check a backup: every file, and the audit log."""
    typer.echo(f"{backup}: {told(verify_backup(backup))}; nothing was changed since")


@coordinator_app.command()
def restore(
    backup: BackupArgument,
    home: Annotated[Path, typer.Argument(help="A new folder.")],
    crl: Annotated[
        Path | None,
        typer.Option(
            help="The CA's newest list of revoked certificates; the newer of it and the backup's own is kept."
        ),
    ] = None,
) -> None:
    """Put a backup back into a new folder, with the newest revocation list."""
    contents, kept = put_back(backup, CoordinatorHome(home), passphrase=passphrase_from_environment(), newest_list=crl)
    typer.echo(f"put back {home}: {told(contents)}; {kept}.")
    if crl is None:
        typer.echo(f"Next: silotune coordinator install {home} --crl crl.pem, the newest one, before you start it")


@coordinator_app.command()
def start(
    home: HomeArgument,
    track: TrackOption = None,
    track_weights: TrackWeightsOption = False,
    energy: EnergyOption = False,
    price_per_kwh: KwhPriceOption = None,
    price_per_hour: HourPriceOption = None,
    cpu_watts: WattsOption = None,
) -> None:
    """Run the coordinator in the foreground until it is stopped (Ctrl-C, SIGTERM, `coordinator stop`)."""
    from server.coordinator.supervisor import Supervisor

    place = CoordinatorHome(home)
    watched = None
    counted = (price_per_kwh, price_per_hour, cpu_watts) != (None, None, None)
    if track or track_weights or energy or counted:
        from server.energy import energy_settings
        from server.tracking import Watched  # loads PyTorch, for which sites need not wait otherwise

        settings = energy_settings(
            energy, price_per_kwh=price_per_kwh, price_per_hour=price_per_hour, cpu_watts=cpu_watts
        )
        watched = Watched.of(track or [], weights=track_weights, energy=settings)
    supervisor = Supervisor(place, watched)
    place.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    form = place.load_config().log_format
    set_up(form, log_file(place.log, form, backups=5))
    if place.server_certificate.exists() and (
        warning := expiry_warning(load_certificate(place.server_certificate), datetime.now(UTC))
    ):
        logging.getLogger("silotune.coordinator").warning(warning)
    with orderly(supervisor.stop, f"go on with: silotune coordinator start {home}; its jobs resume then"):
        supervisor.run()
    if supervisor.lingers:
        logging.shutdown()
        os._exit(0)


@coordinator_app.command("submit")
def submit_job(
    home: HomeArgument,
    run_file: Annotated[Path, typer.Argument(help="Run file (TOML): the job's sections and [evaluation].")],
    signer: Annotated[
        Path | None, typer.Option(help="Ed25519 key that signs the job; see `silotune pki signer`.")
    ] = None,
    signed: Annotated[
        Path | None, typer.Option(help="In its place: the job as `silotune coordinator sign` signed it elsewhere.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the job has ended.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Sign a job, or take a signed one, and hand it to the coordinator, which starts it."""
    from server.coordinator.run_file import check_new, read_run_file, read_signed, sign_run, submit_signed

    if (signer is None) == (signed is None):
        raise ConfigError("give either --signer, a key that signs the job now, or --signed, the job as it was signed.")
    place = CoordinatorHome(home)
    place.load_config()
    job, settings, records = read_run_file(run_file, overrides or [])
    check_new(place.jobs, job)
    coordinator = load_verify_key(home / "round.pub")
    if signed is not None:
        ready = read_signed(signed, job, coordinator=coordinator)
    else:
        assert signer is not None  # noqa: S101 (one of the two, see above)
        key = load_signing_key(signer, passphrase_from_environment())
        ready = sign_run(job, settings, signer=key, coordinator=coordinator)
    submission = submit_signed(place.jobs, ready, settings, records)
    if not as_json:
        typer.echo(f"submitted {submission.name} (job {job.sha256[:12]})")
        if not is_alive(place.read_status()):
            typer.echo(f"the coordinator does not run; start it with: silotune coordinator start {home}")
    with saying(lambda: f"{submission.name} goes on; watch it with: silotune coordinator status {home}"):
        while wait and submission.is_open:
            time.sleep(0.5)
    if wait and not as_json:
        typer.echo(f"{submission.name}: {submission.state()['state']}; its run folder is {submission.run_folder}")
    if as_json:
        terminal.print_json(_job_state(submission))
    if wait and (state := submission.state())["state"] != "completed":
        raise RunError(f"{submission.name} {state['state']}: {state.get('problem') or 'see the log'}")


@coordinator_app.command("sign")
def sign_for_submission(
    run_file: Annotated[Path, typer.Argument(help="Run file (TOML); its evaluation records need not be here.")],
    signer: Annotated[Path, typer.Option(help="Ed25519 key that signs the job; see `silotune pki signer`.")],
    coordinator: Annotated[
        str, typer.Option(help="The coordinator's key: its round.pub, or ed25519:...")
    ] = "round.pub",
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File; by default RUN_FILE with .signed.json.")] = None,
) -> None:
    """Sign a job where the signer's key is; `submit --signed` takes it where the coordinator is, without the key."""
    from server.coordinator.run_file import read_run_settings, sign_run
    from shared.trust.signing import find_verify_key

    job, settings = read_run_settings(run_file, overrides or [])
    path = out or run_file.with_suffix(".signed.json")
    check_new_files(path.parent, [path.name])
    key = load_signing_key(signer, passphrase_from_environment())
    ready = sign_run(job, settings, signer=key, coordinator=find_verify_key(coordinator))
    write_text(path, ready.to_json())
    typer.echo(
        f"{path}: job {job.sha256[:12]}, signed with {ready.signer.text}, valid until {ready.not_after:%Y-%m-%d}"
    )


@coordinator_app.command()
def status(home: HomeArgument, as_json: JsonOption = False) -> None:
    """Show the coordinator, the sites and the jobs; exit status 1 if something is wrong with the coordinator, and what."""
    place = CoordinatorHome(home)
    place.load_config()
    said, known = place.read_status(), submissions(place.jobs)
    alive, jobs = is_alive(said), [_job_state(submission) for submission in known]
    found = [trouble.text for trouble in troubles(place, said, job_waits=any(one.is_open for one in known))]
    if as_json:
        terminal.print_json({"alive": alive, "healthy": not found, "troubles": found, **said, "jobs": jobs})
    else:
        _print_status(said, alive, jobs)
        for text in found:
            terminal.console().print(f"trouble: {text}", soft_wrap=True, style="yellow")
    if found:
        raise typer.Exit(1)


@coordinator_app.command()
def logs(
    home: HomeArgument,
    job: JobOption = None,
    own: Annotated[bool, typer.Option("--coordinator", help="Print the coordinator's own log instead.")] = False,
    lines: Annotated[int, typer.Option("--last", help="Number of lines.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", help="Go on printing.")] = False,
) -> None:
    """Print the log of a job, or of the coordinator itself."""
    place = CoordinatorHome(home)
    path = place.log if own else _log_of(place, job)
    if not path.exists():
        raise RunError(f"{path} does not exist yet; it never ran.")
    text = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in text[-lines:]:
        typer.echo(line)
    with path.open(encoding="utf-8", errors="replace") as file:
        file.seek(0, os.SEEK_END)
        while follow:
            if line := file.readline():
                typer.echo(line, nl=False)
            else:
                time.sleep(0.2)


def _log_of(place: CoordinatorHome, job: str | None) -> Path:
    """Return the log of a job; of the newest that ran, if none is named."""
    ran = [submission.log for submission in submissions(place.jobs) if submission.log.exists()]
    return ran[-1] if job is None and ran else find(place.jobs, job).log


@coordinator_app.command()
def stop(
    home: HomeArgument,
    job: Annotated[str | None, typer.Option("--job", help="Stop this job; without it, the coordinator itself.")] = None,
) -> None:
    """Stop a job, or the coordinator, whose jobs resume when it starts again."""
    place = CoordinatorHome(home)
    if job is not None:
        submission = find(place.jobs, job)
        submission.request_stop()
        typer.echo(f"{submission.name} will be stopped.")
        return
    said = place.read_status()
    if not is_alive(said):
        raise RunError(f"no coordinator runs in {home}.")
    if not place.works_there(int(said["pid"])):
        raise RunError(
            f"{place.status} names process {said['pid']}, which is no coordinator of this folder as far as you may see, so it "
            "gets no signal. A coordinator that runs writes that file anew every second: if there is one, try again, as the user "
            "that runs it."
        )
    os.kill(int(said["pid"]), signal.SIGTERM)
    typer.echo("the coordinator was asked to stop; its jobs resume when it starts again.")


@coordinator_app.command()
def resume(
    home: HomeArgument,
    job: Annotated[str, typer.Option("--job", help="Number or name of the job that was stopped.")],
) -> None:
    """Let a job that was stopped go on from its last durable round; what sites released before stays charged."""
    place = CoordinatorHome(home)
    place.load_config()
    submission = find(place.jobs, job)
    submission.resume()
    typer.echo(f"{submission.name} goes on from round {max(submission.progress(), 0)}.")


@coordinator_app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="An adapter's folder, with signature.json.")],
    key: Annotated[str | None, typer.Option(help="The coordinator's key: a .pub file or ed25519:...")] = None,
) -> None:
    """Check that an adapter is what a coordinator signed."""
    from shared.trust.signed_folder import verify_folder
    from shared.trust.signing import find_verify_key

    expected = None if key is None else find_verify_key(key)
    signer = verify_folder(folder, expected)
    typer.echo(f"unchanged since {signer.text} signed it")
    if expected is None:
        typer.echo("whose key that is was not checked; give --key")


coordinator_app.command("console")(start_console)


def _own_certificate(place: CoordinatorHome, path: Path, root: x509.Certificate, now: datetime) -> x509.Certificate:
    """Return the certificate in `path`, checked to be this coordinator's."""
    loaded = load_certificate(path)
    verify_certificate(loaded, root, now)
    key = load_server_key(place.server_key, passphrase_from_environment())
    if loaded.public_key() != key.public_key():
        raise TrustError(f"{path} was not made for {place.server_key}; send {place.path / 'server.csr'} to the CA.")
    return loaded


def _job_state(submission: Submission) -> dict[str, Any]:
    return {"name": submission.name, "rounds_durable": max(submission.progress(), 0), **submission.state()}


def _print_status(said: dict[str, Any], alive: bool, jobs: list[dict[str, Any]]) -> None:
    console = terminal.console()  # a site's text is shown as it is
    console.print(f"coordinator: {said.get('state', 'never started') if alive else 'not running'}")
    for key in ("address", "certificate_until", "metrics"):
        if said.get(key):
            console.print(f"  {key}: {said[key]}", soft_wrap=True)
    table = Table("site", "connected", "last seen", "admitted until", box=None)
    for name, site in sorted(said.get("sites", {}).items()):
        online = "yes" if site["online"] and alive else "no"
        table.add_row(name, online, site.get("last_seen") or "never", site["until"])
    console.print(table)
    for state in jobs:
        line = f"{state['name']}: {state['state']}, {state['rounds_durable']} rounds durable"
        if state.get("stopped_early"):
            line += f", stopped early after round {state['stopped_early']}"
        if state.get("metrics"):
            line += ", " + ", ".join(
                f"{name} {'not defined' if value is None else f'{value:.4g}'}"
                for name, value in state["metrics"].items()
            )
        console.print(line, soft_wrap=True)
        for key in ("waiting", "problem"):
            if state.get(key) and (key == "problem" or state["state"] == "running"):
                console.print(f"  {key}: {state[key]}", soft_wrap=True, style="yellow")
        for site in (state.get("awaiting") or []) if state["state"] in OPEN else []:
            console.print(f"  {site} is waiting for approval", soft_wrap=True, style="yellow")
        for site, reason in (state.get("refused") or {}).items():
            console.print(f"  {site} refused: {reason}", soft_wrap=True, style="yellow")
        for site, doubt in (state.get("doubted") or {}).items():
            console.print(f"  {site}, {doubt}", soft_wrap=True, style="yellow")
