"""gRPC's failures in words that say what to mend."""

from __future__ import annotations

import grpc
import pytest

from client.link.failures import NotAdmitted, Unreachable, explained
from shared.errors import TrustError
from shared.link.frames import LinkError

CODE = grpc.StatusCode


@pytest.mark.parametrize(
    ("code", "details", "kind", "words"),
    [
        (
            CODE.PERMISSION_DENIED,
            "the certificate of a was revoked.",
            NotAdmitted,
            "does not admit this site: the certif",
        ),
        (CODE.ALREADY_EXISTS, "a process with the key of a is connected", NotAdmitted, "is connected"),
        (CODE.INVALID_ARGUMENT, "the first frame was no hello.", LinkError, "Compare `silotune --version`"),
        (CODE.UNIMPLEMENTED, "Method not found!", LinkError, "no coordinator of this version"),
        (
            CODE.UNAVAILABLE,
            "... CERTIFICATE_VERIFY_FAILED: certificate has expired",
            TrustError,
            "this machine's clock",
        ),
        (CODE.UNAVAILABLE, "Hostname Verification Check failed.", TrustError, "made for another host"),
        (CODE.UNAVAILABLE, "SSL_ERROR_SSL: WRONG_VERSION_NUMBER", Unreachable, "does not speak TLS"),
        (CODE.UNAVAILABLE, "connect: Connection refused (111)", Unreachable, "firewall lets this machine"),
        (CODE.UNAVAILABLE, "DNS resolution failed for nowhere:9092", Unreachable, "check the address and the DNS"),
        (CODE.UNAVAILABLE, "errors resolving nowhere:9092: [getaddrinfo]", Unreachable, "is not known here"),
        (CODE.UNAVAILABLE, "Socket closed", NotAdmitted, "probably this site's certificate is not admitted"),
        (CODE.UNAVAILABLE, "recvmsg:Connection reset by peer", NotAdmitted, "probably"),
        (CODE.UNKNOWN, "something\x1b[2J else", Unreachable, "does not answer (UNKNOWN: something [2J else)"),
    ],
)
def test_each_failure_says_what_to_mend(code: grpc.StatusCode, details: str, kind: type[Exception], words: str) -> None:
    found = explained(code, details, address="fl.example.org:9092", proxy=None, welcomed=False)
    assert type(found) is kind
    assert words in str(found)
    assert "fl.example.org:9092" in str(found)


def test_a_stream_that_was_open_is_lost_and_not_refused() -> None:
    found = explained(CODE.UNAVAILABLE, "Socket closed", address="h:1", proxy=None, welcomed=True)
    assert type(found) is Unreachable
    assert "was lost" in str(found)


def test_a_proxy_is_named_without_its_password() -> None:
    found = explained(
        CODE.UNAVAILABLE, "HTTP proxy returned 403", address="h:1", proxy="http://me:secret@proxy:3128", welcomed=False
    )
    assert "through the proxy http://proxy:3128" in str(found)
    assert "secret" not in str(found)
