"""One record in, one masked record out.

Formal guarantees (tests: tests/shared/data/deidentify/test_engine.py)
    * What a record becomes depends on that record and on the settings alone: not on other records, their order or number, nor on
      records masked before. So data sets that differ in one record (or in one person's) still do after masking, and every
      statement of differential privacy about the masked data holds for the file as it is.
    * Only the named roles change. A list of tokens keeps its length.
    * No message shows a record's content.

No guarantee: that everything which identifies a person is found.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from shared.data.deidentify.config import DeidentifyConfig
from shared.data.deidentify.presidio import PresidioNames, PresidioUnusable, load_presidio
from shared.data.deidentify.rules import find_by_rules
from shared.data.deidentify.spans import Kind, Span, masked, placeholder, united
from shared.errors import DataError


@dataclass(frozen=True, kw_only=True)
class MaskedRecord:
    """What became of a record.

    Attributes:
        record: the roles that were looked at, with placeholders.
        counts: places masked, by kind.
    """

    record: dict[str, Any]
    counts: Counter[Kind]


@dataclass(frozen=True, kw_only=True)
class Deidentifier:
    """Masks texts by the rules, and by Presidio where it is given.

    Attributes:
        kinds: what is masked.
        presidio: finds further names; None leaves it to the rules.
        without_presidio: why `auto` came to the rules alone.
    """

    kinds: frozenset[Kind]
    presidio: PresidioNames | None = None
    without_presidio: str | None = None

    @property
    def engine(self) -> str:
        """`rules` or `presidio`, which always includes the rules."""
        return "rules" if self.presidio is None else "presidio"

    def find(self, text: str) -> list[Span]:
        """Return what is to be masked in `text`: disjoint spans, in order."""
        return united(self._find(text))

    def mask(self, text: str) -> tuple[str, Counter[Kind]]:
        """Return the text with placeholders, and how many by kind."""
        spans = self.find(text)
        return masked(text, spans), Counter(span.kind for span in spans)

    def mask_tokens(self, tokens: Sequence[str]) -> tuple[list[str], Counter[Kind]]:
        """Return as many tokens, with a placeholder for each one that a span touches; a name of two tokens counts once."""
        found: set[Span] = set()
        for tight in (False, True):
            text, starts = _joined(tokens, tight=tight)
            for span in self._find(text):
                touched = [
                    place
                    for place, start in enumerate(starts)
                    if start < span.end and span.start < start + len(tokens[place])
                ]
                if touched:
                    found.add(Span(touched[0], touched[-1] + 1, span.kind))
        spans = united(found)
        changed = list(tokens)
        for span in spans:
            changed[span.start : span.end] = [placeholder(span.kind)] * (span.end - span.start)
        return changed, Counter(span.kind for span in spans)

    def mask_record(self, record: Mapping[str, Any], roles: Sequence[str], *, place: str) -> MaskedRecord:
        """Mask the named roles of a record: text, or a list of tokens; None stays.

        Raises:
            DataError: naming `place` if a role holds anything else.
        """
        changed: dict[str, Any] = {}
        counts: Counter[Kind] = Counter()
        for role in roles:
            value = record[role]
            if value is None:
                continue
            if isinstance(value, str):
                changed[role], own = self.mask(value)
            elif isinstance(value, list) and all(isinstance(token, str) for token in value):
                changed[role], own = self.mask_tokens(value)
            else:
                raise DataError(
                    f"{place}: {role!r} holds a {type(value).__name__}, which cannot be de-identified. Expected text, or "
                    "a list of words; mend the row, or leave the column out."
                )
            counts += own
        return MaskedRecord(record=changed, counts=counts)

    def _find(self, text: str) -> Iterator[Span]:
        yield from find_by_rules(text, self.kinds)
        if self.presidio is not None:
            yield from self.presidio.find(text)


def open_deidentifier(config: DeidentifyConfig) -> Deidentifier:
    """Return what masks as `config` says.

    Raises:
        ConfigError: if Presidio is asked for and cannot be used here; `auto` then goes by the rules, unless models are named.
    """
    kinds = frozenset(config.kinds)
    if config.engine == "rules" or "name" not in kinds:
        return Deidentifier(kinds=kinds)
    try:
        return Deidentifier(kinds=kinds, presidio=load_presidio(tuple(sorted(config.models.items()))))
    except PresidioUnusable as error:
        if config.engine == "presidio" or config.models:
            raise
        return Deidentifier(kinds=kinds, without_presidio=str(error))


def _joined(tokens: Sequence[str], *, tight: bool) -> tuple[str, list[int]]:
    """Return tokens as one text, and where each starts; no space between Chinese characters, nor beside signs if `tight`."""
    starts: list[int] = []
    text = ""
    for left, right in pairwise(["", *tokens]):
        together = not left or (_is_chinese(left[-1:]) and _is_chinese(right[:1])) or (tight and _is_sign(left, right))
        text += "" if together else " "
        starts.append(len(text))
        text += right
    return text, starts


def _is_chinese(letter: str) -> bool:
    return "\u3000" <= letter <= "\u9fff" or "\uff00" <= letter <= "\uffef"


def _is_sign(left: str, right: str) -> bool:
    return any(token and all(unicodedata.category(letter)[0] in "PS" for letter in token) for token in (left, right))
