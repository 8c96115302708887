"""`silotune site requests`, `request`, `approve` and `refuse`: what people of a site say to jobs that wait for them."""

from __future__ import annotations

import getpass
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared import terminal
from shared.errors import RunError, printable
from shared.options import JsonOption
from shared.trust.keystore import passphrase_from_environment

if TYPE_CHECKING:
    from client.budget.accounts import Budgets
    from client.site.approving import ApprovalDesk

HomeArgument = Annotated[Path, typer.Argument(help="The site's folder.")]
JobArgument = Annotated[
    str, typer.Argument(metavar="JOB", help="The job's name, or the first six or more characters of its SHA-256.")
]
ByOption = Annotated[
    str | None, typer.Option("--by", metavar="NAME", help="Who says so; by default the user who is logged in.")
]


def requests(home: HomeArgument, as_json: JsonOption = False) -> None:
    """List the jobs that people here were asked for, those that wait first."""
    from rich.table import Table

    from client.approval.words import heading

    desk = _desk(home)
    found, rules, now = desk.requests(), desk.rules, datetime.now(UTC)
    if as_json:
        terminal.print_json(
            [
                {
                    **request.model_dump(mode="json", exclude={"signed_job", "since", "expired"}),
                    "id": request.id,
                    "state": state,
                    "ends": request.ends(rules, now).isoformat(),
                    "needed": rules.needed,
                }
                for request, state in found
            ]
        )
        return
    console = terminal.console(130)
    if not found:
        console.print(desk.nothing())
        return
    table = Table("job", "name", "state", "asked for", "until", "approved", box=None)
    for request, state in found:
        table.add_row(*heading(request, state, rules, now))
    console.print(table)


def request(home: HomeArgument, job: JobArgument, as_json: JsonOption = False) -> None:
    """Show one request, whole: who signed what, what it promises and costs, every rule, what changed since the last one."""
    from client.approval.facts import as_json as facts_as_json
    from client.approval.words import told

    desk = _desk(home)
    facts = desk.facts(job, lines=_budgets(desk).lines)
    if as_json:
        terminal.print_json(facts_as_json(facts))
        return
    console = terminal.console(soft_wrap=True)
    for line in told(facts):
        console.print(line)


def approve(
    home: HomeArgument,
    job: JobArgument,
    by: ByOption = None,
    reason: Annotated[str, typer.Option("--reason", help="For the audit log of this site.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask once the request was shown.")] = False,
) -> None:
    """Show a request, as `request` does, and approve it; the running node lets the job begin within a minute."""
    from client.approval.grounds import Grounds, moved_told, told_against
    from client.approval.words import told

    desk, account = _desk(home), _account(by)
    budgets = _budgets(desk)
    request, seen = desk.seen(job)
    parts = desk.parts(request)
    facts = desk.facts(request.id, by_id=True, lines=budgets.lines)
    console = terminal.console(soft_wrap=True)
    for line in told(facts):
        console.print(line)
    if not yes and sys.stdin.isatty():
        typer.confirm("Approve it?", abort=True)
    # Figures first: what was computed by a policy that is no more is told as changed.
    lines = budgets.lines(request.signed().job, desk.policy())
    shown, now = Grounds(parts=parts, budget=facts.budget), Grounds(parts=desk.parts(request), budget=lines)
    if against := shown.against(now):
        raise RunError(f"something changed meanwhile, so nothing was approved: {told_against(against)}. Read it again.")
    moved = shown.moved(now)
    found, state = desk.approve(request.id, by=account, reason=reason, seen=seen, moved=moved)
    for text in moved_told(moved):
        typer.echo(text)
    name = printable(f"{found.name} ({found.job[:12]})")
    if state == "approved":
        until = found.ends(desk.rules, datetime.now(UTC))
        typer.echo(f"{name} is approved; its first round has to begin before {until:%Y-%m-%d %H:%M} UTC")
    else:
        typer.echo(f"noted; {name} still waits for the approval of another account (--by)")


def refuse(
    home: HomeArgument,
    job: JobArgument,
    reason: Annotated[str, typer.Option("--reason", help="For this site alone; the coordinator does not learn it.")],
    by: ByOption = None,
) -> None:
    """Refuse a job that waits, or withdraw an approval: its later rounds are refused. The coordinator learns no reason."""
    found = _desk(home).refuse(job, by=_account(by), reason=reason)
    withdrawn = found.refused is not None and found.refused.withdrawn
    typer.echo(
        printable(f"{found.name} ({found.job[:12]}) ")
        + ("is no longer approved: its next round is refused" if withdrawn else "is refused")
        + "; the coordinator is told that people said no, and nothing else"
    )


def add_to(app: typer.Typer) -> None:
    """Make these commands subcommands of `silotune site`."""
    for command in (requests, request, approve, refuse):
        app.command()(command)


def _desk(home: Path) -> ApprovalDesk:
    from client.site.approving import ApprovalDesk
    from client.site.home import SiteHome

    return ApprovalDesk(SiteHome(home), passphrase=passphrase_from_environment())


def _budgets(desk: ApprovalDesk) -> Budgets:
    from client.budget.accounts import Budgets

    return Budgets(desk.home, desk.seal)


def _account(by: str | None) -> str:
    if by is not None:
        return by
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no name belongs to the user's number, as in some containers
        raise RunError("it cannot be told who is logged in; name yourself with --by.") from None
