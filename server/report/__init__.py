"""The report of one run: a single self-contained HTML file that an auditor can file away.

It only reads the run folder. It runs no code, asks no network and escapes every text that it shows.
"""

from __future__ import annotations

from server.report.render import write_report

__all__ = ["write_report"]
