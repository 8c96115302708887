"""The public size of a site's data set: chosen at first use, kept in `declared.json`, and never changed by itself.

A size that followed the data would tell, when it flips from one power of two to the next, that there are exactly so many records,
and whoever can add one would see whether another was there (tests: tests/client/site/test_declared.py). Only the site's engineer
changes it, by `declared_records` in `site.toml`; whatever is declared is public.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from client.ledger.account import dataset_key
from shared.errors import ConfigError
from shared.files.atomic import write_json
from shared.limits import MAX_RECORDS
from shared.privacy.sizes import declared_size

DECLARED_FILE = "declared.json"


def durable_size(home: Path, *, dataset: str, unit: str, num_units: int) -> int:
    """Return the declared size of a data set, as it was first declared; at first use the power of two not above `num_units`.

    Args:
        home: the site's folder.
        dataset, unit: whose size it is; another data set or unit has one of its own.
        num_units: records or persons that are trained on now.

    Raises:
        ConfigError: the file cannot be read.
        RunError: it cannot be written.
    """
    declared = _read(home)
    known = _of(declared, dataset=dataset, unit=unit)
    if known is not None:
        return known
    size = max(declared_size(num_units), 1)
    write_json(home / DECLARED_FILE, declared | {f"{dataset}/{unit}": size})
    return size


def known_size(home: Path, *, dataset: str, unit: str) -> int | None:
    """Return the size that was declared of a data set; None if it was not used yet.

    Raises:
        ConfigError: the file cannot be read.
    """
    return _of(_read(home), dataset=dataset, unit=unit)


def _of(declared: Mapping[str, int], *, dataset: str, unit: str) -> int | None:
    key = f"{dataset}/{unit}"
    if key in declared:
        return declared[key]
    # Under another spelling it is the same data set.
    return next((size for name, size in declared.items() if dataset_key(name) == dataset_key(key)), None)


def _read(home: Path) -> dict[str, int]:
    path = home / DECLARED_FILE
    try:
        if not path.exists():
            return {}
        declared = {str(name): int(size) for name, size in json.loads(path.read_text(encoding="utf-8")).items()}
        if not all(1 <= size <= MAX_RECORDS for size in declared.values()):
            raise ValueError("no size of a data set")
        return declared
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({type(error).__name__}); it holds the size that this site declared. Restore it from a "
            "backup, or set declared_records in site.toml to that size."
        ) from None


def drift(declared: int, num_units: int, unit: str) -> str | None:
    """Return what the site's engineer should know if the declared size no longer fits; for the site alone."""
    if declared <= num_units < 2 * declared:
        return None
    found = (
        f"{num_units:,} {unit}s are trained on, but the site declares {declared:,} to the coordinator. That stays until you set "
        "another declared_records in site.toml, which is public; the power of two below would be "
        f"{max(declared_size(num_units), 1):,}"
    )
    if num_units < 2 * declared:
        return found
    # A step divides by the declared size, and `client.training.adapter_bounds` expects fewer than twice as many.
    return (
        f"{found}. With so many more than declared, a step can move the adapter up to {num_units / declared:,.0f} times as "
        "far as by the declared size, and every site, this one as well, may refuse the next round's adapter as none that "
        "the job can have led to (AdapterError), and the coordinator may leave this site's updates out as too long"
    )
