"""Which model answers: the one that a reference leads to, followed while the service runs.

Every second the reference is resolved anew. A version that is new there is copied, verified, loaded and tried beside the one that
answers; then it takes over in one assignment. Requests keep the model that they began with.

Guarantees (tests: tests/server/serving/test_following.py)
    * A change of the alias loses no request (test_an_alias_changes_under_load).
    * What does not verify never answers; the version before goes on, and the log says why once
      (test_what_does_not_verify_is_refused_and_the_old_one_goes_on).
    * A version that is retired, and that nothing replaces, stops answering (test_a_retired_version_stops).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from server.registry.references import Resolved, resolve
from server.registry.registry import Registry
from server.serving.models import Model, Plan, load
from shared.errors import ModelError, SilotuneError, panics_as_errors, place_of

log = logging.getLogger("silotune.serving")

LOOK_SECONDS = 1.0


class Following:
    """The model that answers.

    Args:
        open_registry: returns the registry, whose policy is read anew with it.
        reference: see `server.registry.references.resolve`.
        plan: how it is run.

    Attributes:
        name: what clients call it: the reference, of a folder its name.
        base: the model's name in the registry, for tokens.
        model: that answers now.
        trouble: why another version does not, or None.
        withdrawn: why none answers, or None.
        changes: how often another version took over.
    """

    def __init__(self, open_registry: Callable[[], Registry], reference: str, plan: Plan) -> None:
        self._open, self._reference, self._plan = open_registry, reference, plan
        found = resolve(open_registry(), reference)
        version = found.version
        self.how = found.how
        self.name = reference if version else found.folder.resolve().name
        self.base = version.manifest.name if version else self.name
        self.trouble: str | None = None
        self.withdrawn: str | None = None
        self.changes = 0
        self.model: Model = load(found, plan)
        self._seen = self.model.manifest_sha256
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="alias", daemon=True)
        if version is not None:
            self._thread.start()

    def close(self) -> None:
        """Follow no longer."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def look(self) -> None:
        """Resolve the reference, and let another version take over if it leads to one."""
        try:
            found = resolve(self._open(), self._reference)
        except SilotuneError as error:
            self._tell(str(error))
            if self._is_retired():
                self.withdrawn = f"{self.model.version} was retired"
            return
        if found.version is None:
            self._tell(f"{self._reference} is in the registry no longer; {self.model.version} goes on")
            return
        if found.version.manifest_sha256 == self.model.manifest_sha256:
            self._seen, self.trouble, self.withdrawn = self.model.manifest_sha256, None, None
            return
        if found.version.manifest_sha256 == self._seen and self.trouble is not None:
            return  # refused before; it is not tried again until something else is promoted
        self._take_over(found)

    def _take_over(self, found: Resolved) -> None:
        assert found.version is not None  # noqa: S101
        self._seen = found.version.manifest_sha256
        try:
            model = load(found, self._plan)
            if model.kind != self.model.kind:
                raise ModelError(f"its task is {model.kind}, which nobody here asks for")
        except SilotuneError as error:
            self._tell(f"{found.version.reference} is not served, {self.model.version} goes on: {error}")
            return
        before, self.model = self.model.version, model
        self.trouble, self.withdrawn = None, None
        self.changes += 1
        log.info("%s answers now, before %s", model.version, before)

    def _is_retired(self) -> bool:
        name, _, number = self.model.version.rpartition(":")
        try:
            return int(number) in self._open().history(name).retired
        except SilotuneError:
            return False

    def _tell(self, trouble: str) -> None:
        if trouble != self.trouble:
            self.trouble = trouble
            log.error("%s", trouble)

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            try:
                with panics_as_errors():
                    self.look()
            except Exception as error:  # a defect must not end what follows retirements
                self._tell(f"the registry could not be looked at: {place_of(error)}")


def registry_opener(path: Path, policy: Path | None) -> Callable[[], Registry]:
    """Return what opens a registry anew."""
    return lambda: Registry(path, policy)
