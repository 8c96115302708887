"""Whatever rosters a coordinator shows, nothing but one roster's full honest sum opens: all ways with five sites, exactly.

Masks are formal here: one variable for each pair of sites and context, which the first of the pair adds and the second subtracts.
That is what mask keys are if X25519, HKDF and AES-256 are what they should be; that the code adds and subtracts so is shown by
running it on a sample of the ways. Colluders know the masks that they share, so these do not count.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shared.secure_sum import site as site_module
from shared.secure_sum.masks import WORD, add_masks, agree, mask_key
from shared.secure_sum.messages import Roster, context
from tests.shared.secure_sum.attempts import attempt, words


class Shown(NamedTuple):
    """A roster as a context: who is on it, and which of several that differ in bytes only."""

    members: frozenset[int]
    variant: int = 0


Way = Mapping[int, Shown]
"""What each honest site that sent a masked input was shown."""


def masks_of(site: int, shown: Shown, colluders: frozenset[int]) -> dict[object, int]:
    """Return the masks in a site's input that the coordinator does not know, as coefficients of formal variables."""
    return {
        (min(site, other), max(site, other), shown): 1 if site < other else -1
        for other in shown.members - {site} - colluders
    }


def cancels(way: Way, subset: Sequence[int], colluders: frozenset[int]) -> bool:
    """Return whether the masks of these inputs add up to nothing, by the algebra."""
    total: dict[object, int] = {}
    for site in subset:
        for mask, sign in masks_of(site, way[site], colluders).items():
            total[mask] = total.get(mask, 0) + sign
    return not any(total.values())


def full_sums(way: Way, colluders: frozenset[int]) -> list[frozenset[int]]:
    """Return the honest sites of each roster that all its honest sites were shown: what may open, by the claim."""
    found = []
    for shown in set(way.values()):
        honest = shown.members - colluders
        if all(way.get(site) == shown for site in honest):
            found.append(honest)
    return found


def subsets(sites: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(sites, size) for size in range(1, len(sites) + 1))


def is_union(subset: Sequence[int], sums: Sequence[frozenset[int]]) -> bool:
    """Return whether a subset is made of whole sums and nothing else."""
    inside = [one for one in sums if one <= set(subset)]
    return sum(len(one) for one in inside) == len(subset)


