"""What a site has released and may be asked for again: one file for each round, and one for the site metrics of a job.

Guarantees (tests: tests/client/site/test_site.py, test_site_metrics.py)
    * A release is stored, whole, before it leaves, in one file with the moments and the residual that the next round starts
      from: after a crash either all of them are there or none. The same request again gets the same bytes.
    * A release that the ledger does not know is found: a ledger that was restored without it does not go on
      (tests/client/site/test_restored_homes.py).
    * With a seal, nothing in it can be read, or put in another job's or round's place, without the site's storage key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from client.ledger.account import CHARGING_KINDS
from client.ledger.file import Entry
from shared.errors import LedgerError
from shared.files.atomic import write_bytes
from shared.files.json_files import canonical_json
from shared.trust.keystore import Seal
from shared.wire.messages import KEPT_ROUNDS, MetricsReply, TrainReply

_METRICS_FILE = "metrics.json"
_JOB_CHARACTERS = 16  # of a job's hash, in the name of its folder
# Whatever else lies there, such as a copy that somebody made of a file or folder, is not ours: neither read nor removed.
_JOB_FOLDER = re.compile(f"[0-9a-f]{{{_JOB_CHARACTERS}}}")
_ROUND_FILE = re.compile(r"round-([0-9]{5,6})\.safetensors")


class Outbox:
    """The stored releases of all jobs in `folder`.

    Args:
        seal: encrypts them; None in a simulation.
    """

    def __init__(self, folder: Path, *, seal: Seal | None) -> None:
        self._folder, self._seal = folder, seal

    def store_round(
        self,
        reply: TrainReply,
        *,
        request_sha256: str,
        optimizer_state: Mapping[str, Tensor],
        residual: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Store one round's release in one file with what the next round starts from; rounds long before it are removed.

        Args:
            optimizer_state: the local optimiser's moments.
            residual: what the release's encoding lost, see `shared.wire.updates`.
        """
        update = torch.from_numpy(np.frombuffer(reply.update, dtype=np.uint8).copy())
        header = json.dumps(asdict(replace(reply, update=b"")) | {"update": None})
        metadata = {"request_sha256": request_sha256, "reply": header}
        path = self._round_file(reply.job_sha256, reply.round_number)
        kept = {f"optimizer/{n}": t for n, t in optimizer_state.items()}
        kept |= {f"residual/{n}": t for n, t in (residual or {}).items()}
        self._write(path, save({"update": update, **kept}, metadata))
        # Only rounds before this one: a coordinator that went back to a backup may ask for it once more.
        earlier = [old for number, old in _rounds(path.parent) if number <= reply.round_number]
        for old in earlier[:-KEPT_ROUNDS]:
            old.unlink(missing_ok=True)

    def stored_round(self, job_sha256: str, round_number: int, *, request_sha256: str) -> TrainReply | None:
        """Return the release that was made for exactly this request, or None."""
        path = self._round_file(job_sha256, round_number)
        if not path.exists():
            return None
        metadata, tensors = self._read_round(path)
        if metadata.get("request_sha256") != request_sha256:
            return None
        fields = json.loads(metadata["reply"])
        return TrainReply(**fields | {"update": tensors["update"].numpy().tobytes()})

    def kept(self, what: Literal["optimizer", "residual"], job_sha256: str, round_number: int) -> dict[str, Tensor]:
        """Return what `store_round` kept of the latest earlier round of this job; empty if there is none."""
        folder = self._round_file(job_sha256, round_number).parent
        earlier = [path for number, path in _rounds(folder) if number < round_number]
        if not earlier:
            return {}
        _, tensors = self._read_round(earlier[-1])
        return {n.removeprefix(f"{what}/"): t for n, t in tensors.items() if n.startswith(f"{what}/")}

    def check_charged(self, entries: Iterable[Entry]) -> None:
        """Raise `LedgerError` if a private release lies here that the ledger never charged: it is older than the release.

        Args:
            entries: of the site's whole ledger. What it took over from another machine names job and round only.
        """
        charges = [entry.payload for entry in entries if entry.kind in CHARGING_KINDS]
        # By the request: a round that was asked for again from another adapter was charged again.
        requests = {charge["request_sha256"] for charge in charges if "request_sha256" in charge}
        taken_over = {(c["job_id"][:_JOB_CHARACTERS], c["round"]) for c in charges if "request_sha256" not in c}
        for folder in sorted(path for path in self._folder.glob("*") if _JOB_FOLDER.fullmatch(path.name)):
            for number, path in _rounds(folder):
                if (folder.name, number) not in taken_over and not self._is_charged(path, requests):
                    raise _uncharged(path)
            path = folder / _METRICS_FILE
            moved = any(folder.name == job for job, _ in taken_over)
            if path.exists() and not moved and self._read_metrics(path)["request_sha256"] not in requests:
                raise _uncharged(path)

    def _is_charged(self, path: Path, requests: Collection[str]) -> bool:
        """Return whether a round's release was charged, or needed no charge."""
        try:
            metadata = _metadata(self._read(path))
            private = json.loads(metadata["reply"])["noise_multiplier"] > 0
            return not private or metadata["request_sha256"] in requests
        except Exception as error:
            raise _unreadable(path, error) from None

    def store_metrics(self, reply: MetricsReply, *, request_sha256: str) -> None:
        """Store the site metrics of a job."""
        content = canonical_json({"request_sha256": request_sha256, "reply": asdict(reply)})
        self._write(self._metrics_file(reply.job_sha256), content.encode())

    def stored_metrics(self, job_sha256: str, *, request_sha256: str) -> MetricsReply | None:
        """Return the site metrics that were released for exactly this request, or None."""
        path = self._metrics_file(job_sha256)
        if not path.exists():
            return None
        content = self._read_metrics(path)
        return content["reply"] if content["request_sha256"] == request_sha256 else None

    def _read_metrics(self, path: Path) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(self._read(path))
            return {"request_sha256": content["request_sha256"], "reply": MetricsReply(**content["reply"])}
        except Exception as error:
            raise _unreadable(path, error) from None

    def _round_file(self, job_sha256: str, round_number: int) -> Path:
        return self._folder / job_sha256[:_JOB_CHARACTERS] / f"round-{round_number:05d}.safetensors"

    def _metrics_file(self, job_sha256: str) -> Path:
        return self._folder / job_sha256[:_JOB_CHARACTERS] / _METRICS_FILE

    def _write(self, path: Path, data: bytes) -> None:
        write_bytes(path, self._seal.seal(data, context=_context(path)) if self._seal else data)

    def _read(self, path: Path) -> bytes:
        data = path.read_bytes()
        return self._seal.open(data, context=_context(path)) if self._seal else data

    def _read_round(self, path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
        try:
            data = self._read(path)
            return _metadata(data), load(data)
        except Exception as error:
            raise _unreadable(path, error) from None


def _rounds(folder: Path) -> list[tuple[int, Path]]:
    """Return (number, file) of the rounds of a job, in order."""
    found = ((_ROUND_FILE.fullmatch(path.name), path) for path in folder.glob("round-*"))
    return sorted((int(match[1]), path) for match, path in found if match)


def _uncharged(path: Path) -> LedgerError:
    return LedgerError(
        f"{path} holds a release that ledger.db never charged, so the ledger is older than it: a backup was put back, or the "
        "ledger was removed. Nothing more is charged or released. Restore the newest copies of ledger and audit log; an "
        "account that came from another machine is taken over with `silotune site ledger HOME --import`."
    )


def _unreadable(path: Path, error: Exception) -> LedgerError:
    return LedgerError(
        f"{path} cannot be read ({type(error).__name__}); it holds a release that was already charged. Restore it from "
        "a backup, or remove it and accept a second charge for that release."
    )


def _metadata(data: bytes) -> dict[str, str]:
    """Return the metadata of safetensors bytes: an 8-byte length, then a JSON header."""
    length = int.from_bytes(data[:8], "little")
    return dict(json.loads(data[8 : 8 + length]).get("__metadata__", {}))


def _context(path: Path) -> str:
    """Return what a sealed file is bound to, so that files cannot be exchanged: job and round."""
    return f"round/{path.parent.name}/{path.name}"
