"""An explanation for people: coloured text for a terminal, one HTML file without scripts, one line of JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from shared.errors import printable
from shared.runtime.attributions import Explanation, Word

if TYPE_CHECKING:
    from rich.console import Console

LEVELS = 5
"""Strengths of colour."""
_SHOWN_FROM = 1 / 20
"""Of the largest attribution: smaller ones are not coloured."""
_HALF_BAR = 100
# One for each mark, + to +++: the strength can be read without colour.
_FOR = ("bright_blue", "bold bright_blue", "bold white on blue")
_AGAINST = ("yellow", "bold yellow", "bold black on yellow")
_MOST_ROWS = 15


class Part(NamedTuple):
    """A stretch of a text: a word, or what stands between words (no level)."""

    text: str
    attribution: float = 0.0
    level: int | None = None
    unread: bool = False


def as_json(found: Explanation, run: str) -> dict[str, Any]:
    """Return what `--json` prints."""
    content = asdict(found)
    words = content.pop("words")
    return {"run": run, **content, "sum": found.total, "words": words}


def level_of(attribution: float, largest: float) -> int:
    """Return the strength of colour, from -5 to 5; 0 is too little to show."""
    share = abs(attribution) / largest if largest else 0.0
    return 0 if share < _SHOWN_FROM else int(math.copysign(math.ceil(LEVELS * share), attribution))


def parts_of(found: Explanation, text: int) -> list[Part]:
    """Return a text in parts that together are the whole of it."""
    whole, place, parts = found.texts[text], 0, []
    for word in sorted((word for word in found.words if word.text == text), key=lambda word: word.begin):
        begin = max(word.begin, place)
        if word.end <= begin:
            continue  # tokens of bytes within one character have one place
        if begin > place:
            parts.append(Part(whole[place:begin]))
        level = level_of(word.attribution, found.largest)
        parts.append(Part(whole[begin : word.end], word.attribution, level))
        place = word.end
    if place < len(whole):
        parts.append(Part(whole[place:], unread=text in found.unread))
    return parts


def ranked(found: Explanation) -> list[Word]:
    """Return the words, those that moved the output furthest first."""
    return sorted(found.words, key=lambda word: -abs(word.attribution))


def named(word: Word) -> str:
    """Return a word as it stands in a list; some tokenizers make tokens of spaces."""
    return printable(word.word, lines=True).strip() or "(space)"


def signed(value: float, found: Explanation) -> str:
    """Return a number with its sign, to the hundredth of the largest attribution or better."""
    decimals = 2 - math.floor(math.log10(found.largest)) if found.largest else 2
    text = f"{value:+,.{min(max(decimals, 0), 12)}f}"
    # Not "-0.00".
    return text.replace("-", "−") if any(digit in "123456789" for digit in text) else text[1:]


def print_explanation(console: Console, found: Explanation) -> None:
    """Print the text with its words coloured, then the words with their numbers, then what they add up to."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console.print(Text(found.says, style="bold"), Text(f"\nwhat moved the {found.target}:\n"), sep="")
    for number in range(len(found.texts)):
        line = Text()
        for part in parts_of(found, number):
            if part.level:
                marks = (abs(part.level) + 1) // 2
                style = (_FOR if part.level > 0 else _AGAINST)[marks - 1]
                line.append(printable(part.text, lines=True) + ("+" if part.level > 0 else "−") * marks, style=style)
            else:
                line.append(printable(part.text, lines=True), style="dim" if part.unread else "")
        console.print(line)
    console.print()
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("word", overflow="fold")
    table.add_column("attribution", justify="right")
    table.add_column("against, for", no_wrap=True)
    for word in ranked(found)[:_MOST_ROWS]:
        table.add_row(
            Text(printable(word.word, lines=True)),
            signed(word.attribution, found),
            _bar(word.attribution, found.largest),
        )
    console.print(table)
    if len(found.words) > _MOST_ROWS:
        console.print(f"{len(found.words) - _MOST_ROWS} more words: --html or --json.")
    for note in sums(found):
        console.print(note)


def sums(found: Explanation) -> list[str]:
    """Return how the attributions add up."""
    difference = found.output - found.baseline_output
    lines = [
        f"{found.target}: {signed(found.output, found)}; with every word replaced by {found.baseline}: "
        f"{signed(found.baseline_output, found)}; difference {signed(difference, found)}.",
        f"sum of all attributions {signed(found.total, found)}; completeness gap {found.gap:.1e} after {found.steps} steps.",
    ]
    if found.unread:
        lines.append("the text goes on beyond the model's length; the rest was not read.")
    return lines


def _bar(value: float, largest: float) -> Any:
    from rich.text import Text

    width = round(10 * abs(value) / largest) if largest else 0
    if value < 0:
        return Text(" " * (10 - width) + "▒" * width + "|", style="yellow")
    return Text(" " * 10 + "|" + "█" * width, style="bright_blue")


def render_html(found: Explanation, run: str) -> bytes:
    """Return the page, UTF-8: no script, nothing loaded, every text escaped."""
    from shared.pages import render_page

    filters = {
        "value": lambda value: signed(value, found),
        "named": named,
        "bar_width": lambda word: f"{_bar_width(word, found):.1f}",
        "bar_x": lambda word: f"{101 - (_bar_width(word, found) if word.attribution < 0 else 0):.1f}",
    }
    template = Path(__file__).with_name("explain.html")
    return render_page(template, filters=filters, found=found, run=run, texts=_cleaned(found), ranked=ranked(found))


def _cleaned(found: Explanation) -> Sequence[Sequence[Part]]:
    return [
        [part._replace(text=printable(part.text, lines=True)) for part in parts_of(found, i)]
        for i in range(len(found.texts))
    ]


def _bar_width(word: Word, found: Explanation) -> float:
    return _HALF_BAR * abs(word.attribution) / found.largest if found.largest else 0.0
