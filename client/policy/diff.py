"""Two policies beside each other: line by line as they are written, and setting by setting as they are meant."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

from client.policy.policy import Policy

_CONTEXT = 3  # lines that stay, beside those that change
_MORE_BY_LARGER = (
    "max_epsilon_per_job",
    "max_epsilon_alone",
    "max_steps",
    "max_sample_rate",
    "max_attempts_per_round",
    "max_clock_skew_seconds",
    "approval_days",
    "limits.max_labels",
    "limits.max_rank",
    "limits.max_length",
    "limits.max_adapter_megabytes",
)
_MORE_BY_SMALLER = ("min_noise_multiplier", "min_sites", "min_colluding", "approvals_needed", "policy_approvals_needed")
_MORE_BY_MEMBERS = ("signers", "tasks", "backbones", "metrics")

_OF_DECISIONS = ("approval", "approvals_needed", "approval_days", "policy_approvals_needed")

Effect = Literal["more", "less", "other"]
"""Of a change on what a site accepts: more than before, less, or what only its people can tell."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a comparison.

    Attributes:
        kind: it stays, goes or comes; "gap" stands for `old` lines that stay and are not shown.
        old, new: its number before and afterwards; None where it is not there.
        text: without its end.
    """

    kind: Literal["same", "gone", "new", "gap"]
    old: int | None
    new: int | None
    text: str


@dataclass(frozen=True, kw_only=True)
class SettingChange:
    """A setting that differs, its values as JSON writes them, and what that does to what is accepted."""

    setting: str
    before: str
    after: str
    effect: Effect


def line_diff(before: str, after: str) -> list[Line]:
    """Return what a comparison of two texts shows: changed lines with some around them."""
    old, new = _lines(before), _lines(after)
    groups = SequenceMatcher(None, old, new, autojunk=len(old) + len(new) > 1000).get_grouped_opcodes(_CONTEXT)
    found: list[Line] = []
    shown = 0  # of the old lines
    for group in groups:
        if hidden := group[0][1] - shown:
            found.append(Line(kind="gap", old=hidden, new=None, text=""))
        for tag, i, end, j, to in group:
            if tag == "equal":
                found += [Line(kind="same", old=i + n + 1, new=j + n + 1, text=old[i + n]) for n in range(end - i)]
                continue
            found += [Line(kind="gone", old=n + 1, new=None, text=old[n]) for n in range(i, end)]
            found += [Line(kind="new", old=None, new=n + 1, text=new[n]) for n in range(j, to)]
        shown = group[-1][2]
    if found and (hidden := len(old) - shown):
        found.append(Line(kind="gap", old=hidden, new=None, text=""))
    return found


def _lines(text: str) -> list[str]:
    """Return the lines as TOML has them: `str.splitlines` also ends one where a comment goes on."""
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []


def setting_changes(before: Policy, after: Policy) -> list[SettingChange]:
    """Return every setting in which two policies differ; one that is not written has its default."""
    old, new = (dict(_flat(policy.model_dump(mode="json"))) for policy in (before, after))
    for values, policy in ((old, before), (new, after)):
        values["max_epsilon_alone"] = policy.largest_epsilon_alone
    return [
        SettingChange(
            setting=setting,
            before=json.dumps(old[setting], ensure_ascii=False),
            after=json.dumps(new[setting], ensure_ascii=False),
            effect=_effect(setting, old[setting], new[setting]),
        )
        for setting in old
        if old[setting] != new[setting]
    ]


def people_needed(before: Policy, after: Policy) -> int:
    """Return how many people a change made in the console takes, by the policy in force, which is `before`.

    As many as its `policy_approvals_needed`; one by which people decide less strictly as many as `officers_needed`, too.
    """
    return max(before.policy_approvals_needed, officers_needed(before, after))


def officers_needed(before: Policy, after: Policy) -> int:
    """Return how many of these must be people who decide on jobs.

    One; of a change by which people decide less strictly as many as decide on a job: else one of two could let in alone, or with
    somebody who decides on no job, what the other would refuse.
    """
    looser = any(one.effect == "more" for one in setting_changes(before, after) if one.setting in _OF_DECISIONS)
    return before.approvals_needed if looser else 1


def _flat(section: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if key == "limits":
            yield from ((f"limits.{name}", limit) for name, limit in value.items())
        else:
            yield key, value


def _effect(setting: str, before: Any, after: Any) -> Effect:
    if setting in _MORE_BY_LARGER:
        return "more" if after > before else "less"
    if setting in _MORE_BY_SMALLER:
        return "more" if after < before else "less"
    if setting in _MORE_BY_MEMBERS:
        old, new = (set(one.items() if isinstance(one, dict) else one) for one in (before, after))
        return "more" if new - old else "less"
    if setting == "approval":
        return "more" if after == "none" else "less"
    return "other"