class Ways:
    """All ways to show `num_sites` sites rosters: each honest site one of its own, at least `min_sites` long, or none.

    Args:
        colluders: sites that the coordinator speaks for.
        variants: rosters of the same sites that differ in bytes.
    """

    def __init__(self, num_sites: int, min_sites: int, colluders: Sequence[int] = (), variants: int = 1) -> None:
        self.colluders = frozenset(colluders)
        self.honest = [site for site in range(num_sites) if site not in self.colluders]
        self.rosters = [
            Shown(frozenset(members), variant)
            for size in range(min_sites, num_sites + 1)
            for members in itertools.combinations(range(num_sites), size)
            for variant in range(variants)
        ]
        self.options = [[shown for shown in self.rosters if site in shown.members] for site in self.honest]
        self.masks_of = masks_of

    @property
    def count(self) -> int:
        """How many there are in which at least one site is shown a roster."""
        return int(np.prod([len(options) + 1 for options in self.options])) - 1

    @functools.cached_property
    def rows(self) -> list[NDArray[np.int8]]:
        """For each honest site, [its rosters, masks]: the coefficients in what it sends."""
        sent = [
            [self.masks_of(s, o, self.colluders) for o in options]
            for s, options in zip(self.honest, self.options, strict=True)
        ]
        place = {
            mask: index for index, mask in enumerate(sorted({m for rows in sent for row in rows for m in row}, key=str))
        }
        found = []
        for rows in sent:
            dense = np.zeros((len(rows), len(place)), np.int8)
            for row, masks in enumerate(rows):
                for mask, sign in masks.items():
                    dense[row, place[mask]] = sign
            found.append(dense)
        return found

    def grid(self, subset: Sequence[int], which: int, values: NDArray[np.generic]) -> NDArray[np.generic]:
        """Return values by roster of one site of a subset as an array over all ways to show that subset rosters."""
        axis = tuple(subset).index(which)
        return values.reshape([-1 if place == axis else 1 for place in range(len(subset))] + list(values.shape[1:]))

    def cancelling(self, subset: Sequence[int]) -> NDArray[np.bool_]:
        """Return where the masks of some honest sites' inputs cancel, over the ways to show those sites rosters: the algebra.

        It does not depend on what the other sites were shown.
        """
        total = sum(self.grid(subset, which, self.rows[which]) for which in subset)
        return ~np.any(total, axis=-1)

    def claimed(self, subset: Sequence[int]) -> NDArray[np.bool_]:
        """Return the same by the claim: where the sites of each roster that is shown are all in the subset and were shown it."""
        covered = {which: np.zeros([len(self.options[w]) for w in subset], bool) for which in subset}
        for shown in self.rosters:
            members = [which for which, site in enumerate(self.honest) if site in shown.members]
            if not members or not set(members) <= set(subset):
                continue
            holds = [np.array([option == shown for option in self.options[which]]) for which in members]
            whole = functools.reduce(
                np.logical_and, (self.grid(subset, w, held) for w, held in zip(members, holds, strict=True))
            )
            for which in members:
                covered[which] |= whole
        return functools.reduce(np.logical_and, covered.values())

    def check_subsets(self) -> None:
        """Assert for every way and every subset of the inputs that their masks cancel exactly where the claim says."""
        for subset in subsets(range(len(self.honest))):
            assert (self.cancelling(subset) == self.claimed(subset)).all(), subset

    def check_combinations(self) -> Counter[int]:
        """Assert for every way that no linear combination of inputs opens anything but full sums; count ways by full sums.

        Each full sum cancels (`check_subsets`), and two have no site in common. If the combinations that cancel have as many
        dimensions as there are full sums, these are all. Every mask stands in two rows at most, once added and once subtracted,
        so the rows are totally unimodular (Heller and Tompkins 1956), and the same holds modulo 2^64.
        """
        sizes = [len(options) + 1 for options in self.options]  # the last: shown none
        places = np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes))
        num_honest = len(self.honest)
        products = np.zeros((places.shape[1], num_honest, num_honest))
        for i, j in itertools.product(range(num_honest), repeat=2):
            table = np.zeros((sizes[i], sizes[j]))
            table[:-1, :-1] = self.rows[i].astype(int) @ self.rows[j].astype(int).T
            if i == j:
                table[-1, -1] = 1  # no input: not to be combined
            products[:, i, j] = table[places[i], places[j]]
        # Of such integer matrices the eigenvalues other than zero are at least 1 / trace^4, so rounding does not matter.
        dimensions = (np.linalg.eigvalsh(products) < 1e-8).sum(axis=1)
        full = np.zeros(places.shape[1], int)
        for shown in self.rosters:
            holds = [
                places[which] == self.options[which].index(shown)
                for which, site in enumerate(self.honest)
                if site in shown.members
            ]
            if holds:
                full += np.logical_and.reduce(holds)
        assert (dimensions == full).all()
        return Counter(full.tolist())


def check_columns(ways: Ways) -> None:
    """Assert that each mask is added by one site of its pair, under one context, and subtracted by the other."""
    for column in range(ways.rows[0].shape[1]):
        signs = sorted(int(sign) for rows in ways.rows for sign in rows[:, column] if sign)
        assert signs in ([-1, 1],)


FIVE_HONEST = [(3, ()), (4, ())]
ONE_COLLUDES = [(3, (site,)) for site in range(5)]
TWO_COLLUDE = [(4, pair) for pair in itertools.combinations(range(5), 2)]


@pytest.mark.parametrize(("min_sites", "colluders"), [*FIVE_HONEST, *ONE_COLLUDES, *TWO_COLLUDE])
def test_nothing_but_one_rosters_full_honest_sum_opens(min_sites: int, colluders: tuple[int, ...]) -> None:
    ways = Ways(5, min_sites, colluders)
    check_columns(ways)
    ways.check_subsets()
    ways.check_combinations()


@pytest.mark.parametrize("colluder", [0, 2, 4])
def test_nor_with_rosters_of_the_same_sites_that_differ_in_a_byte(colluder: int) -> None:
    # A colluder signs as many keys as it likes; and of one ECDSA signature anybody makes a second.
    ways = Ways(5, 3, (colluder,), variants=2)
    assert ways.count == 23**4 - 1
    ways.check_subsets()
    ways.check_combinations()


