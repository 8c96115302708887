"""One error family for everything that a user can mend.

Every error says what was found, what was expected and what to do next. The command line prints the message
without a traceback; anything that is not a `SilotuneError` is a defect and keeps its traceback.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


def excerpt(value: object, most: int = 80) -> str:
    """Return a setting's value as Python writes it, for a message; a long one is cut."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 4 :]} ({len(text):,} characters)"


def printable(text: str, instead: str = "\N{REPLACEMENT CHARACTER}", *, lines: bool = False) -> str:
    """Return `text` with `instead` for control characters, which steer a terminal and reorder text; line ends may stay."""
    return "".join(c if c.isprintable() or (lines and c == "\n") else instead for c in text)


class SilotuneError(Exception):
    """Base of all errors that a user can act on."""

    exit_code = 1


class ConfigError(SilotuneError):
    """A job, scenario or site file is not valid."""

    exit_code = 2


class DataError(SilotuneError):
    """A data set is missing, malformed or too small."""


class ModelError(SilotuneError):
    """A backbone cannot be loaded or cannot be tuned privately."""


class AdapterError(SilotuneError):
    """Bytes that claim to be an adapter are not the adapter that was expected."""


class PrivacyError(SilotuneError):
    """A privacy parameter or an executed mechanism cannot be accounted for."""


class ComputeError(SilotuneError):
    """A process that computes for a site has ended, failed, or computes other numbers than the rest; nothing was released."""


class TrustError(SilotuneError):
    """A key, certificate, signature or chained log cannot be trusted. The text holds no secret and no record."""


class RosterError(TrustError):
    """A site does not enter the sum of a roster; nothing was charged. The text speaks of what all on it see and of the site's own
    trust in them, so it may be sent to the coordinator."""


class PolicyError(SilotuneError):
    """A site's own rules refuse a job. The text speaks of the job only, so it may be sent to the coordinator."""


class AwaitingApproval(PolicyError):
    """A job that no rule refuses waits for people at the site. The one text that may be told: never why, when or by whom."""

    def __init__(self) -> None:
        super().__init__("waiting for approval")


class DroppedOut(PolicyError):
    """A site has nothing ready for an attempt at a sum, any more or yet."""


class RegistryError(SilotuneError):
    """A version of a registered model is retired, or its registry's policy excludes it."""


class LedgerError(SilotuneError):
    """The site's ledger cannot be trusted or written."""


class BudgetExceeded(LedgerError):
    """A charge would cross the site's budget; nothing was charged.

    Attributes:
        steps_affordable: number of steps of the same mechanism that would still fit in the budget.
    """

    def __init__(self, message: str, *, steps_affordable: int) -> None:
        super().__init__(message)
        self.steps_affordable = steps_affordable


class RunError(SilotuneError):
    """A run folder cannot be created, resumed or completed."""


class RunHeld(RunError):
    """A run that a person must look at before it is resumed: going on by itself, it would cost the sites charges for nothing."""


def place_of(error: BaseException) -> str:
    """Return kind and place of an unexpected error, and of what led to it, without their texts, which may quote a record."""
    told: list[str] = []
    found: BaseException | None = error
    while found is not None and len(told) < 5:
        frames = traceback.extract_tb(found.__traceback__)
        places = "".join(f"\n  {frame.filename}, line {frame.lineno}, in {frame.name}" for frame in frames)
        told.append(f"{type(found).__name__}{places}")
        found = found.__cause__ or found.__context__
    return "\nled to by ".join(told)


class Panicked(Exception):
    """A library written in Rust, such as tokenizers, panicked."""


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise `Panicked` where a library panics: Python has that as a `BaseException`, which ends threads that others wait for.

    For code that waits for nothing: a cancelled task is a `BaseException` as well.

    Its words may quote a text; `place_of` does not repeat them.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise Panicked(type(error).__name__) from error


@contextmanager
def model_errors(what: str, *through: type[Exception]) -> Iterator[None]:
    """Raise `ModelError` where a library fails over a model that it was given: a damaged file can fail anywhere inside one.

    Its words may quote a text, so the error names its kind alone, and the log (INFO) the place.

    Args:
        what: what could not be done, such as "the model in runs/first cannot be loaded".
        through: errors that are no model's fault, beside those of Silotune.
    """
    try:
        with panics_as_errors():
            yield
    except SilotuneError:
        raise
    except Exception as error:
        if isinstance(error, through):
            raise
        logging.getLogger(__name__).info("where it happened: %s", place_of(error))
        kind = type(error.__cause__ or error if isinstance(error, Panicked) else error).__name__
        raise ModelError(
            f"{what} ({kind}): its files do not fit together or are damaged. Make it anew, or restore it."
        ) from None
