"""Why a site is not connected, in words that say what to mend."""

from __future__ import annotations

import re

import grpc

from shared.errors import RunError, TrustError
from shared.link.frames import LinkError


class Unreachable(RunError):
    """The coordinator cannot be reached now; trying again later may help."""


class NotAdmitted(TrustError):
    """The coordinator does not let this key in now: unknown, revoked, or connected already."""


def explained(
    code: grpc.StatusCode, details: str, *, address: str, proxy: str | None, welcomed: bool
) -> RunError | TrustError:
    """Return gRPC's failure as one of ours.

    Args:
        code, details: gRPC's.
        address: of the coordinator.
        proxy: through which it was called.
        welcomed: whether the stream was open before.
    """
    told = "".join(c if c.isprintable() else " " for c in details[:300])
    if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.ALREADY_EXISTS):
        return NotAdmitted(f"the coordinator at {address} does not admit this site: {told}")
    if code == grpc.StatusCode.INVALID_ARGUMENT:
        return LinkError(
            f"the coordinator at {address} does not understand this site: {told} Compare `silotune --version` on both machines."
        )
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return LinkError(
            f"what answers at {address} is no coordinator of this version; check the address, and compare `silotune --version` "
            "on both machines."
        )
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return TrustError(
            f"the certificate of {address} does not hold. Check that ca.crt is the consortium's, this machine's clock, and that "
            "the coordinator's certificate has not expired."
        )
    if re.search(r"[Hh]ost ?name [Vv]erification|HOSTNAME_MISMATCH", details):
        return TrustError(
            f"the certificate of {address} was made for another host; check the address, or ask the coordinator for one under "
            "which its certificate was made."
        )
    if re.search(r"WRONG_VERSION_NUMBER|TSI_PROTOCOL_FAILURE|missing selected ALPN|alpn", details, flags=re.IGNORECASE):
        return Unreachable(
            f"what answers at {address} does not speak TLS as a coordinator does ({told}); check the port, and exempt the "
            "connection if a firewall inspects TLS."
        )
    if welcomed:
        return Unreachable(f"the connection to the coordinator at {address} was lost ({told or code.name}).")
    if proxy is not None:
        return Unreachable(
            f"the coordinator at {address} cannot be reached through the proxy {_without_password(proxy)} ({told}); check both "
            "addresses, and that the proxy may CONNECT to the coordinator's port."
        )
    if re.search(r"resolution|DNS|resolv", details):
        return Unreachable(f"the host of {address} is not known here ({told}); check the address and the DNS.")
    if re.search(r"refused|unreachable|timed out|Timeout|No route|FD Shutdown|connect failed", details):
        return Unreachable(
            f"the coordinator at {address} cannot be reached ({told}); check the address, that the coordinator runs, and that "
            "the firewall lets this machine open connections to it."
        )
    # A server that does not like a certificate of TLS 1.3 closes the connection without a word.
    if re.search(r"Socket closed|reset by peer|Broken pipe|ALERT|EOF|GOAWAY|end of TCP", details, flags=re.IGNORECASE):
        return NotAdmitted(
            f"the coordinator at {address} closed the connection at once: probably this site's certificate is not admitted "
            "(another CA, expired), or a firewall cuts the connection. Ask the coordinator."
        )
    return Unreachable(f"the coordinator at {address} does not answer ({code.name}: {told}).")


def _without_password(proxy: str) -> str:
    return re.sub(r"//.*@", "//", proxy)
