"""The words of the consoles, in English and Chinese: one TOML file a language in `texts/` of each room.

Guarantee (tests: tests/shared/web/test_languages.py): every language has the same messages with the same places for values,
and no template holds a word of its own.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

LANGUAGES: Mapping[str, str] = {"en": "English", "zh": "中文"}
DEFAULT = "en"


@dataclass(frozen=True)
class Texts:
    """All messages of one language.

    Attributes:
        language: its tag.
        messages: by key, `section.name`.
    """

    language: str
    messages: Mapping[str, str]

    def __call__(self, key: str, **values: object) -> str:
        """Return a message with its values put in.

        Raises:
            KeyError: there is no such message, or a value is missing.
        """
        return self.messages[key].format(**values) if values else self.messages[key]


def load_texts(folders: Iterable[Path]) -> dict[str, Texts]:
    """Return the messages of all languages; of two folders with one key the later one counts."""
    found: dict[str, dict[str, str]] = {language: {} for language in LANGUAGES}
    for folder in folders:
        for language, messages in found.items():
            sections = tomllib.loads((folder / f"{language}.toml").read_text(encoding="utf-8"))
            for section, texts in sections.items():
                messages |= {f"{section}.{name}": text for name, text in texts.items()}
    return {language: Texts(language, messages) for language, messages in found.items()}


def chosen(cookie: str | None, accepted: str | None) -> str:
    """Return the language to answer in: what was switched to, else the first that the browser accepts, else English."""
    if cookie is not None and cookie in LANGUAGES:
        return cookie
    wanted: list[tuple[float, str]] = []
    for part in (accepted or "")[:500].split(","):
        tag, _, quality = part.partition(";")
        try:
            weight = float(quality.strip().removeprefix("q=") or 1)
        except ValueError:
            weight = 0.0
        if (language := tag.strip().lower().partition("-")[0]) in LANGUAGES and weight > 0:
            wanted.append((weight, language))
    return max(wanted, key=lambda one: one[0])[1] if wanted else DEFAULT
