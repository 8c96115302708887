"""Ways to reach somebody: telephone and fax numbers, e-mail and web addresses, IP addresses."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from shared.data.deidentify.spans import Span

_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9])"
)

# Addresses end at white space, quotes and Chinese characters or punctuation.
_IN_URL = r"[^\s<>\"'`|\\^{}\u2e80-\u9fff\uff00-\uffef]"
# Not those that are English words ("in", "at", "it"): a missing space after a full stop would look like an address.
_TOP_LEVEL = (
    "com|org|net|edu|gov|mil|info|biz|io|ai|app|dev|health|hospital|bank|cn|hk|tw|uk|de|fr|nl|ch|pt|dk"
    "|fi|ie|eu|ca|au|nz|jp|kr|sg|br|mx|za|ru|pl|cz"
)
_URL = re.compile(rf"(?i:(?:https?|ftps?|sftp)://|www\.){_IN_URL}{{2,2000}}")
_DOMAIN = re.compile(
    rf"(?<![A-Za-z0-9_@.-])(?:[A-Za-z0-9](?:[A-Za-z0-9-]{{0,61}}[A-Za-z0-9])?\.){{1,4}}(?:{_TOP_LEVEL})(?![A-Za-z0-9_-]|\.[A-Za-z0-9])(?:/{_IN_URL}{{0,2000}})?"
)

_IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d]|\.\d)")
_IPV6 = re.compile(r"(?<![A-Za-z0-9_:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?:\.\d{1,3}){0,3}(?![A-Za-z0-9_:])")

_EXTENSION = r"(?:[ \t]{0,2}(?:x|ext\.?|extension|转|分机)[ \t:]{0,2}\d{1,6})?"
_PHONES = [
    # +44 20 7946 0958, +1 (415) 555-0132, 0086-...
    r"(?<![A-Za-z0-9_+])(?:\+|00)[1-9]\d{0,2}(?:[ .-]?\(\d{1,4}\))?(?:[ .-]?\d{2,5}){2,5}",
    # (415) 555-0132, 415-555-0132, 1-800-555-0132
    r"(?<![\d-])(?:1[ .-])?(?:\(\d{3}\)[ ]?|\d{3}[-. ])\d{3}[-. ]\d{4}",
    r"(?<![\d-])\d{3}-\d{4}(?=[ \t]{0,2}(?:x|ext))",
    # 020 7946 0958, 07700 900123, (0131) 496 0123
    r"(?<![\d.-])\(?0\d{2,4}\)?[ -]\d{3,4}[ -]?\d{3,4}",
    r"(?<![\d.-])0[1-9]\d{8,9}",
    # 13800138000, 138-0013-8000, 010-62345678, 400-810-1234
    r"(?<![\d.-])(?:86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}",
    r"(?<![\d.-])\(?0\d{2,3}\)?[ -]\d{7,8}",
    r"(?<![\d.-])[48]00[ -]?\d{3,4}[ -]?\d{3,4}",
]
_PHONE = [re.compile(rf"{pattern}{_EXTENSION}(?!\d|[-.]\d)") for pattern in _PHONES]
_PHONE_CUE = re.compile(
    r"(?:(?<![A-Za-z])(?:tel|telephone|phone|(?:her|his|my|their|your|contact) number|mobile|mob|cell"
    r"|cellphone|fax|pager|bleep|call(?:ed)?|ring|whatsapp|wechat)(?![A-Za-z])"
    r"|电话|手机号?码?|手机|传真|联系方式|微信)"
    r"[ \t]{0,3}(?:no\.?|number|#|号码?|(?:him|her|them|me|us|at|on|is|to|from)){0,2}[ \t]{0,2}[.:：#]?[ \t]{0,3}"
    r"(\(?\+?\d[\d ().-]{3,20}\d)",
    re.IGNORECASE,
)


def find_emails(text: str) -> Iterator[Span]:
    """Yield e-mail addresses."""
    for match in _EMAIL.finditer(text):
        yield Span(match.start(), match.end(), "email")


def find_urls(text: str) -> Iterator[Span]:
    """Yield web addresses, with the path; a full stop or bracket at the end belongs to the sentence."""
    for pattern in (_URL, _DOMAIN):
        for match in pattern.finditer(text):
            found = match.group().rstrip(".,;:!?)]}")
            yield Span(match.start(), match.start() + len(found), "url")


def find_ips(text: str) -> Iterator[Span]:
    """Yield addresses of IPv4 and IPv6 that are valid."""
    for pattern in (_IPV4, _IPV6):
        for match in pattern.finditer(text):
            try:
                ipaddress.ip_address(match.group())
            except ValueError:
                continue
            if len(match.group()) > 4:  # not "::" or "::1", which name nobody
                yield Span(match.start(), match.end(), "ip")


def find_phones(text: str) -> Iterator[Span]:
    """Yield telephone numbers: of a known shape, or any number after a word such as "tel" or 电话."""
    for pattern in _PHONE:
        for match in pattern.finditer(text):
            if 7 <= sum(letter.isdigit() for letter in match.group()) <= 21:
                yield Span(match.start(), match.end(), "phone")
    for match in _PHONE_CUE.finditer(text):
        if sum(letter.isdigit() for letter in match.group(1)) >= 4:
            yield Span(match.start(1), match.end(1), "phone")
