"""The mutation runs themselves, on a small project: what is a mutant, what becomes of it, and what a later run repeats."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from tests.mutation.dependence import source_of_test
from tests.mutation.mutants import mutants_of
from tests.mutation.runner import Findings, Verdict, report
from tests.mutation.swap import loaded_functions, swaps

CHECKOUT = Path(__file__).parents[1]


def names(source: str) -> list[str]:
    return [mutant.name for mutant in mutants_of(dedent(source))]


# --- what a mutant is ---


def test_comparisons_arithmetic_logic_and_constants_are_changed() -> None:
    assert names("""
        def f(x):
            return x < 3 and not x
    """) == [
        "f: return x < 3 and (not x) -> return x < 3 or not x",
        "f: return x < 3 and (not x) -> return x <= 3 and (not x)",
        "f: return x < 3 and (not x) -> return x < 4 and (not x)",
        "f: return x < 3 and (not x) -> return x < 3 and x",
    ]
    assert names("RATE = 0.5 * 2") == [
        "<module>: RATE = 0.5 * 2 -> RATE = 1.0 * 2",
        "<module>: RATE = 0.5 * 2 -> RATE = 0.25 * 2",
        "<module>: RATE = 0.5 * 2 -> RATE = 0.5 / 2",
        "<module>: RATE = 0.5 * 2 -> RATE = 0.5 * 3",
    ]


def test_effects_keywords_slices_and_conversions_are_left_out() -> None:
    found = names("""
        class C:
            def f(self, x):
                self.x = x.double()
                g(x[:n], dtype=y)
                if x:
                    raise ValueError(f"{x} is 1")
                return f"a{x}"
    """)
    assert found == [
        "C.f: self.x = x.double() -> pass",
        "C.f: self.x = x.double() -> self.x = x",
        "C.f: g(x[:n], dtype=y) -> pass",
        "C.f: g(x[:n], dtype=y) -> g(x[:n])",
        "C.f: g(x[:n], dtype=y) -> g(x[:], dtype=y)",
        "C.f: if x: -> if not x:",
        "C.f: raise ValueError(f'{x} is 1') -> pass",
        "C.f: return f'a{x}' -> return f'a'",
        "C.f: return f'a{x}' -> return f'a~{x}'",
    ]


def test_what_no_test_should_pin_is_left_alone() -> None:
    assert not names('''
        """Docstring 1."""
        from typing import Literal
        import math
        __all__ = ["f"]
        Kind = Literal["a", "b"]

        @decorated(1)
        def f(x: "int | 3", y) -> "list[2]":
            """Docstring 2."""
            log.info("3")
            return zip(x, y, strict=True)
    ''')


def test_equal_changes_are_numbered_and_every_mutant_is_a_program() -> None:
    source = "def f(x):\n    x += 1\n    x += 1\n"
    mutants = mutants_of(source)
    assert [mutant.name for mutant in mutants[3:]] == [
        "f: x += 1 -> pass (2)",
        "f: x += 1 -> x -= 1 (2)",
        "f: x += 1 -> x += 2 (2)",
    ]
    assert len({mutant.source for mutant in mutants}) == 6
    assert [list(mutant.lines) for mutant in mutants] == [[2]] * 3 + [[3]] * 3
    for mutant in mutants:
        compile(mutant.source, "mutant", "exec")


def test_the_modules_and_tests_of_the_settings_exist() -> None:
    settings = CHECKOUT / "tests" / "mutation"
    explained = tomllib.loads((settings / "survivors.toml").read_text(encoding="utf-8"))
    content = tomllib.loads((settings / "targets.toml").read_text(encoding="utf-8"))
    assert set(explained) <= set(content)
    for path, entry in content.items():
        assert (CHECKOUT / path).is_file(), path
        for name in (*entry["tests"], *entry.get("deselect", ())):
            file, _, function = name.partition("::")
            assert f"def {function}" in (CHECKOUT / file).read_text(encoding="utf-8"), name


# --- what is swapped, and what a verdict stands on ---

LOADED = """
LIMIT = 3


def outer(x, y=1, *, z=True):
    def inner(w):
        return w * 2
    return inner(x) + y


class C:
    field = 0

    @property
    def size(self):
        return len(self.field)

    def same(self):
        return super().__init__()


