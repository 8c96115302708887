"""One attempt at a job: its ServerApp, in a thread of the coordinator, over the link.

It resumes by itself from the last durable checkpoint, so ending it at any moment costs at most the round at hand, and the
sites answer a repeated request with the release that they stored.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from server.coordinator.progress import Progress
from server.link.grid import Halted, LinkGrid
from server.link.server import LinkServer
from server.store.home import CoordinatorHome
from server.store.submission import Submission
from shared.errors import ConfigError, DataError, ModelError, PrivacyError, RunError, RunHeld, SilotuneError, TrustError
from shared.service.logs import LogFormat, about, log_file

if TYPE_CHECKING:
    from server.tracking import Watched  # it loads half of what a run needs

log = logging.getLogger("silotune.coordinator")

_LASTING = (ConfigError, DataError, ModelError, PrivacyError, TrustError)


class Attempt:
    """See the module; it begins when it is made.

    Attributes:
        submission: the job.
        held: whether it ended because a person must look at it first.
        progress: what its sites do.
    """

    def __init__(
        self, home: CoordinatorHome, submission: Submission, link: LinkServer, watched: Watched | None = None
    ) -> None:
        self.submission, self.held, self.progress = submission, False, Progress()
        self._home, self._watched = home, watched
        self._grid = LinkGrid(link, run_id=secrets.randbits(63))
        self._thread = threading.Thread(target=self._run, name=submission.name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it goes on."""
        return self._thread.is_alive()

    def halt(self) -> None:
        """Ask it to end as soon as it looks at its sites again; an evaluation at hand is finished first."""
        self._grid.halt()

    def join(self, timeout: float) -> bool:
        """Wait for its end at most so many seconds, and return whether it came."""
        self._thread.join(timeout)
        return not self.alive

    def _run(self) -> None:
        try:
            form = self._home.load_config().log_format
            with about(job=self.submission.name), _logging_to(self.submission.log, form):
                self._attempt()
        except BaseException as error:  # also a log that cannot be opened: nothing ends in silence
            log.exception("the job ended early")
            defect = not isinstance(error, OSError | SilotuneError)
            with contextlib.suppress(SilotuneError):
                self.submission.note(problem=f"{type(error).__name__}; see the coordinator's log", defect=defect)
        finally:
            with contextlib.suppress(RunError):  # the link may have ended
                self._grid.close()

    def _attempt(self) -> None:
        try:
            # Imported here: sites connect while PyTorch is loaded.
            from server.coordinator.production import run_submission

            run_submission(self._grid, self._home, self.submission, self.progress, self._watched)
        except Halted:
            log.info("the run was stopped")
        except SilotuneError as error:
            log.error("%s", error)
            self.held = isinstance(error, RunHeld)
            with contextlib.suppress(SilotuneError):
                self.submission.note("failed" if lasts(error) else None, problem=str(error))
        except Exception as error:
            # A disk in trouble is no defect of the job.
            defect = not isinstance(error, OSError)
            with contextlib.suppress(SilotuneError):
                self.submission.note(problem=f"{type(error).__name__}; see the log", defect=defect)
            log.exception("the job ended early")


def lasts(error: SilotuneError) -> bool:
    """Return whether trying again would meet the same error; a log that a full disk refuses can be written again later."""
    return isinstance(error, _LASTING) and not isinstance(error.__cause__, OSError | RunError)


@contextlib.contextmanager
def _logging_to(path: Path, form: LogFormat) -> Iterator[None]:
    """Keep in a file what this thread logs."""
    handler = log_file(path, form, backups=2)
    this = threading.get_ident()
    handler.addFilter(lambda record: record.thread == this)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
