"""What is masked, and by which engine."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from shared.data.deidentify.spans import KINDS, Kind
from shared.job.parsing import Section

Engine = Literal["auto", "rules", "presidio"]
Language = Literal["en", "zh"]


class DeidentifyConfig(Section):
    """`[data.deidentify]`, or in short `deidentify = true`, or a list of kinds."""

    kinds: tuple[Kind, ...] = Field(default=KINDS, min_length=1)
    """What is masked: `name`, `date`, `age` (over 89), `phone`, `email`, `url`, `ip`, `account` (IBAN, card), `id` (national and
    record numbers), `number` (other long numbers). All by default."""
    engine: Engine = "auto"
    """`rules`; `presidio`: the rules and names found by Microsoft Presidio; `auto`: Presidio too where it can be used here. Which
    one was used is told by `silotune site check` and in every report."""
    models: dict[Language, str] = Field(default_factory=dict)
    """spaCy models of Presidio by language, `en` and `zh`: the name of an installed package, or a folder. By default the
    installed `en_core_web_*` and `zh_core_web_*`, large before small. Nothing is ever downloaded."""

    @field_validator("kinds")
    @classmethod
    def _in_one_order(cls, kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
        return tuple(kind for kind in KINDS if kind in kinds)

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        if self.models and self.engine == "rules":
            raise ValueError('models are for Presidio, but engine is "rules"; remove one of the two')
        if self.engine == "presidio" and "name" not in self.kinds:
            raise ValueError(
                'Presidio finds names, but "name" is not among the kinds; add it, or set engine to "rules"'
            )
        return self


def parse_short(value: object) -> object:
    """Return what `deidentify = true`, `= false` or a list of kinds stands for; anything else as it is."""
    if value is True:
        return {}
    if value is False:
        return None
    if isinstance(value, list | tuple):
        return {"kinds": value}
    return value
