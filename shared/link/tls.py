"""TLS 1.3 and nothing older, for every gRPC connection of this process.

grpc accepts TLS 1.2 and has no switch for it in Python. It reads GRPC_SSL_CIPHER_SUITES, which names ciphers of TLS 1.2 only,
once, when it is imported. The one cipher named here needs an RSA certificate, and all of ours are ECDSA: no handshake of TLS
1.2 finds a cipher, and TLS 1.3, which chooses its own, is untouched. Measured with grpcio 1.85.1: set after the import, the
variable does nothing and TLS 1.2 is accepted.

Guarantee (tests: tests/integration/link/test_strangers.py): `openssl s_client -tls1_2` is refused, and a server does not start in
a process where the variable came too late. Every stream's version is checked as well (`server.link.service`).
"""

from __future__ import annotations

import os
import sys

from shared.errors import RunError

VARIABLE = "GRPC_SSL_CIPHER_SUITES"
NO_CIPHER_OF_1_2 = "ECDHE-RSA-AES256-GCM-SHA384"

_in_time = False


def allow_only_1_3() -> None:
    """Set the variable, if grpc was not imported yet."""
    global _in_time
    if "grpc" not in sys.modules:
        os.environ[VARIABLE] = NO_CIPHER_OF_1_2
        # Otherwise grpc prints a line for every handshake of a stranger.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
        _in_time = True
    else:
        # A parent, or whoever imported grpc, may have seen to it.
        _in_time = _in_time or os.environ.get(VARIABLE) == NO_CIPHER_OF_1_2


def check() -> None:
    """Check that the variable was there when grpc was imported.

    Raises:
        RunError: if not.
    """
    if not _in_time:
        raise RunError(
            f"this process would accept TLS 1.2: grpc was imported before {VARIABLE} was set. Import shared.link first, or set "
            f"{VARIABLE}={NO_CIPHER_OF_1_2} before the process starts."
        )
