"""Names of people in English text: after titles, after words such as "patient" or "signed by", in signatures, and by given name.

A name that was found once in a record is masked wherever else its parts stand in the same record. Names without any such sign,
and names in small letters, are mostly missed: for these see `shared.data.deidentify.presidio`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from shared.data.deidentify.name_words import GIVEN_NAMES, NO_NAMES, SMALL_NO_NAMES
from shared.data.deidentify.spans import Span

_UP, _LOW = "A-ZÀ-ÖØ-ÞĀ-Ž", "a-zß-öø-ÿā-ž"
# Smith, O'Brien, McDonald, Smith-Jones, SMITH
_WORD = (
    rf"(?:(?:Mc|Mac|[ODL]['’])?[{_UP}][{_LOW}]{{1,30}}(?:[-'’][{_UP}][{_LOW}]{{1,30}}){{0,3}}(?:[{_UP}][{_LOW}]{{1,30}})?"
    rf"|(?:[ODL]['’])?[{_UP}]{{2,30}}(?:[-'’][{_UP}]{{2,30}}){{0,3}})(?![{_UP}{_LOW}\d_])"
)
_ANY_WORD = re.compile(rf"(?<![^\W_]){_WORD}")
_INITIAL = rf"[{_UP}](?:\.|(?=[ \t]))(?:[{_UP}]\.)?"
_PARTICLE = r"(?:van der|van den|van de|van|von|de la|de los|de|del|della|dos|da|di|bin|ibn|al|el|ter|ten)"
_GAP = r"[ \t]{1,3}"
_NAME = (
    rf"(?:(?:{_INITIAL}[ \t]{{0,2}}){{1,3}}(?:{_PARTICLE}{_GAP})?{_WORD}|(?:{_PARTICLE}{_GAP})?{_WORD})"
    rf"(?:{_GAP}(?:{_INITIAL}{_GAP})?(?:{_PARTICLE}{_GAP})?{_WORD}){{0,2}}"
)
_SURNAME_FIRST = rf"{_WORD},[ \t]{{0,2}}{_WORD}(?:{_GAP}(?:{_WORD}|[{_UP}](?![{_UP}{_LOW}])\.?))?"
_START = r"(?<![^\W_])"

_TITLED = re.compile(
    rf"{_START}(?:(?i:dr|mr|mrs|ms|mx|prof)\.?|Miss|MISS|Professor|Doctor|Nurse|Sir|Dame|Madam|Rev\.?|Capt\.?|Sgt\.?|Lt\.?){_GAP}({_NAME})"
)
_TITLED_SMALL = re.compile(rf"{_START}(?:dr|mr|mrs|ms)\.?{_GAP}([{_LOW}][{_LOW}'’-]+)(?![{_UP}\d_])")

_ACTED = (
    "seen|examined|reviewed|assessed|signed|dictated|transcribed|referred|reported|prescribed|accompanied|verified|administered|entered"
    "|performed|treated|admitted|discharged|operated on|authorised|authorized|approved|prepared"
    "|interviewed|completed|ordered|brought in"
)
_PEOPLE = (
    "patient|pt|client|customer|claimant|policyholder|cardholder|account holder|account manager|manager"
    "|adviser|advisor|colleague|tenant"
    "|wife|husband|spouse|partner|son|daughter|mother|father|mum|mom|dad|brother|sister|sibling|uncle|aunt|nephew|niece|cousin"
    "|grandson|granddaughter|grandmother|grandfather|fiancée?|girlfriend|boyfriend|neighbou?r|friend|carer|caregiver|guardian"
    "|GP|physician|surgeon|consultant|nurse|midwife|therapist|dentist|pharmacist|cardiologist|oncologist|neurologist|psychiatrist"
    "|psychologist|registrar|resident|attending|social worker|health visitor|care coordinator|case manager|interpreter"
)
_STRONG = re.compile(
    rf"{_START}(?i:(?:{_ACTED}) by|(?:spoke|speaking|discussed|met|meeting|follow[- ]up|appointment"
    rf"|consultation|liaised|conversation) with"
    r"|spoke to|referred to|(?:is |was |been )?(?:named|called)|my name is|name is|goes by|also known as|a\.?k\.?a\.?|née|nee|c/o"
    r"|care of|attn\.?|attention|next of kin(?: is)?|emergency contact(?: is)?|on behalf of|payable to"
    r"|transfer(?:red)? to|paid to)"
    rf"[ \t]{{0,2}}[:,]?{_GAP}(?:(?i:the|her|his|their|our|my)[ \t](?i:{_PEOPLE})[ \t])?({_NAME})"
)
_WEAK = re.compile(rf"{_START}(?i:{_PEOPLE})(?:,|[ \t]is|[ \t]was|[ \t]\()?[ \t(]{{0,2}}(?<=[ \t(])({_NAME})")
_LABEL = re.compile(
    r"(?:(?<=\n)|^|(?<=[\s;,|(\[*]))(?i:(?:full |first |last |family |given |middle |maiden |patient'?s? "
    r"|customer |client |contact )?name"
    rf"|surname|forename|(?:{_PEOPLE})|next of kin|NOK|emergency contact|provider|author|signed|signature"
    rf"|referring (?:physician|doctor|GP)|PCP|RMO"
    rf"|beneficiary|payee|payer|sender|recipient|contact(?: person)?)[ \t]*[:=][ \t]{{0,4}}((?:{_SURNAME_FIRST})|{_NAME})"
)
_LABEL_SMALL = re.compile(
    rf"(?i:(?:patient'?s?|customer|client|full|first|last|my) name(?: is|:)|(?:^"
    rf"|\n)name:)[ \t]{{0,3}}([{_LOW}][{_LOW}'’-]+(?:[ \t][{_LOW}][{_LOW}'’-]+)?)(?=[ \t]*(?:[,.;\n]|and\b|$))"
)
_SALUTATION = re.compile(
    rf"(?:^|[\n.!?])[ \t]{{0,4}}(?i:dear|hi|hello|hey|good (?:morning|afternoon"
    rf"|evening)){_GAP}({_NAME})(?=[ \t]{{0,2}}(?:[,:!\n–-]|$))"
)
_SIGNATURE = re.compile(
    r"(?i:regards|sincerely|faithfully|yours truly|best wishes|many thanks|thanks|thank you|cheers"
    r"|respectfully|signed)[ \t]{0,2}[,.!]?[ \t]{0,4}"
    rf"(?:\r?\n[ \t]{{0,8}}){{1,3}}({_NAME})(?=[ \t]{{0,4}}(?:[\r\n,(]|$))"
)
_SIGNED_ON_LINE = re.compile(
    rf"(?i:(?:kind|best|warm) regards|regards|sincerely|best wishes)[ \t]{{0,2}},{_GAP}({_NAME})(?=[ \t.]{{0,4}}(?:[\r\n,]|$))"
)
_CREDENTIALS = re.compile(
    rf"{_START}({_NAME}),?[ \t]{{1,2}}(?:M\.?D\.?|D\.?O\.?|R\.?N\.?|Ph\.?D\.?|MBBS|MBChB|FRCS|FRCP|MRCP"
    rf"|FACS|FACP|PA-C|NP|LCSW|CRNA|DDS|DPM|BSN|LPN|RGN)(?![A-Za-z])"
)
# A whole name (two words, or an initial and one) beside a verb of what people do.
_DONE_BY = re.compile(rf"{_START}[a-z]{{3,20}}(?:ed|en)[ \t]by{_GAP}({_NAME})")
_TOLD = re.compile(
    rf"{_START}(?i:tell|told|ask|asked|inform|informed|contact|contacted|phone|phoned|ring|rang|email|emailed|remind|thank|thanked|referring"
    rf"|(?:discussed|shared|agreed|spoken|arranged)[ \t](?:[a-z]{{2,15}}[ \t]){{1,3}}with|(?:transfer"
    rf"|transferred|pay|paid|send|sent|payment)"
    rf"(?:[ \t][^\s]{{1,40}}){{1,10}}?[ \t]to){_GAP}({_NAME})"
)
_DOES = re.compile(
    rf"{_START}({_NAME}){_GAP}(?:said|says|told|tells|called|calls|phoned|rang|reports|reported|states|stated|complains|complained|denies"
    r"|denied|attended|attends|presented|presents|visits|visited|signed|agreed|asked|asks|wrote|writes|confirmed|requested|wants|lives"
    r"|to[ \t](?:contact|call|review|follow|arrange|see|discuss)"
    r"|(?:was|is|has been|were)[ \t](?:admitted|discharged|seen|referred|reviewed|transferred|brought"
    r"|diagnosed|started|commenced|treated|born"
    r"|accompanied|informed|contacted|advised|counselled|intubated|extubated))(?![a-z])"
)
_SELF_SMALL = re.compile(rf"{_START}(?i:i am|i'm|i’m|my name is|this is){_GAP}([{_LOW}]+)[ \t]([{_LOW}'’-]{{3,}})")
_SELF = re.compile(rf"{_START}(?:I am|I'm|I’m|this is|This is|it's|It's){_GAP}({_NAME})")
_PAIR = re.compile(rf"{_START}({_WORD})((?:{_GAP}(?:{_INITIAL}{_GAP}|{_PARTICLE}{_GAP})?{_WORD}){{1,2}})")


def find_names(text: str) -> Iterator[Span]:
    """Yield names, and later mentions of their parts in the same text."""
    found = set(_by_cue(text))
    yield from found
    words = {word for span in found for word in _ANY_WORD.findall(text, span.start, span.end)}
    words = {word for word in words if len(word) >= 3 and word.casefold() not in NO_NAMES}
    if words:
        for match in _ANY_WORD.finditer(text):
            if match.group() in words:
                yield Span(match.start(), match.end(), "name")


def _by_cue(text: str) -> Iterator[Span]:
    certain = [_TITLED, _SALUTATION, _SIGNED_ON_LINE, _STRONG]
    certain += [_SIGNATURE] if "\n" in text else []
    for pattern in certain:
        for match in pattern.finditer(text):
            yield from _trimmed(text, match.start(1), match.end(1))
    for match in _LABEL.finditer(text) if ":" in text or "=" in text else ():
        # One word in capitals behind a label is more often an abbreviation, such as "Patient: ALT 294".
        if " " in match.group(1) or "," in match.group(1) or not _shouted(match.group(1)) or _is_given(match.group(1)):
            yield from _trimmed(text, match.start(1), match.end(1))
    for match in _CREDENTIALS.finditer(text):
        # The letters may follow any words; two words of a name are asked for, or an initial and a word.
        for span in _trimmed(text, match.start(1), match.end(1), from_end=True):
            if " " in text[span.start : span.end] or "." in text[span.start : span.end]:
                yield span
    for match in _WEAK.finditer(text):
        if not _shouted(match.group(1)) or _is_given(match.group(1)):
            yield from _trimmed(text, match.start(1), match.end(1))
    for pattern in (_DONE_BY, _TOLD, _DOES):
        for match in pattern.finditer(text):
            for span in _trimmed(text, match.start(1), match.end(1), from_end=pattern is _DOES):
                if " " in text[span.start : span.end] and not _shouted(text[span.start : span.end]):
                    yield span
    for match in _SELF_SMALL.finditer(text):
        if match.group(1) in GIVEN_NAMES and match.group(2) not in SMALL_NO_NAMES:
            yield Span(match.start(1), match.end(2), "name")
    for match in _SELF.finditer(text):
        if _is_given(match.group(1)):
            yield from _trimmed(text, match.start(1), match.end(1))
    for pattern in (_TITLED_SMALL, _LABEL_SMALL):
        for match in pattern.finditer(text):
            if not {word.casefold() for word in match.group(1).split()} & SMALL_NO_NAMES:
                yield Span(match.start(1), match.end(1), "name")
    place = 0
    while pair := _PAIR.search(text, place):
        place = pair.end(1)
        if pair.group(1).casefold() in GIVEN_NAMES:
            for span in _trimmed(text, pair.start(1), pair.end(2)):
                if span.end > pair.end(1):
                    yield span
                    place = span.end


def _trimmed(text: str, start: int, end: int, *, from_end: bool = False) -> Iterator[Span]:
    """Yield the part of a match before the first word that is no name; with `from_end`, after the last one."""
    words = list(re.finditer(r"[^\s,.()]+", text[start:end]))
    plain = [word.group().casefold() in NO_NAMES and not _is_initial(word.group()) for word in words]
    if from_end:
        first = max((place + 1 for place, is_plain in enumerate(plain) if is_plain), default=0)
        words = words[first:]
    else:
        words = words[: plain.index(True) if True in plain else None]
    if not any(len(word.group()) > 1 for word in words):
        return
    yield Span(start + words[0].start(), start + words[-1].end(), "name")


def _is_initial(word: str) -> bool:
    return len(word) == 1 and word.isupper() and word != "I"


def _shouted(name: str) -> bool:
    return next((word for word in re.findall(r"\w+", name) if len(word) > 1), "").isupper()


def _is_given(name: str) -> bool:
    return re.split(r"[\s,.]", name, maxsplit=1)[0].casefold() in GIVEN_NAMES
