"""Options that several commands have: one type each, so that they are spelled and explained alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from shared.errors import ConfigError, SilotuneError

RunArgument = Annotated[Path, typer.Argument(help="Run folder.")]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Folder of a finished run or a model; or NAME, NAME@ALIAS or NAME:N of a registry."
    ),
]
TextColumnOption = Annotated[
    str | None, typer.Option("--text", metavar="COLUMN", help="Of --file: the column of the texts; by default text.")
]
RegistryOption = Annotated[
    Path | None,
    typer.Option("--registry", envvar="SILOTUNE_MODELS", help="The registry's folder; by default ~/.silotune/models."),
]
PolicyOption = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        envvar="SILOTUNE_MODELS_POLICY",
        help="Whose signatures count and what may be promoted; by default registry.toml in the registry.",
    ),
]
"""Of the registry of models."""
OverridesOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the scenario, for example training.rounds=10."),
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Run folder; by default runs/NAME-DATE.")]

TrackOption = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="TRACKER",
        help="Tell a tracker of it: mlflow:URI, tensorboard:FOLDER, wandb or wandb:offline. Repeatable.",
    ),
]
TrackWeightsOption = Annotated[
    bool, typer.Option("--track-weights", help="Send trackers the tuned adapter, too; by default no weights leave.")
]
EnergyOption = Annotated[
    bool, typer.Option("--energy", help="Count the energy of this machine, measured where it tells, else estimated.")
]
KwhPriceOption = Annotated[
    str | None, typer.Option("--price-per-kwh", metavar="PRICE", help="For the cost of that energy: '0.30 EUR'.")
]
HourPriceOption = Annotated[
    str | None,
    typer.Option("--price-per-hour", metavar="PRICE", help="For the cost of the machine's time: '2.50 USD'."),
]
WattsOption = Annotated[
    float | None,
    typer.Option("--cpu-watts", help="Of an estimate: thermal design power of all processors; by default 4 W a core."),
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JsonLineOption = Annotated[bool, typer.Option("--json", help="Print one JSON line.")]
OnlyJsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON line and nothing else.")]
JsonAtEndOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON line at the end, and nothing else on standard output.")
]

BackupArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A backup, as `backup` wrote it.")]
NoPassphraseOption = Annotated[
    bool, typer.Option("--none", help="Leave the keys without a passphrase: only their mode (0600) protects them.")
]

HostOption = Annotated[str, typer.Option(help="Address to listen on; beyond loopback only with --certificate.")]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any that is free.")]
CertificateOption = Annotated[Path | None, typer.Option(help="Certificate for TLS, PEM, with its chain.")]
KeyOption = Annotated[Path | None, typer.Option(help="Its key, PEM, without a passphrase.")]
DatabaseOption = Annotated[
    str | None,
    typer.Option(
        envvar="SILOTUNE_CONSOLE_DATABASE",
        help="PostgreSQL for accounts: postgresql://...; by default a file in HOME.",
    ),
]
"""Of consoles."""

Quoting = Literal["checked", "trusted", "none"]
_QUOTING = typer.Option("--quoting", help="Of CSV: none takes quotes for plain characters; see data.train.quoting.")
QuotingOption = Annotated[Quoting, _QUOTING]
OptionalQuotingOption = Annotated[Quoting | None, _QUOTING]
DelimiterOption = Annotated[
    str | None, typer.Option("--delimiter", help="Between CSV cells; a comma, or a tab in .tsv.")
]
EncodingOption = Annotated[str | None, typer.Option("--encoding", help="Of CSV, JSONL and text; utf-8 by default.")]


def how_to_read(option: str, file: Path | None, **given: str | None) -> dict[str, Any]:
    """Return those options that say how the file of `option` is read.

    Raises:
        ConfigError: there is such an option, but no file.
    """
    found = {name: value for name, value in given.items() if value is not None}
    if found and file is None:
        raise ConfigError(f"--{next(iter(found))} says how {option} is read, but no {option} was given.")
    return found


def named_once(
    items: Sequence[str], option: str, form: str, error: type[SilotuneError] = ConfigError
) -> dict[str, str]:
    """Return the values of a repeatable option by their names.

    Args:
        form: of an item, for the error, such as ROLE=COLUMN.
        error: what is raised if an item is not of that form, or two have one name: neither may win unseen.
    """
    found: dict[str, str] = {}
    for item in items:
        name, separator, value = (part.strip() for part in item.partition("="))
        if not separator or not name or not value:
            raise error(f"{option} {item!r} is not of the form {form}.")
        if name in found:
            raise error(f"{option} names {name!r} twice, with {found[name]!r} and {value!r}; leave out one of the two.")
        found[name] = value
    return found
