"""`silotune models`: named versions of tuned models, with their lineage, in a registry."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared import terminal
from shared.errors import SilotuneError, TrustError, printable
from shared.options import JsonOption, PolicyOption, RegistryOption

if TYPE_CHECKING:
    from server.registry.history import History
    from server.registry.registry import Registry, Version
    from server.registry.verification import Examined
    from shared.trust.signing import SigningKey

models_app = typer.Typer(
    name="models",
    help="A registry of tuned models: signed versions with their lineage, promoted by whoever may.\n\n"
    "A model is called NAME (its champion; the newest version while none was promoted), NAME@ALIAS or NAME:N.",
    no_args_is_help=True,
)

_STATEMENT_COLUMNS = 100
"""Of a statement, whose paragraphs are long."""
ReferenceArgument = Annotated[str, typer.Argument(metavar="MODEL", help="NAME, NAME@ALIAS or NAME:N.")]
AsOption = Annotated[
    Path | None,
    typer.Option("--as", help="Key file of who decides; by default the registry's own key."),
]
WhyOption = Annotated[str, typer.Option("--why", help="The reason, for the history.")]


def open_registry(registry: Path | None, policy: Path | None = None) -> Registry:
    """Return the registry that the options name."""
    from server.registry.registry import Registry, registry_folder

    return Registry(registry_folder(registry), policy)


@models_app.command()
def add(
    source: Annotated[Path, typer.Argument(help="A finished run's folder, or a model folder that was made from one.")],
    name: Annotated[str, typer.Option("--name", help="Name of the model.")],
    signer: Annotated[
        Path | None,
        typer.Option(
            "--signer", help="Who signs: a key file or a coordinator's folder; by default the registry's own key."
        ),
    ] = None,
    note: Annotated[str, typer.Option("--note", help="For people.")] = "",
    parent: Annotated[
        str | None,
        typer.Option("--parent", help="What an exported or compressed model was made from: NAME:N, or a run folder."),
    ] = None,
    registry: RegistryOption = None,
    policy: PolicyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a model, copy it with the records of its run, and sign it as a new version."""
    from server.registry import adding
    from server.registry.references import resolve
    from shared.runtime.export.card import evaluated_on_private_records

    place = open_registry(registry, policy)
    origin: Version | Path | None = None
    if parent is not None:
        found = resolve(place, parent)
        origin = found.version or found.folder
    version = adding.add(place, source, name, signer=_signer(signer), note=note, parent=origin)
    if as_json:
        terminal.print_json(_row(place, version))
        return
    typer.echo(f"added {version.reference}: {_claim(version)}; signed by {version.signer}")
    if evaluated_on_private_records(version.model):
        typer.echo(
            "Its metrics are on records that count as private, as a file's do unless data.kind says otherwise, and whoever may "
            "read the registry reads them.",
            err=True,
        )
    if version.number == 1 and version.signer == "this-registry":
        typer.echo(f"{place.path / 'registry.toml'} says whose signatures count and what may be promoted.")


