"""`energy.json`: what a run drew, by which method and how exact, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass

from shared.files.json_files import Positive

ENERGY_FILE = "energy.json"
JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True, kw_only=True)
class EnergyPart:
    """What one part of the machine drew.

    Attributes:
        of: the part.
        joules: energy.
        measured: whether the machine counted it; else it was estimated.
        method: how.
        error: how far the figure may be off, with the source of that.
    """

    of: str
    joules: Positive
    measured: bool
    method: str
    error: str


@dataclass(frozen=True, kw_only=True)
class EnergySession:
    """One process's work on the run; a resumed run has several.

    Attributes:
        seconds: wall clock.
        not_counted: what was not, with the reason.
    """

    started: str
    seconds: Positive
    parts: tuple[EnergyPart, ...] = ()
    not_counted: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Price:
    """Money for a kWh or an hour."""

    amount: Positive
    currency: str


@dataclass(frozen=True, kw_only=True)
class EnergyRecord:
    """`energy.json`; prices are those that were given last."""

    sessions: tuple[EnergySession, ...] = ()
    price_per_kwh: Price | None = None
    price_per_hour: Price | None = None

    @property
    def kwh(self) -> float:
        """Energy of all sessions."""
        return sum(part.joules for session in self.sessions for part in session.parts) / JOULES_PER_KWH

    @property
    def seconds(self) -> float:
        """Wall clock of all sessions."""
        return sum(session.seconds for session in self.sessions)

    @property
    def measured(self) -> bool:
        """Whether the machine counted all of it."""
        return all(part.measured for session in self.sessions for part in session.parts)

    @property
    def parts(self) -> tuple[EnergyPart, ...]:
        """What each part drew by each method, over all sessions."""
        found: dict[tuple[str, str], EnergyPart] = {}
        for part in (part for session in self.sessions for part in session.parts):
            before = found.get((part.of, part.method))
            joules = part.joules + (before.joules if before else 0.0)
            found[part.of, part.method] = EnergyPart(**{**vars(part), "joules": joules})
        return tuple(found.values())

    @property
    def not_counted(self) -> tuple[str, ...]:
        """What was not counted in some session, each once."""
        return tuple(dict.fromkeys(text for session in self.sessions for text in session.not_counted))

    @property
    def cost(self) -> Price | None:
        """What the run costs at the given prices; None without one."""
        given = [
            (price, amount)
            for price, amount in ((self.price_per_kwh, self.kwh), (self.price_per_hour, self.seconds / 3600))
            if price is not None
        ]
        if not given:
            return None
        return Price(amount=sum(price.amount * amount for price, amount in given), currency=given[0][0].currency)
