"""`silotune` as a process that ends by itself, as by a power cut, at a moment that has a name, and tells what it masked and drew.

    python -m tests.integration.dying ROLE silotune's own arguments

ROLE is "coordinator" or "site". The folder `$DYING` holds what both sides of a test tell each other:

    ROLE.at         names a moment; the first process of the role that gets there takes the file away and is killed
    ROLE.PID.told   JSON lines: everything that a mask, a key stream or a share of the noise was made of, as SHA-256

A line is written before what it tells of is used, in one call, so it outlives the process.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Place = tuple[str, str, str, str]  # module, class, method, "before" or "after"

SITE_MOMENTS: dict[str, Place] = {
    "ready: asked": ("client.site.secure.shares", "Shares", "begin", "before"),
    "ready: nothing read yet": ("client.site.secure.shares", "Shares", "begin", "after"),
    "ready: computed": ("client.site.secure.shares", "Shares", "finish", "before"),
    "ready: made": ("client.site.secure.shares", "Shares", "finish", "after"),
    "ready: answered": ("client.node.node", "Work", "answer", "after ready"),
    "ready: delivered": ("client.node.node", "Work", "delivered", "after ready"),
    "masked: asked": ("client.site.secure.shares", "Shares", "masked", "before"),
    "masked: roster accepted": ("shared.secure_sum.site", "SecureSite", "accept", "after"),
    "masked: charged in the ledger, not in the log": (
        "client.ledger.audit_mirror",
        "AuditMirror",
        "__call__",
        "before",
    ),
    "masked: charged": ("client.ledger.ledger", "Ledger", "reserve", "after"),
    "masked: made": ("shared.secure_sum.site", "SecureSite", "masked", "after"),
    "masked: stored": ("client.site.outbox", "Outbox", "store_round", "after"),
    "masked: closed in the ledger": ("client.ledger.ledger", "Ledger", "commit", "after"),
    "masked: noted": ("client.site.guard", "Guard", "stored", "after"),
    "masked: answered": ("client.node.node", "Work", "answer", "after masked"),
    "masked: delivered": ("client.node.node", "Work", "delivered", "after masked"),
}
COORDINATOR_MOMENTS: dict[str, Place] = {
    "ready: to be asked": ("server.coordinator.production", "_Recorder", "ready_asked", "after"),
    "ready: first one there": ("server.rounds.secure.round", "_GetReady", "take", "after"),
    "roster closed": ("shared.secure_sum.coordinator", "SecureCoordinator", "close", "after"),
    "attempt noted": ("server.rounds.secure.attempts", "Attempts", "begin", "after"),
    "masked: to be asked": ("server.coordinator.production", "_Recorder", "round_started", "after"),
    "masked: receipt kept": ("server.coordinator.production", "_Recorder", "receipt", "after"),
    "masked: first one there": ("server.rounds.secure.round", "_Send", "take", "after"),
    "masked: all that came are there": ("server.rounds.secure.round", "_Send", "close", "after"),
    "void, not noted": ("server.rounds.secure.attempts", "Attempts", "failed", "before"),
    "void, noted": ("server.rounds.secure.attempts", "Attempts", "failed", "after"),
    "opened": ("shared.secure_sum.coordinator", "SecureCoordinator", "open", "after"),
    "to be saved": ("server.runs.folder", "RunFolder", "save_checkpoint", "before"),
    "saved": ("server.runs.folder", "RunFolder", "save_checkpoint", "after"),
    "completed": ("server.coordinator.production", "_Recorder", "_round_completed", "after"),
    "questions sent": ("server.link.grid", "LinkGrid", "push_messages", "after"),
}
MOMENTS = {"site": SITE_MOMENTS, "coordinator": COORDINATOR_MOMENTS}
NEEDS_A_DEAD_SITE = ("void, not noted", "void, noted")
FIRST_WORDS = 64  # of a masked input, as the coordinator gets it


class Dying:
    """What one process does at its moments and tells; `kind` is that of the request that is answered now."""

    def __init__(self, folder: Path, role: str) -> None:
        self._at = folder / f"{role}.at"
        self._told = (folder / f"{role}.{os.getpid()}.told").open("ab", buffering=0)
        self.kind = ""

    def tell(self, what: str, **facts: Any) -> None:
        self._told.write(json.dumps({"what": what, **facts}).encode() + b"\n")

    def at(self, moment: str) -> None:
        """Die if this is the moment."""
        try:
            wanted = self._at.read_text()
        except FileNotFoundError:
            return
        if wanted == moment:
            try:
                self._at.rename(self._at.with_suffix(f".{os.getpid()}.died"))
            except FileNotFoundError:  # another site was there first
                return
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, moment: str, place: Place) -> None:
        """Be at `moment` before or after a method, of requests of one kind if it says so."""
        module, owner, method, when = place
        found = getattr(__import__(module, fromlist=[owner]), owner)
        real = getattr(found, method)
        order, _, kind = when.partition(" ")

        @functools.wraps(real)
        def call(*args: Any, **kwargs: Any) -> Any:
            if order == "before" and kind in ("", self.kind):
                self.at(moment)
            answer = real(*args, **kwargs)
            if order == "after" and kind in ("", self.kind):
                self.at(moment)
            return answer

        setattr(found, method, call)

    def before(self, owner: Any, method: str, act: Callable[..., None]) -> None:
        """Call `act` with the arguments of a function or method before it runs."""
        real = getattr(owner, method)

        @functools.wraps(real)
        def call(*args: Any, **kwargs: Any) -> Any:
            act(*args, **kwargs)
            return real(*args, **kwargs)

        setattr(owner, method, call)


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def tell_of_a_site(dying: Dying) -> None:
    """Tell every key of a stream, every share of the noise, and every input with the keys of its masks."""
    from client.ledger.audit_mirror import AuditMirror
    from client.ledger.ledger import Ledger
    from client.site.secure.shares import Shares
    from shared.privacy import randomness, shares
    from shared.secure_sum.site import SecureSite

    def of_request(kind: str) -> Callable[..., None]:
        def note(*args: Any, **kwargs: Any) -> None:
            dying.kind = kind

        return note

    dying.before(Shares, "begin", of_request("ready"))
    dying.before(Shares, "masked", of_request("masked"))

    def stream(self: object, key: bytes) -> None:
        dying.tell("stream", key=_sha256(key))

    def masked(self: Any, words: Any, context: bytes) -> None:
        entry, (plus, minus) = self._ready, self._mask_keys
        dying.tell(
            "masked",
            site=entry.site,
            job=entry.job_sha256,
            place=[entry.round_number, entry.attempt],
            words=_sha256(words.tobytes()),
            plus=[_sha256(key) for key in plus],
            minus=[_sha256(key) for key in minus],
            context=context.hex(),
            public_key=entry.public_key.hex(),
        )

    dying.before(randomness.KeyStream, "__init__", stream)
    dying.before(SecureSite, "masked", masked)
    drawn = shares.discrete_gaussian

    def share(*args: Any, **kwargs: Any) -> Any:
        found = drawn(*args, **kwargs)
        dying.tell("share", sha256=_sha256(found.tobytes()))
        return found

    shares.discrete_gaussian = share
    # The mirror is asked at other times as well; here it counts while a round is charged.
    mirror, reserve = AuditMirror.__call__, Ledger.reserve
    charging = [False]

    def charge(self: Ledger, *args: Any, **kwargs: Any) -> int:
        charging[0] = True
        try:
            return reserve(self, *args, **kwargs)
        finally:
            charging[0] = False

    def mirrored(self: AuditMirror, ledger: Ledger) -> None:
        if charging[0]:
            dying.at("masked: charged in the ledger, not in the log")
        mirror(self, ledger)

    Ledger.reserve, AuditMirror.__call__ = charge, mirrored  # type: ignore[method-assign]


def tell_of_a_coordinator(dying: Dying) -> None:
    """Tell the beginning of every masked input that came, as whoever keeps all would have it."""
    from server.rounds.secure.round import _Send
    from shared.secure_sum.messages import Masked

    def came(self: _Send, reply: Any, site: Any) -> None:
        words = Masked.from_bytes(reply.update).words[: 8 * FIRST_WORDS]
        place = [self.number, self.attempt]
        dying.tell(
            "came", site=site.site, job=self.job.sha256, place=place, sha256=_sha256(reply.update), words=words.hex()
        )

    dying.before(_Send, "take", came)


def main(role: str, arguments: list[str]) -> None:
    """Run `silotune` as a process that may die."""
    import cli

    dying = Dying(Path(os.environ["DYING"]), role)
    {"site": tell_of_a_site, "coordinator": tell_of_a_coordinator}[role](dying)
    for moment, place in MOMENTS[role].items():
        if place[1] != "AuditMirror":
            dying.watch(moment, place)
    cli.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
