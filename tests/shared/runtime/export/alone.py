"""The lines of a model card in a process of their own, which cannot import Silotune, PEFT or what the lines do not need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

OURS = ("shared", "server", "client", "simulations", "cli", "peft", "opacus", "flwr")
_PROGRAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
for name in {missing!r}:
    sys.modules[name] = None  # so that importing it fails
scope = {{}}
exec({lines!r}, scope)
print(json.dumps([scope["texts"] if isinstance(scope["texts"], list) else scope["texts"].tolist(), scope["logits"].tolist()]))
"""


def card_lines(folder: Path) -> str:
    """Return the Python of the card, nothing changed."""
    return (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]


def run_card(folder: Path, *, missing: tuple[str, ...]) -> tuple[Any, list[Any], list[str]]:
    """Run the card's lines in the model's folder; return its texts, its logits and what was printed before."""
    program = _PROGRAM.format(missing=(*OURS, *missing), lines=card_lines(folder))
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    texts, logits = json.loads(last)
    return texts, logits, printed
