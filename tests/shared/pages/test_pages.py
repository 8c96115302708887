"""The shell of HTML pages: what is given is escaped, nothing is loaded, and only the page's own style sheet is admitted."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest
from jinja2 import Environment, UndefinedError, nodes

from shared.pages import render_page

TEMPLATE = '{% extends "page.html" %}\n{% block title %}{{ name }}{% endblock %}\n{% block body %}\n<p>{{ name | twice }}</p>\n'
PRODUCT = Path(__file__).parents[3]


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "own.html"
    path.write_text(TEMPLATE + "{% endblock %}\n", encoding="utf-8")
    path.with_suffix(".css").write_text(".own > p { color: red; }\n", encoding="utf-8")
    return path


def test_a_text_is_escaped_wherever_it_stands(template: Path) -> None:
    page = render_page(template, filters={"twice": lambda text: 2 * text}, name='</style><script>"&é').decode()
    escaped = "&lt;/style&gt;&lt;script&gt;&#34;&amp;é"
    assert f"<title>{escaped}</title>" in page
    assert f"<p>{2 * escaped}</p>" in page
    assert page.startswith("<!doctype html>\n")
    assert page.endswith("</body>\n</html>\n")


def test_the_policy_admits_the_style_sheet_and_nothing_else(template: Path) -> None:
    page = render_page(template, filters={"twice": str}, name="a").decode()
    style = re.search(r"<style>(.*?)</style>", page, flags=re.DOTALL)
    assert style is not None
    assert style[1].endswith("}\n.own > p { color: red; }\n"), "the page's own rules come last, unescaped"
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in page
    assert not re.search(r"\b(src|href)=|url\(|@import|<script", page)


def test_a_name_that_nobody_gave_is_an_error(template: Path) -> None:
    with pytest.raises(UndefinedError, match="'name' is undefined"):
        render_page(template, filters={"twice": str})


def test_a_template_is_compiled_once_and_anew_if_it_changed(template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str | None] = []
    real = Environment._generate

    def generate(self: Environment, source: nodes.Template, name: str | None, *args: object, **kwargs: object) -> str:
        compiled.append(name)
        return real(self, source, name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Environment, "_generate", generate)
    assert b"<p>aa</p>" in render_page(template, filters={"twice": lambda text: 2 * text}, name="a")
    assert compiled.count("own.html") == 1
    # Values and filters are those of each call.
    assert b"<p>b!</p>" in render_page(template, filters={"twice": lambda text: text + "!"}, name="b")
    assert compiled.count("own.html") == 1
    template.write_text(template.read_text(encoding="utf-8").replace("<p>", "<p>so "), encoding="utf-8")
    assert b"<p>so c</p>" in render_page(template, filters={"twice": str}, name="c")
    assert compiled.count("own.html") == 2


def test_half_of_a_surrogate_pair_does_not_stop_a_page(template: Path) -> None:
    assert b"<p>a?b</p>" in render_page(template, filters={"twice": str}, name="a\ud800b")


def test_no_control_character_stands_in_a_page(template: Path) -> None:
    controls = "".join(map(chr, (*range(0x20), *range(0x7F, 0xA0))))
    page = render_page(template, filters={"twice": str}, name=f"a{controls}b\r\nc").decode()
    assert {character for character in controls if character in page} == {"\n", "\t"}
    assert f"<p>a{9 * chr(0xFFFD)}\t\n" in page, "each shows that something was there"
    assert "b\nc</p>" in page


def test_every_page_extends_the_shell() -> None:
    folders = [PRODUCT / folder for folder in ("client", "server", "shared", "simulations")]
    pages = {path for folder in folders for path in folder.rglob("*.html")} - {PRODUCT / "shared/pages/page.html"}
    pages -= {
        page for page in pages if page.parent.name == "templates"
    }  # of consoles, which are served: tests/shared/web
    assert len(pages) >= 3
    for page in pages:
        assert page.read_text(encoding="utf-8").startswith('{% extends "page.html" %}\n'), page
        assert page.with_suffix(".css").is_file(), page
