"""Numbers that stand for a person or an account: with a check digit, with a word before them, or just long.

Check digits: IBAN (ISO 13616, remainder 1 by 97), payment cards (Luhn, ISO/IEC 7812), NHS numbers (modulus 11, NHS Data
Dictionary), resident identity cards of China (GB 11643, ISO 7064 MOD 11-2). A number that fails its check is still masked as a
long number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from shared.data.deidentify.spans import Kind, Span

# Length of an IBAN by country, from the SWIFT registry.
_IBAN_LENGTHS = {
    country: int(length)
    for length, countries in {
        "15": "NO", "16": "BE", "18": "DK FI FO GL NL SD", "19": "MK SI", "20": "AT BA EE KZ LT LU MN XK", "21": "CH HR LI LV",
        "22": "BG BH CR DE GB GE IE ME RS VA", "23": "AE GI IL IQ OM SO TL", "24": "AD CZ ES MD PK RO SA SE SK TN VG",
        "25": "LY PT ST", "26": "IS TR", "27": "BI DJ FR GR IT MC MR SM", "28": "AL AZ BY CY DO GT HU LB NI PL SV",
        "29": "BR EG PS QA UA", "30": "JO KW MU", "31": "MT SC", "32": "LC", "33": "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip

_IBAN_START = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d{2}(?=[ -]?[A-Za-z0-9])")
_CARD = re.compile(r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?!\d|[.-]\d)")
_SSN = re.compile(r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\d-])")
_NHS = re.compile(r"(?<![\d-])\d{3}([ -]?)\d{3}\1\d{4}(?![\d-])")
_RESIDENT = re.compile(r"(?<![\dA-Za-z])\d{17}[\dXx](?![\dA-Za-z])")

# What follows such a word is an identifier if it has a digit, whatever its shape.
_VALUE = r"((?=[A-Za-z/-]{0,8}\d)[A-Za-z0-9](?:[A-Za-z0-9]|[/_.-](?=[A-Za-z0-9])|[ ](?=\d{2,})){2,30})"
_LINK = (
    r"[ \t]{0,3}(?:no\b\.?|nos\b\.?|num\b\.?|number|nr\b\.?|id\b|#|号码?)?[ \t]{0,3}(?:is|was|为"
    r"|是)?[ \t]{0,3}[:：#=]?[ \t]{0,3}"
)
_ID_WORDS = (
    r"(?<![A-Za-z])(?:MRN|M\.R\.N\.|medical record|hospital|unit record|health record|patient id|patient no|patient number|chart"
    r"|case|encounter|episode|accession|specimen|NHS|SSN|social security|national insurance|NINO"
    r"|health plan|member|medicare|medicaid"
    r"|insurance|policy|passport|driver'?s? licen[cs]e|licen[cs]e plate|licen[cs]e|registration|employee"
    r"|customer|client|reference|ref"
    r"|claim|tax id|TIN|VIN|serial|device|certificate|national id|identity card|ID card|student|DEA|NPI|GMC)(?![A-Za-z])"
)
_ID_LABELS = (  # these need a word such as "number", or a sign, before the value
    r"(?:病历号|病案号|住院号|门诊号|就诊号|登记号|就诊卡号|医保卡?号|社保号|社会保障号|身份证号?码?|护照号?码?|居民身份证|军官证号?|驾驶证号?|检查号|检验号"
    r"|标本号|条码号|床号|档案号|工号|学号|客户号|客户编号|保单号|订单号|流水号|车牌号|编号|证件号码?|(?<![A-Za-z])ID号?|(?<![A-Za-z])QQ号?|微信号)"
)
_ACCOUNT_WORDS = (
    r"(?:(?<![A-Za-z])(?:IBAN|account|acct|a/c|sort code|routing|card|credit card|debit card|visa"
    r"|mastercard|SWIFT|BIC)(?![A-Za-z])"
    r"|账号|帐号|账户|帐户|卡号|银行卡号?|信用卡号?|储蓄卡号?)"
)
_MUST_LINK = (
    r"[ \t]{0,3}(?:(?:no\b\.?|nos\b\.?|num\b\.?|numbers?|nr\b\.?|id\b|#|code)[ \t]{0,3}(?:is"
    r"|was)?[ \t]{0,3}[:#=]?|[:#=])[ \t]{0,3}"
)
_CUES: list[tuple[Kind, re.Pattern[str]]] = [
    ("id", re.compile(rf"(?:{_ID_WORDS}){_MUST_LINK}{_VALUE}", re.IGNORECASE)),
    ("id", re.compile(rf"(?<![A-Za-z])(?:MRN|SSN|NHS number|NINO|VIN|NPI){_LINK}{_VALUE}", re.IGNORECASE)),
    ("id", re.compile(rf"{_ID_LABELS}{_LINK}{_VALUE}", re.IGNORECASE)),
    ("account", re.compile(rf"{_ACCOUNT_WORDS}{_LINK}{_VALUE}", re.IGNORECASE)),
    # card ending in 4242, 尾号4242
    (
        "account",
        re.compile(r"(?:ending(?: in| with)?|last (?:four|4)(?: digits)?(?: are)?|尾号为?)[ \t:：]{0,3}(\d{4})(?!\d)"),
    ),
]

_LONG = re.compile(r"(?<![\d.,])\d{7,}(?:[Xx](?![A-Za-z]))?(?![.,]?\d)")
_GROUPED = re.compile(r"(?<![\d.,-])\d{2,}(?:[ -]\d{2,}){2,}(?![.,]?\d)")
_MIXED = re.compile(r"(?<![A-Za-z0-9])(?:[A-Z]{1,4}-?\d{7,}[A-Z]{0,2}|[A-Z]{2}\d{6}[A-D])(?![A-Za-z0-9])")


def find_identifiers(text: str) -> Iterator[Span]:
    """Yield accounts and personal numbers, by check digit, shape or the word before them."""
    for start, end in _ibans(text):
        yield Span(start, end, "account")
    for match in _CARD.finditer(text):
        if luhn_is_valid(match.group()):
            yield Span(match.start(), match.end(), "account")
    for match in _SSN.finditer(text):
        yield Span(match.start(), match.end(), "id")
    for match in _NHS.finditer(text):
        if nhs_is_valid(match.group()):
            yield Span(match.start(), match.end(), "id")
    for match in _RESIDENT.finditer(text):
        if resident_id_is_valid(match.group()):
            yield Span(match.start(), match.end(), "id")
    for kind, pattern in _CUES:
        for match in pattern.finditer(text):
            yield Span(match.start(1), match.end(1), kind)


def find_numbers(text: str) -> Iterator[Span]:
    """Yield numbers of seven digits and more, in one piece or in groups, and such with letters before them."""
    for match in (*_LONG.finditer(text), *_MIXED.finditer(text)):
        yield Span(match.start(), match.end(), "number")
    for match in _GROUPED.finditer(text):
        if len(_digits(match.group())) >= 9:
            yield Span(match.start(), match.end(), "number")


def luhn_is_valid(number: str) -> bool:
    """Return whether the last digit is the check digit of a payment card."""
    digits = _digits(number)
    doubled = [digit if place % 2 == 0 else digit * 2 - 9 * (digit > 4) for place, digit in enumerate(reversed(digits))]
    return 13 <= len(digits) <= 19 and any(digits) and sum(doubled) % 10 == 0


def iban_is_valid(number: str) -> bool:
    """Return whether country, length and check digits fit."""
    plain = re.sub(r"[ -]", "", number).upper()
    if not (plain.isascii() and plain.isalnum() and _IBAN_LENGTHS.get(plain[:2]) == len(plain)):
        return False
    return int("".join(str(int(letter, 36)) for letter in plain[4:] + plain[:4])) % 97 == 1


def nhs_is_valid(number: str) -> bool:
    """Return whether the tenth digit checks the first nine."""
    digits = _digits(number)
    if len(digits) != 10 or not any(digits):
        return False
    check = 11 - sum(digit * weight for digit, weight in zip(digits[:9], range(10, 1, -1), strict=True)) % 11
    return check % 11 == digits[9] and check != 10


def resident_id_is_valid(number: str) -> bool:
    """Return whether 18 places hold a plausible date of birth and the right check digit."""
    if not re.fullmatch(r"\d{17}[\dXx]", number):
        return False
    digits = _digits(number[:17])
    year, month, day = (int("".join(map(str, digits[a:b]))) for a, b in ((6, 10), (10, 12), (12, 14)))
    if not (1850 <= year <= 2100 and 1 <= month <= 12 and 1 <= day <= 31):
        return False
    total = sum(digit * pow(2, 17 - place, 11) for place, digit in enumerate(digits))
    return "10X98765432"[total % 11] == ("X" if number[17] in "Xx" else str(int(number[17])))


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    for match in _IBAN_START.finditer(text):
        length = _IBAN_LENGTHS.get(match.group()[:2].upper())
        if length is None:
            continue
        # As many letters and digits as the country has, with single spaces or hyphens between them.
        body = re.compile(rf"[A-Za-z0-9](?:[ -]?[A-Za-z0-9]){{{length - 1}}}(?![A-Za-z0-9])").match(text, match.start())
        if body and iban_is_valid(body.group()):
            yield body.span()


def _digits(text: str) -> list[int]:
    return [int(letter) for letter in text if letter.isdecimal()]
