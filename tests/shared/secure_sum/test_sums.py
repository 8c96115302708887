"""The sum is the plain sum, and nothing short of all inputs says anything of one."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from shared.secure_sum import site as site_module
from shared.secure_sum.masks import WORD, add_masks
from shared.secure_sum.messages import Masked, pack_roster
from tests.shared.secure_sum.attempts import Attempt, attempt, plain_sum, words

FALSE_ALARM = 1e-9  # of one statistical test


def run(here: Attempt, inputs: dict[str, NDArray[np.uint64]]) -> tuple[NDArray[np.int64], list[bytes], dict[str, Any]]:
    """Return what the coordinator opened, all messages, and what the coordinator held before the last input came."""
    found = here.coordinator()
    sent = []
    for name in here.names:
        ready = here.sites[name].ready()
        sent.append(ready.to_bytes())
        found.take_ready(type(ready).from_bytes(sent[-1]))
    roster = found.close()
    sent.append(pack_roster(roster))
    state: dict[str, Any] = {}
    for name in here.names:
        masked = here.sites[name].masked(inputs[name], here.accept(name, roster))
        sent.append(masked.to_bytes())
        state = {key: value for key, value in vars(found).items() if key != "_key_of"}
        state = pickle.loads(pickle.dumps(state))  # noqa: S301
        found.take_masked(Masked.from_bytes(sent[-1]))
    return found.open(), sent, state


@pytest.mark.parametrize("count", [2, 3, 8, 20])
def test_the_sum_is_the_plain_sum(count: int) -> None:
    here = attempt(count, num_words=1000)
    inputs = here.inputs()
    assert (run(here, inputs)[0] == plain_sum(inputs.values())).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=3, max_size=3), min_size=2, max_size=5))
def test_signed_inputs_add_up_as_long_as_the_sum_fits(rows: list[list[int]]) -> None:
    here = attempt(len(rows), num_words=3)
    inputs = {name: np.array(row, np.int64).view(np.uint64) for name, row in zip(here.names, rows, strict=True)}
    totals = [sum(column) for column in zip(*rows, strict=True)]
    opened = run(here, inputs)[0]
    for total, found in zip(totals, opened, strict=True):
        assert (int(found) - total) % 2**64 == 0
        if -(2**63) <= total < 2**63:
            assert int(found) == total


def test_the_extremes_do_not_wrap_where_the_sum_fits() -> None:
    here = attempt(4, num_words=2)
    rows = [[2**62 - 1, -(2**62)], [2**62, -(2**62)], [0, 0], [0, 0]]
    inputs = {name: np.array(row, np.int64).view(np.uint64) for name, row in zip(here.names, rows, strict=True)}
    assert run(here, inputs)[0].tolist() == [2**63 - 1, -(2**63)]


# --- what is seen short of the sum ---


def chi_square(data: bytes) -> float:
    """Return the smallest p-value, times their number, of: all bytes, and the bytes at each place of a word, uniform."""
    values = np.frombuffer(data, np.uint8)
    rows = [values, *values.reshape(-1, 8).T]
    return float(min(stats.chisquare(np.bincount(row, minlength=256)).pvalue for row in rows) * len(rows))


def views(masked: Sequence[Masked]) -> list[bytes]:
    """Return what a coordinator can make of masked inputs short of all: the sum of every proper subset, every difference."""
    rows = [np.frombuffer(one.words, WORD) for one in masked]
    subsets = (chosen for size in range(1, len(rows)) for chosen in itertools.combinations(rows, size))
    found = [np.sum(chosen, axis=0, dtype=np.uint64).tobytes() for chosen in subsets]
    return found + [(a - b).tobytes() for a, b in itertools.combinations(rows, 2)]


def small_inputs(here: Attempt) -> dict[str, NDArray[np.uint64]]:
    """Inputs as they are in a round: near zero, so that high bytes are all zeros or all ones."""
    rng = np.random.default_rng(1)
    return {name: rng.integers(-1000, 1000, here.num_words).view(np.uint64) for name in here.names}


def check_uniform(here: Attempt) -> None:
    """Assert that nothing short of all masked inputs is told from uniform words."""
    masked = list(here.masked(small_inputs(here)).values())
    found = views(masked)
    assert min(chi_square(data) for data in found) * len(found) > FALSE_ALARM


@pytest.mark.parametrize("count", [2, 3, 8])
def test_all_but_one_masked_input_look_uniform(count: int) -> None:
    check_uniform(attempt(count, num_words=20_000))


def test_the_sum_itself_does_not() -> None:
    here = attempt(3, num_words=20_000)
    opened = run(here, small_inputs(here))[0]
    assert chi_square(opened.tobytes()) < FALSE_ALARM


def no_masks(values: NDArray[np.uint64], **_: object) -> None:
    """Plants: nothing is added."""


def masks_of_32_bits(values: NDArray[np.uint64], *, plus: list[bytes], minus: list[bytes]) -> None:
    """Plants: words of 32 bits, whose sums are not uniform modulo 2^64."""
    for sign, keys in ((1, plus), (-1, minus)):
        for key in keys:
            stream = np.zeros(len(values), WORD)
            add_masks(stream, plus=[key], minus=[])
            values += np.uint64(sign % 2**64) * (stream >> np.uint64(32))


def one_mask_for_all(values: NDArray[np.uint64], *, plus: list[bytes], minus: list[bytes]) -> None:
    """Plants: a key that does not depend on the pair, so that what the difference of two inputs is shows."""
    add_masks(values, plus=[bytes(32)] * len(plus), minus=[bytes(32)] * len(minus))


def masks_of_one_sign(values: NDArray[np.uint64], *, plus: list[bytes], minus: list[bytes]) -> None:
    """Plants: added by both of a pair."""
    add_masks(values, plus=[*plus, *minus], minus=[])


@pytest.mark.parametrize("planted", [no_masks, masks_of_32_bits, one_mask_for_all])
def test_masks_that_do_not_hide_are_found(planted: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_module, "add_masks", planted)
    with pytest.raises(AssertionError):
        check_uniform(attempt(4, num_words=20_000))


def test_masks_that_do_not_cancel_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_module, "add_masks", masks_of_one_sign)
    here = attempt(3, num_words=10)
    inputs = here.inputs()
    assert (run(here, inputs)[0] != plain_sum(inputs.values())).all()


# --- a marker ---


def check_marker_nowhere(here: Attempt) -> None:
    """Plant words and look for each of them, and for all secrets, in all messages and in what the coordinator holds."""
    inputs = {name: words(here.num_words) for name in here.names}
    private = [here.sites[name]._secret.private_bytes_raw() for name in here.names]  # type: ignore[union-attr]
    for name in here.names:
        here.accept(name, here.roster())
    mask_keys = [key for name in here.names for keys in here.sites[name]._mask_keys or () for key in keys]
    assert len(mask_keys) == len(here.names) * (len(here.names) - 1)
    _, sent, state = run(here, inputs)
    seen = b"".join(sent) + pickle.dumps(state)
    markers = [*private, *mask_keys]
    for row in (*inputs.values(), sum(inputs.values(), -inputs[here.names[-1]])):
        markers += [word.tobytes() for word in row]
        markers += [word.tobytes()[::-1] for word in row]
    assert not [marker for marker in markers if marker in seen]
    assert state["_sum"].tobytes() in seen  # what is held is seen there


def test_neither_an_input_nor_a_secret_is_in_what_the_coordinator_sees() -> None:
    for count in (2, 3, 5):
        check_marker_nowhere(attempt(count, num_words=50))


def leaks_one_word(values: NDArray[np.uint64], *, plus: list[bytes], minus: list[bytes]) -> None:
    """Plants: the last word is left as it is."""
    add_masks(values[:-1], plus=plus, minus=minus)


def leaks_a_key(values: NDArray[np.uint64], *, plus: list[bytes], minus: list[bytes]) -> None:
    """Plants: a mask key among the words."""
    add_masks(values, plus=plus, minus=minus)
    values[:4] = np.frombuffer([*plus, *minus][0], WORD)


@pytest.mark.parametrize("planted", [leaks_one_word, leaks_a_key, no_masks])
def test_a_marker_that_is_sent_is_found(planted: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_module, "add_masks", planted)
    with pytest.raises(AssertionError):
        check_marker_nowhere(attempt(3, num_words=50))
