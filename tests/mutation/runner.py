"""Mutation runs: plant every mutant of a module, run the tests that reach it, and account for those that survive.

    1. Run the module's tests on a copy without any mutant; note which test runs which line, and how long it takes.
    2. Plant each mutant in a copy, and run the tests that reach it, fastest first, until one fails. Two run at a time.
    3. Keep what was found. A later run repeats only what may have changed.

Guarantee (tests: tests/test_mutation.py): a mutant counts as killed only if a test failed, used far more processor time
than without the mutant, or waited for ever. A call that lacks an argument that it must have is no mutant and counts nowhere.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.mutation.dependence import source_of_test
from tests.mutation.mutants import Mutant, mutants_of
from tests.mutation.workers import Child, Copy, Run, Running, Warm, load_libraries

GOOD_SHARE = 0.95
"""Share of the mutants of all modules that the tests have to kill."""
SAMPLE_SEED = 13
_TIME_FACTOR = 5


@dataclass(frozen=True, kw_only=True)
class Target:
    """One module and the tests that are to notice its mutants.

    Attributes:
        path: of the module in the project.
        tests: files of tests, the most focused first.
        deselect: tests that are left out, for the time they take.
        seconds: of processor time that a test may take on a mutant, beside five times what it takes without it; the import
            of the tests may take as much.
    """

    path: str
    tests: tuple[str, ...]
    deselect: tuple[str, ...] = ()
    seconds: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one mutant.

    Attributes:
        status: "killed", "timeout", "survived", "unreached" (no test runs its lines), "invalid" (see the module's guarantee).
        test, reason: what failed, and why.
        depends: hash of what the verdict was reached on.
        passed: of a survivor, hashes of the tests that did not notice.
    """

    status: str
    test: str = ""
    reason: str = ""
    depends: str = ""
    passed: Sequence[str] = ()

    @property
    def alive(self) -> bool:
        """Whether no test noticed."""
        return self.status in ("survived", "unreached")


@dataclass(kw_only=True)
class Findings:
    """Verdicts on the mutants of one module, by their names.

    Attributes:
        num_all: mutants that there are; more than `verdicts`, if only a sample was tried.
        complete: unless the run was cut short.
    """

    path: str
    num_all: int
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    complete: bool = True

    def survivors(self) -> list[str]:
        """Names of the mutants that no test noticed."""
        return [name for name, verdict in self.verdicts.items() if verdict.alive]

    def counts(self) -> Counter[str]:
        """How many mutants there are of each status."""
        return Counter(verdict.status for verdict in self.verdicts.values())

    @property
    def num_valid(self) -> int:
        """Mutants that count."""
        return len(self.verdicts) - self.counts()["invalid"]

    @property
    def num_killed(self) -> int:
        """Mutants that a test noticed."""
        return self.num_valid - len(self.survivors())


class Store:
    """Verdicts of earlier runs in one JSON file, written after every few mutants, so that a run that is stopped goes on later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self._content: dict[str, dict[str, Any]] = content.get("verdicts", {})
        self._baselines: dict[str, Any] = content.get("baselines", {})

    def get(self, module: str, name: str) -> Verdict | None:
        """Return the verdict on a mutant, if there is one."""
        found = self._content.get(module, {}).get(name)
        return None if found is None else Verdict(**found)

    def put(self, module: str, name: str, verdict: Verdict) -> None:
        """Keep a verdict."""
        self._content.setdefault(module, {})[name] = asdict(verdict)

    def baseline(self, module: str) -> tuple[str, dict[str, str], Run] | None:
        """Return how the tests of a module went without a mutant: hash of all, hash of each test, the run."""
        found = self._baselines.get(module)
        return None if found is None else (found["state"], found["hashes"], Run(**found["run"]))

    def keep_baseline(self, module: str, state: str, hashes: Mapping[str, str], run: Run) -> None:
        """Keep how the tests of a module went."""
        self._baselines[module] = {"state": state, "hashes": hashes, "run": run.__dict__}
        self.save()

    def save(self) -> None:
        """Write the file."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        content = {"verdicts": self._content, "baselines": self._baselines}
        part.write_text(json.dumps(content), encoding="utf-8")
        part.replace(self._path)


