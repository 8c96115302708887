"""Processes that run tests on a copy of the project, one mutant at a time.

Every run is a fork, for PyTorch and its companions take ten seconds to import, most tests that kill a mutant a fraction of one:
a `Child` of this process, which has loaded the large libraries and nothing of the project; or a run of a `Warm` process, which
has collected the tests as well, so that the mutant is swapped in (`tests.mutation.swap`). Nothing in the checkout is written to:
the copy is mutated, so programs that a test starts see the mutant as well.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import os
import resource
import select
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import hypothesis
import pytest

from tests.mutation.swap import loaded_functions, swaps

PACKAGES = ("cli", "client", "server", "shared", "silotune", "simulations", "tests", "benchmarks")
_FILES = ("pyproject.toml",)
_OF_EACH_RUN = {"grpc", "ray", "flwr"}  # start threads, which a fork does not survive


def load_libraries(names: Iterable[str]) -> None:
    """Import modules that tests need beside the project, so that no run of theirs has to."""
    top = {*PACKAGES, "conftest", "__main__", *_OF_EACH_RUN}
    for name in names:
        if name.partition(".")[0] not in top and name not in sys.modules:
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(name)
    gc.freeze()  # else every fork walks over, and so copies, what was loaded here


class Copy:
    """The project's sources in a folder of their own; one that is there already is brought up to date."""

    def __init__(self, project: Path, folder: Path, *, with_bytecode: bool = False) -> None:
        self.folder = folder
        for name in (*PACKAGES, *_FILES):
            _bring_up_to_date(project / name, folder / name, with_bytecode=with_bytecode)

    @contextlib.contextmanager
    def changed(self, module: str, source: str) -> Any:
        """Hold the mutated module in the copy for the duration of the block."""
        path = self.folder / module
        original = path.read_bytes()
        compiled = list((path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"))
        for old in compiled:
            old.unlink()
        path.write_text(source, encoding="utf-8")
        try:
            yield
        finally:
            path.write_bytes(original)


def _bring_up_to_date(source: Path, target: Path, *, with_bytecode: bool) -> None:
    """Copy what is new or changed of a file or folder, and remove what is gone."""
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_file() or _stamp(source) != _stamp(target):
            shutil.copy2(source, target)
    elif source.is_dir():
        here = {child.name for child in source.iterdir() if not child.name.startswith(".")}
        if not with_bytecode:
            here.discard("__pycache__")
        for name in here:
            _bring_up_to_date(source / name, target / name, with_bytecode=with_bytecode)
        gone = [child for child in target.iterdir() if child.name not in here] if target.is_dir() else []
        for child in gone:
            if child.is_file():
                child.unlink()
            elif child.name != "__pycache__":
                shutil.rmtree(child)


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@dataclass(eq=False)
class Selection:
    """A pytest plugin: runs the chosen tests only, in the given order; notes how each ended.

    Attributes:
        limits: node ids in order, and the processor seconds that each may take; None for all, without a limit.
        skip: node ids to leave out.
        coverage: switched to each test's name while it runs, if there is one.
        seconds: of every test that passed, set-up included.
        failed: the first test that failed, "" if none did.
        reason: the last line of why.
    """

    limits: Mapping[str, float] | None = None
    skip: Set[str] = frozenset()
    coverage: Any = None
    seconds: dict[str, float] = field(default_factory=dict)
    failed: str = ""
    reason: str = ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Keep and order."""
        items[:] = [item for item in items if item.nodeid not in self.skip]
        if self.limits is not None:
            rank = {name: place for place, name in enumerate(self.limits)}
            items[:] = sorted((item for item in items if item.nodeid in rank), key=lambda item: rank[item.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins, with its fixtures."""
        if self.limits is not None:
            _limit_processor_seconds(self.limits[nodeid])
        if self.coverage is not None:
            self.coverage.switch_context(nodeid)

    def pytest_runtest_logfinish(self) -> None:
        """A test is over."""
        if self.coverage is not None:
            self.coverage.switch_context("")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """One phase of a test ended."""
        if report.skipped:
            return
        if report.failed and not self.failed:
            self.failed, self.reason = report.nodeid, _last_line(report.longrepr)
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration

    def pytest_collectreport(self, report: Any) -> None:
        """A file of tests was imported, or not."""
        if report.failed and not self.failed:
            self.failed, self.reason = f"{report.nodeid} (import)", _last_line(report.longrepr)


def _last_line(longrepr: Any) -> str:
    crash = getattr(longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(longrepr)
    return str(text).strip().splitlines()[0][:200] if str(text).strip() else ""


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a run of tests ended.

    Attributes:
        status: "passed", "failed" or "timeout".
        test, reason: the first test that failed, and why.
        seconds: of each test.
        contexts: tests that ran each line of the watched file, if one was; lines are texts, as in JSON.
        modules: names of all modules that were imported in the meantime, if a file was watched.
    """

    status: str
    test: str = ""
    reason: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    contexts: Mapping[str, list[str]] = field(default_factory=dict)
    modules: Sequence[str] = ()

    def beside(self, earlier: Run, tests: Set[str]) -> Run:
        """Return this run together with some `tests` of an earlier one."""
        contexts = {line: set(names) for line, names in self.contexts.items()}
        for line, names in earlier.contexts.items():
            contexts.setdefault(line, set()).update(name for name in names if name in tests or not name)
        return replace(
            self,
            seconds={**{name: earlier.seconds[name] for name in tests}, **self.seconds},
            contexts={line: sorted(names) for line, names in contexts.items()},
            modules=sorted({*earlier.modules, *self.modules}),
        )


class Running(Protocol):
    """A run of tests that has begun."""

    def poll(self) -> Run | None:
        """Return how the run ended, or None while it goes on."""


class Child:
    """A fork that runs tests in a copy."""

    def __init__(
        self,
        copy: Copy,
        files: Iterable[str],
        *,
        limits: Mapping[str, float] | None = None,
        watch: str | None = None,
        deselect: Sequence[str] = (),
        skip: Set[str] = frozenset(),
        begin: float = 3600.0,
    ) -> None:
        """Start it.

        Args:
            copy: of the project.
            files: of tests.
            limits: the tests to run, in order, and the processor seconds that each may take; None for all, without a limit.
            watch: a file of which to note what test runs which line.
            deselect: beginnings of node ids of tests to leave out.
            skip: node ids of others.
            begin: processor seconds until the first test.
        """
        self._result, self._log = copy.folder / "result.json", copy.folder / "log.txt"
        self._result.unlink(missing_ok=True)
        self._deadline = time.monotonic() + _patience({"": 3600.0} if limits is None else limits)
        self.pid = os.fork()
        if not self.pid:
            _in_child(
                lambda: _run_tests(copy.folder, list(files), Selection(limits=limits, skip=skip), deselect, watch),
                self._result,
                self._log,
                begin,
            )

    def poll(self) -> Run | None:
        """Return how the run ended, or None while it goes on."""
        return _read(self._result) if _has_ended(self.pid, self._deadline) else None

    def wait(self) -> Run:
        """Return how the run ended."""
        while (run := self.poll()) is None:
            time.sleep(0.02)
        return run


class Warm:
    """A process that has collected all tests of a module, and forks for one mutant after the other.

    For a mutant that can be swapped in, and of which no line runs while the tests are collected.
    """

    def __init__(self, copy: Copy, module: str, files: Sequence[str], *, deselect: Sequence[str] = ()) -> None:
        self._result, self._log = copy.folder / "result.json", copy.folder / "warm.txt"
        self._original = (copy.folder / module).read_text(encoding="utf-8")
        theirs, requests = os.pipe()
        answers, their_answers = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            server = _Server(copy.folder / module, self._original, theirs, their_answers)
            _in_child(lambda: _run_tests(copy.folder, files, server, deselect), self._result, self._log)
        os.close(theirs)
        os.close(their_answers)
        self._requests = os.fdopen(requests, "w", encoding="utf-8")
        self._answers = os.fdopen(answers, "rb", buffering=0)

    def wait(self) -> None:
        """Wait until all tests are collected; before that no mutant may be planted in the copy."""
        if not (line := self._answers.readline()):
            raise RuntimeError(f"the tests could not be collected; see {self._log}")
        self._functions = {(name, number) for name, number in json.loads(line)}

    def takes(self, source: str) -> bool:
        """Return whether a mutant can be swapped in."""
        found = swaps(self._original, source)
        return found is not None and {key for key, _ in found} <= self._functions

    def start(self, source: str, limits: Mapping[str, float]) -> Running:
        """Run tests, in order and each within its processor seconds, with the mutant of which this is the source."""
        self._result.unlink(missing_ok=True)
        self._requests.write(json.dumps({"source": source, "limits": limits}) + "\n")
        self._requests.flush()
        return self

    def poll(self) -> Run | None:
        """Return how the run ended, or None while it goes on."""
        if not select.select([self._answers], [], [], 0)[0]:
            return None
        if not self._answers.readline():
            raise RuntimeError(f"the process that has collected the tests is gone; see {self._log}")
        return _read(self._result)

    def close(self) -> None:
        """End the process."""
        self._requests.write("\n")
        self._requests.close()
        self._answers.close()
        os.waitpid(self.pid, 0)


class _Server(Selection):
    """A `Selection` that forks for each request in the place of running the tests; the fork goes on and runs them."""

    def __init__(self, module: Path, original: str, requests: int, answers: int) -> None:
        super().__init__()
        self._module, self._original, self._requests, self._answers = module, original, requests, answers

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: Any) -> None:
        """Say what can be swapped, then serve until an empty request."""
        functions = loaded_functions(str(self._module))
        os.write(self._answers, json.dumps(list(functions)).encode() + b"\n")
        gc.collect()
        gc.freeze()
        with os.fdopen(self._requests, encoding="utf-8") as lines:
            while (line := lines.readline()).strip():
                request = json.loads(line)
                limits = request["limits"]
                deadline = time.monotonic() + _patience(limits)
                pid = os.fork()
                if not pid:
                    os.setsid()
                    for key, code in swaps(self._original, request["source"]) or ():
                        for function in functions[key]:
                            function.__code__ = code
                    self.limits = limits
                    self.pytest_collection_modifyitems(session.items)
                    return
                while not _has_ended(pid, deadline):
                    time.sleep(0.01)
                os.write(self._answers, b"\n")
        os._exit(0)


def _patience(limits: Mapping[str, float]) -> float:
    """Return after how many seconds by the clock, on a machine with much else to do, a run counts as hanging."""
    return 2 * sum(limits.values()) + 60


def _has_ended(pid: int, deadline: float) -> bool:
    """Return whether a child has ended, with all that it started; after the deadline it is made to."""
    ended, _status = os.waitpid(pid, os.WNOHANG)
    if not ended:
        if time.monotonic() < deadline:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # programs that a test started and left
    return True


def _read(result: Path) -> Run:
    return Run(**json.loads(result.read_text(encoding="utf-8"))) if result.exists() else Run(status="timeout")


def _in_child(work: Callable[[], Run], result: Path, log: Path, begin: float | None = None) -> None:
    """Do `work` and end this process."""
    try:
        os.setsid()
        if begin is not None:
            _limit_processor_seconds(begin)
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        run = work()
        text = json.dumps({**run.__dict__}, default=dict)
        result.with_suffix(".part").write_text(text, encoding="utf-8")
        result.with_suffix(".part").rename(result)
    finally:
        os._exit(0)


def _limit_processor_seconds(more: float) -> None:
    """End this process once it has used so many seconds from now on."""
    limit = math.ceil(time.process_time() + more) or 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def _run_tests(
    folder: Path, files: Sequence[str], selection: Selection, deselect: Sequence[str], watch: str | None = None
) -> Run:
    _enter(folder, write_bytecode=watch is not None)
    # What fails need not be made small.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutants", phases=phases, database=None)
    hypothesis.settings.load_profile("mutants")
    tracer = None
    if watch is not None:
        import coverage

        tracer = coverage.Coverage(data_file=None, include=[str(folder / watch)], config_file=False)
        tracer.start()
    selection.coverage = tracer
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = ["-q", "-x", "--no-header", "--assert=plain", "-p", "pytest_timeout", "-p", "no:cacheprovider"]
    options += ["-p", "no:unraisableexception", "-W", "ignore::pytest.PytestWarning", "-m", "not endurance and not gpu"]
    options += [f"--deselect={name}" for name in deselect]
    options += [f"--rootdir={folder}", f"--basetemp={folder}.tmp"]
    status = pytest.main([*options, *files], plugins=[selection])
    contexts: dict[str, list[str]] = {}
    modules: list[str] = []
    if tracer is not None:
        tracer.stop()
        found = tracer.get_data().contexts_by_lineno(str(folder / str(watch)))
        contexts = {str(line): names for line, names in found.items()}
        modules = [name for name, module in sys.modules.items() if getattr(module, "__spec__", None) is not None]
    if status in (0, 5):  # 5: all chosen tests were skipped
        return Run(status="passed", seconds=selection.seconds, contexts=contexts, modules=modules)
    return Run(status="failed", test=selection.failed, reason=selection.reason, seconds=selection.seconds)


def _enter(folder: Path, *, write_bytecode: bool) -> None:
    """Make this process see the copy and nothing of the checkout."""
    os.chdir(folder)
    top = {*PACKAGES}
    for name in [name for name in sys.modules if name.partition(".")[0] in top]:
        del sys.modules[name]
    checkout = str(Path(__file__).parents[2])
    sys.path[:] = [str(folder), *(path for path in sys.path if path not in (checkout, ""))]
    os.environ["PYTHONPATH"] = str(folder)
    if not write_bytecode:  # that of a mutant would outlive it
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.dont_write_bytecode = True
    importlib.invalidate_caches()