key = lambda value: value + 5
"""


@pytest.mark.parametrize(
    ("before", "after", "swapped"),
    [
        ("w * 2", "w * 3", ["outer"]),
        ("+ y", "- y", ["outer"]),
        ("len(self.field)", "len(self.other)", ["C.size"]),
        ("value + 5", "value + 6", ["<lambda>"]),
        ("value + 5", "value + 5.0", ["<lambda>"]),
        ("w * 2", "w * 2 + 0 * LIMIT", ["outer"]),
        # What runs while the module is imported, and what a function object holds itself.
        ("LIMIT = 3", "LIMIT = 4", None),
        ("y=1", "y=2", None),
        ("z=True", "z=1", None),
        ("field = 0", "field = 1", None),
        ("@property", "@staticmethod", None),
        ("x, y=1", "x, y, v=1", None),
        ("super().__init__()", "None", None),
    ],
)
def test_a_mutant_is_swapped_in_only_if_nothing_else_differs(
    before: str, after: str, swapped: list[str] | None
) -> None:
    assert LOADED.count(before) == 1
    found = swaps(LOADED, ast.unparse(ast.parse(LOADED.replace(before, after))))
    assert (found if found is None else [name for (name, _), _ in found]) == swapped


def test_a_function_that_is_loaded_becomes_the_mutant_wherever_it_is_held() -> None:
    space: dict[str, Any] = {}
    exec(compile(LOADED, "loaded for this test", "exec"), space)  # noqa: S102
    held = [space["outer"]]
    functions = loaded_functions("loaded for this test")
    for key, code in swaps(LOADED, LOADED.replace("w * 2", "w * 7")) or ():
        for function in functions[key]:
            function.__code__ = code
    assert held[0](2) == 15


def test_a_test_is_made_of_what_it_names_in_its_file() -> None:
    source = """
A = 1
B = 2

@fixture
def made():
    return B

@fixture(autouse=True)
def always():
    pass

def helper():
    return A

def test_one(made):
    assert helper()

def test_other():
    pass
"""
    found = source_of_test(source, "test_one[a]")
    assert [
        name for name in ("A = 1", "B = 2", "made", "always", "helper", "test_one", "test_other") if name in found
    ] == ["A = 1", "B = 2", "made", "always", "helper", "test_one"]
    assert "A = 1" not in source_of_test(source, "test_other")
    assert source_of_test(source, "test_gone") == source


# --- what becomes of them ---

MODULE = '''
LIMIT = 10


def count(number, *, by):
    """Count up to a number."""
    done = 0
    while done < number:
        done += by
    return min(done, LIMIT)


def twice(number):
    return count(number * 2, by=1)


def never(number):
    return number + 1


def idle(number):
    return number + 0 * number
'''
TESTS = """
from shared.toy import count, idle, twice


def test_count():
    assert count(3, by=1) == 3


def test_twice():
    assert twice(2) == 4


def test_idle():
    idle(0)