class MutationRun:
    """Mutants of modules of `project`, planted in copies under `scratch`."""

    def __init__(
        self,
        project: Path,
        scratch: Path,
        store: Store,
        *,
        jobs: int = 2,
        seconds: float | None = None,
        sample: int | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """Prepare runs.

        Args:
            project: whose modules.
            scratch: for the copies.
            store: of the verdicts.
            jobs: mutants at a time.
            seconds: of processor time, after which no other mutant is planted; None for no end.
            sample: how many mutants of a module to try at most, drawn at random, the same ones each time; None for all.
            say: where progress goes.
        """
        self._project, self._scratch, self._store, self._jobs, self._say = project, scratch, store, jobs, say
        self._seconds, self._sample = seconds, sample
        self._contents: dict[str, str] = {}

    def examine(self, target: Target, *, again: bool = False) -> Findings:
        """Return the verdicts on every mutant of a module.

        Args:
            target: the module and its tests.
            again: also repeat what was found before.

        Raises:
            RuntimeError: if the tests do not pass without a mutant.
        """
        # As they are now: someone may go on editing while the mutants are tried.
        self._contents = {path: _content(self._project / path) for path in (target.path, *target.tests)}
        first = Copy(self._project, self._scratch / "0")
        every = mutants_of(self._contents[target.path])
        mutants = every if self._sample is None else drawn(every, self._sample)
        verdicts = {mutant.name: Verdict(status="unreached") for mutant in mutants}
        findings = Findings(path=target.path, num_all=len(every), verdicts=verdicts)
        open_ones = []
        for mutant in mutants:
            known = None if again else self._store.get(target.path, mutant.name)
            if known is not None and known.depends == self._depends(target, mutant, known):
                findings.verdicts[mutant.name] = known
            else:
                open_ones.append((mutant, known))
        if open_ones:
            self._examine(target, first, open_ones, findings)
        return findings

    def _examine(
        self, target: Target, first: Copy, open_ones: list[tuple[Mutant, Verdict | None]], findings: Findings
    ) -> None:
        baseline = self._baseline(target, first)
        load_libraries(baseline.modules)
        copies = [
            first,
            *(Copy(first.folder, self._scratch / str(n), with_bytecode=True) for n in range(1, self._jobs)),
        ]
        warm = [Warm(copy, target.path, target.tests, deselect=target.deselect) for copy in copies]
        for process in warm:
            process.wait()
        queue, running, done = list(reversed(open_ones)), dict[int, _Planted](), 0
        killers: Counter[str] = Counter()
        while (queue and not self._used_up()) or running:
            for place, copy in enumerate(copies):
                if place not in running and queue and not self._used_up():
                    mutant, known = queue.pop()
                    chosen = tests_that_reach(mutant, baseline, killers)
                    if known is not None and known.test in chosen:
                        chosen = [known.test, *(name for name in chosen if name != known.test)]
                    earlier = set(known.passed) if known is not None else set()
                    chosen = [name for name in chosen if self._hash_of(target, mutant, name) not in earlier]
                    limits = {name: target.seconds + _TIME_FACTOR * baseline.seconds[name] for name in chosen}
                    is_loaded = runs_at_import(mutant, baseline) or not warm[place].takes(mutant.source)
                    running[place] = _Planted(copy, target, mutant, limits, None if is_loaded else warm[place])
            time.sleep(0.01)
            for place, planted in list(running.items()):
                if (verdict := planted.poll()) is None:
                    continue
                del running[place]
                killers[verdict.test] += 1
                if verdict.alive:
                    reaching = tests_that_reach(planted.mutant, baseline, {})
                    passed = [self._hash_of(target, planted.mutant, name) for name in reaching]
                    verdict = replace(verdict, status="survived" if reaching else "unreached", passed=passed)
                verdict = replace(verdict, depends=self._depends(target, planted.mutant, verdict))
                findings.verdicts[planted.mutant.name] = verdict
                self._store.put(target.path, planted.mutant.name, verdict)
                done += 1
                if verdict.alive:
                    self._say(f"  {verdict.status}: {planted.mutant.name}")
                if done % 20 == 0:
                    self._store.save()
                    self._say(f"  {done} of {len(open_ones)} mutants of {target.path}")
        for process in warm:
            process.close()
        findings.complete = not queue
        self._store.save()

    def _used_up(self) -> bool:
        return self._seconds is not None and _processor_seconds() > self._seconds

    def _baseline(self, target: Target, copy: Copy) -> Run:
        """Return the run of all tests without a mutant; only those that are new or changed are run."""
        state, known, run = self._store.baseline(target.path) or ("", {}, Run(status="passed"))
        if state == self._state(target):
            return run
        same = {name for name, value in known.items() if self._hash_without(target, name) == value}
        baseline = Child(copy, target.tests, watch=target.path, deselect=target.deselect, skip=same).wait()
        if baseline.status != "passed":
            raise RuntimeError(
                f"the tests of {target.path} do not pass without a mutant: {baseline.test} {baseline.reason}; see "
                f"{copy.folder / 'log.txt'}"
            )
        run = baseline.beside(run, same)
        hashes = {name: self._hash_without(target, name) for name in run.seconds}
        self._store.keep_baseline(target.path, self._state(target), hashes, run)
        return run

    def _state(self, target: Target) -> str:
        return _hash(repr(target), *(self._contents[path] for path in (target.path, *target.tests)))

    def _hash_without(self, target: Target, test: str) -> str:
        """Return the hash of a test and the module."""
        file, _, name = test.partition("::")
        return _hash(self._contents[target.path], source_of_test(self._contents.get(file, ""), name))

    def _hash_of(self, target: Target, mutant: Mutant, test: str) -> str:
        """Return the hash of a test, the module, and a mutant."""
        return _hash(self._hash_without(target, test), mutant.name)

    def _depends(self, target: Target, mutant: Mutant, verdict: Verdict) -> str:
        """Return the hash of what a verdict stands on.

        For a mutant that was killed these are its function and the test, else the whole module and all its tests.
        What they call elsewhere is left out: `--again` repeats everything.
        """
        file, _, name = verdict.test.removesuffix(" (import)").partition("::")
        if verdict.status in ("killed", "invalid") and file:
            return _hash(mutant.name, mutant.top, source_of_test(self._contents.get(file, ""), name))
        return _hash(mutant.name, self._state(target))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def drawn(mutants: Sequence[Mutant], count: int) -> list[Mutant]:
    """Return `count` of the mutants at random, always the same ones, in their order; all if there are no more."""
    chosen = set(random.Random(SAMPLE_SEED).sample(range(len(mutants)), min(count, len(mutants))))
    return [mutant for place, mutant in enumerate(mutants) if place in chosen]


class _Planted:
    """One mutant in its copy while tests run."""

    def __init__(self, copy: Copy, target: Target, mutant: Mutant, limits: dict[str, float], warm: Warm | None) -> None:
        """Start tests, each with a limit of its processor seconds, in a warm process if there is one."""
        self.mutant = mutant
        self._running: Running | None = None
        self._holding = copy.changed(target.path, mutant.source)
        if not limits:
            return
        self._holding.__enter__()
        if warm is not None:
            self._running = warm.start(mutant.source, limits)
        else:
            files = dict.fromkeys(name.partition("::")[0] for name in limits)
            self._running = Child(copy, files, limits=limits, deselect=target.deselect, begin=target.seconds)

    def poll(self) -> Verdict | None:
        """Return the verdict once there is one."""
        if self._running is None:
            return Verdict(status="unreached")
        run = self._running.poll()
        if run is None:
            return None
        self._holding.__exit__(None, None, None)
        if run.status == "passed":
            return Verdict(status="survived")
        if run.status == "failed" and "missing" in run.reason and "required" in run.reason and "argument" in run.reason:
            return Verdict(status="invalid", test=run.test, reason=run.reason)
        return Verdict(status="killed" if run.status == "failed" else "timeout", test=run.test, reason=run.reason)


def tests_that_reach(mutant: Mutant, baseline: Run, killers: Mapping[str, int]) -> list[str]:
    """Return the tests that run a line of the mutant; all of them for what runs while the module is imported.

    First those that are fast, and those that have killed many mutants of the module.
    """
    reaching: set[str] = set()
    for line in mutant.lines:
        reaching |= set(baseline.contexts.get(str(line), []))
    chosen = set(baseline.seconds) if "" in reaching else reaching & set(baseline.seconds)
    return sorted(chosen, key=lambda name: ((baseline.seconds[name] + 0.05) / (1 + killers.get(name, 0)), name))


def runs_at_import(mutant: Mutant, baseline: Run) -> bool:
    """Return whether a line of the mutant runs outside of all tests."""
    return any("" in baseline.contexts.get(str(line), []) for line in mutant.lines)


def _processor_seconds() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _content(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def report(findings: Sequence[Findings], explained: dict[str, dict[str, str]]) -> tuple[str, bool]:
    """Return (table and survivors that nobody explained, whether all is well)."""
    width = max(len(found.path) for found in findings)
    lines = [f"{'module':{width}}  mutants  killed  of time  survived  explained  killed"]
    bad = []
    for found in findings:
        counts, known = found.counts(), explained.get(found.path, {})
        survivors = found.survivors()
        bad += [(found.path, name) for name in survivors if name not in known]
        lines.append(
            f"{found.path:{width}}  {found.num_valid:7}  {found.num_killed:6}  {counts['timeout']:7}  {len(survivors):8}  "
            f"{sum(name in known for name in survivors):9}  {_percent(found.num_killed, found.num_valid)}"
        )
        if len(found.verdicts) < found.num_all:
            lines[-1] += f"  (a sample: {len(found.verdicts)} of {found.num_all} mutants, seed {SAMPLE_SEED})"
    killed, valid = sum(f.num_killed for f in findings), sum(f.num_valid for f in findings)
    lines.append(f"{'all':{width}}  {valid:7}  {killed:6}  {'':28}  {_percent(killed, valid):>9}")
    if bad:
        lines.append(
            "Nobody noticed these, and tests/mutation/survivors.toml does not say why; write a test, or a reason:"
        )
        lines += [f"  {path}: {name}" for path, name in bad]
    for found in findings:
        alive = set(found.survivors())
        tried = found.verdicts if len(found.verdicts) < found.num_all else explained.get(found.path, {})
        stale = [name for name in explained.get(found.path, {}) if name not in alive and name in tried]
        lines += [f"explained, but killed or gone: {found.path}: {name}" for name in stale]
    return "\n".join(lines), not bad and killed >= GOOD_SHARE * valid


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
