"""docs/architecture.md names only what there is, and every room."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PACKAGES = ("shared", "client", "server", "simulations", "silotune", "cli")


def test_every_file_and_folder_that_it_names_exists() -> None:
    named = set(
        re.findall(r"[`\"]((?:(?:shared|client|server|simulations|silotune|cli)/[\w/.]+|pyproject\.toml))[`\"]", TEXT)
    )
    assert len(named) > 40
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_name_in_parentheses_stands_in_the_file_before_it() -> None:
    pairs = re.findall(r"`([\w/]+\.py)` \(`(\w+)`\)", TEXT)
    assert pairs
    assert [pair for pair in pairs if pair[1] not in (ROOT / pair[0]).read_text(encoding="utf-8")] == []


def section(title: str) -> str:
    """Return what stands under one heading."""
    (found,) = re.findall(rf"^### {re.escape(title)}\n(.*?)^##", TEXT, flags=re.DOTALL | re.MULTILINE)
    return found


def files_that_match(pattern: str) -> list[str]:
    """Return the files of the product in which a pattern stands."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    found = [path for path in files if re.search(pattern, path.read_text(encoding="utf-8"), flags=re.MULTILINE)]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


QUESTIONS = {
    # What is searched for, and what it finds that is no answer.
    "Where is noise added?": (
        r"(?<!def )\b(add_gaussian_noise|with_share|noisy_counts|discrete_gaussian|add_noise)\(",
        set[str](),
    ),
    "Where is a job refused?": (
        r"raise (PolicyError|BudgetExceeded|AdapterError|RosterError|DroppedOut)\b|raise self\._refusal\(",
        {  # of a site's update at the coordinator, and of an adapter in a file
            *("server/aggregation/mean.py", "server/rounds/update_bounds.py", "shared/wire/updates.py"),
            *("shared/runtime/calibration.py", "shared/runtime/export/peft.py"),
        },
    ),
    "Where is an epsilon printed?": (
        r"(?<!def )\b(rounded_up|rounded_up_short|format_epsilon)\(",
        {"shared/privacy/central.py"},  # of a noise multiplier
    ),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_answer_to_a_newcomers_question_is_named(question: str) -> None:
    pattern, others = QUESTIONS[question]
    found, text = files_that_match(pattern), section(question)
    assert len(found) >= 4
    assert others <= set(found)
    named = set(re.findall(r"`((?:shared|client|server|simulations|silotune)/[\w/.]+)`", text))
    assert [
        file
        for file in found
        if file not in others and not any(file == n or (n.endswith("/") and file.startswith(n)) for n in named)
    ] == []


def test_every_room_is_named() -> None:
    rooms = {
        folder.name
        for package in PACKAGES
        for folder in (ROOT / package).iterdir()
        if (folder / "__init__.py").exists()
    }
    assert [room for room in sorted(rooms) if f"`{room}/`" not in TEXT] == []


def test_no_folder_holds_more_than_fifteen_files_of_code() -> None:
    """A newcomer looks a folder over in one glance."""
    counts = {
        folder.relative_to(ROOT).as_posix(): len([file for file in folder.glob("*.py") if file.name != "__init__.py"])
        for package in PACKAGES
        for folder in [ROOT / package, *(ROOT / package).rglob("*")]
        if folder.is_dir()
    }
    assert {name: count for name, count in counts.items() if count > 15} == {}
