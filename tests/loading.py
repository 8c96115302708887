"""Which heavy libraries a command loads: whoever asks for help or a plan waits for none of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAVY = (
    *("torch", "transformers", "peft", "opacus", "flwr", "grpc", "ray"),
    *("numpy", "scipy", "sklearn", "pandas", "pyarrow", "matplotlib", "jinja2"),
)


def run_and_list(*arguments: object) -> tuple[str, set[str]]:
    """Run `silotune` in a process of its own, which must succeed; return what it printed and every module that it loaded."""
    code = f"""
import sys, cli
try:
    cli.main({[*map(str, arguments)]!r})
except SystemExit as ended:
    assert not ended.code, ended.code
print()
print(*sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    out, _, loaded = done.stdout.rstrip("\n").rpartition("\n")
    return out, set(loaded.split())
