"""The compliance report of a run: what was trained, by whom, what was spent and released, in words that a lawyer can use.

`reading` reads the run and recomputes, into `facts`; `checks` compares. `content`, `evidence` and `spending` put the facts into
words, and `html` and `pdf` only lay these out, so that both say the same. It reads files; it runs no code of theirs and asks
no network.
"""

from __future__ import annotations

from server.reports.compliance.ledgers import Account, load_account
from server.reports.compliance.report import Format, write_compliance_report

__all__ = ["Account", "Format", "load_account", "write_compliance_report"]
