"""Energy and cost in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from server.records.energy import EnergyRecord
from server.reports.run.formats import format_energy, format_money


def energy_line(record: EnergyRecord) -> str:
    """Return one line: how much, how it is known, what it costs."""
    how = "measured" if record.measured else "estimated"
    methods = "; ".join(dict.fromkeys(part.method for part in record.parts)) or "nothing could be counted"
    cost = record.cost
    text = f"{format_energy(record.kwh)} {how} ({methods})"
    return text if cost is None else f"{text}, {format_money(cost)}"


def energy_figures(record: EnergyRecord) -> dict[str, Any]:
    """Return the same for programs, with the error of every part."""
    cost = record.cost
    return {
        "kwh": float(f"{record.kwh:.4g}"),
        "measured": record.measured,
        "parts": [
            {"of": part.of, "joules": round(part.joules, 3), "method": part.method, "error": part.error}
            for part in record.parts
        ],
        "not_counted": list(record.not_counted),
        "cost": None if cost is None else {"amount": float(f"{cost.amount:.4g}"), "currency": cost.currency},
    }


def together(records: Sequence[EnergyRecord]) -> EnergyRecord | None:
    """Return what several trainings drew, at the prices of the first; None without one."""
    if not records:
        return None
    return replace(records[0], sessions=tuple(session for record in records for session in record.sessions))
