"""What libraries may do beside their work: call nobody, and draw no progress bars between our lines.

Both act by environment variables, so they come before the libraries are imported.
"""

from __future__ import annotations

import os


def call_nobody() -> None:
    """Forbid telemetry and checks for updates, whatever else the environment says: no part of Silotune calls home."""
    os.environ["FLWR_TELEMETRY_ENABLED"], os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "0", "1"


def hide_progress() -> None:
    """Silence bars and advice that say nothing a user could act on; who set the variables otherwise sees them."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
