"""Whether a backbone knows the words of the texts: what share of their letters its tokenizer can make something of.

A word counts as known unless one of its tokens stands for "unknown", or it falls into as many tokens as it has letters, or more:
such a word is spelled, by letters or bytes, and means nothing to a backbone that never read its language. Words of one or
two letters are known unless a token says otherwise, and so are scripts of which a letter is a word or a syllable (Chinese).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

_FEWEST_LETTERS = 3
MOST_UNKNOWN = 0.1
"""Share of the letters above which the engineer is warned: names, codes and slip of the pen stay far below it."""


def unknown_share(encodings: Sequence[Any], texts: Sequence[Any], unknown_id: int | None) -> float:
    """Return the share of letters that stand in words which the tokenizer does not know; 0 without letters.

    Args:
        encodings: of a fast tokenizer, `tokenizers.Encoding`, one for each text.
        texts: texts, pairs of texts, or lists of words.
        unknown_id: the token for what is not in the vocabulary, if there is one.
    """
    known = unknown = 0
    for encoding, text in zip(encodings, texts, strict=True):
        for word, tokens in _words(encoding, text):
            letters = sum(character.isalpha() for character in word)
            if letters and (unknown_id in tokens or _is_spelled(word, letters, len(tokens))):
                unknown += letters
            else:
                known += letters
    return unknown / (known + unknown) if known + unknown else 0.0


def _words(encoding: Any, text: Any) -> Iterator[tuple[str, list[int]]]:
    """Yield (word, its tokens) as the tokenizer parts words."""
    found: dict[tuple[int, int], tuple[list[int], list[tuple[int, int]]]] = {}
    rows = zip(encoding.ids, encoding.word_ids, encoding.sequence_ids, encoding.offsets, strict=True)
    for token, word, sequence, place in rows:
        if word is not None and sequence is not None:
            tokens, places = found.setdefault((sequence, word), ([], []))
            tokens.append(token)
            places.append(place)
    for (sequence, word), (tokens, places) in found.items():
        whole = text[word] if isinstance(text, list) else text[sequence] if isinstance(text, tuple) else text
        yield str(whole)[places[0][0] : places[-1][1]], tokens


def _is_spelled(word: str, letters: int, num_tokens: int) -> bool:
    """Return whether a word fell into letters or less; a letter of a wide script may be a word."""
    if num_tokens > len(word.strip()):
        return True
    wide = any(unicodedata.east_asian_width(character) in "WF" for character in word)
    return not wide and letters >= _FEWEST_LETTERS and num_tokens >= letters
