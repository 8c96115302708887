"""What a run draws from the plug, as far as the machine tells, and what that costs.

Guarantees (tests: tests/server/energy/)
    * Every figure names its method and its error. What the machine counts is measured (RAPL, NVML), the rest estimated, and
      what is neither is named as not counted.
    * Nothing is asked over a network, and nothing fails because a counter is missing or may not be read.
    * It is the energy of this machine; what sites draw is theirs, and nobody asks for it.
"""

from server.energy.measuring import EnergyObserver
from server.energy.settings import EnergySettings, energy_settings
from server.energy.words import energy_figures, energy_line, together

__all__ = [
    "EnergyObserver",
    "EnergySettings",
    "energy_figures",
    "energy_line",
    "energy_settings",
    "together",
]
