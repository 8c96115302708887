"""`silotune pki`: the consortium's certificate authority, requests, the coordinator's trust store, signing keys."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from cryptography.hazmat.primitives.serialization import Encoding
from rich.table import Table
from rich.text import Text

from shared import terminal
from shared.errors import TrustError
from shared.files.bounded import read_named_bytes
from shared.files.outputs import CERTIFICATE_MARK, CSR_MARK, check_file
from shared.options import JsonLineOption, NoPassphraseOption
from shared.trust import certificates, keystore, node_keys, pki, signing
from shared.trust.certificates import SiteIdentity
from shared.trust.trust_store import TrustStore

pki_app = typer.Typer(
    name="pki",
    help="Certificates and keys: who may be the coordinator, which sites may connect, who may sign jobs.",
    no_args_is_help=True,
)


class RoleChoice(StrEnum):
    """What a certificate is for."""

    site = "site"
    server = "server"


PassphraseOption = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        help="File with the passphrase of the private key. Else SILOTUNE_PASSPHRASE_FILE or SILOTUNE_PASSPHRASE; with "
        "none of them the key is not encrypted and only its file mode (0600) protects it.",
    ),
]
CaArgument = Annotated[Path, typer.Argument(metavar="CA_DIR", help="Folder of the certificate authority.")]
TrustArgument = Annotated[Path, typer.Argument(metavar="TRUST_DIR", help="Trust store of the coordinator.")]
DaysOption = Annotated[int, typer.Option("--days", min=1, help="Days until it expires.")]


@pki_app.command()
def init(
    ca_dir: CaArgument,
    name: Annotated[str, typer.Option("--name", help="Name of the consortium, for people.")],
    days: DaysOption = 3650,
    passphrase_file: PassphraseOption = None,
) -> None:
    """Make a certificate authority: one for the whole consortium, on a machine that need not be online."""
    passphrase = _passphrase(passphrase_file)
    certificate = pki.create_ca(ca_dir, name=name, days=days, passphrase=passphrase)
    typer.echo(f"CA {name}: {ca_dir / 'ca.crt'}, valid until {_date(certificate.not_valid_after_utc)}")
    _say_protection(ca_dir / "ca.key", passphrase)
    typer.echo(
        f"Give ca.crt to every site and to the coordinator, crl.pem to the coordinator too; keep a backup of {ca_dir}."
    )


@pki_app.command()
def request(
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Folder for the private key and the request.")],
    name: Annotated[str, typer.Option("--name", help="Name of the holder: letters, digits, dots, dashes.")],
    role: Annotated[RoleChoice, typer.Option("--role", help="`site` for a site, `server` for the coordinator.")],
    hosts: Annotated[
        list[str] | None,
        typer.Option("--host", help="DNS name or IP address that sites dial; for a server, once or more."),
    ] = None,
    passphrase_file: PassphraseOption = None,
) -> None:
    """Make a private key, which stays here, and a request for its certificate, which goes to the CA."""
    passphrase = _passphrase(passphrase_file)
    key, csr = pki.make_request(name=name, role=role.value, hosts=hosts or ())
    key_path, csr_path = out_dir / f"{name}.key", out_dir / f"{name}.csr"
    check_file(csr_path, CSR_MARK)
    node_keys.save_private_key(key_path, key, passphrase)
    certificates.write_public(csr_path, csr)
    _say_protection(key_path, passphrase)
    typer.echo(f"request: {csr_path}; send it to the CA.")
    typer.echo(f"fingerprint of the key: {certificates.fingerprint(key.public_key())}")
    typer.echo("Read the fingerprint to the CA by telephone: it must be the same there.")


@pki_app.command()
def approve(
    ca_dir: CaArgument,
    request_file: Annotated[Path, typer.Argument(metavar="REQUEST", help="The request (.csr).")],
    role: Annotated[
        RoleChoice,
        typer.Option("--role", help="Whom you mean to certify: a `site`, or as `server` the coordinator."),
    ],
    hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--host", help="For a server, once or more: every DNS name or IP address that the request asks for."
        ),
    ] = None,
    days: DaysOption = 365,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write the certificate; by default beside the request.")
    ] = None,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Allow a new key for a name that has one; revoke the old one afterwards.")
    ] = False,
    passphrase_file: PassphraseOption = None,
) -> None:
    """Issue the certificate that a request asks for, if it asks for the role and the hosts that you name.

    Compare the fingerprint with its sender before you hand the certificate out.
    """
    csr = _read(request_file)
    asked = pki.read_request(csr)
    path = out or request_file.with_suffix(".crt")
    check_file(path, CERTIFICATE_MARK, way_out="choose another file with --out")
    certificate = pki.approve(
        ca_dir,
        csr,
        role=role.value,
        hosts=hosts or (),
        days=days,
        passphrase=_passphrase(passphrase_file),
        rotate=rotate,
    )
    certificates.write_public(path, certificate.public_bytes(Encoding.PEM))
    typer.echo(f"certificate: {path}")
    typer.echo(f"{asked.role} {asked.name}, serial {certificate.serial_number:x}")
    if asked.hosts:
        typer.echo(f"hosts: {', '.join(asked.hosts)}")
    typer.echo(f"valid until {_date(certificate.not_valid_after_utc)}")
    typer.echo(f"fingerprint of the key: {certificates.fingerprint(asked.public_key)}")
    typer.echo("Compare the fingerprint with the sender by telephone before you hand the certificate out.")


@pki_app.command()
def install(
    trust_dir: TrustArgument,
    certificates: Annotated[list[Path], typer.Argument(metavar="CERT...", help="Certificates of sites (.crt).")],
) -> None:
    """Let sites connect: put their certificates into the coordinator's trust store."""
    store = TrustStore(trust_dir)
    for path in certificates:
        try:
            site = store.install(_read(path))
        except TrustError as error:
            raise TrustError(f"{path}: {error}") from None
        typer.echo(f"{site.name} may connect until {_date(site.not_after)} ({site.path})")


