"""The pages of a site's console; what they show comes from `client.console.content`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import Path, Query
from fastapi.responses import Response

from client.console.audit.packed import Release
from client.console.content import SiteContent, being_read, content_of
from client.console.state import accepted_backbones, clock_offset, health
from shared.trust.audit_log import Event
from shared.web.asked import Asked, Denied, Here, Routes
from shared.web.console import Entry
from shared.web.entries import Line, backwards, every
from shared.web.exports import as_csv, as_json_lines
from shared.web.roles import Action, allowed

ROUTES = Routes()


def _num_waiting(content: SiteContent) -> int:
    return content.requests.num_waiting if content.is_read.is_set() else 0


def _num_proposed(content: SiteContent) -> int:
    """How many changes of the policy wait; pages about something else neither wait nor fail for it."""
    return content.policies.num_open if content.is_read.is_set() else 0


NAVIGATION = (
    Entry(key="requests", path="/requests", action=Action.SEE_REQUESTS, count=_num_waiting),
    Entry(key="budget", path="/budget", action=Action.SEE_BUDGET),
    Entry(key="releases", path="/releases", action=Action.SEE_RELEASES),
    Entry(key="policy", path="/policy", action=Action.SEE_POLICY, count=_num_proposed),
    Entry(key="health", path="/health", action=Action.SEE_HEALTH),
    Entry(key="accounts", path="/accounts", action=Action.MANAGE_ACCOUNTS),
)
_A_PAGE = 50
_RELEASE_COLUMNS = tuple(Release.__dataclass_fields__)
_LOG_COLUMNS = ("sequence", "time", "event", "details", "sha256")

Search = Annotated[str, Query(alias="q", max_length=200)]
Id = Annotated[str, Path(max_length=64)]
Kind = Annotated[str, Query(max_length=40)]
Number = Annotated[int, Query(ge=1, le=2**53)]


# --- releases and audit ---


@ROUTES.page("/releases", Action.SEE_RELEASES)
def releases(asked: Here, search: Search = "", page: Number = 1) -> Response:
    """Show what left the site."""
    if (later := being_read(asked)) is not None:
        return later
    shown, count = content_of(asked).releases.page(search, first=(page - 1) * _A_PAGE, most=_A_PAGE)
    return asked.page(
        "releases.html",
        releases=shown,
        num_found=count,
        page=page,
        num_pages=max(1, -(-count // _A_PAGE)),
        search=search,
        may_export=_may_export(asked),
    )


@ROUTES.page("/releases/verified", Action.SEE_RELEASES)
def verified(asked: Here) -> Response:
    """Show whether the whole audit log and the ledger are unbroken; a part of the page."""
    template = "verified.html" if asked.is_fragment else "verified-page.html"
    return asked.page(template, checked=content_of(asked).chains.checked())


@ROUTES.page("/releases/log", Action.SEE_RELEASES)
def log(asked: Here, search: Search = "", event: Kind = "", before: Number | None = None) -> Response:
    """Show the audit log, the newest entries first."""
    lines = backwards(content_of(asked).home.audit, search=search, event=event, before=before, most=_A_PAGE + 1)
    return asked.page(
        "log.html",
        lines=lines[:_A_PAGE],
        has_more=len(lines) > _A_PAGE,
        search=search,
        event=event,
        before=before,
        events=sorted(Event),
        may_export=_may_export(asked),
    )


@ROUTES.page("/releases/export.{form}", Action.EXPORT_RELEASES)
def export_releases(asked: Here, form: Id, search: Search = "") -> Response:
    """Return the releases as a file."""
    rows = (asdict(one) for one in content_of(asked).releases.all(search))
    return _exported(asked, "releases", form, _RELEASE_COLUMNS, rows)


@ROUTES.page("/releases/log/export.{form}", Action.EXPORT_RELEASES)
def export_log(asked: Here, form: Id, search: Search = "", event: Kind = "") -> Response:
    """Return the entries of the audit log as a file, the newest first."""
    found = every(content_of(asked).home.audit, search=search, event=event)
    return _exported(asked, "audit-log", form, _LOG_COLUMNS, map(_row, found))


# --- health ---


@ROUTES.page("/health", Action.SEE_HEALTH)
def site_health(asked: Here) -> Response:
    """Show how the node and its machine are."""
    if (later := being_read(asked)) is not None:
        return later
    content = content_of(asked)
    latest, prepared = content.releases.latest_round(), content.releases.latest_prepared()
    backbone = str(prepared.details.get("backbone", "")) if prepared else ""
    return asked.page(
        "health.html",
        health=health(content.home),
        latest=latest,
        offset=clock_offset(latest),
        prepared=prepared,
        backbone=backbone,
        backbone_sha256=accepted_backbones(content.home).get(backbone, ""),
        num_waiting=told_waiting(asked),
    )


@ROUTES.page("/health/gpus", Action.SEE_HEALTH)
def gpus(asked: Here) -> Response:
    """Show the GPUs; a part of the page, as their driver may take seconds to tell."""
    template = "health-gpus.html" if asked.is_fragment else "health-gpus-page.html"
    return asked.page(template, gpus=content_of(asked).gpus.all())


# --- small parts ---


def told_waiting(asked: Asked) -> int:
    """Return how many requests wait; 0 to those who may not see any."""
    return _num_waiting(content_of(asked)) if allowed(asked.me().role, Action.SEE_REQUESTS) else 0


def _may_export(asked: Asked) -> bool:
    return allowed(asked.me().role, Action.EXPORT_RELEASES)


def _row(line: Line) -> dict[str, Any]:
    return {column: getattr(line, column) for column in _LOG_COLUMNS}


def _exported(asked: Asked, what: str, form: str, columns: tuple[str, ...], rows: Any) -> Response:
    if form not in ("csv", "jsonl"):
        raise Denied(404, "missing")
    content = content_of(asked)
    content.record(asked.me().name, "export", {"what": what, "form": form, "address": asked.address})
    name = f"{content.home.load_config().name}-{what}"
    return as_csv(name, columns, rows) if form == "csv" else as_json_lines(name, rows)
