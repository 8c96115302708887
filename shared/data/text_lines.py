"""Bytes of a file into lines of text, in whatever pieces the bytes come: the layer below `shared.data.rows`, used by every
command.

Guarantees (tests: tests/shared/data/test_rows.py)
    * Equal bytes give equal lines, however they are cut into pieces. A line ends with LF, CR LF or CR.
    * gzip is told by content. A byte order mark (UTF-8, UTF-16, UTF-32) decides the encoding, whatever was declared.
    * At most one piece and one line of `MAX_ROW_BYTES` are held. A longer line, one that is not in the encoding and one
      with a NUL is still a line, with a fault that says so; no fault holds text.
"""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from shared.errors import DataError

PIECE = 2**16
"""Bytes that are read at once."""
MAX_ROW_BYTES = 32 * 2**20
"""A longer row is not read: it is no text of a person, or a quote that is never closed."""

_GZIP_MAGIC = b"\x1f\x8b"
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins like the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive, as Excel's .xlsx is"),
    (b"\xd0\xcf\x11\xe0", "an old Office file, as Excel's .xls is"),
    (b"%PDF", "a PDF"),
    (b"BZh9", "bzip2"),
    (b"\xfd7zX", "xz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard"),
)

_MAGICS = tuple(magic for magic, _ in (*_MARKS, *_FOREIGN))

NOT_IN_ENCODING = "not in the encoding"
TOO_LONG = "too long"
HOLDS_NUL = "with a NUL character"
DAMAGED_GZIP = "of damaged gzip data"


class LineFault(NamedTuple):
    """Why a line cannot be read.

    Attributes:
        reason: one of the constants above.
        detail: the same as a sentence for a person, with what to do.
    """

    reason: str
    detail: str


class Line(NamedTuple):
    """A line of a file.

    Attributes:
        number: from 1.
        text: without its end; where there is a fault, what could be made of it, for the structure of the file only.
        end: LF, CR LF, CR, or nothing at the end of the file.
    """

    number: int
    text: str
    end: str
    fault: LineFault | None = None


def check_encoding(name: str) -> str:
    """Return `name`; ValueError unless it is a text encoding that is known here."""
    try:
        "".encode(name)
        codecs.getincrementaldecoder(name)
    except LookupError:
        raise ValueError(f"unknown text encoding {name!r}; try utf-8, latin-1 or cp1252") from None
    return name


def describe_binary(start: bytes) -> str | None:
    """Return what a file is that begins so, if it is a known kind that holds no lines."""
    return next((what for magic, what in _FOREIGN if start.startswith(magic)), None)


def read_lines(path: Path, encoding: str) -> Iterator[Line]:
    """Yield the lines of a whole file.

    Raises:
        DataError: if it cannot be read, or is no text.
    """
    reader = LineReader(str(path), encoding)
    for piece in read_pieces(path):
        yield from reader.feed(piece)
    yield from reader.finish()


