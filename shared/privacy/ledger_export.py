"""One account of a site's ledger as a file that others can read: for the planner, for reports, for moving to another machine.

It holds what was charged and nothing of a record. The jobs of other coordinators appear by their hash only. Nobody signs it:
whoever may write the file can take charges out, so it is worth what the way is worth on which it came. The entries that an
import makes name the ledger's hash that stands in it, so the two can be compared as long as both ledgers exist.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from shared.errors import LedgerError, PrivacyError
from shared.files.atomic import write_text
from shared.files.bounded import read_named_text
from shared.files.json_files import Count
from shared.job.parsing import Section
from shared.privacy.accounting import GaussianSteps, merged
from shared.privacy.filter import Composition, SpendingRule, filter_orders

FORMAT: Literal["silotune-ledger/1"] = "silotune-ledger/1"


class ChargedSteps(Section):
    """One charge: the executed steps once committed, the reserved ones until then.

    `round` is the round of the job, `attempt` which attempt at it; `committed` tells which of the two `steps` are;
    `planned_steps` are all steps of a job that may take fewer. `noise_together` is the noise multiplier of the sum that a masked
    input goes into, where `noise_multiplier` is that of one site's share.
    """

    job_id: str
    round: Count
    noise_multiplier: float = Field(gt=0)
    sample_rate: float = Field(gt=0, le=1)
    steps: Count
    committed: bool
    time: str
    planned_steps: Count | None = Field(default=None, ge=1, exclude_if=lambda value: value is None)
    noise_together: float | None = Field(default=None, gt=0, exclude_if=lambda value: value is None)
    attempt: Count | None = Field(default=None, exclude_if=lambda value: value is None)

    @model_validator(mode="after")
    def _check_noise(self) -> Self:
        if self.noise_together is not None and self.noise_together < self.noise_multiplier:
            raise ValueError(f"noise_together is {self.noise_together}, below noise_multiplier {self.noise_multiplier}")
        return self

    @property
    def mechanism(self) -> GaussianSteps:
        """The mechanism as the accountant takes it, with the noise of what left the site."""
        return GaussianSteps(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=self.steps)

    @property
    def together(self) -> GaussianSteps | None:
        """The same with the noise of the sum that it went into; None if it went into none."""
        if self.noise_together is None:
            return None
        return GaussianSteps(noise_multiplier=self.noise_together, sample_rate=self.sample_rate, steps=self.steps)


class LedgerExport(Section):
    """One account at one moment.

    `epsilon` and `delta` are its cap, `epsilon_alone` the one for what counts if each masked input stands by itself (none: it is
    the same); `composition` tells how spending is measured against them ("adaptive": a filter over runs chosen one after the
    other; "fixed": PLD over plans that were all fixed in advance), and `orders` are the filter's, fixed when the account was
    begun (none: those that follow from the cap), `orders_alone` those of the second cap's (none: the same). `num_entries` and
    `head_sha256` name the state of the ledger file that this was read from, `exported_at` the time, UTC, ISO 8601.
    """

    format: Literal["silotune-ledger/1"] = FORMAT
    site: str
    dataset: str
    unit: str
    declared_records: Count = Field(ge=1)
    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    composition: Composition
    orders: tuple[int, ...] = ()
    epsilon_alone: float | None = Field(default=None, gt=0, exclude_if=lambda value: value is None)
    orders_alone: tuple[int, ...] = Field(default=(), exclude_if=lambda value: not value)
    charges: tuple[ChargedSteps, ...]
    held_back: tuple[ChargedSteps, ...] = Field(default=(), exclude_if=lambda value: not value)
    """Under "fixed": the rest of the plan of every job that may stop early, as its round 0. It was not executed, and counts."""
    num_entries: Count
    head_sha256: str
    exported_at: str

    @model_validator(mode="after")
    def _check_rule(self) -> Self:
        try:
            _ = self.rule, self.rule_alone, merged(self.mechanisms), merged(self.mechanisms_alone)
        except PrivacyError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def rule(self) -> SpendingRule:
        """How the account measures what it spends."""
        orders = self.orders or filter_orders(epsilon=self.epsilon, delta=self.delta)
        return SpendingRule(composition=self.composition, delta=self.delta, orders=orders)

    @property
    def rule_alone(self) -> SpendingRule:
        """Likewise for the second cap."""
        return replace(self.rule, orders=self.orders_alone or self.rule.orders)

    @property
    def cap_alone(self) -> float:
        """The second cap."""
        return self.epsilon if self.epsilon_alone is None else self.epsilon_alone

    @property
    def mechanisms(self) -> Sequence[GaussianSteps]:
        """Everything that counts against the cap: what was charged, oldest first, then what is held back."""
        return [charge.together or charge.mechanism for charge in (*self.charges, *self.held_back)]

    @property
    def mechanisms_alone(self) -> Sequence[GaussianSteps]:
        """Everything that counts against the second cap: the same, each masked input by itself."""
        return [charge.mechanism for charge in (*self.charges, *self.held_back)]


def save_export(path: Path, export: LedgerExport) -> None:
    """Write `export` to `path`, whole or not at all.

    Raises:
        RunError: if the file cannot be written.
    """
    write_text(path, json.dumps(export.model_dump(mode="json"), indent=2) + "\n")


def load_export(path: Path) -> LedgerExport:
    """Read what `save_export` wrote.

    Raises:
        LedgerError: if the file is missing or is not an export.
    """
    try:
        text = read_named_text(path)
    except (OSError, ValueError) as error:
        raise LedgerError(f"the ledger export {path} cannot be read: {getattr(error, 'strerror', error)}.") from None
    try:
        return LedgerExport.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        message = first["msg"].removeprefix("Value error, ").removesuffix(".")
        raise LedgerError(
            f"{path} is not an export of a ledger ({where}: {message}). Make one at the site with "
            "`silotune site ledger HOME --export FILE`."
        ) from None
