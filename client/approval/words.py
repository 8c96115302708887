"""`client.approval.facts` in plain words, line by line; whatever a signer wrote in a job stays one line and steers nothing."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from client.approval.facts import BudgetLine, Facts, Promised
from client.approval.request import Request, RequestState, Rules
from shared.epsilons import as_set, delta_rounded_up, noise_rounded_down, rate_rounded_up, rounded_up
from shared.errors import printable

STATE_WORDS: dict[RequestState, str] = {
    "waiting": "waits for approval",
    "approved": "approved, not begun",
    "begun": "approved and begun",
    "refused": "refused",
    "expired": "not decided or not begun in time",
}
CAP_WORDS = {"together": "", "alone": " with each masked input by itself"}


def told(facts: Facts) -> list[str]:
    """Return a request, whole, as lines for a terminal."""
    return [printable(line) for line in _lines(facts)]


def heading(request: Request, state: RequestState, rules: Rules, now: datetime) -> tuple[str, ...]:
    """Return one row of a list: job, name, state, since and until when, and who approved it."""
    ends = _time(request.ends(rules, now)) if state in ("waiting", "approved") else ""
    counted = request.approvals if state == "begun" else request.counted(rules, now)
    said = ", ".join(approval.by for approval in counted)
    if state == "waiting":
        said = f"{len(counted)} of {rules.needed}" + (f": {said}" if said else "")
    if state == "refused" and request.refused is not None:
        said = f"{'withdrawn' if request.refused.withdrawn else 'refused'} by {request.refused.by}"
    cells = (request.job[:12], request.name, STATE_WORDS[state], _time(request.arrived), ends, said)
    return tuple(printable(cell) for cell in cells)


def _lines(facts: Facts) -> Iterator[str]:
    here = facts.here
    yield f"{facts.name} ({facts.job}): {STATE_WORDS[facts.state]}"
    yield from _said(facts)
    yield "who asks"
    name = facts.signer_name or "somebody who may sign nothing here now"
    yield f"  signed by {name} ({facts.signer}) on {_time(facts.issued)}, valid until {_time(facts.not_after)}"
    yield f"  for the coordinator with the key {facts.coordinator}"
    yield "what is asked"
    more = ", ..." if facts.num_labels > len(facts.labels) else ""
    labels = f", {facts.num_labels:,} labels ({', '.join(facts.labels)}{more})" if facts.num_labels else ""
    yield f"  {facts.task}{labels}, on the backbone {facts.backbone}"
    columns = ", ".join(f"{column} as {role}" for role, column in here.columns.items())
    yield f"  on the data set {here.dataset} ({columns}), which is read here and stays here"
    spare = facts.steps - facts.rounds * facts.local_steps
    yield (
        f"  {facts.rounds:,} rounds of {facts.local_steps:,} steps"
        + (f" and {spare:,} spare attempts" if spare > 0 else "")
        + f"; each {here.unit} enters a step with probability {rate_rounded_up(facts.sample_rate)}"
    )
    if facts.metrics:
        yield f"  and metrics of held-out records, with noise: {', '.join(facts.metrics)}"
    yield f"what is promised about each {here.unit}"
    yield from _promise(facts.promised)
    yield "what is left"
    yield from (f"  {_budget(line)}" for line in facts.told_apart)
    if not facts.budget:
        yield "  this site's budget is not charged for it, or what it costs cannot be told"
    kept = [verdict.kept for verdict in facts.rules]
    yield f"rules of policy.toml: {sum(kept)} of {len(kept)} kept"
    for verdict in facts.rules:
        yield f"  {'kept  ' if verdict.kept else 'BROKEN'} {verdict.rule}: {verdict.asked}; accepted: {verdict.allowed}"
    if here.settings:
        yield f"  BROKEN site.toml: {here.settings}"
    yield from _changes(facts)


def _said(facts: Facts) -> Iterator[str]:
    yield f"  asked for on {_time(facts.arrived)}, id {facts.id[:12]}"
    for approval in facts.approvals:
        yield f"  approved by {approval.by} on {_time(approval.at)}" + (
            f": {approval.reason}" if approval.reason else ""
        )
    if facts.refused is not None:
        how = "withdrawn" if facts.refused.withdrawn else "refused"
        yield f"  {how} by {facts.refused.by} on {_time(facts.refused.at)}: {facts.refused.reason}"
    if facts.state == "waiting":
        who = "one account" if facts.needed == 1 else f"{facts.needed} different accounts"
        yield f"  needs the approval of {who} until {_time(facts.ends)}"
    if facts.state == "approved":
        yield f"  its first round has to begin before {_time(facts.ends)}"
    if facts.begun is not None:
        yield f"  its first round began on {_time(facts.begun)}"


def _promise(promised: Promised | None) -> Iterator[str]:
    if promised is None:
        yield "  NOTHING: no noise is added, or what it is worth cannot be told; see the rules below"
        return
    noise, delta = noise_rounded_down(promised.noise_multiplier), delta_rounded_up(promised.delta)
    if promised.alone is None:
        by = (
            " (by the coordinator, which sees this site's update unprotected)"
            if promised.mechanism == "central"
            else ""
        )
        yield f"  epsilon {rounded_up(promised.epsilon, 4)} at delta {delta}, with noise multiplier {noise}{by}"
        return
    yield (
        f"  epsilon {rounded_up(promised.epsilon, 4)} at delta {delta} against the coordinator and up to {promised.colluding} "
        "sites that work with it, as long as secure aggregation holds"
    )
    yield (
        f"  epsilon {rounded_up(promised.alone, 4)} at delta {delta} for what this site sends by itself, if secure aggregation "
        f"fails and all others work together: its own share of the noise, multiplier {noise}"
    )


def _budget(line: BudgetLine) -> str:
    text = f"epsilon {rounded_up(line.spent, 4)} of {as_set(line.cap)} is spent{CAP_WORDS[line.promise]}, "
    after = f"{rounded_up(line.after, 4)} once this job has run"
    return text + (
        after if line.fits else f"and with this job it would be {rounded_up(line.after, 4)}: it does NOT fit"
    )


def _changes(facts: Facts) -> Iterator[str]:
    if facts.compared_with is None:
        yield "changes: nothing of this signer was approved before that could be compared"
        return
    name, job = facts.compared_with
    yield f"changes since {name} ({job[:12]}), the last job of this signer that was approved: {len(facts.changes)}"
    for change in facts.changes:
        yield f"  {change.setting}: {change.before or 'not set'} -> {change.after or 'not set'}"


def _time(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"
