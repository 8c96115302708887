"""The pages about sites: who may connect, admit, shut out; as `silotune coordinator install` does it.

What somebody pastes is judged and shown first: its fingerprint has to be compared by telephone, and a revocation list ends
connections. Only then a second form puts it into force.

Formal guarantees (tests: tests/server/console/test_sites.py)
    * Nothing is admitted that the command line would refuse (test_what_the_trust_store_refuses_is_not_admitted).
    * Who admitted whom stands in the audit log before it holds (test_it_is_noted_first).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import Form
from fastapi.responses import Response

from server.console.content import content_of
from server.console.routes.run_pages import Number, Search, Since
from shared.errors import TrustError
from shared.trust.certificates import fingerprint, identity
from shared.trust.revocation import crl_number
from shared.web.asked import Asked, Here, Routes
from shared.web.roles import Action, allowed

ROUTES = Routes()

A_PAGE = 50
MOST_CHARACTERS = 40_000
"""Of what is pasted; a request has at most 64 KiB."""

Pem = Annotated[str, Form(max_length=MOST_CHARACTERS)]


@ROUTES.page("/sites", Action.SEE_SITES)
def sites(asked: Here, search: Search = "", page: Number = 1) -> Response:
    """Show all sites."""
    return _shown(asked, search, page)


@ROUTES.page("/sites/listed", Action.SEE_SITES)
def listed(asked: Here, search: Search = "", page: Number = 1) -> Response:
    """Show the table of sites; a part of the page, which follows what happens."""
    return _shown(asked, search, page, template="sites-listed.html" if asked.is_fragment else "sites.html")


@ROUTES.page("/sites/events", Action.SEE_SITES)
def events(asked: Here, since: Since = "") -> Response:
    """Say when the list changes."""
    content = content_of(asked)
    return content.streams.answer(asked, Action.SEE_SITES, lambda: content.sites.mark, since=since)


@ROUTES.page("/sites/check", Action.ADMIT_SITES, method="POST")
def check(asked: Here, certificate: Pem = "") -> Response:
    """Show whose certificate this is, before it is admitted."""
    try:
        found = content_of(asked).sites.store.check(certificate.encode(), datetime.now(UTC))
    except TrustError as error:
        return _shown(asked, problem=str(error), status=422)
    return asked.page("site-check.html", found=_told(found), pem=certificate)


@ROUTES.page("/sites/admit", Action.ADMIT_SITES, method="POST")
def admit(asked: Here, certificate: Pem = "") -> Response:
    """Admit a site by its certificate; a running coordinator lets it in within a second."""
    content, now = content_of(asked), datetime.now(UTC)
    try:
        found = _told(content.sites.store.check(certificate.encode(), now))
    except TrustError as error:
        return _shown(asked, problem=str(error), status=422)
    details = {"site": found["name"], "fingerprint": found["fingerprint"], "until": found["until"].isoformat()}
    content.record(asked.me().name, "admit site", details | {"address": asked.address})
    content.sites.store.install(certificate.encode(), now)
    return asked.to("/sites")


@ROUTES.page("/sites/revocations/check", Action.ADMIT_SITES, method="POST")
def check_list(asked: Here, revocations: Pem = "") -> Response:
    """Show whom a revocation list shuts out, before it is put into force."""
    content = content_of(asked)
    try:
        found = content.sites.store.check_list(revocations.encode())
    except TrustError as error:
        return _shown(asked, problem=str(error), status=422)
    return asked.page("revocations-check.html", number=crl_number(found), ended=_ended(asked, found), pem=revocations)


@ROUTES.page("/sites/revocations", Action.ADMIT_SITES, method="POST")
def install_list(asked: Here, revocations: Pem = "") -> Response:
    """Put a revocation list into force; a running coordinator ends the connections of those on it within a second."""
    content = content_of(asked)
    try:
        found = content.sites.store.check_list(revocations.encode())
    except TrustError as error:
        return _shown(asked, problem=str(error), status=422)
    details = {"number": crl_number(found), "sites": _ended(asked, found), "address": asked.address}
    content.record(asked.me().name, "install revocation list", details)
    try:
        content.sites.store.install_list(found)
    except TrustError as error:  # a newer one came in meanwhile
        return _shown(asked, problem=str(error), status=409)
    return asked.to("/sites")


def _told(certificate: x509.Certificate) -> dict[str, Any]:
    name, _ = identity(certificate)
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)  # noqa: S101 (it was judged)
    return {"name": name, "fingerprint": fingerprint(key), "until": certificate.not_valid_after_utc}


def _ended(asked: Asked, crl: x509.CertificateRevocationList) -> list[str]:
    """Return the sites that may connect now, and of which a certificate is on a list."""
    return sorted(
        {
            one.name
            for one in content_of(asked).sites.store.sites(datetime.now(UTC))
            if one.state == "valid"
            and one.serial is not None
            and crl.get_revoked_certificate_by_serial_number(one.serial) is not None
        }
    )


def _shown(
    asked: Asked,
    search: str = "",
    page: int = 1,
    *,
    template: str = "sites.html",
    problem: str = "",
    status: int = 200,
) -> Response:
    content = content_of(asked)
    told, mark = content.said.now(), content.sites.mark
    try:
        names, is_trusted = content.sites.names(search), True
        num_admitted = content.sites.num_admitted(search)
        shown = content.sites.some(names[(page - 1) * A_PAGE : page * A_PAGE])
    except TrustError:
        names, shown, is_trusted, num_admitted = [], [], False, 0
    return asked.page(
        template,
        status=status,
        sites=shown,
        told=told,
        is_trusted=is_trusted,
        num_found=len(names),
        num_admitted=num_admitted,
        num_online=sum(told.online.get(name, False) for name in names),
        page=page,
        num_pages=max(1, -(-len(names) // A_PAGE)),
        search=search,
        mark=mark,
        problem=problem,
        most=MOST_CHARACTERS,
        may_admit=allowed(asked.me().role, Action.ADMIT_SITES),
    )
