"""Silotune in Python: from a file of records to a private, federated run, its report and predictions.

    scenario = silotune.Scenario.from_csv("reviews.csv", text="text", label="label", epsilon=3)
    print(silotune.plan(scenario))
    run = silotune.simulate(scenario, "runs/reviews")

Everything here is what the command line does, by the same functions (docs/reference/python.md). Importing the module loads
nothing heavy: PyTorch and the rest come with the first name that needs them.

Guarantees (tests: tests/silotune)
    * A mistake raises a kind of `SilotuneError`, whose text says what was found, what was expected and what to do. Texts
      name options as the command line does: `--label` is the argument `label`.
    * An epsilon that is shown, or is an attribute of a `Run`, is an upper bound for what was executed, rounded up.
    * What stands in `__all__` keeps its name and its meaning from one version to the next, or CHANGELOG.md says so.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shared.errors import (
    AdapterError,
    ConfigError,
    DataError,
    LedgerError,
    ModelError,
    PrivacyError,
    RegistryError,
    RunError,
    SilotuneError,
    TrustError,
)
from shared.libraries import call_nobody

if TYPE_CHECKING:
    from silotune.planning import Plan, plan
    from silotune.runs import Run, load, simulate
    from silotune.scenarios import Scenario
    from silotune.showing import Figure

    __version__: str

__all__ = [
    "AdapterError",
    "ConfigError",
    "DataError",
    "Figure",
    "LedgerError",
    "ModelError",
    "Plan",
    "PrivacyError",
    "RegistryError",
    "Run",
    "RunError",
    "Scenario",
    "SilotuneError",
    "TrustError",
    "__version__",
    "load",
    "plan",
    "simulate",
]

_PLACES = {
    **dict.fromkeys(("Plan", "plan"), "silotune.planning"),
    **dict.fromkeys(("Run", "load", "simulate"), "silotune.runs"),
    "Scenario": "silotune.scenarios",
    "Figure": "silotune.showing",
}

call_nobody()


if not TYPE_CHECKING:  # or a type checker would take every name for one of the module

    def __getattr__(name: str) -> Any:
        """Import what is asked for when it is asked for (PEP 562)."""
        if name == "__version__":
            from shared.version import silotune_version

            return silotune_version()
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
