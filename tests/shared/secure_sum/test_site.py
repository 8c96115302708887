"""What a site refuses of a roster, and that one input leaves it, under one."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from shared.errors import PrivacyError, TrustError
from shared.secure_sum import site as site_module
from shared.secure_sum.masks import WORD, add_masks, agree, mask_key
from shared.secure_sum.messages import MOST_SITES, MOST_WORDS, Ready, Roster, context
from shared.secure_sum.site import SecureSite
from tests.shared.secure_sum.attempts import SAME, Attempt, attempt, new_key, site, words

ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256
A, B, C, D = "site-000", "site-001", "site-002", "site-003"


def resigned(here: Attempt, name: str, **changes: Any) -> Ready:
    """Return what a site would have said of other fields, with its own signature."""
    return replace(here.sites[name].ready(), **{"signature": b"", **changes}).signed_by(here.keys[name])


def with_entry(roster: Roster, entry: Ready) -> Roster:
    """Return the roster with the entry instead of that of its name."""
    return tuple(entry if entry.site == other.site else other for other in roster)


def check_refused(here: Attempt, roster: Roster, match: str, **settings: Any) -> None:
    """Assert that the first site refuses a roster, masks nothing, and still takes a good one."""
    own = here.sites[A]
    with pytest.raises(TrustError, match=match):
        own.accept(roster, **{"min_sites": here.min_sites, "key_of": here.key_of, **settings})
    with pytest.raises(TrustError, match="has accepted no roster"):
        own.masked(words(here.num_words), context(roster))
    here.accept(A, here.roster())


# --- ready ---


def test_ready_is_said_once_and_signed() -> None:
    here = attempt(2)
    ready = here.sites[A].ready()
    assert here.sites[A].ready() is ready
    ready.verify(here.keys[A].public_key())
    assert (ready.site, ready.declared_records, ready.certificate) == (A, 64, b"")
    assert {name: getattr(ready, name) for name in SAME} == SAME


def test_every_attempt_has_a_key_of_its_own() -> None:
    key = new_key()
    assert len({site(A, key, attempt=number // 2).ready().public_key for number in range(20)}) == 20


@pytest.mark.parametrize(
    "changes", [{"site": "a b"}, {"declared_records": 0}, {"attempt": -1}, {"certificate": bytes(5000)}]
)
def test_a_site_out_of_bounds_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(TrustError, match="cannot be read"):
        SecureSite(**{**SAME, "site": A, "declared_records": 64, "key": new_key(), "certificate": b"", **changes})


# --- the roster ---


def test_an_honest_roster_is_accepted_again_and_again() -> None:
    here = attempt(4)
    roster = here.roster()
    assert {here.accept(name, roster) for name in here.names for _ in range(2)} == {context(roster)}


def test_a_roster_below_min_sites_is_refused() -> None:
    here = attempt(4, min_sites=3)
    check_refused(here, here.roster([A, B]), "the roster has 2 sites, expected 3 to 1000")
    check_refused(attempt(3), (), "the roster has 0 sites")
    with pytest.raises(TrustError, match="has 1 sites"):
        here.sites[A].accept(here.roster([A]), min_sites=2, key_of=here.key_of)
    for least in (1, 0, -1):
        with pytest.raises(PrivacyError, match="hides nothing; expected min_sites of two or more"):
            here.sites[A].accept(here.roster([A]), min_sites=least, key_of=here.key_of)


def test_a_roster_of_too_many_is_refused() -> None:
    here = attempt(3)
    others = tuple(replace(here.sites[B].ready(), site=f"z-{index:04}") for index in range(MOST_SITES))
    check_refused(here, (here.sites[A].ready(), *others), "the roster has 1001 sites")


def test_a_roster_of_the_most_sites_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_module, "MOST_SITES", 3)
    here = attempt(4)
    with pytest.raises(TrustError, match="the roster has 4 sites, expected 2 to 3"):
        here.accept(A, here.roster())
    here.accept(A, here.roster([A, B, C]))


def test_names_come_once_and_in_order() -> None:
    here = attempt(4)
    roster = here.roster()
    twice = resigned(here, B, public_key=X25519PrivateKey.generate().public_key().public_bytes_raw())
    for changed in (
        roster[::-1],
        (roster[1], roster[0], *roster[2:]),
        (*roster, roster[-1]),
        (roster[0], *roster),
        (roster[0], roster[1], twice, *roster[2:]),
    ):
        check_refused(here, changed, "not in the order of its names, or has one of them twice")


@pytest.mark.parametrize(
    ("name", "value"), [("job_sha256", "2" * 64), ("round_number", 4), ("attempt", 2), ("adapter_sha256", "2" * 64)]
)
def test_another_job_round_attempt_or_adapter_of_one_site_is_refused(name: str, value: Any) -> None:
    # As one site says it that was asked with something else, or said it in another attempt: a replay.
    here = attempt(4)
    changed = with_entry(here.roster(), resigned(here, C, **{name: value}))
    check_refused(here, changed, f"the ready message of {C} has the {name} {value}, expected {SAME[name]}")


def test_an_attempt_of_yesterday_is_refused_as_a_whole() -> None:
    here, old = attempt(3), attempt(3)
    for name in here.names:
        old.keys[name] = here.keys[name]
        old.sites[name] = site(name, here.keys[name], attempt=0)
    check_refused(here, old.roster(), "has the attempt 0, expected 1")


@pytest.mark.parametrize("field", ["declared_records", "public_key", "certificate", "signature"])
def test_the_own_entry_is_there_byte_for_byte(field: str) -> None:
    here = attempt(4)
    roster, own = here.roster(), here.sites[A].ready()
    r, s = decode_dss_signature(own.signature)
    value = {
        "declared_records": 65,
        "public_key": X25519PrivateKey.generate().public_key().public_bytes_raw(),
        "certificate": b"another",
        "signature": encode_dss_signature(r, ORDER - s),  # as good a signature of the same key
    }[field]
    altered = replace(own, **{field: value})
    if field == "signature":
        altered.verify(here.keys[A].public_key())
    else:
        altered = altered.signed_by(here.keys[A])
    check_refused(here, with_entry(roster, altered), f"the roster does not have {A} as {A} signed it")
    check_refused(here, roster[1:], f"the roster does not have {A} as {A} signed it")


def test_a_key_stands_for_one_site() -> None:
    here = attempt(4)
    for copied in (A, B):
        changed = with_entry(here.roster(), resigned(here, C, public_key=here.sites[copied].ready().public_key))
        check_refused(here, changed, "two sites of the roster have the same X25519 key")


def test_a_certified_key_stands_for_one_site() -> None:
    here = attempt(4)
    for copied in (A, B):
        genuine, here.keys[C] = here.keys[C], here.keys[copied]
        changed = with_entry(here.roster(), resigned(here, C))
        with pytest.raises(TrustError, match="two sites of the roster have certificates of the same key"):
            here.accept(A, changed)
        here.keys[C] = genuine
    here.accept(A, here.roster())


@pytest.mark.parametrize("field", ["declared_records", "public_key", "certificate"])
def test_an_entry_that_was_changed_on_the_way_is_refused(field: str) -> None:
    here = attempt(4)
    value = {"declared_records": 65, "public_key": bytes(range(32)), "certificate": b"another"}[field]
    for name in (B, D):
        changed = with_entry(here.roster(), replace(here.sites[name].ready(), **{field: value}))
        check_refused(here, changed, f"the ready message of {name} is not signed with the key of its certificate")


def test_an_entry_in_another_sites_name_is_refused() -> None:
    here = attempt(4)
    changed = with_entry(here.roster(), replace(here.sites[B].ready(), site=C))
    check_refused(here, changed, f"the ready message of {C} is not signed|the same X25519 key")
    forged = replace(here.sites[C].ready(), declared_records=65).signed_by(here.keys[B])
    check_refused(here, with_entry(here.roster(), forged), f"the ready message of {C} is not signed")


@pytest.mark.parametrize("reason", ["revoked", "expired", "not signed by this CA", "not the pinned one"])
def test_what_key_of_refuses_stops_everything_before_a_mask_is_made(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chain, revocation, time and pinned fingerprints are the caller's; here, a second certificate for a pinned name."""
    here = attempt(4)
    pinned, second = here.keys[D].public_key(), new_key()
    here.keys[D] = second
    forged = resigned(here, D)
    forged.verify(second.public_key())  # genuine under the second certificate

    def key_of(entry: Ready) -> ec.EllipticCurvePublicKey:
        key = here.key_of(entry)
        if entry.site == D and key != pinned:
            raise TrustError(f"the certificate of {D} is {reason}.")
        return key

    agreed: list[str] = []
    monkeypatch.setattr(site_module, "agree", lambda own, raw, name: agreed.append(name) or agree(own, raw, name))
    with pytest.raises(TrustError, match=f"the certificate of {D} is {reason}"):
        here.sites[A].accept(with_entry(here.roster(), forged), min_sites=2, key_of=key_of)
    assert agreed == []
    assert here.sites[A]._context is None
    with pytest.raises(TrustError, match="has accepted no roster"):
        here.sites[A].masked(words(5), context(here.roster()))
    here.accept(A, here.roster([A, B, C]))
    assert agreed == [B, C]


