"""What the accountant's answers are made of: cells, which take time and memory on every machine alike."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cells:
    """Cells that a test had computed.

    Attributes:
        composed: of each composition.
        of_steps: of each evaluation of one step's divergence, times sites.
    """

    composed: list[int] = field(default_factory=list)
    of_steps: list[int] = field(default_factory=list)