"""
LIMIT_TEST = "\n\ndef test_limit():\n    assert count(11, by=1) == 10\n"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A project of one module."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "tests" / "mutation").mkdir(parents=True)
    (tmp_path / "shared" / "__init__.py").touch()
    (tmp_path / "shared" / "toy.py").write_text(MODULE)
    (tmp_path / "tests" / "test_toy.py").write_text(TESTS)
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = "--import-mode=importlib"\n')
    (tmp_path / "tests" / "mutation" / "targets.toml").write_text(
        '["shared/toy.py"]\ntests = ["tests/test_toy.py"]\nseconds = 0\n'
    )
    (tmp_path / "tests" / "mutation" / "survivors.toml").touch()
    return tmp_path


def mutate(project: Path, *options: str) -> tuple[int, str, dict[str, dict[str, str]]]:
    """Return (status, output, verdicts) of one run."""
    command = [sys.executable, "-m", "tests.mutation", "--project", str(project), *options]
    done = subprocess.run(
        command,
        cwd=CHECKOUT,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    file = project / ".mutation" / "report.json"
    return (
        done.returncode,
        done.stdout + done.stderr,
        json.loads(file.read_text())["shared/toy.py"] if file.exists() else {},
    )


def sources(project: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for path in project.rglob("*") if path.is_file() and ".mutation" not in path.parts
    }


def test_a_run_tells_killed_timed_out_survived_unreached_and_invalid_mutants_apart(toy: Path) -> None:
    before = sources(toy)
    status, output, verdicts = mutate(toy)
    assert status == 1
    assert sources(toy) == before  # nothing is written beside the folder of the run
    ended = {name: verdict["status"] for name, verdict in verdicts.items()}
    assert ended["count: while done < number: -> while done <= number:"] == "killed"
    assert ended["twice: return count(number * 2, by=1) -> return count(number / 2, by=1)"] == "killed"
    assert ended["count: done += by -> done -= by"] == "timeout"
    assert ended["count: done += by -> pass"] == "timeout"
    assert ended["twice: return count(number * 2, by=1) -> return count(number * 2)"] == "invalid"
    assert ended["<module>: LIMIT = 10 -> LIMIT = 11"] == "survived"
    assert ended["never: return number + 1 -> return number - 1"] == "unreached"
    assert verdicts["count: while done < number: -> while done <= number:"]["test"].startswith(
        "tests/test_toy.py::test_"
    )
    assert "survivors.toml does not say why" in output
    assert "shared/toy.py: <module>: LIMIT = 10 -> LIMIT = 11" in output


def test_a_later_run_repeats_what_may_have_changed_and_reads_explanations(toy: Path) -> None:
    begin, end = MODULE.index("    done = 0"), MODULE.index("    return min(")
    (toy / "shared" / "toy.py").write_text(MODULE[:begin] + "    done = number * by\n" + MODULE[end:])
    _, _, first = mutate(toy)
    store = toy / ".mutation" / "verdicts.json"
    written = store.stat().st_mtime_ns
    _, _, again = mutate(toy)
    assert (again, store.stat().st_mtime_ns) == (first, written)  # no mutant was planted
    # A test more: the survivors are tried again.
    (toy / "tests" / "test_toy.py").write_text(TESTS + LIMIT_TEST)
    status, _, later = mutate(toy)
    assert status == 1
    assert later["<module>: LIMIT = 10 -> LIMIT = 11"]["test"] == "tests/test_toy.py::test_limit"
    # Every survivor explained, and enough of them killed.
    alive = [name for name, verdict in later.items() if verdict["status"] in ("survived", "unreached")]
    lines = [f"{json.dumps(name)} = 'of no use'\n" for name in alive]
    (toy / "tests" / "mutation" / "survivors.toml").write_text('["shared/toy.py"]\n' + "".join(lines))
    status, output, _ = mutate(toy)
    assert "does not say why" not in output
    assert status == 1  # explained, but too many


def test_tests_that_fail_without_a_mutant_stop_the_run(toy: Path) -> None:
    (toy / "tests" / "test_toy.py").write_text(TESTS + "\n\ndef test_broken():\n    assert count(2, by=1) == 3\n")
    status, output, _ = mutate(toy)
    assert status == 1
    assert "do not pass without a mutant: tests/test_toy.py::test_broken" in output


def test_a_sample_is_the_same_each_time_and_called_one(toy: Path) -> None:
    status, output, first = mutate(toy, "--sample", "8")
    assert status == 1
    assert len(first) == 8
    assert f"(a sample: 8 of {len(mutants_of(MODULE))} mutants, seed 13)" in output
    _, _, again = mutate(toy, "--sample", "8")
    assert again == first
    _, output, every = mutate(toy)
    assert "a sample" not in output
    assert {name: every[name] for name in first} == first


@pytest.mark.parametrize(
    ("killed", "survived", "explained", "good"),
    [(95, 5, 5, True), (94, 6, 6, False), (99, 1, 0, False), (100, 0, 0, True)],
)
def test_a_run_is_good_if_enough_are_killed_and_the_others_explained(
    killed: int, survived: int, explained: int, good: bool
) -> None:
    verdicts = {f"k{n}": Verdict(status="killed") for n in range(killed)}
    verdicts |= {f"s{n}": Verdict(status=("survived", "unreached")[n % 2]) for n in range(survived)}
    verdicts |= {"i": Verdict(status="invalid")}
    found = Findings(path="a.py", num_all=101, verdicts=verdicts)
    text, well = report([found], {"a.py": {f"s{n}": "why" for n in range(explained)}})
    assert well is good
    assert f"{killed:.1f} %" in text
    stale, well = report([found], {"a.py": {f"s{n}": "why" for n in range(survived)} | {"k1": "why"}})
    assert "explained, but killed or gone: a.py: k1" in stale
    assert well is (killed >= 95)
