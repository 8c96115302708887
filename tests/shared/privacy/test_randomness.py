"""Randomness of a site: the generator itself, its distributions, and that nothing public reaches it."""

from __future__ import annotations

import hmac
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from client.training.trainer import LocalWork, train_local_rounds
from shared.errors import PrivacyError
from shared.job.compute import ComputeConfig
from shared.privacy import randomness as randomness_module
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import KeyStream, SiteRandomness
from shared.runtime.runtime import load_runtime

ALPHA = 1e-4
COUNT = 400_000


def stream(name: str = "test") -> KeyStream:
    return SiteRandomness.injected(name).stream("noise", round_number=1, step=0)


def chacha20_block(key: bytes, counter: int) -> bytes:
    """RFC 8439, section 2.3, with a nonce of zeros, written from the text of the standard."""

    def rotate(x: int, n: int) -> int:
        return (x << n | x >> (32 - n)) & 0xFFFFFFFF

    def quarter(s: list[int], a: int, b: int, c: int, d: int) -> None:
        for x, y, z, n in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            s[x] = (s[x] + s[y]) & 0xFFFFFFFF
            s[z] = rotate(s[z] ^ s[x], n)

    constants = [int.from_bytes(b"expand 32-byte k"[i : i + 4], "little") for i in range(0, 16, 4)]
    words = [int.from_bytes(key[i : i + 4], "little") for i in range(0, 32, 4)]
    start = [*constants, *words, counter, 0, 0, 0]
    state = list(start)
    for _ in range(10):
        for i in range(4):
            quarter(state, i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter(state, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return b"".join(((a + b) & 0xFFFFFFFF).to_bytes(4, "little") for a, b in zip(start, state, strict=True))


def test_stream_is_chacha20_of_rfc_8439() -> None:
    # Appendix A.1, test vectors 1 and 2: key and nonce of zeros, blocks 0 and 1.
    vector = (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    assert KeyStream(bytes(32)).uint64(16).tobytes().hex() == vector
    key = bytes(range(7, 39))
    found = KeyStream(key)
    # Read in uneven pieces, the stream neither repeats nor skips.
    pieces = b"".join(found.uint64(n).tobytes() for n in (1, 6, 2, 15))
    assert pieces == b"".join(chacha20_block(key, counter) for counter in range(3))


def test_uniforms_are_uniform() -> None:
    bits = stream("uniform").uint64(COUNT)
    assert stats.kstest(bits / 2.0**64, "uniform").pvalue > ALPHA
    ones = np.unpackbits(bits.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=0)  # each of the 64 positions
    assert (2 * stats.norm.sf(np.abs(ones - COUNT / 2) / np.sqrt(COUNT / 4)) > ALPHA / 64).all()


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_counts_are_exact(count: int) -> None:
    assert (
        stream().normal(count).shape == stream().uint64(count).shape == stream().bernoulli(count, 0.5).shape == (count,)
    )


def test_normals_are_standard_normal_and_wrong_scales_are_rejected() -> None:
    values = stream("normal").normal(COUNT)
    assert values.dtype == np.float64
    assert np.isfinite(values).all()
    assert stats.kstest(values, "norm").pvalue > ALPHA
    for wrong in (values * 1.02, values * 0.98, values + 0.02):
        assert stats.kstest(wrong, "norm").pvalue < ALPHA


@pytest.mark.parametrize("bound", [0.5, 1.0, 2.0, 3.0, 4.0])
def test_normal_tails_are_as_heavy_as_they_should_be(bound: float) -> None:
    values = stream("tails").normal(COUNT)
    for tail in (values > bound, values < -bound):
        assert stats.binomtest(int(tail.sum()), COUNT, stats.norm.sf(bound)).pvalue > ALPHA
    if 1 <= bound <= 3:
        wrong = int((0.97 * values > bound).sum() + (0.97 * values < -bound).sum())
        assert stats.binomtest(wrong, COUNT, 2 * stats.norm.sf(bound)).pvalue < ALPHA


@pytest.mark.parametrize("bit", range(11, 64))
def test_every_one_of_53_bits_reaches_radius_and_angle(monkeypatch: pytest.MonkeyPatch, bit: int) -> None:
    """Box and Muller on u in (0, 1] and v in [0, 1) of 53 bits each: coarser ones would cut the tails off at 6.66."""

    def normals(radius_bits: int, angle_bits: int) -> np.ndarray:
        bits = np.array([radius_bits, angle_bits], dtype=np.uint64)
        monkeypatch.setattr(KeyStream, "uint64", lambda self, count: bits)
        return stream().normal(2)

    u, v = (2.0 ** (bit - 11) + 1) * 2.0**-53, 2.0 ** (bit - 64)
    radius = math.sqrt(-2 * math.log(u))
    assert normals(1 << bit, 0).tolist() == pytest.approx([radius, 0.0], rel=1e-15)
    longest = math.sqrt(2 * 53 * math.log(2))
    turned = [longest * math.cos(2 * math.pi * v), longest * math.sin(2 * math.pi * v)]
    assert normals(0, 1 << bit).tolist() == pytest.approx(turned, rel=1e-12, abs=1e-14)
    assert normals((1 << 64) - 1, 0)[0] == 0.0
    # What lies below the 53 bits changes nothing.
    assert normals((1 << bit) | 0x7FF, 0x7FF).tolist() == normals(1 << bit, 0).tolist()


def test_normals_of_one_stream_are_independent() -> None:
    values = stream("pairs").normal(COUNT)
    half = COUNT // 2  # Box and Muller: value i and value i + half come from the same two uniforms
    for left, right in ((values[:half], values[half:]), (values[:-1], values[1:])):
        for function in (np.asarray, np.square, np.abs):
            assert stats.pearsonr(function(left), function(right)).pvalue > ALPHA


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.25, 0.5, 0.9, 1.0])
def test_bernoulli_rates(probability: float) -> None:
    drawn = stream(f"coins {probability}").bernoulli(COUNT, probability)
    assert stats.binomtest(int(drawn.sum()), COUNT, probability).pvalue > ALPHA
    if probability < 1:
        for wrong in (probability * 0.7, min(probability * 1.4, 0.99)):
            assert stats.binomtest(int(drawn.sum()), COUNT, wrong).pvalue < ALPHA


def test_a_coin_is_the_stream_below_a_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter is 2**62 of the 2**64 values, no more and no less."""
    edge = np.array([0, 2**62 - 1, 2**62, 2**64 - 1], dtype=np.uint64)
    monkeypatch.setattr(KeyStream, "uint64", lambda self, count: edge[:count])
    for probability, drawn in ((0.25, [True, True, False, False]), (2.0**-64, [True, False, False, False])):
        found = stream().bernoulli(4, probability)
        assert (found.tolist(), found.dtype) == (drawn, np.bool_)
    assert stream().bernoulli(4, 1.0).dtype == np.bool_
    assert stream().bernoulli(4, 1.0).all()


def test_a_stream_is_chacha20_under_the_hmac_of_its_label() -> None:
    """The labels are fixed: an injected key gives the same round in every version."""
    key = bytes(range(32))
    for purpose, label in (("noise", b"silotune/noise/3/14"), ("records", b"silotune/records/3/14")):
        found = SiteRandomness(key, "injected").stream(purpose, round_number=3, step=14).uint64(8).tobytes()
        assert found == chacha20_block(hmac.digest(key, label, "sha256"), 0)


def test_streams_are_independent() -> None:
    source = SiteRandomness.injected("independent")
    labels = [
        *itertools.product(("sampling", "noise", "salt"), (1, 2, 11, 12), (0, 1, 2, 21)),
        ("noise", 112, 1),  # concatenated without a separator this would be (noise, 11, 21)
    ]
    rows = np.stack([source.stream(p, round_number=r, step=s).normal(4096) for p, r, s in labels])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    first, second = np.triu_indices(len(rows), k=1)
    correlation = (rows @ rows.T)[first, second]
    p_values = 2 * stats.norm.sf(np.abs(correlation) * np.sqrt(4096))
    assert p_values.min() > ALPHA / len(p_values)
    assert stats.kstest(p_values, "uniform").pvalue > ALPHA


def test_a_stream_is_reproducible_only_from_its_key() -> None:
    same = [SiteRandomness.injected("a").stream("noise", round_number=1, step=0).uint64(4).tolist() for _ in range(2)]
    assert same[0] == same[1]
    assert SiteRandomness.injected("b").stream("noise", round_number=1, step=0).uint64(4).tolist() != same[0]
    assert SiteRandomness.injected("a").origin == "injected"
    os_streams = {
        SiteRandomness.from_os().stream("noise", round_number=1, step=0).uint64(2).tobytes() for _ in range(20)
    }
    assert len(os_streams) == 20
    assert SiteRandomness.from_os().origin == "os"
    with pytest.raises(ValueError, match="32 bytes"):
        SiteRandomness(b"short", "os")


def test_a_stream_is_given_once() -> None:
    source = SiteRandomness.injected("once")
    where = [
        {"purpose": purpose, "round_number": number, "step": step}
        for purpose, number, step in itertools.product(("sampling", "records", "noise", "salt"), (1, 2), (0, 1))
    ]
    first = {source.stream(**place).uint64(2).tobytes() for place in where}
    assert len(first) == len(where)
    for place in where:
        with pytest.raises(PrivacyError, match="was used before"):
            source.stream(**place)


def test_the_key_of_a_site_has_256_bits_of_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    def bits_of(system: int) -> bytes:
        monkeypatch.setattr(randomness_module.os, "urandom", lambda count: system.to_bytes(32, "little")[:count])
        return SiteRandomness.from_os().stream("noise", round_number=1, step=0).uint64(4).tobytes()

    assert (
        bits_of(5)
        == SiteRandomness((5).to_bytes(32, "little"), "os").stream("noise", round_number=1, step=0).uint64(4).tobytes()
    )
    assert len({bits_of(0), *(bits_of(1 << bit) for bit in range(256))}) == 257


def test_job_seed_does_not_reach_noise(
    classification_job: Callable[..., Any], records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same job, same public generators, same data: only the key from the operating system makes the rounds differ."""
    job = classification_job(seed=7)
    runtime = load_runtime(job, ComputeConfig(device="cpu", precision="float32"))
    examples, plan = runtime.encode(records), PrivacyPlan.from_job(job)

    def train(randomness: SiteRandomness) -> torch.Tensor:
        torch.manual_seed(job.seed)
        np.random.seed(job.seed)
        result = train_local_rounds(
            runtime,
            [LocalWork(examples=examples, declared_records=32, randomness=randomness)],
            runtime.initial,
            training=job.training,
            plan=plan,
            round_number=1,
        )[0]
        return torch.cat([value.flatten() for value in result.delta.values()])

    assert not torch.equal(train(SiteRandomness.from_os()), train(SiteRandomness.from_os()))
    # With equal keys nothing else varies: the key is the only source.
    monkeypatch.setattr(randomness_module.os, "urandom", lambda count: b"\x05" * count)
    first = train(SiteRandomness.from_os())
    torch.manual_seed(99)
    assert torch.equal(first, train(SiteRandomness.from_os()))
    # And no argument exists through which a seed of a job could come in.
    assert not inspect.signature(SiteRandomness.from_os).parameters
    assert set(inspect.signature(KeyStream.__init__).parameters) == {"self", "key"}