def read_pieces(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file; DataError if it cannot be read."""
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                yield piece
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Mend that, then try again.") from None


class LineReader:
    """Turns the bytes of one file into lines."""

    def __init__(self, name: str, encoding: str) -> None:
        self._name = name
        self._unpack = _Gunzip()
        self._encoding = _plain_name(encoding)
        self._start: bytes | None = b""  # of the unpacked file, until there is enough to tell what it is
        self._decode: codecs.IncrementalDecoder | None = None
        self._parts: list[bytes] = []  # of a line that has no end yet
        self._size = 0
        self._dropped = 0  # bytes of a line that is too long
        self._line = 0
        self._offset = 0
        self._damaged = False

    def feed(self, piece: bytes) -> list[Line]:
        """Return the lines that `piece` completes.

        Raises:
            DataError: if the file is of a kind that has no lines.
        """
        return [] if self._damaged else self._lines(piece, last=False)

    def finish(self) -> list[Line]:
        """Return what is left when the file ends; raises as `feed`."""
        if self._damaged:
            return []
        lines = self._lines(b"", last=True)
        if self._start is not None:
            lines += self._begin(self._start)
        if self._decode is not None:
            lines += self._decoded(b"", self._decode, last=True)
        if self._parts or self._dropped:
            lines.append(self._made(b"".join(self._parts)))
            self._parts = []
        return lines

    def _lines(self, piece: bytes, *, last: bool) -> list[Line]:
        lines: list[Line] = []
        try:
            for part in self._unpack.feed(piece, last=last):
                lines += self._plain(part)
        except zlib.error:
            self._damaged = True
            lines.append(Line(self._line + 1, "", "", LineFault(DAMAGED_GZIP, _GZIP_ADVICE)))
        return lines

    def _plain(self, piece: bytes) -> list[Line]:
        if self._start is None:
            return self._split(piece) if self._decode is None else self._decoded(piece, self._decode)
        self._start += piece
        # As soon as it is clear what it is: a first line may come long before the next.
        waits = any(len(magic) > len(self._start) and magic.startswith(self._start) for magic in _MAGICS)
        return [] if waits else self._begin(self._start)

    def _begin(self, start: bytes) -> list[Line]:
        self._start = None
        if (kind := describe_binary(start)) is not None:
            raise DataError(f"{self._name} is {kind}, not text. Save it as CSV or JSONL (UTF-8), then try again.")
        for mark, encoding in _MARKS:
            if start.startswith(mark):
                self._encoding, start, self._offset = encoding, start[len(mark) :], len(mark)
                break
        if _ends_lines_with_a_byte(self._encoding):
            return self._split(start)
        self._decode = codecs.getincrementaldecoder(self._encoding)(_errors_for(self._encoding))
        return self._decoded(start, self._decode)

    def _decoded(self, piece: bytes, decode: codecs.IncrementalDecoder, *, last: bool = False) -> list[Line]:
        """Lines of an encoding in which a line's end is no single byte: by way of UTF-8, where what is wrong stays wrong."""
        try:
            return self._split(decode.decode(piece, last).encode("utf-8", "surrogatepass"))
        except UnicodeError:
            decode.reset()
            return self._split(b"\xff")

    def _split(self, piece: bytes) -> list[Line]:
        if not piece:
            return []
        if self._parts and self._parts[-1].endswith(b"\r"):  # a line's end may have been cut in two
            self._size -= len(self._parts[-1])
            piece = self._parts.pop() + piece
        raw = piece.splitlines(keepends=True)
        rest = b"" if raw[-1].endswith(b"\n") else raw.pop()
        lines = []
        for part in raw:
            lines.append(self._made(b"".join([*self._parts, part]) if self._parts else part))
            self._parts, self._size = [], 0
        if rest:
            self._parts.append(rest)
            self._size += len(rest)
            if self._size > MAX_ROW_BYTES:
                kept = [b"\r"] if rest.endswith(b"\r") else []
                self._dropped += self._size - len(kept)
                self._parts, self._size = kept, len(kept)
        return lines

    def _made(self, raw: bytes) -> Line:
        self._line += 1
        begin, self._offset = self._offset, self._offset + self._dropped + len(raw)
        end = b"\r\n" if raw.endswith(b"\r\n") else raw[-1:] if raw[-1:] in (b"\n", b"\r") else b""
        body = raw[: len(raw) - len(end)]
        if self._dropped or len(body) > MAX_ROW_BYTES:
            self._dropped = 0
            return Line(self._line, "", end.decode(), LineFault(TOO_LONG, TOO_LONG_ADVICE))
        encoding = "utf-8" if self._decode is not None else self._encoding
        fault = None
        try:
            text = body.decode(encoding)
        except UnicodeError as error:
            place = begin + error.start if isinstance(error, UnicodeDecodeError) else begin
            where = "" if self._decode is not None else f" at byte {place:,}"
            text = body.decode(encoding, "replace")
            what = f"it is not {self._encoding}{where}. {_ENCODING_ADVICE}"
            fault = LineFault(NOT_IN_ENCODING, what)
        if fault is None and "\0" in text:
            fault = LineFault(HOLDS_NUL, NUL_ADVICE)
        return Line(self._line, text, end.decode(), fault)


_ENCODING_ADVICE = (
    "Set the encoding that the file was saved in, such as latin-1, cp1252 or utf-16, or save it as UTF-8."
)
_GZIP_ADVICE = "damaged or cut short gzip data. Copy it again from its source."
NUL_ADVICE = (
    "it holds a NUL character. The file may be UTF-16 (then set the encoding) or damaged; write it again without NUL."
)
TOO_LONG_ADVICE = (
    f"it is longer than {MAX_ROW_BYTES // 2**20} MiB. A quote may never be closed; otherwise split the record."
)


class _Gunzip:
    """Passes bytes on, unpacked if they begin like gzip: one member after the other, as they lie in a file."""

    def __init__(self) -> None:
        self._start: bytes | None = b""
        self._packed = False
        self._member: zlib._Decompress | None = None

    def feed(self, piece: bytes, *, last: bool) -> Iterator[bytes]:
        """Yield `piece`, or what it unpacks to, in small parts; raise `zlib.error` if it is damaged or, at the end, cut short."""
        if self._start is not None:
            piece = self._start + piece
            if len(piece) < len(_GZIP_MAGIC) and not last:
                self._start = piece
                return
            self._start, self._packed = None, piece.startswith(_GZIP_MAGIC)
        if not self._packed:
            if piece:
                yield piece
            return
        yield from self._unpacked(piece)
        if last and self._member is not None:
            raise zlib.error("cut short")

    def _unpacked(self, piece: bytes) -> Iterator[bytes]:
        while piece:
            if self._member is None:
                piece = piece.lstrip(b"\0")  # padding after the last member
                if not piece:
                    return
                self._member = zlib.decompressobj(wbits=31)
            yield self._member.decompress(piece, PIECE)
            piece = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            if self._member.eof:
                self._member = None


def _plain_name(encoding: str) -> str:
    name = codecs.lookup(encoding).name
    return "utf-8" if name == "utf-8-sig" else name


def _ends_lines_with_a_byte(encoding: str) -> bool:
    return all(sign.encode(encoding) == sign.encode() for sign in "\n\r")


def _errors_for(encoding: str) -> str:
    # Half a pair is then seen as such, in its own line.
    return "surrogatepass" if encoding.startswith(("utf-16", "utf-32")) else "strict"
