"""The files that forges, editors and tools read: they parse, and what they call and name is there."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.pages import fetched_from_elsewhere, with_folders, with_policy

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))
PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md"]
PAGES += ["docker/README.md", "charts/README.md"]
YAML = sorted(
    [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "mkdocs.yml", ROOT / "CITATION.cff"]
)


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def nav_files(entry: Any) -> Iterator[str]:
    """Return every target of a navigation."""
    if isinstance(entry, str):
        yield entry
    else:
        for inner in entry.values() if isinstance(entry, dict) else entry:
            yield from nav_files(inner)


def documented_files(text: str) -> set[str]:
    """Return what a document names in back-quotes and looks like a file of this repository."""
    return set(re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|toml)|(?:[\w.-]+/)+)`", text)) - {".venv/", "site/"}


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_yaml_parses(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def called_targets(path: Path) -> set[str]:
    """Return the targets that a file calls: of a document in back-quotes and code blocks, of others anywhere."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = "\n".join([*text.split("```")[1::2], *re.findall(r"`make [^`]*`", text)])
    return set(re.findall(r"\bmake ([a-z-]+)", text))


def test_every_make_target_that_is_called_exists() -> None:
    workflow, container = ROOT / ".github/workflows/ci.yml", ROOT / ".devcontainer/devcontainer.json"
    assert called_targets(workflow) == {"test", "docs", "sbom"}
    assert json.loads(container.read_text(encoding="utf-8"))["postCreateCommand"] == "make install"
    others = [ROOT / name for name in (*PAGES, ".ci/run", ".github/PULL_REQUEST_TEMPLATE.md", ".github/dependabot.yml")]
    for path in [workflow, container, *others, *(ROOT / "docs").rglob("*.md")]:
        assert called_targets(path) <= TARGETS, path.name


def test_every_target_is_explained_and_phony() -> None:
    explained = set(re.findall(r'@echo "make ([a-z-]+)', MAKEFILE))
    phony = set(MAKEFILE.partition(".PHONY:")[2].partition("\n")[0].split())
    assert phony == TARGETS
    assert TARGETS - explained == {"help", "install"}


def test_commits_are_checked_as_make_check_does() -> None:
    recipe = MAKEFILE.partition("\ncheck:")[2].partition("\n\n")[0].splitlines()[1:]
    (repository,) = load(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == [
        line.strip().replace("$(BIN)", ".venv/bin") for line in recipe
    ]


def test_the_workflow_runs_every_python_that_is_supported_and_may_only_read() -> None:
    workflow = load(".github/workflows/ci.yml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert workflow["permissions"] == {"contents": "read"}
    assert f">={workflow['jobs']['test']['strategy']['matrix']['python'][0]}" == project["requires-python"]
    assert all(job["timeout-minutes"] for job in workflow["jobs"].values())


def test_issue_forms_have_what_a_forge_wants() -> None:
    for name in ("bug.yml", "idea.yml"):
        form = load(f".github/ISSUE_TEMPLATE/{name}")
        assert form["name"]
        assert form["description"]
        fields = [item for item in form["body"] if item["type"] != "markdown"]
        assert len({item["id"] for item in fields}) == len(fields)
        assert all(item["type"] in ("textarea", "input") and item["attributes"]["label"] for item in fields)


def test_the_citation_is_of_this_version() -> None:
    citation = load("CITATION.cff")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"cff-version", "message", "title", "authors", "type"} <= set(citation)
    assert (citation["cff-version"], citation["type"], citation["license"]) == ("1.2.0", "software", project["license"])
    assert str(citation["version"]) == project["version"]
    assert all(
        set(author) <= {"name", "given-names", "family-names", "orcid", "website"} for author in citation["authors"]
    )


def test_the_editor_is_told_what_the_formatter_does() -> None:
    text = (ROOT / ".editorconfig").read_text(encoding="utf-8")
    width = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["line-length"]
    assert f"max_line_length = {width}\n" in text
    assert re.search(r"\[Makefile\]\nindent_style = tab\n", text)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md"])
def test_files_that_are_named_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = documented_files(text)
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []
    links = [target for target in re.findall(r"\]\((?!https?://)([^)#]+)", text) if not (ROOT / target).exists()]
    assert links == []


def test_tests_that_are_named_exist() -> None:
    named = re.findall(r"`(test_\w+)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert named
    assert all(f"def {name}(" in code for name in named)


# The web site


def test_the_site_shows_every_document_and_only_what_exists() -> None:
    shown = list(nav_files(with_folders(load("mkdocs.yml")["nav"], ROOT)))
    assert sorted(shown) == sorted([*PAGES, *(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md"))])
    recipe = MAKEFILE.partition("\ndocs:")[2].partition("\n\n")[0]
    assert all(f" {name} " in recipe for name in [*PAGES, "docs"]), "make docs copies them"


def test_the_reference_names_modules_that_exist() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/reference").glob("*.md"))
    modules = re.findall(r"^::: ([\w.]+)$", pages, flags=re.MULTILINE)
    assert len(modules) > 10
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []


def test_the_site_has_no_font_of_another_host_and_fails_on_dead_links() -> None:
    site = load("mkdocs.yml")
    assert site["theme"]["font"] is False
    assert site["strict"] is True
    assert not {"extra_javascript", "extra_css", "repo_url"} & set(site)


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example.org/x.js"></script>',
        "<img loading=lazy src='//example.org/x.png'>",
        '<link rel="stylesheet" href="https://fonts.example.org/css">',
        "<style>@import 'https://example.org/x.css'</style>",
        "<style>a{background:url(https://example.org/x.png)}</style>",
    ],
)
def test_what_a_browser_would_fetch_is_found(html: str) -> None:
    assert fetched_from_elsewhere(f"<p>before</p>{html}")


def test_links_and_own_files_are_no_fetches() -> None:
    page = '<a href="https://flower.ai">x</a><img src="x.png"><link rel="canonical" href="https://example.org/"><p>url(x)</p>'
    assert fetched_from_elsewhere(page) == []


def test_every_page_forbids_fetches() -> None:
    html = with_policy("<html><head><title>x</title></head></html>")
    policy = re.search(r'<head><meta http-equiv="Content-Security-Policy" content="([^"]+)">', html)
    assert policy is not None
    assert "http" not in policy[1]
    assert policy[1].startswith("default-src 'self'")


@pytest.mark.parametrize(("checks", "tests", "status"), [(0, 0, 0), (0, 3, 3), (2, 0, 1), (2, 3, 1)])
def test_tests_beside_checks_fail_if_either_does(tmp_path: Path, checks: int, tests: int, status: int) -> None:
    """`make test`; here both are one line."""
    make = tmp_path / "make"
    make.write_text(f"#!/bin/sh\necho $@ > {tmp_path / 'asked'}\nexit {checks}\n")
    make.chmod(0o755)
    done = subprocess.run(
        ["sh", ROOT / "tools" / "tests_beside_checks.sh", "sh", "-c", f"sleep 0.1; exit {tests}"],
        env=os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status
    assert ("make check found faults" in done.stderr) == (checks != 0)
    assert (tmp_path / "asked").read_text().split()[-1] == "check"
    (recipe,) = re.findall(r"^test:.*\n\t(.*)", MAKEFILE, flags=re.MULTILINE)
    assert recipe == "@sh tools/tests_beside_checks.sh $(PYTEST)"
