"""What counters say is summed as they mean it, what cannot be read is named, and money follows from both."""

from __future__ import annotations

import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.energy import (
    EnergyObserver,
    EnergySettings,
    energy_figures,
    energy_line,
    energy_settings,
    measuring,
    together,
)
from server.energy.measuring import Meter
from server.energy.sources import NotReadable, ProcessorTime, Rapl
from server.records.energy import ENERGY_FILE, EnergyPart, EnergyRecord, EnergySession, Price
from shared.errors import ConfigError
from shared.files.json_files import read_record
from shared.job.job import Job
from tests.server.tracking.told import checkpoint

RANGE = 262_143_328_850  # microjoules, as on many machines


def zone(folder: Path, number: str, name: str, energy: int) -> Path:
    """Write a zone of powercap, as Linux shows it."""
    place = folder / number
    place.mkdir(parents=True, exist_ok=True)
    for file, value in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", RANGE)):
        (place / file).write_text(f"{value}\n")
    return place


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two packages, one with memory of its own; what is part of a package, and what holds all, beside them."""
    folder = tmp_path / "powercap"
    zone(folder, "intel-rapl:0", "package-0", 1_000_000)
    zone(folder, "intel-rapl:0:0", "core", 5)
    zone(folder, "intel-rapl:0:1", "dram", 2_000_000)
    zone(folder, "intel-rapl:1", "package-1", RANGE - 500_000)
    zone(folder, "intel-rapl:2", "psys", 7)
    zone(folder, "intel-rapl-mmio:0", "package-0", 9)
    (folder / "intel-rapl").mkdir()
    return folder


def test_rapl_sums_packages_and_memory_and_nothing_twice(powercap: Path) -> None:
    counter = Rapl(powercap)
    assert counter.joules() == 0
    zone(powercap, "intel-rapl:0", "package-0", 4_000_000)
    zone(powercap, "intel-rapl:0:0", "core", 90_000_000)
    zone(powercap, "intel-rapl:0:1", "dram", 2_500_000)
    zone(powercap, "intel-rapl:2", "psys", 90_000_000)
    zone(powercap, "intel-rapl-mmio:0", "package-0", 90_000_000)
    assert counter.joules() == pytest.approx(3.5)


def test_a_rapl_counter_that_begins_anew_loses_nothing(powercap: Path) -> None:
    counter = Rapl(powercap)
    zone(powercap, "intel-rapl:1", "package-1", 1_500_000)
    assert counter.joules() == pytest.approx(2.0)
    zone(powercap, "intel-rapl:1", "package-1", RANGE - 1_000_000)
    counter.joules()
    zone(powercap, "intel-rapl:1", "package-1", 0)
    assert counter.joules() == pytest.approx(2.0 + (RANGE - 1_500_000) / 1e6)


def test_fault_a_plain_difference_would_be_negative(powercap: Path) -> None:
    """The planted counter does begin anew."""
    before = int((powercap / "intel-rapl:1" / "energy_uj").read_text())
    zone(powercap, "intel-rapl:1", "package-1", 1_500_000)
    assert int((powercap / "intel-rapl:1" / "energy_uj").read_text()) - before < 0


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters that root alone may read; the tests may run as root."""
    read = Path.read_text

    def refused(self: Path, *arguments: Any, **named: Any) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return read(self, *arguments, **named)

    monkeypatch.setattr(Path, "read_text", refused)


@pytest.mark.usefixtures("forbidden")
def test_counters_that_may_not_be_read_are_named_with_the_remedy(powercap: Path) -> None:
    with pytest.raises(NotReadable, match=r"root alone.*sudo chmod a\+r .*intel-rapl:\*/energy_uj"):
        Rapl(powercap)
    meter = Meter(EnergySettings(), gpu=False, powercap=powercap)
    session = meter.read()
    meter.close()
    assert [part.measured for part in session.parts] == [False]
    assert "root alone" in session.not_counted[0]


def test_without_counters_processor_time_is_taken(tmp_path: Path) -> None:
    meter = Meter(EnergySettings(cpu_watts=1000), gpu=False, powercap=tmp_path)
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    (part,) = meter.read().parts
    meter.close()
    assert part.joules > 0
    assert "1000 W over" in part.method
    assert "40 %" in part.error
    assert "this machine shows no RAPL counters" in meter.read().not_counted[0]


def test_a_counter_that_is_lost_on_the_way_keeps_what_it_counted(powercap: Path) -> None:
    meter = Meter(EnergySettings(), gpu=False, powercap=powercap)
    zone(powercap, "intel-rapl:0", "package-0", 4_000_000)
    assert meter.read().parts[0].joules == pytest.approx(3.0)
    (powercap / "intel-rapl:0" / "energy_uj").unlink()
    for _ in range(2):
        session = meter.read()
    meter.close()
    assert session.parts[0].joules == pytest.approx(3.0)
    assert len(session.not_counted) == 1
    assert "cannot be read" in session.not_counted[0]