@pki_app.command()
def revoke(
    ca_dir: CaArgument,
    target: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of the holder, or the serial of one certificate.")
    ],
    publish_to: Annotated[
        Path | None, typer.Option("--publish", metavar="TRUST_DIR", help="Publish the new revocation list there too.")
    ] = None,
    passphrase_file: PassphraseOption = None,
) -> None:
    """Revoke all certificates of a name, or one by its serial. It cannot be undone."""
    number = pki.revoke(ca_dir, target, passphrase=_passphrase(passphrase_file))
    typer.echo(f"{number} certificate{'' if number == 1 else 's'} of {target} revoked" + ("" if number else " before"))
    if publish_to is None:
        typer.echo(
            f"It takes effect when the coordinator has the new list. Send it {ca_dir / 'crl.pem'}, to be installed by:"
        )
        typer.echo("  silotune coordinator install HOME --crl crl.pem")
        typer.echo(f"or, where both folders are on one machine: silotune pki publish {ca_dir} TRUST_DIR")
    else:
        publish(ca_dir, publish_to)


@pki_app.command()
def publish(ca_dir: CaArgument, trust_dir: TrustArgument) -> None:
    """Copy the CA's certificate and its newest revocation list into a trust store."""
    number = pki.publish(ca_dir, trust_dir)
    typer.echo(f"revocation list {number} published to {trust_dir}")


@pki_app.command()
def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A CA folder or a trust store.")],
    as_json: JsonLineOption = False,
) -> None:
    """List certificates: who may connect, until when, and why not."""
    now = datetime.now(UTC)
    is_ca = (folder / "issued").is_dir() or (folder / "ca.key").exists()
    identities = pki.issued(folder, now) if is_ca else TrustStore(folder).sites(now)
    if as_json:
        terminal.print_json([_as_json(found) for found in identities])
    else:
        _print_table(f"Issued by the CA in {folder}" if is_ca else f"Sites in the trust store {folder}", identities)
    authority = certificates.expiry_warning(certificates.load_certificate(folder / "ca.crt"), now)
    for warning in [authority, *(_warning(found, now) for found in identities)]:
        if warning:
            typer.echo(f"warning: {warning}", err=True)


