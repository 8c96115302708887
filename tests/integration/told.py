"""What processes told of themselves (`tests.integration.dying`), checked: no mask, stream, share or input served twice."""

from __future__ import annotations

import functools
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Told = dict[str, Any]
_NEAR = 1 << 42  # sums and noise of small sites are below; of a uniform word, one in two million is


def told(folder: Path, role: str) -> list[Told]:
    """Return everything that the processes of a role told, also those that died; half a line is an error."""
    return [
        json.loads(line) for path in sorted(folder.glob(f"{role}.*.told")) for line in path.read_text().splitlines()
    ]


def assert_nothing_twice(of_sites: Iterable[Told]) -> None:
    """Check what all sites told, from inside: what was drawn and the keys that hid it, whichever process of whichever site."""
    by_kind: dict[str, list[Told]] = defaultdict(list)
    for one in of_sites:
        by_kind[one["what"]].append(one)
    masked = by_kind["masked"]
    _assert_once("key of a stream of coins or noise", (one["key"] for one in by_kind["stream"]))
    _assert_once("share of the noise", (one["sha256"] for one in by_kind["share"]))
    _assert_once("input", (one["words"] for one in masked))
    _assert_once("X25519 key", (one["public_key"] for one in masked))
    _assert_once("attempt of a site", ((one["job"], *one["place"], one["site"]) for one in masked))
    # A mask key is that of two sites, one of which adds what the other subtracts, in one attempt.
    added = Counter(key for one in masked for key in one["plus"])
    subtracted = Counter(key for one in masked for key in one["minus"])
    assert max((added | subtracted).values()) == 1, "a mask was used twice"
    places: dict[str, set[tuple[Any, ...]]] = defaultdict(set)
    for one in masked:
        for key in (*one["plus"], *one["minus"]):
            places[key].add((one["job"], *one["place"], one["context"]))
    assert max(map(len, places.values())) == 1, "a mask was used in two attempts"


def assert_masks_hide(of_coordinator: Iterable[Told]) -> None:
    """Check what came, from outside: two inputs of a site under the same masks differ by no more than what they hide."""
    came: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for one in of_coordinator:
        words = np.frombuffer(bytes.fromhex(one["words"]), "<u8")
        came[one["site"]][one["sha256"]] = words  # the same bytes may come again
    for site, inputs in came.items():
        for one, other in itertools.combinations(inputs.values(), 2):
            apart = np.abs((one - other).view(np.int64).astype(float))
            assert np.mean(apart < _NEAR) < 0.5, f"two inputs of {site} are under the same masks"


def masked_of(of_sites: Iterable[Told], site: str, job: str) -> set[tuple[int, int]]:
    """Return (round, attempt) of what a site masked for a job."""
    return {
        (one["place"][0], one["place"][1])
        for one in of_sites
        if one["what"] == "masked" and (one["site"], one["job"]) == (site, job)
    }


def _assert_once(what: str, found: Iterable[Any]) -> None:
    times = Counter(found)
    assert times, f"nobody told of any {what}"
    assert max(times.values()) == 1, f"an {what} served twice" if what[0] in "aiX" else f"a {what} served twice"


# --- a recount that shares no code with the ledger ---


def ledger_lines(log: Path) -> list[Mapping[str, Any]]:
    """Return what an audit log says that the ledger noted, read as text."""
    lines = [json.loads(line) for path in sorted(log.glob("audit-*.jsonl")) for line in path.read_text().splitlines()]
    return [line["details"] for line in lines if line["event"] == "ledger.entry"]


def recounted(lines: Iterable[Mapping[str, Any]], delta: float, job: str | None = None) -> tuple[float, float]:
    """Return (epsilon of the sums, epsilon of the inputs alone) by dp-accounting, of one job or of the account.

    Of a job every attempt that was charged counts, of the account the whole plan of a job that began.
    """
    attempts: Counter[str] = Counter()
    payloads: dict[str, Mapping[str, Any]] = {}
    for line in lines:
        if line["kind"] == "reserve":
            name = line["payload"]["job_id"]
            attempts[name] += line["payload"]["mechanism"]["steps"]
            payloads.setdefault(name, line["payload"])
            for key in ("mechanism", "together", "planned_steps"):
                assert payloads[name][key] == line["payload"][key], f"{key} of a job changed"
    if job is not None:
        return _composed([(payloads[job], attempts[job])], delta)
    return _composed([(payload, max(attempts[n], payload["planned_steps"])) for n, payload in payloads.items()], delta)


def _composed(jobs: Iterable[tuple[Mapping[str, Any], int]], delta: float) -> tuple[float, float]:
    jobs = list(jobs)

    def epsilon(which: str) -> float:
        steps: Counter[tuple[float, float]] = Counter()
        for payload, count in jobs:
            steps[payload[which]["noise_multiplier"], payload[which]["sample_rate"]] += count
        return _epsilon(frozenset(steps.items()), delta)

    return epsilon("together"), epsilon("mechanism")


@functools.cache  # half a second and more each
def _epsilon(steps: frozenset[tuple[tuple[float, float], int]], delta: float) -> float:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for (noise, rate), count in sorted(steps):
        event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
        accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))