def test_the_estimate_is_power_times_load(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    seconds = iter([10.0, 13.0])
    monkeypatch.setattr("server.energy.sources._processor_seconds", lambda: next(seconds))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert ProcessorTime(80).joules() == pytest.approx(3 * 80 / 8)


def gpu_library(monkeypatch: pytest.MonkeyPatch, readings: list[int], error: str = "") -> None:
    """Put NVML in place, as nvidia-ml-py has it: there is no GPU here."""
    library: Any = types.ModuleType("pynvml")
    library.NVMLError = type("NVMLError", (Exception,), {})

    def total(device: str) -> int:
        assert device == "device of GPU-1"
        if error:
            raise library.NVMLError(error)
        return readings.pop(0)

    library.nvmlInit = lambda: None
    library.nvmlDeviceGetHandleByUUID = lambda uuid: f"device of {uuid}"
    library.nvmlDeviceGetTotalEnergyConsumption = total
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(measuring, "gpu_uuid", lambda: "GPU-1")


def test_a_gpu_counts_in_millijoules_beside_the_processors(monkeypatch: pytest.MonkeyPatch, powercap: Path) -> None:
    gpu_library(monkeypatch, [5_000, 17_500])
    meter = Meter(EnergySettings(), gpu=True, powercap=powercap)
    session = meter.read()
    meter.close()
    assert [(part.of, part.joules, part.measured) for part in session.parts] == [
        ("CPU and memory", 0.0, True),
        ("GPU", 12.5, True),
    ]


@pytest.mark.parametrize("fault", ["Not Supported", "no library"])
def test_a_gpu_that_does_not_tell_is_named(monkeypatch: pytest.MonkeyPatch, powercap: Path, fault: str) -> None:
    gpu_library(monkeypatch, [], error=fault)
    if fault == "no library":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    meter = Meter(EnergySettings(), gpu=True, powercap=powercap)
    session = meter.read()
    meter.close()
    assert len(session.parts) == 1
    assert session.not_counted[0].startswith("the GPU: ")
    assert ("silotune[energy]" if fault == "no library" else "Not Supported") in session.not_counted[0]


def session(joules: float, seconds: float, *, measured: bool = True) -> EnergySession:
    part = EnergyPart(of="processors", joules=joules, measured=measured, method="a counter", error="5 %")
    return EnergySession(started="2026-01-01T00:00:00+00:00", seconds=seconds, parts=(part,), not_counted=("the GPU",))


def test_a_cost_is_energy_and_time_at_their_prices() -> None:
    record = EnergyRecord(
        sessions=(session(1.8e6, 1800), session(5.4e6, 1800)),
        price_per_kwh=Price(amount=0.30, currency="EUR"),
        price_per_hour=Price(amount=2.50, currency="EUR"),
    )
    assert record.kwh == pytest.approx(2.0)
    assert record.cost == Price(amount=pytest.approx(2 * 0.30 + 2.50), currency="EUR")
    assert energy_line(record) == "2 kWh measured (a counter), 3.10 EUR"
    figures = energy_figures(record)
    assert figures["cost"] == {"amount": 3.1, "currency": "EUR"}
    assert figures["parts"] == [{"of": "processors", "joules": 7.2e6, "method": "a counter", "error": "5 %"}]
    assert figures["not_counted"] == ["the GPU"]
    both = together([record, EnergyRecord(sessions=(session(3.6e6, 1, measured=False),))])
    assert both is not None
    assert both.kwh == pytest.approx(3.0)
    assert not both.measured
    assert together([]) is None


def test_a_resumed_run_adds_to_what_it_drew(
    classification_job: Callable[..., Job], powercap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "POWERCAP", powercap)
    monkeypatch.setattr(Meter.__init__, "__kwdefaults__", {"powercap": powercap})
    job, folder = classification_job(), tmp_path / "run"
    folder.mkdir()
    energy = 1_000_000
    for rounds in ((0, 1), (2, 3)):
        observer = EnergyObserver(folder, EnergySettings(price_per_kwh=Price(amount=1, currency="CHF")), gpu=False)
        for number in rounds:
            energy += 1_800_000
            zone(powercap, "intel-rapl:0", "package-0", energy)
            observer.round_done(checkpoint(job, number))
            kept = read_record(folder / ENERGY_FILE, EnergyRecord)
        observer.ended(checkpoint(job, rounds[-1]), complete=True)
    assert len(kept.sessions) == 2
    assert kept.kwh * 3.6e6 == pytest.approx(4 * 1.8)
    assert json.loads((folder / ENERGY_FILE).read_text())["price_per_kwh"] == {"amount": 1, "currency": "CHF"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"price_per_kwh": "0.30"}, "'0.30 EUR'"),
        ({"price_per_kwh": "-1 EUR"}, "expected an amount and a currency"),
        ({"price_per_hour": "2,5 EUR"}, "--price-per-hour is '2,5 EUR'"),
        ({"price_per_kwh": "1 EUR", "price_per_hour": "1 USD"}, "one currency"),
        ({"cpu_watts": 0.0}, "--cpu-watts is 0"),
        ({"cpu_watts": float("nan")}, "--cpu-watts is nan"),
    ],
)
def test_a_mistake_is_named(options: dict[str, Any], words: str) -> None:
    nothing: dict[str, Any] = {"price_per_kwh": None, "price_per_hour": None, "cpu_watts": None}
    with pytest.raises(ConfigError, match=words):
        energy_settings(False, **nothing | options)


def test_a_price_asks_for_the_energy_too() -> None:
    nothing: dict[str, Any] = {"price_per_kwh": None, "price_per_hour": None, "cpu_watts": None}
    assert energy_settings(False, **nothing) is None
    assert energy_settings(True, **nothing) == EnergySettings()
    found = energy_settings(False, **nothing | {"price_per_kwh": "0.30EUR"})
    assert found == EnergySettings(price_per_kwh=Price(amount=0.3, currency="EUR"))
