"""Which model answers: the one that a reference leads to, followed while the service runs.

Every second the reference is resolved anew. A version that is new there is copied, verified, loaded and tried beside the one that
answers; then it takes over in one assignment. Requests keep the model that they began with.

Guarantees (tests: tests/server/serving/test_following.py)
    * A change of the alias loses no request (test_an_alias_changes_under_load).
    * What does not verify never answers; the version before goes on, and the log says why once
      (test_what_does_not_verify_is_refused_and_the_old_one_goes_on). It is tried again with growing pauses
      (test_what_was_mended_is_taken).
    * A version that is retired, or whose signer is trusted no longer, stops answering unless another one takes its place
      (test_a_retired_version_stops, also where its successor is refused; test_whose_key_was_taken_out_stops).
    * A history that does not continue the one that was followed is not followed (test_a_history_that_was_put_back).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from server.registry.history import History
from server.registry.references import Resolved, resolve
from server.registry.registry import Registry
from server.serving.models import Model, Plan, load
from shared.errors import ConfigError, ModelError, SilotuneError, TrustError, panics_as_errors, place_of
from shared.trust.signing import VerifyKey

log = logging.getLogger("silotune.serving")

LOOK_SECONDS = 1.0
_LONGEST_PAUSE = 60.0


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
        if version is None and "/" not in reference:
            # A registry that is empty for a moment must not lead to what nobody signed.
            raise ConfigError(
                f"{reference} is no model of the registry. A folder of that name is served as ./{reference}; nobody signed it."
            )
        if version is not None and "/" in reference:  # its path: the registry in which it lies says what becomes of it
            root, reference = version.path.parents[2], version.reference
            self._open, self._reference = lambda: open_registry().at(root), reference
        self.how = found.how
        self.name = reference if version else found.folder.resolve().name
        self.base = version.manifest.name if version else self.name
        self.trouble: str | None = None
        self.withdrawn: str | None = None
        self.changes = 0
        self.model: Model = load(found, plan)
        self._seen, self._pause, self._again = self.model.manifest_sha256, 0.0, 0.0
        self._signer = version.manifest.signer if version else ""
        self._last: tuple[int, str] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="alias", daemon=True)
        if version is not None:
            self._continued(self._open().history(self.base))
            self._thread.start()

    def close(self) -> None:
        """Follow no longer."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def look(self) -> None:
        """Resolve the reference, and let another version take over if it leads to one."""
        try:
            registry = self._open()
            history = registry.history(self.base)
            self._continued(history)
            found = resolve(registry, self._reference, history=history)
        except SilotuneError as error:
            self._tell(str(error))
        else:
            if self._follow(found):
                return
        if reason := self._not_to_be_used():
            self.withdrawn = reason

    def _continued(self, history: History) -> None:
        """Raise `TrustError` if a history is not the one that was followed, with or without more entries."""
        entries = history.entries
        if self._last is not None:
            number, sha256 = self._last
            if len(entries) < number or entries[number - 1].sha256 != sha256:
                raise TrustError(
                    f"{history.path} does not continue what was followed (entry {number}, {sha256[:12]}…): it was put back or "
                    f"rewritten, so it is not followed. If that was meant, start the service anew."
                )
        if entries:
            self._last = (len(entries), entries[-1].sha256)

    def _follow(self, found: Resolved) -> bool:
        """Let what the reference leads to take over, if it is another version; return whether it answers now."""
        if found.version is None:
            self._tell(f"{self._reference} is in the registry no longer; {self.model.version} goes on")
            return False
        sha256 = found.version.manifest_sha256
        if sha256 == self.model.manifest_sha256:
            self._seen, self.trouble, self.withdrawn = sha256, None, None
            return True
        if sha256 != self._seen:
            self._seen, self._pause, self._again = sha256, LOOK_SECONDS, 0.0
        if time.monotonic() < self._again:
            return False
        try:
            model = load(found, self._plan)
            if model.kind != self.model.kind:
                raise ModelError(f"its task is {model.kind}, which nobody here asks for")
        except Exception as error:
            self._again, self._pause = time.monotonic() + self._pause, min(_LONGEST_PAUSE, 2 * self._pause)
            reason = str(error) if isinstance(error, SilotuneError) else place_of(error)
            self._tell(f"{found.version.reference} is not served, {self.model.version} goes on: {reason}")
            return False
        before, self.model = self.model.version, model
        self._signer = found.version.manifest.signer
        self.trouble, self.withdrawn = None, None
        self.changes += 1
        log.info("%s answers now, before %s", model.version, before)
        return True

    def _not_to_be_used(self) -> str | None:
        """Return why the version that answers must not go on; None also where that cannot be told."""
        number = int(self.model.version.rpartition(":")[2])
        try:
            registry = self._open()
            if registry.policy.name_of(VerifyKey.parse(self._signer), "signer", "former") is None:
                return f"{self.model.version} was signed by a key that is trusted no longer"
            return f"{self.model.version} was retired" if number in registry.history(self.base).retired else None
        except SilotuneError:
            return None

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