def test_key_of_is_asked_of_every_other_site_each_time() -> None:
    here, asked = attempt(4), []

    def key_of(entry: Ready) -> ec.EllipticCurvePublicKey:
        asked.append(entry.site)
        return here.key_of(entry)

    for _ in range(2):
        here.sites[B].accept(here.roster(), min_sites=2, key_of=key_of)
    assert asked == [A, C, D] * 2


@pytest.mark.parametrize("low", [0, 1, 2**255 - 20])
def test_a_key_of_small_order_is_refused_and_nothing_is_bound(low: int) -> None:
    here = attempt(4)
    changed = with_entry(here.roster(), resigned(here, D, public_key=low.to_bytes(32, "little")))
    check_refused(here, changed, f"the X25519 key of {D} gives a secret that everybody knows")


# --- one roster ---


def test_of_two_rosters_for_one_key_the_second_is_refused() -> None:
    here = attempt(4)
    full = here.roster()
    r, s = decode_dss_signature(full[1].signature)
    others = {
        "subset": here.roster([A, B, C]),
        "another size": with_entry(full, resigned(here, B, declared_records=65)),
        "another key of a colluder": with_entry(full, resigned(here, B, public_key=bytes(range(32)))),
        "another signature": with_entry(full, replace(full[1], signature=encode_dss_signature(r, ORDER - s))),
    }
    ctx = here.accept(A, full)
    for other in others.values():
        with pytest.raises(TrustError, match=f"{A} has accepted another roster in attempt 1"):
            here.accept(A, other)
        with pytest.raises(TrustError, match="has accepted no roster of the context"):
            here.sites[A].masked(words(5), context(other))
    first = here.sites[A].masked(values := words(5), ctx)
    for other in others.values():
        with pytest.raises(TrustError, match="has accepted another roster"):
            here.accept(A, other)
        with pytest.raises(TrustError, match="has accepted no roster of the context"):
            here.sites[A].masked(values, context(other))
    assert here.accept(A, full) == ctx
    assert here.sites[A].masked(values, ctx) == first


