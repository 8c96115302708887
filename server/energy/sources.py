"""Counters of energy, each with its method and its error: RAPL, NVML, and an estimate by processor time.

Counters count from when they are made, in joules.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
WATTS_PER_CORE = 4.0


class NotReadable(Exception):
    """The machine does not tell; the text says why."""


class Source(Protocol):
    """A counter of energy.

    Attributes:
        of, measured, method, error: see `EnergyPart`.
    """

    of: str
    measured: bool
    method: str
    error: str

    def joules(self) -> float:
        """Return the energy since the counter was made; raises `NotReadable` if it can no longer be read."""


class Rapl:
    """Running Average Power Limit: counters in processors of Intel and AMD, which Linux shows as files in microjoules.

    Only whole packages and memory are summed: cores and graphics are parts of a package, and `psys` holds all of them. A counter
    that is below its last value has begun anew at its range (minutes to hours), so it has to be read more often than that.

    Raises:
        NotReadable: there are none, or they may not be read; Linux shows them to root alone since CVE-2020-8694.
    """

    of, measured = "CPU and memory", True
    method = "RAPL counters of the processors"
    error = (
        "close to a meter at the plug (Khan et al. 2018), but of everything that ran on the machine, and without fans, disks, "
        "board and power supply"
    )

    def __init__(self, folder: Path = POWERCAP) -> None:
        zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if _counts(zone)]
        if not zones:
            raise NotReadable("this machine shows no RAPL counters")
        self._ranges = {zone: _microjoules(zone / "max_energy_range_uj") for zone in zones}
        self._last = {zone: _microjoules(zone / "energy_uj") for zone in zones}
        self._sum = 0

    def joules(self) -> float:
        """See `Source`."""
        for zone, last in self._last.items():
            now = _microjoules(zone / "energy_uj")
            self._sum += now - last if now >= last else self._ranges[zone] - last + now
            self._last[zone] = now
        return self._sum / 1e6


def _counts(zone: Path) -> bool:
    try:
        name = (zone / "name").read_text().strip()
    except OSError:
        return False
    return name.startswith("package-") or name == "dram"


def _microjoules(path: Path) -> int:
    try:
        return int(path.read_text())
    except PermissionError:
        raise NotReadable(
            "RAPL counters may be read by root alone here; to change that until the next start: sudo chmod a+r "
            f"{path.parent.parent}/intel-rapl:*/energy_uj"
        ) from None
    except (OSError, ValueError) as error:
        raise NotReadable(f"the RAPL counter {path} cannot be read ({type(error).__name__})") from None


class Nvml:
    """NVIDIA's counter of a GPU since its driver was loaded, in millijoules; of GPUs since Volta.

    Args:
        uuid: of the GPU.

    Raises:
        NotReadable: nvidia-ml-py is missing, or the GPU has no such counter.
    """

    of, measured = "GPU", True
    method = "NVML's counter of the GPU"
    error = (
        "about 5 %, more where load changes quickly, for newer GPUs sample a part of the time (Yang et al. 2024); of everything "
        "that ran on the GPU"
    )

    def __init__(self, uuid: str) -> None:
        try:
            import pynvml
        except ImportError:
            raise NotReadable('nvidia-ml-py is not installed (pip install "silotune[energy]")') from None
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            self._device = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except pynvml.NVMLError as error:
            raise NotReadable(f"NVML does not answer ({error})") from None
        self._first = self._millijoules()

    def _millijoules(self) -> int:
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device))
        except self._nvml.NVMLError as error:
            raise NotReadable(f"NVML does not tell the GPU's energy ({error})") from None

    def joules(self) -> float:
        """See `Source`."""
        return (self._millijoules() - self._first) / 1e3


class ProcessorTime:
    """Processor time of this process times the power of a core: thermal design power times load.

    Args:
        watts: thermal design power of all processors; None is 4 W a core, as CodeCarbon takes of processors that it does not
            know.
    """

    of, measured = "CPU", False
    error = (
        "up to 40 % against a meter (Fischer 2025, of such estimates), more where the processor's own power is not given; of "
        "this process alone, without memory and what the machine draws when idle"
    )

    def __init__(self, watts: float | None = None) -> None:
        cores = os.cpu_count() or 1
        self._watts = WATTS_PER_CORE if watts is None else watts / cores
        said = (
            f"{watts:g} W over {cores} cores, as given"
            if watts is not None
            else f"{WATTS_PER_CORE:g} W a core, assumed"
        )
        self.method = f"thermal design power times load, by processor time ({said})"
        self._first = _processor_seconds()

    def joules(self) -> float:
        """See `Source`."""
        return self._watts * (_processor_seconds() - self._first)


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def gpu_uuid() -> str | None:
    """Return the UUID of the GPU that PyTorch computes on; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