def test_how_many_ways_there_are_and_in_how_many_something_opens() -> None:
    """Each of five sites is shown one of 11 rosters of three to five with itself on it, or none."""
    assert [len(options) for options in Ways(5, 3).options] == [11] * 5
    # All honest: one roster of five; of four, five times, and the fifth site whatever it is shown; of three, ten times.
    assert Ways(5, 3).count == 12**5 - 1 == 248_831
    assert Ways(5, 3).check_combinations() == {0: 12**5 - 1501, 1: 1 + 5 * 12 + 10 * 12**2}
    # One of the five is with the coordinator. Rosters with it: of five, of four (four times), of three (six times); without: of
    # four, of three (four times). In three ways two sums open: the honest in two pairs, the colluder in both rosters.
    assert Ways(5, 3, (4,)).count == 12**4 - 1 == 20_735
    opening = 1 + 4 * 12 + 6 * 12**2 + 1 + 4 * 12
    found = Ways(5, 3, (4,)).check_combinations()
    assert found == {0: 12**4 - (opening - 3), 1: opening - 6, 2: 3}
    # Two are: each honest site has five rosters of four or five, or none.
    assert Ways(5, 4, (3, 4)).count == 6**3 - 1 == 215


@pytest.mark.parametrize(("num_sites", "min_sites", "max_colluding"), [(4, 2, 0), (5, 3, 1), (5, 4, 2), (6, 4, 2)])
def test_what_opens_holds_min_sites_less_the_colluders(num_sites: int, min_sites: int, max_colluding: int) -> None:
    sizes = {
        len(shown.members - set(colluders))
        for colluders in itertools.combinations(range(num_sites), max_colluding)
        for shown in Ways(num_sites, min_sites, colluders).rosters
    }
    assert min(sizes) == min_sites - max_colluding >= 2


def test_with_one_colluder_too_many_a_site_is_alone() -> None:
    """What the checks look for can be: a roster of two colluders and one honest site has no mask that they do not know."""
    ways = Ways(5, 3, (3, 4))
    assert Shown(frozenset({0, 3, 4})) in ways.rosters
    assert ways.cancelling((0,)).any()


def test_the_model_is_what_the_claim_says_site_by_site() -> None:
    """The arrays above against plain sets and dicts, for all ways with four honest sites."""
    ways = Ways(5, 3, (2,))
    for subset in subsets(range(4)):
        found = ways.cancelling(subset)
        for places in itertools.product(*(range(len(ways.options[which])) for which in subset)):
            way = {ways.honest[w]: ways.options[w][place] for w, place in zip(subset, places, strict=True)}
            assert found[places] == cancels(way, tuple(way), ways.colluders)
            assert found[places] == is_union(tuple(way), full_sums(way, ways.colluders))


@pytest.mark.parametrize("fault", ["context", "pair", "sign"])
def test_masks_that_are_not_for_one_context_and_pair_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(site: int, shown: Shown, colluders: frozenset[int]) -> dict[object, int]:
        masks = masks_of(site, shown, colluders)
        if fault == "context":
            return {mask[:2]: sign for mask, sign in masks.items()}
        if fault == "pair":
            return {(shown, "all"): sum(masks.values())}
        return dict.fromkeys(masks, 1)

    ways = Ways(5, 3)
    monkeypatch.setattr(ways, "masks_of", planted)
    with pytest.raises(AssertionError):
        ways.check_subsets()
    with pytest.raises(AssertionError):
        ways.check_combinations()


# --- the code does what the model says ---


def residuals(way: Way, num_sites: int, colluders: frozenset[int]) -> dict[tuple[int, ...], bool]:
    """Run the real sites; return for every subset of their inputs whether the masks cancel, but for those of colluders."""
    here = attempt(num_sites, num_words=2)
    readies = [here.sites[name].ready() for name in here.names]
    secrets = {(site, 0): here.sites[here.names[site]]._secret for site in colluders}
    left: dict[int, NDArray[np.uint64]] = {}
    for site, shown in way.items():
        entries = list(readies)
        for colluder in colluders & shown.members:
            if (colluder, shown.variant) not in secrets:
                secrets[colluder, shown.variant] = X25519PrivateKey.generate()
            own = secrets[colluder, shown.variant]
            assert own is not None
            changed = replace(readies[colluder], public_key=own.public_key().public_bytes_raw(), signature=b"")
            entries[colluder] = changed.signed_by(here.keys[here.names[colluder]])
        roster: Roster = tuple(entries[member] for member in sorted(shown.members))
        name, values = here.names[site], words(2)
        masked = here.sites[name].masked(values, here.accept(name, roster))
        rest = np.frombuffer(masked.words, WORD) - values
        for colluder in colluders & shown.members:  # what the colluder computes of the masks that it shares
            own, other = secrets[colluder, shown.variant], entries[site]
            assert own is not None
            secret = agree(own, other.public_key, name)
            party = (here.names[colluder], own.public_key().public_bytes_raw())
            key = [mask_key(secret, context(roster), party, (name, other.public_key))]
            add_masks(rest, plus=key if colluder < site else [], minus=[] if colluder < site else key)
        left[site] = rest
    return {
        subset: not np.sum([left[site] for site in subset], axis=0, dtype=np.uint64).any()
        for subset in subsets(sorted(left))
    }


