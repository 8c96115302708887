"""Fonts for text of every script in figures and PDF: a package of ours to ask for, the machine's own, else code points.

Guarantee (tests: tests/shared/test_fonts.py): a character that no font at hand can show is written as its code point, such as
U+1F600, never as an empty box, and nothing is refused for it.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

CJK_PACKAGE = "noto_cjk_sans_otc"
HOW_TO_GET_FONTS = (
    "Characters that no font here has are written as code points, such as U+7D27. For Chinese, Japanese and Korean: "
    "pip install silotune[cjk], or install a font on this machine."
)
# What a machine has to have for each of the three, one character each.
_SAMPLES = "紧ひ한"
_SYSTEM_NAMES = ("cjk", "sourcehan", "source han", "wqy", "wenquan", "unifont", "droidsansfallback", "uming", "ukai")


@cache
def packaged_cjk_font() -> Path | None:
    """Return the font file of the extra `cjk`, or None if it is not installed."""
    try:
        font = Path(str(importlib.import_module(CJK_PACKAGE).FONT_PATH))
    except (ImportError, AttributeError):
        return None
    return font if font.is_file() else None


@cache
def cjk_font() -> Path | None:
    """Return a font file with Chinese, Japanese and Korean characters: the extra's, else one of this machine, else None."""
    if (packaged := packaged_cjk_font()) is not None:
        return packaged
    from matplotlib.font_manager import findSystemFonts

    likely = [path for path in sorted(findSystemFonts()) if any(name in path.lower() for name in _SYSTEM_NAMES)]
    found = [(sum(ord(sample) in _characters(Path(path)) for sample in _SAMPLES), path) for path in likely]
    covered, best = max(found, key=lambda item: item[0], default=(0, ""))
    return Path(best) if covered else None


def shown_by(fonts: Iterable[Path]) -> Callable[[str], str]:
    """Return a function that writes every character that none of `fonts` has as its code point."""
    known = frozenset().union(*(_characters(font) for font in fonts))

    def shown(text: str) -> str:
        return "".join(
            character if ord(character) in known or character in "\n\t" else f"U+{ord(character):04X} "
            for character in text
        ).rstrip(" " if not text.endswith(" ") else "")

    return shown


@contextlib.contextmanager
def readable_figures() -> Iterator[Callable[[str], str]]:
    """Let matplotlib find characters of all scripts, and yield the function that every text of a user goes through."""
    import matplotlib
    from matplotlib.font_manager import FontProperties, fontManager

    fonts = [_matplotlib_font("DejaVuSans.ttf")]
    families = ["DejaVu Sans"]
    if (font := cjk_font()) is not None:
        if not any(entry.fname == str(font) for entry in fontManager.ttflist):
            fontManager.addfont(str(font))
        fonts.append(font)
        families.append(FontProperties(fname=str(font)).get_name())  # matplotlib falls back from one family to the next
    with matplotlib.rc_context({"font.family": families}):
        yield shown_by(fonts)


def shown_in_pdf() -> Callable[[str], str]:
    """Return the function that makes a text one that Typst's own fonts and the extra's can show."""
    packaged = packaged_cjk_font()
    # Typst has DejaVu Sans Mono inside; matplotlib's is the same font, as a file.
    return shown_by([_matplotlib_font("DejaVuSansMono.ttf"), *([packaged] if packaged else [])])


def _matplotlib_font(name: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name


@cache
def _characters(font: Path) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(str(font)).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
