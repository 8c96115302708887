"""Makes a process repeatable below the product: random bytes, keys, signatures, clocks and facts of the machine.

The product's own code is not touched, so that it may move. Guarantee: what a process draws, signs
and dates depends on its label and on the order of its own draws alone. Each length of random bytes
has a stream of its own, so that one more identifier does not change every key and every noise.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import os
import platform
import random
import resource
import shutil
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from pydantic._internal import _generate_schema

START = 1_793_606_400.0
"""Seconds since 1970 at which every clock stands: 2 November 2026. Only the main thread's `time.sleep` moves it."""

_real_datetime = datetime.datetime
_real_sleep = time.sleep


class RandomBytes:
    """Takes the place of `os.urandom`."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._drawn: defaultdict[int, Iterator[int]] = defaultdict(itertools.count)

    def __call__(self, size: int, /) -> bytes:
        """Return the next `size` bytes of the stream of this length."""
        place = f"{self.label}/{size}/{next(self._drawn[size])}"
        return hashlib.shake_256(place.encode()).digest(size)

    def restart(self, label: str) -> None:
        """Begin all streams anew under another label."""
        self.label = label
        self._drawn.clear()


class Clock:
    """One time for all clocks; it stands still unless somebody sleeps."""

    def __init__(self) -> None:
        self.seconds = START

    def sleep(self, seconds: float, /) -> None:
        """Advance the clock, and sleep a little for the sake of other threads; these sleep as they ask."""
        if threading.current_thread() is threading.main_thread():
            self.seconds += seconds
            seconds = min(seconds, 0.001)
        _real_sleep(seconds)

    def now(self, zone: datetime.tzinfo | None = None) -> datetime.datetime:
        """Return the time as `datetime.now` does."""
        if zone is None:
            return _real_datetime.fromtimestamp(self.seconds, datetime.UTC).replace(tzinfo=None)
        return _real_datetime.fromtimestamp(self.seconds, zone)


def be_still(label: str) -> RandomBytes:
    """Replace randomness, clocks and facts of the machine in this process; call it before the product is imported."""
    source = RandomBytes(label)
    os.urandom = source
    random._urandom = source  # type: ignore[attr-defined] # what `secrets` draws from
    _make_keys_repeatable(source)
    _order_metadata()
    _let_cryptography_meet_time()
    _stop_clocks(Clock())
    _hide_machine()
    return source


def _let_cryptography_meet_time() -> None:
    """Sign something: what is compiled looks `datetime` up when it first needs it, and must find the real one."""
    key, name, now = ec.derive_private_key(1, ec.SECP256R1()), x509.Name([]), _real_datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now)
    _ = builder.sign(key, hashes.SHA256()).not_valid_after_utc


def _make_keys_repeatable(source: RandomBytes) -> None:
    """Draw keys from `source` and sign without a random number (RFC 6979): OpenSSL has a generator of its own."""

    def new_ec_key(curve: ec.EllipticCurve, backend: Any = None) -> ec.EllipticCurvePrivateKey:
        secret = int.from_bytes(source(curve.key_size // 8 - 1), "big") + 1  # below the group's order
        return ec.derive_private_key(secret, curve)

    def new_ed25519_key() -> ed25519.Ed25519PrivateKey:
        return ed25519.Ed25519PrivateKey.from_private_bytes(source(32))

    class RepeatableEcdsa(ec.ECDSA):
        def __init__(self, algorithm: Any, deterministic_signing: bool = True) -> None:
            super().__init__(algorithm, deterministic_signing=True)

    ec.generate_private_key = new_ec_key
    ed25519.Ed25519PrivateKey.generate = new_ed25519_key  # type: ignore[method-assign]
    ec.ECDSA = RepeatableEcdsa  # type: ignore[misc]
    for builder in (
        x509.CertificateBuilder,
        x509.CertificateSigningRequestBuilder,
        x509.CertificateRevocationListBuilder,
    ):
        builder.sign = _signing_repeatably(builder.sign)  # type: ignore[attr-defined]


def _signing_repeatably(sign: Callable[..., Any]) -> Callable[..., Any]:
    def signed(self: Any, private_key: Any, algorithm: Any, **options: Any) -> Any:
        if isinstance(private_key, ec.EllipticCurvePrivateKey):
            options["ecdsa_deterministic"] = True
        return sign(self, private_key, algorithm, **options)

    return signed


def _order_metadata() -> None:
    """Sort the metadata of files in the safetensors format: the library writes them in another order in each process."""
    written = safetensors.serialize

    def serialize(tensors: Any, metadata: dict[str, str] | None = None) -> bytes:
        data = written(tensors, metadata=metadata)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        if metadata:
            header["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(-8 * (-len(text) // 8))  # tensors begin at a multiple of eight bytes
        return len(text).to_bytes(8, "little") + text + data[8 + size :]

    def serialize_file(tensors: Any, filename: Any, metadata: dict[str, str] | None = None) -> None:
        Path(filename).write_bytes(serialize(tensors, metadata))

    for module in (safetensors, *(sys.modules.get(f"safetensors.{kind}") for kind in ("numpy", "torch"))):
        if module is not None:  # else it takes them from `safetensors` when it is imported
            module.serialize, module.serialize_file = serialize, serialize_file


def _stop_clocks(clock: Clock) -> None:
    class SameKind(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, _real_datetime)

    class Still(_real_datetime, metaclass=SameKind):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return clock.now(tz)

        @classmethod
        def utcnow(cls) -> Any:
            return clock.now()

        @classmethod
        def today(cls) -> Any:
            return clock.now()

        @classmethod
        def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
            return handler.generate_schema(_real_datetime)

    # Records are read by adapters that pydantic makes when one is first asked for: it compares with what it finds here.
    _generate_schema.datetime = SimpleNamespace(**vars(datetime))  # type: ignore[attr-defined]
    datetime.datetime = Still  # type: ignore[misc]
    for name in ("time", "monotonic", "perf_counter", "process_time"):
        setattr(time, name, lambda: clock.seconds)
        setattr(time, f"{name}_ns", lambda: int(clock.seconds * 1_000_000_000))
    time.sleep = clock.sleep
    os.environ["SOURCE_DATE_EPOCH"] = str(int(START))  # what figures are dated with


def _hide_machine() -> None:
    """Give the same answer everywhere to what the product asks about its machine."""
    measured = resource.getrusage

    def usage(who: int, /) -> resource.struct_rusage:
        fields = list(measured(who))
        fields[:3] = [0.0, 0.0, 1_048_576]  # seconds of the user and the system, peak memory in KiB
        return resource.struct_rusage(fields)

    resource.getrusage = usage
    platform.platform = lambda *_args, **_options: "golden"
    os.cpu_count = lambda: 2
    disk = type(shutil.disk_usage("/"))(1 << 40, 1 << 39, 1 << 39)
    shutil.disk_usage = lambda _path: disk  # what a site's check tells
