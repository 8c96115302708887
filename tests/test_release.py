"""A version's commit: what it writes, what it refuses, and that `git describe` counts from its tag."""

from __future__ import annotations

import datetime
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from tools.release import CHARTS, FILES, ROOT, git, main, release

TODAY = datetime.date(2027, 1, 2)
NEXT = "98.7.6"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the files as they are here and one entry under "Unreleased"."""
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "somebody")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "somebody@example.org")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    text = (tmp_path / "CHANGELOG.md").read_text()
    (tmp_path / "CHANGELOG.md").write_text(text.replace("## Unreleased\n", "## Unreleased\n\n- One thing more.\n", 1))
    git(tmp_path, "init", "--quiet")
    commit(tmp_path, "before")
    return tmp_path


def commit(root: Path, message: str) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--allow-empty", "--message", message)


def test_a_version_is_in_all_files_and_in_one_commit(project: Path) -> None:
    release(project, NEXT, TODAY)
    assert git(project, "log", "--format=%s").splitlines() == [f"Version {NEXT}", "before"]
    assert set(git(project, "show", "--name-only", "--format=").split()) == set(FILES)
    assert tomllib.loads((project / "pyproject.toml").read_text())["project"]["version"] == NEXT
    for name in CHARTS:
        chart = yaml.safe_load((project / name).read_text())
        assert (chart["version"], chart["appVersion"]) == (NEXT, NEXT)
    citation = yaml.safe_load((project / "CITATION.cff").read_text())
    assert (citation["version"], citation["date-released"]) == (NEXT, TODAY)
    assert f"## Unreleased\n\n## {NEXT} (2027-01-02)\n\n- One thing more.\n" in (project / "CHANGELOG.md").read_text()


def test_git_describes_what_follows_a_version(project: Path) -> None:
    release(project, NEXT, TODAY)
    git(project, "tag", "--annotate", f"v{NEXT}", "--message", "as CONTRIBUTING.md says")
    commit(project, "after")
    assert git(project, "describe").startswith(f"v{NEXT}-1-g")


def test_the_next_version_replaces_the_day(project: Path) -> None:
    release(project, NEXT, TODAY)
    text = (project / "CHANGELOG.md").read_text()
    (project / "CHANGELOG.md").write_text(text.replace("## Unreleased\n", "## Unreleased\n\n- Another.\n", 1))
    commit(project, "after")
    release(project, "99.0.0", datetime.date(2027, 2, 3))
    assert (project / "CITATION.cff").read_text().count("date-released: ") == 1
    assert "date-released: 2027-02-03" in (project / "CITATION.cff").read_text()


@pytest.mark.parametrize(
    ("version", "message"),
    [("1.2", "is no version"), ("v1.2.3", "is no version"), ("01.2.3", "is no version"), ("0.0.1", "is not above")],
)
def test_a_bad_version_is_refused(project: Path, version: str, message: str) -> None:
    refused(project, version, message)


def test_an_empty_changelog_is_refused(project: Path) -> None:
    (project / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n## 0.1.0\n\n- Old.\n")
    commit(project, "emptied")
    refused(project, NEXT, "no entry under")


def test_uncommitted_changes_are_refused(project: Path) -> None:
    (project / "new.txt").write_text("x")
    refused(project, NEXT, "uncommitted changes.*\n.*new.txt")


def test_a_version_that_has_a_tag_is_refused(project: Path) -> None:
    git(project, "tag", f"v{NEXT}")
    refused(project, NEXT, "there is a tag")


def refused(project: Path, version: str, message: str) -> None:
    before = {name: (project / name).read_bytes() for name in FILES}
    head = git(project, "rev-parse", "HEAD")
    with pytest.raises(SystemExit, match=message):
        release(project, version, TODAY)
    assert {name: (project / name).read_bytes() for name in FILES} == before
    assert git(project, "rev-parse", "HEAD") == head


def test_the_makefile_passes_the_version_on() -> None:
    shown = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "release", f"VERSION={NEXT}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.rstrip().endswith(f"tools/release.py {NEXT}")
    with pytest.raises(SystemExit, match="name the version"):
        main([])
