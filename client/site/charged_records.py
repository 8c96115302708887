"""Which records were charged under which data set's name, so that the same ones under another name do not pass unseen.

The ledger keeps a budget for each name, and a new name for the same people would be a new budget. Nobody can be kept from it
who owns the machine; but the site is told, by `silotune site check`, when its node starts, and in its log.

What is kept: a keyed digest of 64 bits of each record that was ever trained on under a name, in one sealed file, and a keyed
fingerprint of the whole data set in every charge of the ledger. The key follows from the site's storage key, so neither tells
anybody else whether a text is among the records (tests: tests/client/site/test_charged_records.py).

Not guaranteed: see `shared.data.overlap` for what counts as the same record. A deleted file forgets; the fingerprints in the
ledger then still show the whole data set under another name, unchanged.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.ledger.account import dataset_key
from client.ledger.file import Entry
from shared.data.overlap import content_key
from shared.errors import LedgerError
from shared.files.atomic import write_bytes
from shared.trust.keystore import Seal

RECORDS_FILE = "records.sealed"
_CONTEXT = "charged records"
_PURPOSE = "digests of records"


class ChargedRecords:
    """The records of one data set, and those that were charged under any name.

    Args:
        path: the sealed file; it need not be there.
        seal: of the site.
        dataset: the name of the records that are trained on now.
        records: these.
    """

    def __init__(self, path: Path, *, seal: Seal, dataset: str, records: Sequence[Mapping[str, Any]]) -> None:
        self._path, self._seal, self._dataset = path, seal, dataset
        key = seal.derived_key(_PURPOSE)
        digests = [hmac.digest(key, content_key(record).encode("utf-8", "replace"), "sha256") for record in records]
        self._own = np.sort(np.frombuffer(b"".join(digest[:8] for digest in digests), dtype="<u8"))
        # In order of the digests: the order of the rows does not matter.
        self.fingerprint = hmac.new(key, b"all:" + b"".join(sorted(digests)), hashlib.sha256).hexdigest()

    def note(self) -> None:
        """Note, durably, that these records are charged under their name; writes nothing that is noted already.

        Raises:
            LedgerError, RunError: the file cannot be read, or written.
        """
        kept = self._read()
        before = kept.get(self._dataset, np.array([], dtype="<u8"))
        together = np.union1d(before, self._own).astype("<u8")
        if len(together) > len(before):
            kept[self._dataset] = together
            content = {name: base64.b64encode(digests.tobytes()).decode() for name, digests in kept.items()}
            write_bytes(self._path, self._seal.seal(json.dumps(content).encode(), context=_CONTEXT))

    def warnings(self, entries: Iterable[Entry]) -> list[str]:
        """Return a sentence for every other name under which some of these records were charged.

        Args:
            entries: of the site's ledger.
        """
        same = {
            str(entry.payload["dataset"])
            for entry in entries
            if entry.kind == "reserve" and entry.payload.get("records") == self.fingerprint
        }
        counts = {name: int(np.isin(self._own, digests).sum()) for name, digests in self._read().items()}
        counts |= {name: len(self._own) for name in same}
        return [
            f"{count:,} of the {len(self._own):,} records were charged as the data set {name!r} before; as {self._dataset!r} "
            "they have a second budget, and what both spend adds up for the same people. Set dataset to the earlier name in "
            "site.toml again, unless these are other people with the same texts"
            for name, count in sorted(counts.items())
            if count and dataset_key(name) != dataset_key(self._dataset)  # else it is the same account
        ]

    def _read(self) -> dict[str, NDArray[np.uint64]]:
        if not self._path.exists():
            return {}
        try:
            content = json.loads(self._seal.open(self._path.read_bytes(), context=_CONTEXT))
            return {
                str(name): np.frombuffer(base64.b64decode(text, validate=True), dtype="<u8")
                for name, text in content.items()
            }
        except Exception as error:
            raise LedgerError(
                f"{self._path} cannot be read ({type(error).__name__}); it tells which records were charged under which name. "
                "Restore it from a backup, or remove it: then records that come back under another name may not be noticed."
            ) from None
