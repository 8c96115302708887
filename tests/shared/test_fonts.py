"""Text of every script in figures and PDF: shown where a font is at hand, as code points where none is, refused nowhere."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from shared import fonts

CJK = "紧急 北京 ひらがな カタカナ 한국어"


@pytest.fixture(params=["with the extra", "without any"])
def at_hand(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a font for Chinese, Japanese and Korean is at hand."""
    if request.param == "with the extra":
        pytest.importorskip(fonts.CJK_PACKAGE)
    else:
        monkeypatch.setattr(fonts, "packaged_cjk_font", lambda: None)
        monkeypatch.setattr(fonts, "cjk_font", lambda: None)
    return request.param == "with the extra"


def test_a_figure_shows_every_character_or_its_code_point(at_hand: bool) -> None:
    with fonts.readable_figures() as readable, warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a glyph that no font has
        text = readable(f"{CJK} é عاجل \U00012000 x")
        figure = Figure()
        FigureCanvasAgg(figure)
        figure.suptitle(text, parse_math=False)
        figure.canvas.draw()
    assert (CJK in text) == at_hand
    assert ("U+7D27 U+6025" in text) == (not at_hand)
    assert "é عاجل U+12000  x" in text


def test_text_that_can_be_shown_is_not_changed() -> None:
    with fonts.readable_figures() as readable:
        for text in ("", "plain", " two  spaces ", "a\nb\tc", "naïve – “x” ≤ ∞"):
            assert readable(text) == text


def test_a_font_of_the_machine_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip(fonts.CJK_PACKAGE)
    monkeypatch.setattr(fonts, "packaged_cjk_font", lambda: None)
    monkeypatch.setattr(
        "matplotlib.font_manager.findSystemFonts", lambda: ["/x/NotoSansCJK-none.ttc", str(package.FONT_PATH)]
    )
    fonts.cjk_font.cache_clear()
    try:
        assert fonts.cjk_font() == Path(str(package.FONT_PATH))
    finally:
        fonts.cjk_font.cache_clear()
