"""Processes that run tests on a copy of the project, one mutant at a time.

Every run is a fork of this process, which has loaded the large libraries and nothing of the project: PyTorch and its companions
take ten seconds to import, most tests that kill a mutant a fraction of one. Nothing in the checkout is written to: the copy is
mutated, so programs that a test starts see the mutant as well.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = ("client", "server", "shared", "simulations", "tests", "benchmarks")
_FILES = ("cli.py", "pyproject.toml")
_OF_EACH_RUN = {"grpc", "ray", "flwr"}  # start threads, which a fork does not survive


def load_libraries(names: Iterable[str]) -> None:
    """Import modules that tests need beside the project, so that no run of theirs has to."""
    top = {*PACKAGES, "cli", "conftest", "__main__", *_OF_EACH_RUN}
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
        chosen: node ids in order; None for all.
        coverage: switched to each test's name while it runs, if there is one.
        seconds: of every test that passed, set-up included.
        failed: the first test that failed, "" if none did.
        reason: the last line of why.
    """

    chosen: Sequence[str] | None = None
    coverage: Any = None
    seconds: dict[str, float] = field(default_factory=dict)
    failed: str = ""
    reason: str = ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Keep and order."""
        if self.chosen is not None:
            rank = {name: place for place, name in enumerate(self.chosen)}
            items[:] = sorted((item for item in items if item.nodeid in rank), key=lambda item: rank[item.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins, with its fixtures."""
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


class Child:
    """A fork that runs tests in a copy."""

    def __init__(
        self,
        copy: Copy,
        files: Iterable[str],
        *,
        chosen: Sequence[str] | None = None,
        watch: str | None = None,
        deselect: Sequence[str] = (),
        processor_seconds: float = 3600.0,
    ) -> None:
        self._result, self._log = copy.folder / "result.json", copy.folder / "log.txt"
        self._result.unlink(missing_ok=True)
        self._deadline = time.monotonic() + 8 * processor_seconds + 60
        self.pid = os.fork()
        if not self.pid:
            _in_child(
                lambda: _run_tests(copy.folder, list(files), chosen, watch, deselect),
                self._result,
                self._log,
                processor_seconds,
            )

    def poll(self) -> Run | None:
        """Return how the run ended, or None while it goes on."""
        pid, _status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            if time.monotonic() < self._deadline:
                return None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # programs that a test started and left
        if not self._result.exists():
            return Run(status="timeout")
        return Run(**json.loads(self._result.read_text(encoding="utf-8")))

    def wait(self) -> Run:
        """Return how the run ended."""
        while (run := self.poll()) is None:
            time.sleep(0.02)
        return run


def _in_child(work: Callable[[], Run], result: Path, log: Path, processor_seconds: float) -> None:
    """Do `work` and end this process."""
    try:
        os.setsid()
        limit = math.ceil(processor_seconds) or 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        run = work()
        text = json.dumps({**run.__dict__}, default=dict)
        result.with_suffix(".part").write_text(text, encoding="utf-8")
        result.with_suffix(".part").rename(result)
    finally:
        os._exit(0)


def _run_tests(
    folder: Path, files: list[str], chosen: Sequence[str] | None, watch: str | None, deselect: Sequence[str]
) -> Run:
    _enter(folder, write_bytecode=watch is not None)
    import pytest

    tracer = None
    if watch is not None:
        import coverage

        tracer = coverage.Coverage(data_file=None, include=[str(folder / watch)], config_file=False)
        tracer.start()
    selection = Selection(chosen=chosen, coverage=tracer)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = ["-q", "-x", "--no-header", "--assert=plain", "-p", "pytest_timeout", "-p", "no:cacheprovider"]
    options += ["-p", "no:unraisableexception", "-W", "ignore::pytest.PytestWarning", "-m", "not endurance and not gpu"]
    options += [f"--deselect={name}" for name in deselect]
    status = pytest.main([*options, f"--rootdir={folder}", *files], plugins=[selection])
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
    top = {*PACKAGES, "cli"}
    for name in [name for name in sys.modules if name.partition(".")[0] in top]:
        del sys.modules[name]
    checkout = str(Path(__file__).parents[2])
    sys.path[:] = [str(folder), *(path for path in sys.path if path not in (checkout, ""))]
    os.environ["PYTHONPATH"] = str(folder)
    if not write_bytecode:  # that of a mutant would outlive it
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.dont_write_bytecode = True
    importlib.invalidate_caches()
