"""Hooks of mkdocs: no page of the built site loads anything from elsewhere, so nobody else learns who reads it.

A link that a reader may follow is none of that; what a browser fetches by itself is: scripts, styles, fonts, images, frames.
Built pages are searched for them, and a policy in each page forbids them to scripts of the theme as well. Beside that, an entry
of the navigation that ends in "/" stands for every page of that folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_FETCHED_TAG = re.compile(r"<(?:script|img|iframe|source|video|audio|object|embed|link)\b[^>]*>", re.IGNORECASE)
_ELSEWHERE = re.compile(r"""(?:src|srcset|href|data)\s*=\s*["']?\s*(?:https?:)?//""", re.IGNORECASE)
_STYLE_ELSEWHERE = re.compile(r"""(?:url\(|@import)\s*["']?\s*(?:https?:)?//""", re.IGNORECASE)
_ONLY_NAMED = re.compile(r"""rel\s*=\s*["']?(?:canonical|next|prev|edit)\b""", re.IGNORECASE)

_POLICY = "default-src 'self' file: data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'none'"


def fetched_from_elsewhere(text: str) -> list[str]:
    """Return what a browser would fetch from another host while it shows this HTML or style sheet."""
    tags = [tag for tag in _FETCHED_TAG.findall(text) if not _ONLY_NAMED.search(tag)]
    return [tag for tag in tags if _ELSEWHERE.search(tag)] + _STYLE_ELSEWHERE.findall(text)


def with_folders(nav: list[Any], pages: Path) -> list[Any]:
    """Return a navigation in which each folder is replaced by its pages."""
    found = []
    for entry in nav:
        title, target = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        if isinstance(target, list):
            found.append({title: with_folders(target, pages)})
        elif target.endswith("/"):
            names = [path.relative_to(pages).as_posix() for path in sorted((pages / target).glob("*.md"))]
            found.append({title: sorted(names, key=lambda name: (not name.endswith("README.md"), name))})
        else:
            found.append(entry)
    return found


def on_config(config: Any) -> None:
    """Put the pages of folders into the navigation."""
    config["nav"] = with_folders(config["nav"], Path(config["docs_dir"]))


def with_policy(html: str) -> str:
    """Return a page that lets the browser fetch nothing but what lies beside it."""
    policy = f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    if html.count("<head>") != 1:
        raise SystemExit("error: a page has no <head> to put its policy into; look at the theme's templates.")
    return html.replace("<head>", f"<head>{policy}")


def on_post_page(output: str, **_: Any) -> str:
    """Put the policy into every page."""
    return with_policy(output)


def on_post_template(output_content: str, template_name: str, **_: Any) -> str:
    """Put the policy into the pages that no document makes, such as 404.html."""
    return with_policy(output_content) if template_name.endswith(".html") else output_content


def on_post_build(config: Any, **_: Any) -> None:
    """Refuse the site if a page or style sheet of it fetches something from elsewhere."""
    for path in sorted(Path(config["site_dir"]).rglob("*")):
        if path.suffix in (".html", ".css") and (found := fetched_from_elsewhere(path.read_text(encoding="utf-8"))):
            raise SystemExit(f"error: {path} loads from another host: {found[0]}. Put a copy beside the pages instead.")