def test_a_superset_after_a_subset_is_refused() -> None:
    here = attempt(4)
    here.accept(A, here.roster([A, B, C]))
    with pytest.raises(TrustError, match="has accepted another roster"):
        here.accept(A, here.roster())


def test_nothing_is_masked_before_a_roster_is_accepted() -> None:
    here = attempt(2)
    for ctx in (context(here.roster()), b"", bytes(32)):
        with pytest.raises(TrustError, match="has accepted no roster"):
            here.sites[A].masked(words(5), ctx)


# --- one input ---


def test_a_masked_input_is_the_input_and_the_masks_of_all_pairs() -> None:
    here = attempt(3)
    own, roster, values = here.sites[B], here.roster(), words(5)
    secret, before = own._secret, values.copy()
    assert secret is not None
    ctx = here.accept(B, roster)
    masked = own.masked(values, ctx)
    assert (values == before).all()
    masked.verify(here.keys[B].public_key(), own.ready())
    assert (masked.site, masked.context) == (B, ctx)
    expected = values.astype(WORD)
    parties = {entry.site: (entry.site, entry.public_key) for entry in roster}
    keys = {n: mask_key(agree(secret, parties[n][1], n), ctx, parties[B], parties[n]) for n in (A, C)}
    add_masks(expected, plus=[keys[C]], minus=[keys[A]])  # the first of a pair adds
    assert masked.words == expected.tobytes()


