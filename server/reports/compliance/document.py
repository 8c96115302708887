"""The report as a tree of headings, paragraphs, lists and tables: all that HTML and PDF lay out, and nothing of how.

Every text is plain text; whoever lays it out escapes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    """One paragraph; `role` is "statement" for a sentence that is a guarantee, "note" for small print."""

    text: str
    role: Literal["body", "statement", "note"] = "body"
    kind: Literal["paragraph"] = "paragraph"


@dataclass(frozen=True, kw_only=True)
class Bullets:
    """A list without order."""

    items: tuple[str, ...]
    kind: Literal["bullets"] = "bullets"


@dataclass(frozen=True, kw_only=True)
class Notice:
    """A box that must not be overlooked: "danger", "caution", or "good"."""

    level: Literal["danger", "caution", "good"]
    title: str
    items: tuple[str, ...]
    kind: Literal["notice"] = "notice"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of `Entries`; `mono` sets hashes and keys in a fixed width."""

    term: str
    value: str
    mono: bool = False


@dataclass(frozen=True, kw_only=True)
class Entries:
    """Names and values."""

    rows: tuple[Entry, ...]
    kind: Literal["entries"] = "entries"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table.

    Attributes:
        mono: a SHA-256, set on one line.
        width: "narrow" takes what its longest cell needs, "wide" shares the rest of the page and may break long words.
    """

    title: str
    number: bool = False
    mono: bool = False
    width: Literal["narrow", "wide"] = "narrow"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose first column names the row."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    kind: Literal["table"] = "table"


@dataclass(frozen=True, kw_only=True)
class SignatureLines:
    """Places for signatures by hand, one for each role; each has the same labelled lines."""

    roles: tuple[str, ...]
    lines: tuple[str, ...] = ("Name", "Function", "Place, date", "Signature")
    kind: Literal["signatures"] = "signatures"


Block = Paragraph | Bullets | Notice | Entries | Table | SignatureLines


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands below it; `id` is its anchor."""

    id: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A whole report.

    Attributes:
        title: of the document, also in its metadata.
        subtitle: one line below it.
        language: BCP 47.
        created: when it was made, for its foot.
        lead: what stands before the first section.
    """

    title: str
    subtitle: str
    language: str
    created: str
    lead: tuple[Block, ...]
    sections: tuple[Section, ...]


HASH = Column(title="SHA-256", mono=True)


def numbers(*titles: str) -> tuple[Column, ...]:
    """Return columns of numbers."""
    return tuple(Column(title=title, number=True) for title in titles)


def wide(title: str) -> Column:
    """Return a column of text that needs room."""
    return Column(title=title, width="wide")


def section(anchor: str, title: str, blocks: Iterable[Block]) -> Section:
    """Return a section."""
    return Section(id=anchor, title=title, blocks=tuple(blocks))


def entries(*rows: tuple[str, str | None], mono: Sequence[str] = ()) -> Entries:
    """Return names and values; what is None or empty is left out, terms in `mono` have a fixed width."""
    return Entries(rows=tuple(Entry(term=term, value=value, mono=term in mono) for term, value in rows if value))
