"""The report of one run: a single self-contained HTML file that an auditor can file away.

It only reads the run folder. It runs no code, asks no network and escapes every text that it shows.
"""

from __future__ import annotations

import logging
from pathlib import Path

from server.reports.run.reading import read_arm
from server.reports.run.render import write_report


def write_report_if_possible(run_dir: Path) -> None:
    """Write the report of a run that is over; what stops it is said, for the run's own files need no report."""
    try:
        write_report(run_dir)
    except Exception as error:
        logging.getLogger("silotune.report").warning(
            "The run in %s is complete, but its report could not be written: %s: %s. `silotune report %s` tries again.",
            run_dir,
            type(error).__name__,
            error,
            run_dir,
        )


__all__ = ["read_arm", "write_report", "write_report_if_possible"]