def test_masked_twice_is_the_same_bytes_or_refused() -> None:
    here = attempt(3)
    ctx, values = here.accept(A, here.roster()), words(5)
    first = here.sites[A].masked(values, ctx)
    assert here.sites[A].masked(values.copy(), ctx).to_bytes() == first.to_bytes()
    for place in range(5):
        other = values.copy()
        other[place] ^= np.uint64(1)
        with pytest.raises(PrivacyError, match="another input was masked in this attempt"):
            here.sites[A].masked(other, ctx)
    with pytest.raises(PrivacyError, match="another input was masked"):
        here.sites[A].masked(values[:4], ctx)
    assert here.sites[A].masked(values, ctx) == first


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(0, np.uint64),
        np.zeros((2, 2), np.uint64),
        np.zeros(3, np.int64),
        np.zeros(3, np.uint32),
        np.zeros(3),
        np.broadcast_to(np.uint64(0), MOST_WORDS + 1),
    ],
)
def test_what_is_no_input_is_refused_and_uses_up_nothing(values: Any) -> None:
    here = attempt(2)
    ctx = here.accept(A, here.roster())
    with pytest.raises(PrivacyError, match="an input of the secure sum is 1 to"):
        here.sites[A].masked(values, ctx)
    here.sites[A].masked(words(5), ctx)


def test_one_word_is_enough_and_there_is_a_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_module, "MOST_WORDS", 3)
    for count in (1, 3):
        here = attempt(2)
        here.sites[A].masked(words(count), here.accept(A, here.roster()))
    here = attempt(2)
    ctx = here.accept(A, here.roster())
    with pytest.raises(PrivacyError, match="is 1 to 3 unsigned words"):
        here.sites[A].masked(words(4), ctx)


def test_strided_words_are_the_same_words() -> None:
    here = attempt(2)
    values = words(10)
    ctx = here.accept(A, here.roster())
    masked = here.sites[A].masked(values[::2], ctx)
    assert here.sites[A].masked(values[::2].copy(), ctx) == masked


def test_masking_that_breaks_off_is_not_taken_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # Else a second input could meet the masks of the first.
    here = attempt(2)
    ctx = here.accept(A, here.roster())
    with monkeypatch.context() as patched:

        def broken(*_: object, **__: object) -> None:
            raise MemoryError

        patched.setattr(site_module, "add_masks", broken)
        with pytest.raises(MemoryError):
            here.sites[A].masked(words(5), ctx)
    with pytest.raises(PrivacyError, match="masking was broken off; this site has dropped out"):
        here.sites[A].masked(words(5), ctx)


# --- secrets ---


def secrets_of(found: SecureSite) -> list[bytes]:
    """Return every secret that a site holds: of X25519, and mask keys."""
    private = [] if found._secret is None else [found._secret.private_bytes_raw()]
    return private + [key for keys in found._mask_keys or () for key in keys]


def test_after_masking_no_secret_is_left() -> None:
    here = attempt(3)
    own = here.sites[A]
    (private,) = secrets_of(own)
    ctx = here.accept(A, here.roster())
    mask_keys = secrets_of(own)
    assert len(mask_keys) == 2
    assert private not in mask_keys
    own.masked(words(5), ctx)
    assert secrets_of(own) == []
    held = [value for name, value in vars(own).items() if name != "_key"]
    state = pickle.dumps(held)
    assert not any(isinstance(value, X25519PrivateKey) for value in held)
    assert not any(secret in state for secret in (private, *mask_keys))
    assert own.ready().public_key in state  # what is held is seen there


def test_a_site_in_an_attempt_cannot_be_copied() -> None:
    here = attempt(2)
    for _ in range(2):
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="a site in an attempt is in one place"):
                copied(here.sites[A])
        here.accept(A, here.roster())


def test_refusals_do_not_depend_on_the_input() -> None:
    """After masking as before: another input, the same refusals, word for word."""
    heard = []
    for value in (0, 2**64 - 1):
        here = attempt(3)
        here.sites[A].masked(np.full(5, value, np.uint64), here.accept(A, here.roster()))
        told = []
        for changed in (
            here.roster([A, B]),
            here.roster()[::-1],
            here.roster()[1:],
            with_entry(here.roster(), resigned(here, B, attempt=2)),
            with_entry(here.roster(), replace(here.sites[B].ready(), declared_records=65)),
        ):
            with pytest.raises(TrustError) as caught:
                here.accept(A, changed)
            told.append(str(caught.value))
        heard.append(told)
    assert heard[0] == heard[1]
