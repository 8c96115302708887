"""Dates: numeric, with English month names, and Chinese. A year alone stays, as the Safe Harbor rule of HIPAA allows."""

from __future__ import annotations

import re
from collections.abc import Iterator

from shared.data.deidentify.spans import Span

_DAY = r"(?:3[01]|[12]\d|0?[1-9])"
_MONTH = r"(?:1[0-2]|0?[1-9])"
_YEAR = r"(?:18|19|20)\d\d"
_TIME = r"(?:[T ]\d{1,2}:\d\d(?::\d\d(?:\.\d{1,9})?)?(?:Z|[+-]\d\d:?\d\d)?)?"

_LONG = ("january", "february", "april", "june", "july", "august", "september", "october", "november", "december")
_DOUBTFUL = ("march", "may")  # words of their own, so a small letter needs a day and a year beside them
_SHORT = ("jan", "feb", "mar", "apr", "jun", "jul", "aug", "sept", "sep", "oct", "nov", "dec")


def _cases(names: tuple[str, ...], *, small: bool) -> list[str]:
    return [form for name in names for form in ([name] if small else []) + [name.capitalize(), name.upper()]]


_ANY = rf"(?i:{'|'.join((*_LONG, *_DOUBTFUL, *_SHORT))})"
_FULL_NAME = "|".join([*_cases(_LONG, small=True), *_cases(_DOUBTFUL, small=False)])
_CLEAR = rf"(?:{_FULL_NAME}|{'|'.join(_cases(_SHORT, small=False))})"

_NTH = r"(?:st|nd|rd|th|ST|ND|RD|TH)?"
_DAYS = rf"{_DAY}{_NTH}(?:[ \t]?(?:-|–|to|and|&)[ \t]?{_DAY}{_NTH})?"
_GAP = r"[ \t]{1,3}"
_NO_WORD_BEFORE, _NO_WORD_AFTER = r"(?<![^\W_])", r"(?![^\W_])"

_ENGLISH = [
    # 5 March 2024, 5th of March, 2024, 05-Mar-24, 05Mar2024
    rf"{_DAYS}[ \t]?(?:of[ \t]+)?[-/.]?[ \t]?{_ANY}\.?(?:[ \t]?[-/,.]?[ \t]?(?:of[ \t])?{_YEAR}|[-/.]\d\d|[ \t]['’]\d\d)",
    # March 5, 2024, Mar-05-2024, Mar. 5th 2024
    rf"{_ANY}\.?[ \t]?[-/]?[ \t]?{_DAYS}(?:,?[ \t]{{0,2}}[-/]?{_YEAR}|[-/]\d\d|,?[ \t]['’]\d\d)",
    # 2024 March 5, 2024-Mar-05
    rf"{_YEAR}[-/, \t]{{1,2}}{_ANY}\.?[-/ \t]{_DAY}",
    # 5 March, 5th of March; March 5
    rf"{_DAYS}[ \t]?(?:of[ \t]+)?-?{_CLEAR}\.?",
    rf"{_CLEAR}\.?{_GAP}{_DAYS}",
    # March 2024, Mar '24
    rf"{_CLEAR}[.,]?{_GAP}(?:of[ \t])?(?:{_YEAR}|['’]\d\d)",
    rf"{_CLEAR}[-/]{_YEAR}",
]
_MONTH_ALONE = re.compile(
    rf"{_NO_WORD_BEFORE}(?i:in|since|until|till|last|next|this|early|late|mid|during|by|of)[ \t-]+({_FULL_NAME}){_NO_WORD_AFTER}"
)
_NUMERIC = [
    rf"{_YEAR}([-/.]){_MONTH}\1{_DAY}{_TIME}",
    rf"{_DAY}([-/.]){_MONTH}\1{_YEAR}{_TIME}",
    rf"{_MONTH}([-/.]){_DAY}\1{_YEAR}{_TIME}",
    rf"(?:{_DAY}(?:/{_MONTH}/|-{_MONTH}-)|{_MONTH}(?:/{_DAY}/|-{_DAY}-))\d\d",
    r"(?:3[01]|[12]\d|0[1-9])\.(?:1[0-2]|0[1-9])\.\d\d",
    # 20240305, also with a time behind it
    r"(?:19|20)\d\d(?:1[0-2]|0[1-9])(?:3[01]|[12]\d|0[1-9])(?:[T ]?(?:[01]\d|2[0-3])[0-5]\d(?:[0-5]\d)?)?",
]
# Day and month without a year look like a fraction, so a word must say that they are none.
_CUED = re.compile(
    rf"{_NO_WORD_BEFORE}(?i:on|since|until|dated?|dob|d\.o\.b\.?|born|birth|admitted|admission|discharged?"
    rf"|taken|seen|reviewed)[ \t:]+((?:{_DAY}[/.]{_MONTH}|{_MONTH}/{_DAY}))(?![\d/%.]\d|\d)"
)

_HAN_NUMBER = "〇零一二三四五六七八九十廿卅"
_CHINESE = [
    rf"(?:\d{{4}}|\d{{2}}|[{_HAN_NUMBER}]{{4}})[ \t]?年[ \t]?(?:{_MONTH}|[{_HAN_NUMBER}]{{1,3}})[ \t]?月"
    rf"(?:[ \t]?(?:{_DAY}|[{_HAN_NUMBER}]{{1,3}})[ \t]?[日号])?",
    rf"(?:{_MONTH}|[{_HAN_NUMBER}]{{1,3}})[ \t]?月[ \t]?(?:初)?(?:{_DAY}|[{_HAN_NUMBER}]{{1,3}})[ \t]?[日号]",
    rf"(?:{_MONTH}|[{_HAN_NUMBER}]{{1,3}})月份",
]
_CHINESE_CUED = re.compile(rf"(?:[今去前明]年|自|于|至)[ \t]?((?:{_MONTH}|[{_HAN_NUMBER}]{{1,2}})月)(?!经)")

_WITH_MONTH = [re.compile(rf"{_NO_WORD_BEFORE}(?:{pattern}){_NO_WORD_AFTER}") for pattern in _ENGLISH]
_WITH_DIGITS = [re.compile(rf"(?<!\d)(?<!\d[-/.])(?:{pattern})(?!\d|[-/.]\d)") for pattern in _NUMERIC]
_WITH_MOON = [re.compile(rf"(?<![\d{_HAN_NUMBER}])(?:{pattern})") for pattern in _CHINESE]
_DIGIT, _ANY_MONTH = re.compile(r"\d"), re.compile(_ANY)


def find_dates(text: str) -> Iterator[Span]:
    """Yield every date with at least a month in it."""
    # Most texts lack what most patterns need, and to look for that is quicker.
    has_digit, has_month, has_moon = bool(_DIGIT.search(text)), bool(_ANY_MONTH.search(text)), "月" in text
    whole = [
        *(_WITH_MONTH if has_digit and has_month else ()),
        *(_WITH_DIGITS if has_digit else ()),
        *(_WITH_MOON if has_moon else ()),
    ]
    for pattern in whole:
        for match in pattern.finditer(text):
            yield Span(match.start(), match.end(), "date")
    parts = [
        *([_MONTH_ALONE] if has_month else ()),
        *([_CUED] if has_digit else ()),
        *([_CHINESE_CUED] if has_moon else ()),
    ]
    for pattern in parts:
        for match in pattern.finditer(text):
            yield Span(match.start(1), match.end(1), "date")
