"""Names of accounts: which ones may be given, and when two are one person's.

Two that look the same must not make two pairs of eyes. Not covered: a name whose letters are all of another alphabet than those
that they look like (a Cyrillic "сор", a Latin "cop"), and letters of one alphabet that look alike (l and I, rn and m).
"""

from __future__ import annotations

import re
import unicodedata

# Unicode's Default_Ignorable_Code_Point, which holds fillers, variation selectors and tags; and the blank Braille pattern.
_UNSEEN = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_ALIKE = {"LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "COPTIC", "CHEROKEE"}
"""Alphabets with letters that look like those of another one."""


def is_plain(name: str) -> bool:
    """Return whether a name can be seen whole, and mixes no alphabets whose letters look alike."""
    letters = (letter for letter in unicodedata.normalize("NFKC", name) if letter.isalpha())
    alphabets = {unicodedata.name(letter, "").partition(" ")[0] for letter in letters}
    return name.isprintable() and not _UNSEEN.search(name) and len(alphabets & _ALIKE) <= 1


def name_key(name: str) -> str:
    """Return what spellings of one name have in common: all but case, form, blanks too many and what nobody sees."""
    shown = unicodedata.normalize("NFKC", " ".join(name.split()))
    seen = "".join(letter for letter in _UNSEEN.sub("", shown) if letter.isprintable())
    return " ".join(unicodedata.normalize("NFKC", seen.casefold()).split())


_SAME_SHAPE = str.maketrans({"0": "o", "1": "l", "i": "l", "|": "l"})


def look_key(name: str) -> str:
    """Return what names have in common that are easily taken for one another in print: 0 and O, 1, l and I."""
    return name_key(name).translate(_SAME_SHAPE)
