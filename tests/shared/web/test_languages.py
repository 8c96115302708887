"""The words of the consoles: the same in every language, and nowhere else."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from string import Formatter

import pytest

from shared.web.accounts.passwords import LEAST_CHARACTERS
from shared.web.languages import LANGUAGES, chosen, load_texts
from shared.web.roles import Role

ROOT = Path(__file__).parents[3]
ROOMS = [path.parent for path in sorted(ROOT.glob("*/*/texts"))]
TEMPLATES = [path for room in ROOMS for path in sorted((room / "templates").glob("*.html"))]
# Words that a person reads although they are no text between tags.
_READ = ("alt", "title", "placeholder", "aria-label", "data-missing", "data-empty", "data-label")


def keys_used(text: str) -> set[str]:
    """Return the keys of messages that a template or a module asks for in full."""
    found = set(re.findall(r"\b(?:t|texts)\(\s*f?\"([a-z_]+\.[a-z_0-9]+)\"", text))
    return {key for key in found if not key.endswith("_")}  # to those a second part is added


def test_there_are_rooms() -> None:
    assert {room.relative_to(ROOT).as_posix() for room in ROOMS} >= {"shared/web", "client/console", "server/console"}
    assert len(TEMPLATES) > 12


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.relative_to(ROOT).as_posix())
def test_every_language_has_the_same_messages(room: Path) -> None:
    english, *others = [load_texts([room / "texts"])[language].messages for language in LANGUAGES]
    for other in others:
        assert set(other) == set(english)
        for key, text in english.items():
            assert _values(text) == _values(other[key]), key
    assert all(text.strip() == text and text for messages in (english, *others) for text in messages.values())


def _values(text: str) -> set[str | None]:
    return {name for _, name, _, _ in Formatter().parse(text) if name is not None}


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_no_template_has_words_of_its_own(template: Path) -> None:
    source = template.read_text(encoding="utf-8")
    source = re.sub(r"\{% block kind %\}.*?\{% endblock %\}", "", source)  # a class
    source = re.sub(r"\{#.*?#\}|\{%.*?%\}|\{\{.*?\}\}", " ", source, flags=re.DOTALL)
    found: list[str] = []

    class Words(HTMLParser):
        def handle_data(self, data: str) -> None:
            found.extend(re.findall(r"[^\W\d_]+", data))

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend(
                word for name, value in attrs if name in _READ for word in re.findall(r"[^\W\d_]+", value or "")
            )

    Words(convert_charrefs=True).feed(source)
    assert found == []


def test_every_message_that_is_asked_for_is_there_and_no_other() -> None:
    messages = set(load_texts([room / "texts" for room in ROOMS])["en"].messages)
    files = [*TEMPLATES, *(path for room in ROOMS for path in room.rglob("*.py"))]
    asked = set().union(*(keys_used(path.read_text(encoding="utf-8")) for path in files))
    assert asked <= messages
    # Those whose names are put together of two parts.
    composed = {
        key
        for key in messages
        if key.partition(".")[0]
        in ("roles", "roles_about", "themes", "kinds", "nav", "units", "units_each", "states", "arms")
    }
    composed |= {key for key in messages if re.match(r"errors\.t(itle|ext)_|unsuitable\.", key)}
    composed |= {
        key
        for key in messages
        if re.match(
            r"budget\.(composition|promise|line|cap)_|requests\.against_|health\.(outcome|certificate)_|requests\.state_|runs\.|sites\.cert_|reports\.(failed|make|sign)_",
            key,
        )
    }
    composed |= {key for key in messages if re.match(r"policy\.(state|effect)_", key)}
    composed |= {key for key in messages if re.match(r"accounts\.(en|dis)able", key)}
    composed |= {key for key in messages if key.startswith("verdicts.")}  # tests/client/console/test_deciding.py
    assert messages - asked - composed == set()
    assert {f"roles.{role}" for role in Role} | {f"roles_about.{role}" for role in Role} <= messages


def test_messages_are_filled_in() -> None:
    texts = load_texts([room / "texts" for room in ROOMS])
    for language in LANGUAGES:
        assert str(LEAST_CHARACTERS) in texts[language]("unsuitable.password_short", least=LEAST_CHARACTERS, most=1)
    with pytest.raises(KeyError):
        texts["en"]("no.such.message")


@pytest.mark.parametrize(
    ("cookie", "accepted", "language"),
    [
        (None, None, "en"),
        (None, "zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        (None, "de,en;q=0.5,zh;q=0.6", "zh"),
        (None, "zh;q=0", "en"),
        (None, "fr", "en"),
        ("zh", "en", "zh"),
        ("xx", "zh", "zh"),
        ("../../etc", ";;q=,,zh;q=x", "en"),
    ],
)
def test_the_language_of_an_answer(cookie: str | None, accepted: str | None, language: str) -> None:
    assert chosen(cookie, accepted) == language
