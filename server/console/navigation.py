"""The lines of the console's navigation, in order."""

from __future__ import annotations

from shared.web.console import Entry
from shared.web.roles import Action

NAVIGATION = (
    Entry(key="runs", path="/runs", action=Action.SEE_RUNS),
    Entry(key="sites", path="/sites", action=Action.SEE_SITES),
    Entry(key="new_job", path="/jobs/new", action=Action.MAKE_JOBS),
    Entry(key="accounts", path="/accounts", action=Action.MANAGE_ACCOUNTS),
)
