"""Partitions keep every record once, are as skewed as they say, and refuse what cannot be."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shared.errors import DataError
from simulations.data.partitions import PartitionConfig, _shares, partition

SITE_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")


def labelled(num_records: int, num_classes: int = 2) -> list[dict[str, Any]]:
    return [{"text": str(index), "label": f"class {index % num_classes}"} for index in range(num_records)]


def sizes(parts: dict[str, list[int]]) -> list[int]:
    return [len(rows) for rows in parts.values()]


def label_shares(parts: dict[str, list[int]], records: list[dict[str, Any]]) -> list[float]:
    return [np.mean([records[row]["label"] == "class 0" for row in rows]).item() for rows in parts.values()]


@settings(deadline=None)
@given(
    kind=st.sampled_from(["iid", "dirichlet", "quantity", "column"]),
    labels=st.lists(st.sampled_from(["a", "B", "ü", "ü!", "重", "neg ative", "neg-ative"]), min_size=1, max_size=80),
    num_sites=st.integers(1, 8),
    alpha=st.floats(0.05, 100),
    min_records=st.integers(1, 4),
    seed=st.integers(0, 2**64),
)
def test_every_record_belongs_to_exactly_one_site(
    kind: Any, labels: list[str], num_sites: int, alpha: float, min_records: int, seed: int
) -> None:
    records = [{"text": "t", "label": label} for label in labels]
    by_column = kind == "column"
    config = PartitionConfig(
        kind=kind,
        num_sites=None if by_column else num_sites,
        column="label" if by_column else None,
        alpha=alpha,
        min_records=min_records,
    )
    try:
        parts = partition(records, config, seed=seed)
    except DataError:
        too_few = len(records) < num_sites * min_records
        too_small = min(Counter(labels).values()) < min_records
        assert kind == "dirichlet" or (too_small if by_column else too_few)
        return
    assert sorted(row for rows in parts.values() for row in rows) == list(range(len(records)))
    assert all(rows == sorted(rows) and len(rows) >= min_records for rows in parts.values())
    assert len(parts) == (len(set(labels)) if by_column else num_sites)
    assert all(SITE_NAME.match(name) for name in parts)
    assert list(parts) == sorted(parts) or by_column
    assert parts == partition(records, config, seed=seed)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "quantity"])
def test_seed_changes_the_partition(kind: Any) -> None:
    config = PartitionConfig(kind=kind, num_sites=4)
    assert partition(labelled(200), config, seed=1) != partition(labelled(200), config, seed=2)


def test_iid_sizes_differ_by_one_at_most_and_rows_are_shuffled() -> None:
    parts = partition(labelled(103), PartitionConfig(num_sites=10), seed=0)
    assert set(sizes(parts)) == {10, 11}
    assert min(parts) == "site-01"
    assert max(parts) == "site-10"
    assert parts["site-01"] != list(range(11))


def test_partition_is_pinned() -> None:
    """A scenario names a seed, so another version must not spread the records differently."""
    found = {
        kind: partition(labelled(12), PartitionConfig(kind=kind, num_sites=3, alpha=1.0), seed=7)
        for kind in ("iid", "dirichlet", "quantity")
    }
    assert found == {
        "iid": {"site-1": [0, 4, 6, 10], "site-2": [1, 3, 7, 8], "site-3": [2, 5, 9, 11]},
        "dirichlet": {"site-1": [6, 7], "site-2": [4, 8, 10], "site-3": [0, 1, 2, 3, 5, 9, 11]},
        "quantity": {"site-1": [0, 1, 3, 4, 6, 8, 10], "site-2": [2, 5, 7], "site-3": [9, 11]},
    }


def test_alpha_rules_label_skew() -> None:
    records = labelled(4000)

    def spread_of(**fields: Any) -> float:
        config = PartitionConfig(num_sites=10, **fields)
        return float(np.std(label_shares(partition(records, config, seed=3), records)))

    spread = {alpha: spread_of(kind="dirichlet", alpha=alpha) for alpha in (0.3, 3.0, 1000.0)}
    iid = spread_of(kind="iid")
    assert spread[0.3] > 1.5 * spread[3.0] > 3 * spread[1000.0]
    assert iid < 0.05
    assert spread[1000.0] < 0.05


def test_label_skew_has_the_moments_of_the_dirichlet() -> None:
    """The share at one site is Beta(a, (n - 1) a): mean 1 / n, variance (n - 1) / n^2 / (n a + 1)."""
    num_sites, alpha, records = 5, 2.0, labelled(2000, num_classes=1)
    config = PartitionConfig(kind="dirichlet", num_sites=num_sites, alpha=alpha)
    shares = np.array([sizes(partition(records, config, seed=seed)) for seed in range(400)]) / len(records)
    variance = (num_sites - 1) / num_sites**2 / (num_sites * alpha + 1)
    assert np.abs(shares.mean(axis=0) - 1 / num_sites).max() < 4 * np.sqrt(variance / 400)
    assert shares.var() == pytest.approx(variance, rel=0.15)


def test_label_skew_does_not_follow_the_order_of_the_records() -> None:
    records = labelled(1000, num_classes=1)
    parts = partition(records, PartitionConfig(kind="dirichlet", num_sites=2, alpha=50), seed=0)
    assert max(parts["site-1"]) > min(parts["site-2"])


def test_label_skew_of_many_sites_and_classes() -> None:
    parts = partition(labelled(10_003, 77), PartitionConfig(kind="dirichlet", num_sites=100, alpha=0.1), seed=0)
    assert len(parts) == 100
    assert sum(sizes(parts)) == 10_003


def test_alpha_rules_size_skew_and_every_site_keeps_its_minimum() -> None:
    def spread(alpha: float) -> float:
        config = PartitionConfig(kind="quantity", num_sites=50, alpha=alpha, min_records=20)
        found = sizes(partition(labelled(10_000), config, seed=5))
        assert min(found) >= 20
        return float(np.std(found))

    assert spread(0.1) > 2 * spread(1.0) > 4 * spread(1e6)
    assert spread(1e6) < 3


@settings(deadline=None)
@given(
    total=st.integers(0, 10_000),
    weights=st.lists(st.floats(0, 1), min_size=1, max_size=20).filter(lambda found: sum(found) > 1e-3),
)
def test_shares_sum_to_the_total_and_stay_within_one(total: int, weights: list[float]) -> None:
    proportions = np.array(weights) / sum(weights)
    found = _shares(np.array(total), proportions)
    assert found.sum() == total
    assert found.min() >= 0
    assert np.abs(found - proportions * total).max() <= 1 + 1e-6


def test_column_names_sites_by_value() -> None:
    values = ["St. Mary's", "Köln", "st mary s", "Köln", 7, "北京", "!"]
    records = [{"text": "t", "hospital": value} for value in values]
    parts = partition(records, PartitionConfig(kind="column", column="hospital"), seed=0)
    assert parts == {
        "site": [6],
        "7": [4],
        "koln": [1, 3],
        "st-mary-s": [0],
        "st-mary-s-2": [2],
        "xn--1lq90i": [5],
    }
    assert b"1lq90i".decode("punycode") == "北京"
    # Names that lose letters, or all of them, stay apart.
    values = ["北京", "上海", "北京医院", "Köln", "Koln", "köln!", "!", "?", "医" * 90, "医" * 89]
    parts = partition([{"h": value} for value in values], PartitionConfig(kind="column", column="h"), seed=0)
    assert sorted(rows[0] for rows in parts.values()) == list(range(len(values)))
    assert all(SITE_NAME.match(name) for name in parts)


def test_slugs_never_collide_with_numbered_ones() -> None:
    records = [{"h": value} for value in ("a", "a!", "a-2", "A")]
    parts = partition(records, PartitionConfig(kind="column", column="h"), seed=0)
    assert sorted(rows[0] for rows in parts.values()) == [0, 1, 2, 3]


def test_long_values_make_valid_names() -> None:
    records = [{"h": "x" * 99 + end} for end in "abc"]
    config = PartitionConfig(kind="column", column="h")
    assert all(SITE_NAME.match(name) for name in partition(records, config, seed=0))
    # Longer ones are notes by mistake, which may name no folder.
    with pytest.raises(DataError, match="3 of 3 values of 'h' have more than 100 characters"):
        partition([{"h": "x" * 100 + end} for end in "abc"], config, seed=0)
    with pytest.raises(ValidationError, match="would be called by texts"):
        PartitionConfig(kind="column", column="text")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_sites": 11}, "10 records cannot give 11 sites at least 1 each. Use at most 10 sites"),
        ({"num_sites": 3, "min_records": 4, "kind": "quantity"}, "Use at most 2 sites"),
        ({"num_sites": 10, "kind": "dirichlet", "alpha": 0.01}, "Use a larger alpha"),
        ({"num_sites": 2, "kind": "column", "column": "place"}, "10 distinct values, but num_sites is 2"),
        ({"kind": "column", "column": "place", "min_records": 2}, "10 of 10 values"),
        ({"kind": "column", "column": "hospital"}, "record 1 has no 'hospital'"),
        ({"kind": "column", "column": "words"}, "record 1 has a list as 'words'"),
    ],
)
def test_impossible_partitions_say_what_to_do(config: dict[str, Any], message: str) -> None:
    records = [record | {"words": ["a"], "place": record["text"]} for record in labelled(10)]
    with pytest.raises(DataError, match=re.escape(message)):
        partition(records, PartitionConfig.model_validate(config), seed=0)


def test_no_records() -> None:
    for config in (PartitionConfig(num_sites=1), PartitionConfig(kind="column", column="label")):
        with pytest.raises(DataError):
            partition([], config, seed=0)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"kind": "column"},
        {"num_sites": 0},
        {"num_sites": 2, "alpha": 0},
        {"num_sites": 2, "alpha": float("nan")},
        {"num_sites": 2, "min_records": 0},
        {"num_sites": 2, "column": "label"},
        {"num_sites": 2, "sites": 3},
    ],
)
def test_config_refuses(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PartitionConfig.model_validate(fields)
