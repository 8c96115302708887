"""The table of rules. Each looks at one text and at nothing else, and names places of the kinds that it is for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from shared.data.deidentify.ages import find_ages
from shared.data.deidentify.chinese_names import find_chinese_names
from shared.data.deidentify.contacts import find_emails, find_ips, find_phones, find_urls
from shared.data.deidentify.dates import find_dates
from shared.data.deidentify.identifiers import find_identifiers, find_numbers
from shared.data.deidentify.names import find_names
from shared.data.deidentify.spans import Kind, Span


@dataclass(frozen=True)
class Rule:
    """A way to find places.

    Attributes:
        find: yields them; pure.
        kinds: that it may yield.
        needs: what a text must have for the rule to find anything; saves time.
    """

    find: Callable[[str], Iterable[Span]]
    kinds: frozenset[Kind]
    needs: re.Pattern[str] = re.compile("")


_DIGIT = re.compile(r"\d")

RULES: tuple[Rule, ...] = (
    Rule(find_identifiers, frozenset({"account", "id"}), _DIGIT),
    Rule(find_emails, frozenset({"email"}), re.compile("@")),
    Rule(find_urls, frozenset({"url"})),
    Rule(find_ips, frozenset({"ip"})),
    Rule(find_phones, frozenset({"phone"}), _DIGIT),
    Rule(find_dates, frozenset({"date"})),
    Rule(find_ages, frozenset({"age"})),
    Rule(find_names, frozenset({"name"})),
    Rule(find_chinese_names, frozenset({"name"})),
    Rule(find_numbers, frozenset({"number"}), _DIGIT),
)


def find_by_rules(text: str, kinds: frozenset[Kind]) -> Iterator[Span]:
    """Yield every place of the given kinds; they may overlap."""
    for rule in RULES:
        if rule.kinds & kinds and rule.needs.search(text):
            yield from (span for span in rule.find(text) if span.kind in kinds)
