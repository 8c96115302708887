"""Ages over 89, which the Safe Harbor rule of HIPAA names as identifiers; younger ages stay."""

from __future__ import annotations

import re
from collections.abc import Iterator

from shared.data.deidentify.spans import Span

_OLD = r"(?:9\d|1[0-4]\d)"
_UNITS = r"(?:one|two|three|four|five|six|seven|eight|nine)"
_WORDS = rf"(?:ninety(?:[- ]{_UNITS})?|(?:a|one)[- ]hundred(?:[- ](?:and[- ])?(?:{_UNITS}|ten|eleven|twelve))?)"
_HAN = r"(?:九十[一二三四五六七八九]?|一百零?[一二三四五六七八九]?)"
_PERSON = r"(?:males?|females?|man|woman|gentleman|lady|patient|resident|widow(?:er)?)"

_PATTERNS = [
    # 92-year-old, 92 years of age, 92 y/o; ninety-two-year-old
    rf"(?<![\w.])({_OLD}|{_WORDS})[- ]?(?:years?|yrs?|yr\.)[- ]?(?:old|of age)\b",
    rf"(?<![\w.])({_OLD}) ?(?:yo|y/o|y\.o\.)(?!\w)",
    rf"(?<![\w.])({_OLD})[- ](?:years?|yrs?)?,? ?{_PERSON}\b",
    # aged 92, age: 92
    rf"\bage[ds]?(?: of| is| was| at)?[ :=]{{1,3}}({_OLD}|{_WORDS})(?![\w.%]*\w)",
    rf"(?<![\d.])({_OLD}|{_HAN})[ \t]?(?:周岁|岁)",
    rf"年龄[ \t]?[:：]?[ \t]?({_OLD})(?!\d)",
]
_COMPILED = [re.compile(pattern, re.IGNORECASE) for pattern in _PATTERNS]


def find_ages(text: str) -> Iterator[Span]:
    """Yield the numbers of ages of 90 and more."""
    for pattern in _COMPILED:
        for match in pattern.finditer(text):
            yield Span(match.start(1), match.end(1), "age")
