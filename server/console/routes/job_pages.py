"""The page on which a job is made: a form of its settings, with what it would promise beside it.

The signer's key never comes near a browser: what the page gives out is a run file, which is signed where the key is
(decision 0032).
"""

from __future__ import annotations

from typing import Any

from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from server.console.content import content_of
from server.console.job_form import ENTRIES, EVALUATION_COLUMNS, EVALUATION_PATH, FIRST, Filled, filled, run_file
from server.console.promises import Promises
from shared.errors import PrivacyError
from shared.web.asked import Asked, Here, Routes
from shared.web.roles import Action

ROUTES = Routes()

_COMMANDS = (
    "silotune coordinator sign {name}.toml --signer KEY --coordinator round.pub\n"
    "silotune coordinator submit HOME {name}.toml --signed {name}.signed.json"
)


@ROUTES.page("/jobs/new", Action.MAKE_JOBS)
def new_job(asked: Here) -> Response:
    """Show the form with the defaults."""
    return _shown(asked, Filled())


@ROUTES.page("/jobs/new", Action.MAKE_JOBS, method="POST")
async def check(asked: Here) -> Response:
    """Show what is wrong with what was typed, or what it would promise; or the same in another language or theme."""
    typed = await _typed(asked)
    language, theme = typed.pop("language", ""), typed.pop("theme", "")
    answer = await run_in_threadpool(_checked, asked.preferring(language, theme), typed)
    return asked.prefer(answer, language, theme)


@ROUTES.page("/jobs/file", Action.MAKE_JOBS, method="POST")
async def give_out(asked: Here) -> Response:
    """Return the run file of what was typed."""
    return await run_in_threadpool(_given_out, asked, await _typed(asked))


async def _typed(asked: Asked) -> dict[str, str]:
    form = await asked.request.form()
    return {key: value for key, value in form.items() if isinstance(value, str)}


def _checked(asked: Asked, typed: dict[str, str]) -> Response:
    form = filled(typed)
    if form.job is None:
        return _shown(asked, form, status=422)
    promised, problem = _promised(asked, form)
    return _shown(asked, form, promised=promised, problem=problem, status=422 if problem else 200)


def _given_out(asked: Asked, typed: dict[str, str]) -> Response:
    form = filled(typed)
    if form.job is None:
        return _shown(asked, form, status=422)
    promised, problem = _promised(asked, form)
    if problem:
        return _shown(asked, form, promised=promised, problem=problem, status=422)
    details = {"name": form.job.name, "job": form.job.sha256, "address": asked.address}
    content_of(asked).record(asked.me().name, "make job", details)
    headers = {"content-disposition": f'attachment; filename="{form.job.name}.toml"'}
    return Response(run_file(form).encode(), media_type="application/toml", headers=headers)


def _promised(asked: Asked, form: Filled) -> tuple[Promises | None, str]:
    assert form.job is not None  # noqa: S101 (the caller asked)
    try:
        return content_of(asked).planner.of(form.job), ""
    except PrivacyError as error:
        return None, str(error)


def _shown(
    asked: Asked, form: Filled, *, promised: Promises | None = None, problem: str = "", status: int = 200
) -> Response:
    sections: dict[str, list[Any]] = {}
    for entry in ENTRIES:
        if entry.key not in FIRST:
            sections.setdefault(entry.section, []).append(entry)
    return asked.page(
        "job-numbers.html" if asked.is_fragment else "new-job.html",
        status=200 if asked.is_fragment else status,  # htmx shows no other
        form=form,
        first=sorted((one for one in ENTRIES if one.key in FIRST), key=lambda one: FIRST.index(one.key)),
        sections=sections,
        promised=promised,
        problem=problem,
        evaluation={"path": EVALUATION_PATH, "columns": EVALUATION_COLUMNS},
        commands=_COMMANDS.format(name=form.job.name if form.job else "JOB"),
        back="/jobs/new",
        keeps={"form": "job", "action": "/jobs/new"},
    )
