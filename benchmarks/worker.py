"""One call in a process of its own: `python -m benchmarks.worker MODULE FUNCTION JSON-ARGUMENTS ANSWER-FILE`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from benchmarks.harness import calm_environment


def main() -> None:
    """Call the function and write what it returns."""
    module, function, arguments, answer = sys.argv[1:]
    calm_environment()
    result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    Path(answer).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