def check_code(way: Way, num_sites: int, colluders: frozenset[int]) -> None:
    """Assert that the real masks cancel for the subsets that the model says."""
    for subset, cancelled in residuals(way, num_sites, colluders).items():
        assert cancelled == cancels(way, subset, colluders)
        assert cancelled == is_union(subset, full_sums(way, colluders))


def can_be_shown(ways: Ways) -> list[Shown]:
    """Return the rosters of which there can be real ones: here, only colluders make a second one of the same sites."""
    return [shown for shown in ways.rosters if not shown.variant or shown.members & ways.colluders]


def sampled(ways: Ways, count: int, seed: int) -> Iterator[Way]:
    """Return some ways, half of them with few different rosters, so that whole sums are among them."""
    chance = random.Random(seed)
    for number in range(count):
        few = chance.sample(can_be_shown(ways), 2) if number % 2 else can_be_shown(ways)
        way = {}
        for site, options in zip(ways.honest, ways.options, strict=True):
            choice = [shown for shown in options if shown in few]
            if choice and (number % 2 or chance.random() < 0.9):
                way[site] = chance.choice(choice)
        if way:
            yield way


@pytest.mark.parametrize(
    ("min_sites", "colluders", "variants"), [(3, (), 1), (3, (2,), 2), (3, (4,), 2), (4, (0, 3), 2), (3, (1, 3), 1)]
)
def test_the_code_is_what_the_model_says(min_sites: int, colluders: tuple[int, ...], variants: int) -> None:
    ways = Ways(5, min_sites, colluders, variants)
    seen = Counter()
    for way in sampled(ways, 60, seed=5):
        check_code(way, 5, ways.colluders)
        seen[len(full_sums(way, ways.colluders))] += 1
    assert seen[0] >= 10
    assert seen[1] + seen[2] >= 10


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_code_is_what_the_model_says_of_any_rosters(data: st.DataObject) -> None:
    num_sites = data.draw(st.integers(3, 7))
    num_colluding = data.draw(st.integers(0, num_sites - 2))
    ways = Ways(num_sites, num_colluding + 2, range(num_colluding), variants=2 if num_colluding else 1)
    few = data.draw(st.lists(st.sampled_from(can_be_shown(ways)), min_size=1, max_size=3))
    way = {}
    for site, options in zip(ways.honest, ways.options, strict=True):
        choice = [shown for shown in few if shown in options]
        shown = data.draw(st.sampled_from([None, *choice]))
        if shown is not None:
            way[site] = shown
    check_code(way, num_sites, ways.colluders)


# 0 and 1, 1 and 3, 3 and 2, 2 and 0 see each other, each under another roster.
IN_A_RING = {0: {0, 1, 2}, 1: {0, 1, 3}, 2: {0, 2, 3}, 3: {1, 2, 3}}


def without_context(secret: bytes, _: bytes, first: tuple[str, bytes], second: tuple[str, bytes]) -> bytes:
    return mask_key(secret, bytes(32), first, second)


def without_pair(_: bytes, ctx: bytes, *parties: tuple[str, bytes]) -> bytes:
    return mask_key(bytes(32), ctx, ("a", b""), ("b", b""))


@pytest.mark.parametrize(
    ("planted", "members"), [(without_context, IN_A_RING), (without_pair, {site: set(range(4)) for site in range(4)})]
)
def test_a_mask_key_that_is_not_for_one_context_and_pair_is_found(
    planted: Callable[..., bytes], members: dict[int, set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    way = {site: Shown(frozenset(names)) for site, names in members.items()}
    check_code(way, 4, frozenset())
    monkeypatch.setattr(site_module, "mask_key", planted)
    with pytest.raises(AssertionError):
        check_code(way, 4, frozenset())
