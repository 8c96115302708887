"""Reports of a run: made on request, signed, taken away as files.

A report has what sites released and said, so it is a file for an officer, never a page of the console.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Form, Path
from fastapi.responses import FileResponse, Response

from server.console.content import content_of
from server.console.reports import FILES, KINDS, SIGNED
from server.console.routes.run_pages import Id, run_of
from server.console.runs import Run
from shared.web.asked import Asked, Denied, Here, Routes
from shared.web.roles import Action, allowed

ROUTES = Routes()

KindField = Annotated[str, Form(max_length=10)]
File = Annotated[str, Path(max_length=60)]


@ROUTES.page("/runs/{run}/reports", Action.SEE_REPORTS)
def reports(asked: Here, run: Id) -> Response:
    """Show what there is; a part of the run's page."""
    return _shown(asked, run_of(asked, run))


@ROUTES.page("/runs/{run}/reports", Action.SEE_REPORTS, method="POST")
def make(asked: Here, run: Id, kind: KindField = "") -> Response:
    """Begin to make a report."""
    return _begun(asked, run_of(asked, run), kind, signed=False)


@ROUTES.page("/runs/{run}/reports/signed", Action.SIGN_REPORTS, method="POST")
def make_signed(asked: Here, run: Id, kind: KindField = "") -> Response:
    """Begin to make a compliance report that the coordinator signs."""
    return _begun(asked, run_of(asked, run), kind, signed=True)


@ROUTES.page("/runs/{run}/reports/{file}", Action.SEE_REPORTS)
def give_out(asked: Here, run: Id, file: File) -> Response:
    """Return a report as a file."""
    content, found = content_of(asked), run_of(asked, run)
    path = content.reports.file(found, file)
    if path is None:
        raise Denied(404, "missing")
    details = {"name": found.id, "job": found.job, "file": file, "address": asked.address}
    content.record(asked.me().name, "export", details)
    return FileResponse(path, media_type=FILES[file], filename=f"{found.id}-{file}")


def _begun(asked: Asked, run: Run, kind: str, *, signed: bool) -> Response:
    content, chosen = content_of(asked), KINDS.get(kind)
    if chosen is None or (signed and chosen not in SIGNED):
        raise Denied(422, "wrong")

    def note() -> None:
        details = {"name": run.id, "job": run.job, "kind": chosen, "signed": signed, "address": asked.address}
        content.record(asked.me().name, "report", details)

    if not content.reports.begin(run, chosen, signed=signed, first=note):
        return _shown(asked, run, problem=asked.texts("reports.busy"), status=409)
    return asked.to(f"/runs/{run.id}")


def _shown(asked: Asked, run: Run, *, problem: str = "", status: int = 200) -> Response:
    made = content_of(asked).reports
    return asked.page(
        "reports.html" if asked.is_fragment else "reports-page.html",
        status=status,
        run=run,
        made=made.made(run),
        making=made.making(run),
        failed=made.failed(run),
        problem=problem,
        may_sign=allowed(asked.me().role, Action.SIGN_REPORTS),
    )
