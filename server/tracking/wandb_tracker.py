"""Runs in Weights & Biases, online or as files that `wandb sync` sends later.

Everything that its library would add by itself is switched off: what is printed, code, requirements, the machine and its load.
"""

from __future__ import annotations

import logging
import netrc
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from server.tracking.run_told import Ending, Figures, RunTold
from shared.errors import ConfigError

_SECONDS_TO_BEGIN = 10.0
_NOTHING_BY_ITSELF: dict[str, Any] = {
    "console": "off",
    "silent": True,
    "disable_code": True,
    "disable_git": True,
    "save_code": False,
    "disable_job_creation": True,
    "host": "",
    "username": "",
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
}
# Its process would otherwise try for hours, and whoever started it waits for it. What it could not send stays in wandb/run-*.
_PATIENCE: dict[str, Any] = {
    "init_timeout": _SECONDS_TO_BEGIN,
    "summary_timeout": 5,
    **{f"x_{part}_retry_max": 1 for part in ("graphql", "file_stream", "file_transfer")},
    **{f"x_{part}_retry_wait_min_seconds": 1 for part in ("graphql", "file_stream", "file_transfer")},
    **{f"x_{part}_retry_wait_max_seconds": 1 for part in ("graphql", "file_stream", "file_transfer")},
    **{f"x_{part}_timeout_seconds": 5 for part in ("graphql", "file_stream", "file_transfer")},
}
_EXIT_CODE = {"completed": 0, "stopped": 255, "failed": 1}


class WandbTracker:
    """See the module.

    Args:
        mode: online or offline.

    Raises:
        ConfigError: online, if there is no key; the library would ask for one and wait.
    """

    def __init__(self, mode: str) -> None:
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # its calls home
        logging.getLogger("wandb").setLevel(logging.ERROR)
        if mode == "online" and not _has_key():
            raise ConfigError(
                "W&B has no key on this machine, and would wait for somebody to type one. Set WANDB_API_KEY, run "
                "`wandb login`, or take --track wandb:offline."
            )
        self._mode: Literal["online", "offline"] = "online" if mode == "online" else "offline"
        self._ids: dict[str, str] = {}  # chosen once, so that a second try does not begin a second run

    def record(self, run: RunTold, known_as: str | None) -> WandbRecording:
        """See `Tracker`; the name is ours, so a resumed run is the same one when it is synced."""
        own = known_as or self._ids.setdefault(run.name, uuid.uuid4().hex[:12])
        return WandbRecording(run, own, self._mode, is_new=known_as is None)


class WandbRecording:
    """See `Recording`."""

    def __init__(self, run: RunTold, own: str, mode: Literal["online", "offline"], *, is_new: bool) -> None:
        import wandb

        self.id, self.is_new = own, is_new
        self._run: Any = wandb.init(
            project=run.experiment,
            name=run.name,
            id=self.id,
            resume="allow" if mode == "online" else None,  # files of one name are one run once they are synced
            reinit="create_new",
            config={**run.tags, **run.settings},
            # By itself it keeps to the folder of a process's first run.
            dir=os.environ.get("WANDB_DIR") or str(Path.cwd()),
            settings=wandb.Settings(mode=mode, **_NOTHING_BY_ITSELF, **_PATIENCE),
        )

    def send(self, figures: Sequence[Figures]) -> None:
        """See `Recording`."""
        for one in figures:
            self._run.log(dict(one.values), step=one.round)

    def finish(self, ending: Ending) -> None:
        """See `Recording`."""
        import wandb

        for name, path in ending.artifacts.items():
            artifact = wandb.Artifact(f"{self.id}-{name.partition('.')[0]}", type=name.partition(".")[0])
            if path.is_dir():
                artifact.add_dir(str(path))
            else:
                artifact.add_file(str(path), name)
            self._run.log_artifact(artifact)
        self._run.finish(exit_code=_EXIT_CODE[ending.status])


def _has_key() -> bool:
    """Return whether the library will find a key where it looks for one: in the environment, or in the file of `wandb login`."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host is not None and netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