@models_app.command("list")
def list_models(
    name: Annotated[str | None, typer.Argument(help="Only the versions of this model.")] = None,
    registry: RegistryOption = None,
    policy: PolicyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List versions with aliases, metric, epsilon and signer; the signature of each manifest is checked, its files are not."""
    place = open_registry(registry, policy)
    if name is not None:
        place.require(name)
    rows: list[dict[str, Any]] = []
    for model in [name] if name else place.names():
        rows += _rows(place, model)
    if as_json:
        terminal.print_json(rows)
    elif rows:
        _print_rows(rows)
    else:
        typer.echo(f"{place.path} holds no model yet; add one with: silotune models add RUN --name NAME")


@models_app.command()
def show(
    reference: ReferenceArgument,
    registry: RegistryOption = None,
    policy: PolicyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a version is, where it comes from, and its statement."""
    from server.registry.references import resolve
    from server.registry.showing import statement_of

    place = open_registry(registry, policy)
    found = resolve(place, reference, retired=True)
    version = _require(found.version, reference)
    manifest, statement = version.manifest, statement_of(version)
    row = _row(place, version)
    if as_json:
        terminal.print_json({**row, "statement": statement, "how": found.how, "manifest": manifest.model_dump()})
        return
    console = terminal.console(soft_wrap=True)
    console.print(found.how)
    summary = manifest.summary
    facts = {
        "model": f"{summary.format}, {summary.precision}, {summary.task}",
        "aliases": ", ".join(row["aliases"]) or "none",
        "retired": row["retired"],
        "added": f"{manifest.added[:10]} by {version.signer} ({manifest.signer})",
        "note": manifest.note,
        "made from": row["parent"],
        "job": f"{summary.job} ({summary.job_sha256[:12]})",
        "job signed by": summary.job_signer,
        "data": summary.data,
        "sites": ", ".join(summary.sites),
        "metric": row["metric_text"],
        "audits": ", ".join(summary.audits) or "none",
        "files": f"{len(manifest.files)}, {manifest.num_bytes:,} bytes of model",
    }
    for key, value in facts.items():
        if value:
            console.print(f"  {key}: {printable(value)}")
    console.print()
    text = statement or "The run was not private: nothing is claimed."
    for paragraph in printable(text, lines=True).split("\n"):
        console.print(textwrap.fill(paragraph, _STATEMENT_COLUMNS, break_long_words=False, break_on_hyphens=False))


@models_app.command()
def verify(
    reference: ReferenceArgument,
    registry: RegistryOption = None,
    policy: PolicyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check every file, the signature, and the statement, recomputed from what was executed; exit status 1 if one fails."""
    from server.registry.references import require_version

    place = open_registry(registry, policy)
    try:
        version = require_version(place, reference, retired=True)
        _verify(version)
    except SilotuneError as error:
        if not as_json:
            raise
        terminal.print_json({"model": reference, "verified": False, "problem": str(error)})
        raise typer.Exit(1) from None
    if as_json:
        terminal.print_json({**_row(place, version), "verified": True})
        return
    typer.echo(
        f"{version.reference}: every file is as {version.signer} signed it, and the statement holds: {_claim(version)}"
    )


@models_app.command()
def promote(
    reference: ReferenceArgument,
    alias: Annotated[str, typer.Option("--alias", help="champion, candidate, or another name.")] = "champion",
    officer: AsOption = None,
    why: WhyOption = "",
    registry: RegistryOption = None,
    policy: PolicyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let an alias name this version, if it verifies and the policy allows it; to roll back, promote the former one."""
    from server.registry.references import require_version

    place = open_registry(registry, policy)
    version, key = require_version(place, reference), place.who(_signer(officer))
    from server.registry import promotion  # takes seconds to load: mistakes are told before

    entry = promotion.promote(place, version, alias, key, why=why)
    if as_json:
        terminal.print_json(entry.model_dump())
        return
    before = f", before {version.manifest.name}:{entry.former}" if entry.former else ""
    typer.echo(f"{version.manifest.name}@{alias} is {version.reference} now{before}")


@models_app.command()
def retire(
    reference: ReferenceArgument,
    officer: AsOption = None,
    why: WhyOption = "",
    registry: RegistryOption = None,
    policy: PolicyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take a version out of use for good; it stays on the disk. Aliases that name it must move first."""
    from server.registry.references import require_version

    place = open_registry(registry, policy)
    version, key = require_version(place, reference), place.who(_signer(officer))
    from server.registry import promotion

    entry = promotion.retire(place, version, key, why=why)
    if as_json:
        terminal.print_json(entry.model_dump())
        return
    typer.echo(f"{version.reference} is retired: it can neither be promoted nor served any more")


@models_app.command()
def aliases(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    registry: RegistryOption = None,
    policy: PolicyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the aliases of a model and every promotion and retirement, each signature checked."""
    from rich.table import Table

    from server.registry.showing import who_signed

    place = open_registry(registry, policy)
    place.require(name)
    history = place.history(name)
    if as_json:
        named = {alias: entry.version for alias, entry in history.aliases.items()}
        entries = [entry.model_dump() for entry in history.entries]
        last = history.entries[-1].sha256 if history.entries else None
        terminal.print_json({"model": name, "aliases": named, "entries": entries, "last_sha256": last})
        return
    table = Table("entry", "when", "who", "what", "why", box=None)
    for entry in history.entries:
        before = f" (before {entry.former})" if entry.former else ""
        what = f"retired {entry.version}" if entry.alias is None else f"{entry.alias}: {entry.version}{before}"
        table.add_row(str(entry.number), entry.at[:16], who_signed(place, entry), what, entry.why)
    console = terminal.console()
    for alias, entry in history.aliases.items():
        console.print(f"{name}@{alias} is {name}:{entry.version}")
    console.print(table)
    if history.entries:
        console.print(f"last entry: {len(history.entries)}, SHA-256 {history.entries[-1].sha256}", soft_wrap=True)


@models_app.command()
def push(
    reference: ReferenceArgument,
    to: Annotated[
        str, typer.Option("--to", metavar="URI", help="MLflow's address, such as https://... or sqlite:///FILE.")
    ],
    registry: RegistryOption = None,
    policy: PolicyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Verify a version and register it in an MLflow registry, under the same name; needs the extra `mlflow`."""
    from server.registry.references import require_version

    place = open_registry(registry, policy)
    version = require_version(place, reference)
    history = place.history(version.manifest.name)
    from server.registry.mlflow_push import push as push_to

    found = push_to(version, _verify(version), history, to)
    if as_json:
        terminal.print_json({"model": version.reference, "mlflow_version": found.version, "was_there": found.was_there})
        return
    said = "is there already, as" if found.was_there else "is now"
    typer.echo(f"{version.reference} {said} version {found.version} of {version.manifest.name} in {to}")


def _verify(version: Version) -> Examined:
    from server.registry.verification import verify as verify_all  # takes seconds to load

    return verify_all(version)


def _require(version: Version | None, reference: str) -> Version:
    from shared.errors import ConfigError, excerpt

    if version is None:
        raise ConfigError(f"{excerpt(reference)} is a folder, no version of a model; add it with: silotune models add")
    return version


def _signer(place: Path | None) -> tuple[str, SigningKey] | None:
    """Return name and key of whoever holds a key file, or of a coordinator; None if nobody was named."""
    from shared.trust.keystore import passphrase_from_environment
    from shared.trust.signing import load_signing_key

    if place is None:
        return None
    passphrase = passphrase_from_environment()
    if (place / "coordinator.toml").exists():
        from server.store.home import CoordinatorHome

        signer = CoordinatorHome(place).signer(passphrase)
        return signer.name, signer.key
    return place.stem, load_signing_key(place, passphrase)


def _claim(version: Version) -> str:
    from server.registry.showing import claim

    return claim(version.manifest.summary)


def _row(place: Registry, version: Version) -> dict[str, Any]:
    from server.registry.showing import row

    return row(version, place.history(version.manifest.name))


def _rows(place: Registry, name: str) -> list[dict[str, Any]]:
    """Return a row for each version of a model; of one that is not trusted, why."""
    from server.registry.showing import row

    history: History | None = None
    rows: list[dict[str, Any]] = []
    for number in place.numbers(name):
        try:
            history = history or place.history(name)
            rows.append(row(place.version(name, number), history))
        except TrustError as error:
            rows.append({"model": name, "version": number, "trusted": False, "problem": str(error)})
    return rows


def _print_rows(rows: list[dict[str, Any]]) -> None:
    from server.registry.showing import table_of

    console = terminal.console(width=140)
    console.print(table_of(rows))
    for problem in dict.fromkeys(one["problem"] for one in rows if not one["trusted"]):
        console.print(f"\n{problem}", soft_wrap=True, style="red")
