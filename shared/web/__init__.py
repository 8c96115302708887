"""What all consoles share: accounts, sign-in, roles, the design system, and the process that serves pages.

Only `client.console`, `server.console` and `simulations.console` import it; a process in which it runs never loads PyTorch
(tests/client/console/test_process.py, tests/server/console/test_process.py). What it needs is the extra `console`, so nothing
outside these rooms may import it at its top: `require_web` is asked first.
"""

from __future__ import annotations

import importlib.util

from shared.errors import ConfigError

_NEEDED = (
    "alembic",
    "argon2",
    "authlib",
    "fastapi",
    "httpx",
    "joserfc",
    "multipart",
    "psycopg",
    "pyotp",
    "segno",
    "sqlalchemy",
    "uvicorn",
)


def require_web() -> None:
    """Check that the extra `console` is installed.

    Raises:
        ConfigError: naming what is missing and how to install it.
    """
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f'the console needs {", ".join(missing)}, which this installation does not have: pip install "silotune[console]"'
        )
