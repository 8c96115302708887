"""Partitions: which simulated site holds which records, as pure functions of the labels and a public seed.

Guarantee: every record belongs to exactly one site, and every site holds at least `min_records`. Where persons are the unit
of privacy, all records of a person belong to the same site; otherwise `DataError` (tests:
tests/simulations/running/test_persons.py).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from shared.data.datasets import PERSON_ROLE, TEXT_ROLES, Record
from shared.data.records import named
from shared.errors import DataError
from shared.job.parsing import Section
from shared.privacy.persons import Persons

Indices = npt.NDArray[np.int64]

MAX_DRAWS = 1000
"""Dirichlet draws before giving up on a label skew in which every site has `min_records`."""

_MAX_NAME = 100
_MAX_SLUG = 48


class PartitionConfig(Section):
    """How records are spread over sites."""

    kind: Literal["iid", "dirichlet", "quantity", "column"] = "iid"
    """`iid`: random parts; `dirichlet`: label skew; `quantity`: size skew; `column`: a site per value."""
    num_sites: int | None = Field(default=None, ge=1)
    """Number of sites; may be None only for `column`, which then follows the number of distinct values."""
    alpha: float = Field(default=0.5, gt=0, le=1e6)
    """Dirichlet concentration for `dirichlet` and `quantity`: 0.1 is a strong skew, 100 nearly none."""
    column: str | None = Field(default=None, min_length=1)
    """Role whose values name the sites; only for `column`."""
    min_records: int = Field(default=1, ge=1)
    """Records that every site must hold at least; persons, where they are the unit of privacy."""

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if self.kind == "column" and self.column is None:
            raise ValueError('kind "column" needs column, the role whose values name the sites, such as "hospital"')
        if self.kind != "column" and self.column is not None:
            raise ValueError(f'column is for kind "column", but kind is "{self.kind}"; remove one of the two')
        if self.column in TEXT_ROLES:
            raise ValueError(f'column is "{self.column}", so the sites would be called by texts; choose another role')
        if self.kind != "column" and self.num_sites is None:
            raise ValueError(f'kind "{self.kind}" needs num_sites, the number of sites')
        return self


def partition(
    records: Sequence[Record],
    config: PartitionConfig,
    *,
    seed: int,
    label_role: str = "label",
    persons: Persons | None = None,
) -> dict[str, list[int]]:
    """Split the indices of `records` over sites: site name -> increasing indices.

    The kinds and their sources:
        - `iid`: a random permutation cut into parts whose sizes differ by one at most (McMahan et al. 2017).
        - `dirichlet`: each class is cut in proportions over the sites ~ Dir(alpha), one draw per class
          (Yurochkin et al. 2019, "Bayesian Nonparametric Federated Learning of Neural Networks", section 4;
          Hsu, Qi and Brown 2019, arXiv:1909.06335, draw the classes of each site instead). All proportions
          are drawn again, at most `MAX_DRAWS` times, until every site has `min_records`.
        - `quantity`: every site gets `min_records` random records, the rest goes in proportions ~ Dir(alpha)
          (Li et al. 2022, arXiv:2102.02079, "quantity skew").
        - `column`: one site per distinct value of a role, such as the hospital that wrote the text.

    Sites are called site-1, site-2 and so on, padded with zeros so that they sort; with `column`, by the value in lower-case
    ASCII, or, of a value without any, in Punycode (RFC 3492: `北京` is `xn--1lq90i`). Two values never share a name, and
    `run.json` keeps the value of each name. Equal arguments give equal results under the same major version of NumPy.

    Args:
        records: the data set; only its length, its labels or one role are read.
        config: how to split.
        seed: public, non-negative; fixes everything random.
        label_role: role of the class label, for `dirichlet`.
        persons: whose record each is: then persons are spread as records are otherwise, each with all their records and, for
            `dirichlet`, their most frequent label.

    Raises:
        DataError: if the records cannot be spread so; for example fewer records than sites need, or a person at two sites.
    """
    if persons is not None:
        return _partition_persons(records, persons, config, seed=seed, label_role=label_role)
    if config.kind == "column":
        return _by_column(records, config)
    num_sites = config.num_sites or 1
    _require_enough(len(records), num_sites, config.min_records)
    generator = np.random.default_rng(seed)
    if config.kind == "dirichlet":
        parts = _by_label_skew(_rows_by_value(records, label_role), num_sites, config, generator)
    elif config.kind == "quantity":
        order = generator.permutation(len(records))
        free = np.array(len(records) - num_sites * config.min_records)
        sizes = _shares(free, generator.dirichlet(np.full(num_sites, config.alpha))) + config.min_records
        parts = _cut(order, sizes)
    else:
        parts = np.array_split(generator.permutation(len(records)), num_sites)
    width = len(str(num_sites))
    return {f"site-{number:0{width}}": sorted(part.tolist()) for number, part in enumerate(parts, start=1)}


def _partition_persons(
    records: Sequence[Record], persons: Persons, config: PartitionConfig, *, seed: int, label_role: str
) -> dict[str, list[int]]:
    role = config.column or label_role
    if role == PERSON_ROLE:
        raise DataError(
            f"partition.column is {PERSON_ROLE!r}, so the sites would be called by the ids of persons; choose another role."
        )
    by_value = _rows_by_value(records, role) if config.kind in ("column", "dirichlet") else {}
    value_of = {row: value for value, rows in by_value.items() for row in rows}
    values = [Counter(value_of.get(row) for row in rows.tolist()) for rows in persons.rows]
    if config.kind == "column" and (scattered := sum(len(counts) > 1 for counts in values)):
        raise DataError(
            f"{scattered:,} of {persons.count:,} persons have records at more than one site by {role!r}. A site's epsilon is for "
            "persons whose records are all there: bring a person's records under one value, leave such persons out, or choose "
            "another partition.kind."
        )
    if config.num_sites is not None and persons.count < config.num_sites * config.min_records:
        raise DataError(
            f"{persons.count} persons cannot give {config.num_sites} sites at least {config.min_records} each. Use fewer "
            "sites or a smaller min_records."
        )
    typical: list[Record] = [{role: counts.most_common(1)[0][0]} for counts in values]
    parts = partition(typical, config, seed=seed, label_role=label_role)
    return {
        name: sorted(row for person in members for row in persons.rows[person].tolist())
        for name, members in parts.items()
    }


def _require_enough(num_records: int, num_sites: int, min_records: int) -> None:
    if num_records < num_sites * min_records:
        raise DataError(
            f"{num_records} records cannot give {num_sites} sites at least {min_records} each. Use at most "
            f"{num_records // min_records} sites, a smaller min_records, or more data."
        )


def _by_label_skew(
    classes: Mapping[Hashable, list[int]],
    num_sites: int,
    config: PartitionConfig,
    generator: np.random.Generator,
) -> list[Indices]:
    counts = np.array([len(rows) for rows in classes.values()])
    sizes = _draw_label_skew(counts, num_sites, config, generator)
    cuts = [_cut(generator.permutation(rows), size) for rows, size in zip(classes.values(), sizes, strict=True)]
    return [np.concatenate(parts) for parts in zip(*cuts, strict=True)]


def _draw_label_skew(
    counts: Indices, num_sites: int, config: PartitionConfig, generator: np.random.Generator
) -> Indices:
    """Records of each class (row) at each site (column)."""
    for _ in range(MAX_DRAWS):
        shares = generator.dirichlet(np.full(num_sites, config.alpha), size=len(counts))
        sizes = _shares(counts, shares)
        if sizes.sum(axis=0).min() >= config.min_records:
            return sizes
    raise DataError(
        f"{MAX_DRAWS} Dirichlet draws with alpha {config.alpha:g} over {num_sites} sites each left a site "
        f"with fewer than {config.min_records} of the {counts.sum()} records. Use a larger alpha, fewer "
        "sites or a smaller min_records."
    )


def _shares(totals: Indices, proportions: npt.NDArray[np.float64]) -> Indices:
    """Whole numbers that sum to `totals` over the last axis, each within one of its proportion."""
    ends = np.floor(np.cumsum(proportions, axis=-1) * totals[..., None]).astype(np.int64)
    ends[..., -1] = totals
    return np.diff(np.minimum(ends, totals[..., None]), prepend=0)


def _cut(rows: Indices, sizes: Indices) -> list[Indices]:
    return np.split(rows, np.cumsum(sizes)[:-1])


def _by_column(records: Sequence[Record], config: PartitionConfig) -> dict[str, list[int]]:
    role = config.column or ""
    groups = _rows_by_value(records, role)
    if long := sum(len(str(value)) > _MAX_NAME for value in groups):
        raise DataError(
            f"{long} of {len(groups)} values of {role!r} have more than {_MAX_NAME} characters, so they are no names of sites; "
            "check data.train.columns."
        )
    if config.num_sites not in (None, len(groups)):
        raise DataError(
            f"{role!r} has {len(groups)} distinct values, but num_sites is {config.num_sites}. Remove "
            f"num_sites or set it to {len(groups)}."
        )
    small = sum(len(rows) < config.min_records for rows in groups.values())
    if small or not groups:
        raise DataError(
            f"{small} of {len(groups)} values of {role!r} have fewer than {config.min_records} records. Use "
            "a smaller min_records, or merge or remove these sites."
        )
    ordered = sorted(groups, key=lambda value: (str(value), type(value).__name__))
    return dict(zip(_site_names(ordered), (groups[value] for value in ordered), strict=True))


def _rows_by_value(records: Sequence[Record], role: str) -> dict[Hashable, list[int]]:
    """Indices of the records with each value of `role`, values in the order of first appearance."""
    groups: dict[Hashable, list[int]] = {}
    for index, record in enumerate(records):
        value = record.get(role)
        if value is None or not isinstance(value, Hashable):
            raise DataError(
                f"{named(record, index + 1)} has {'no' if value is None else 'a list as'} {role!r}. Expected one "
                "plain value, text or number, in every record; declare its column or choose another kind."
            )
        groups.setdefault(value, []).append(index)
    return groups


def _site_names(values: Iterable[object]) -> list[str]:
    """Names for folders, logs and certificates: lower-case ASCII letters, digits and hyphens, all distinct."""
    names: dict[str, None] = {}
    for value in values:
        slug = name = _slug(str(value))
        number = 1
        while name in names:
            number += 1
            name = f"{slug}-{number}"
        names[name] = None
    return list(names)


def _slug(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    if slug := re.sub(r"[^a-z0-9]+", "-", plain)[:_MAX_SLUG].strip("-"):
        return slug
    letters = "".join(character for character in text if character.isalnum())
    encoded = letters.encode("punycode").decode().lower() if letters else ""
    return f"xn--{encoded}"[:_MAX_SLUG].strip("-") if encoded else "site"