@pki_app.command()
def signer(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Path without ending; OUT.key and OUT.pub are written.")],
    passphrase_file: PassphraseOption = None,
) -> None:
    """Make a key pair for signing jobs or models, and print the public key, which sites' policies and registries name."""
    certificates.check_name(out.name)
    passphrase = _passphrase(passphrase_file)
    key = signing.SigningKey.generate()
    key_path, pub_path = out.with_name(f"{out.name}.key"), out.with_name(f"{out.name}.pub")
    signing.save_signing_key(key_path, key, passphrase)
    certificates.write_public(pub_path, f"{key.verify_key.text}\n".encode())
    _say_protection(key_path, passphrase)
    typer.echo(f"public key: {pub_path}")
    typer.echo(
        "Whoever trusts this key has this line below [signers]: a site, for jobs, in its policy.toml; a registry of models in "
        "its registry.toml (below [officers], if it may promote):"
    )
    typer.echo(f'"{out.name}" = "{key.verify_key.text}"')


@pki_app.command()
def passphrase(
    key: Annotated[Path, typer.Argument(metavar="KEY", help="Key file: the CA's ca.key, a signer's NAME.key.")],
    none: NoPassphraseOption = False,
    passphrase_file: PassphraseOption = None,
) -> None:
    """Change the passphrase of one key.

    The new one is read from SILOTUNE_NEW_PASSPHRASE_FILE or SILOTUNE_NEW_PASSPHRASE, or typed twice. Keys of a site or a
    coordinator change together: `silotune site passphrase`, `silotune coordinator passphrase`.
    """
    old = keystore.old_passphrase([key]) if passphrase_file is None else keystore.read_passphrase(passphrase_file)
    new = None if none else keystore.new_passphrase()
    node_keys.change_passphrase([key], old=old, new=new)
    _say_protection(key, new)


def _passphrase(file: Path | None) -> str | None:
    return keystore.read_passphrase(file) if file is not None else keystore.passphrase_from_environment()


def _read(path: Path) -> bytes:
    try:
        return read_named_bytes(path)
    except (OSError, ValueError) as error:
        raise TrustError(f"{path} cannot be read ({getattr(error, 'strerror', error)}); check the path.") from None


def _say_protection(path: Path, passphrase: str | None) -> None:
    how = "encrypted" if passphrase is not None else "not encrypted: only its mode 0600 protects it"
    typer.echo(f"private key: {path} ({how})")


def _print_table(title: str, identities: list[SiteIdentity]) -> None:
    table = Table(title=Text(title), title_justify="left")
    for column in ("Name", "Role", "State", "Until", "Key", "Serial"):
        table.add_column(column, overflow="fold", no_wrap=column == "Key")
    for found in identities:
        style = "green" if found.state == "valid" else "red"
        table.add_row(
            Text(found.name),
            found.role or "",
            Text(found.state, style=style),
            _date(found.not_after),
            _fingerprint(found)[:19],  # enough to tell keys apart; --json has all of it
            _serial(found),
        )
    terminal.console(120).print(table)  # room for a whole serial
    for found in identities:
        if found.reason:
            typer.echo(f"{found.path.name}: {found.reason}")


def _as_json(found: SiteIdentity) -> dict[str, Any]:
    return {
        "file": found.path.name,
        "name": found.name,
        "role": found.role,
        "state": found.state,
        "reason": found.reason,
        "not_after": None if found.not_after is None else found.not_after.isoformat(),
        "fingerprint": _fingerprint(found) or None,
        "serial": _serial(found) or None,
    }


def _warning(found: SiteIdentity, now: datetime) -> str | None:
    return (
        certificates.expiry_warning(certificates.load_certificate(found.path), now) if found.state == "valid" else None
    )


def _fingerprint(found: SiteIdentity) -> str:
    return "" if found.public_key is None else certificates.fingerprint(found.public_key)


def _serial(found: SiteIdentity) -> str:
    return "" if found.serial is None else format(found.serial, "x")


def _date(time: datetime | None) -> str:
    return "" if time is None else f"{time:%Y-%m-%d}"
