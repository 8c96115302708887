"""What `--energy` and the prices beside it ask for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from server.records.energy import Price
from shared.errors import ConfigError

_PRICE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Z]{3})")
_MOST_WATTS = 10_000.0


@dataclass(frozen=True, kw_only=True)
class EnergySettings:
    """How energy is counted.

    Attributes:
        cpu_watts: thermal design power of all processors together, for the estimate; None takes a usual one for each core.
        price_per_kwh, price_per_hour: for the cost.
    """

    cpu_watts: float | None = None
    price_per_kwh: Price | None = None
    price_per_hour: Price | None = None


def energy_settings(
    asked: bool, *, price_per_kwh: str | None, price_per_hour: str | None, cpu_watts: float | None
) -> EnergySettings | None:
    """Return what the options ask for; None if it is nothing. A price or a power asks for the energy, too.

    Raises:
        ConfigError: a price is none, two have different currencies, or the power is out of range.
    """
    if not asked and price_per_kwh is None and price_per_hour is None and cpu_watts is None:
        return None
    if cpu_watts is not None and not 0 < cpu_watts <= _MOST_WATTS:
        raise ConfigError(
            f"--cpu-watts is {cpu_watts:g}; expected the power of all processors, up to {_MOST_WATTS:g} W."
        )
    kwh, hour = _price(price_per_kwh, "--price-per-kwh"), _price(price_per_hour, "--price-per-hour")
    if kwh is not None and hour is not None and kwh.currency != hour.currency:
        raise ConfigError(
            f"--price-per-kwh is in {kwh.currency} and --price-per-hour in {hour.currency}; give both in one currency."
        )
    return EnergySettings(cpu_watts=cpu_watts, price_per_kwh=kwh, price_per_hour=hour)


def _price(text: str | None, option: str) -> Price | None:
    if text is None:
        return None
    found = _PRICE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(
            f"{option} is {text!r}; expected an amount and a currency of three letters, such as '0.30 EUR'."
        )
    return Price(amount=float(found[1]), currency=found[2])
