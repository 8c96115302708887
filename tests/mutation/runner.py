"""Mutation runs: plant every mutant of a module, run the tests that reach it, and account for those that survive.

    1. Run the module's tests on a copy without any mutant; note which test runs which line, and how long it takes.
    2. Plant each mutant in a copy, and run the tests that reach it, fastest first, until one fails. Two run at a time.
    3. Keep what was found. A later run repeats only what may have changed.

Guarantee (tests: tests/test_mutation.py): a mutant counts as killed only if a test failed, or used far more processor time
than without the mutant. A call that lacks an argument that it must have is no mutant and counts nowhere.
"""

from __future__ import annotations

import hashlib
import json
import resource
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.mutation.mutants import Mutant, mutants_of
from tests.mutation.workers import Child, Copy, Run

GOOD_SHARE = 0.95
"""Share of the mutants of all modules that the tests have to kill."""
_TIME_FACTOR = 5


@dataclass(frozen=True, kw_only=True)
class Target:
    """One module and the tests that are to notice its mutants.

    Attributes:
        path: of the module in the project.
        tests: files of tests, the most focused first.
        deselect: tests that are left out, for the time they take.
        seconds: of processor time that the tests may take on a mutant, beside five times what they take without it.
    """

    path: str
    tests: tuple[str, ...]
    deselect: tuple[str, ...] = ()
    seconds: float = 15.0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one mutant.

    Attributes:
        status: "killed", "timeout", "survived", "unreached" (no test runs its lines), "invalid" (see the module's guarantee).
        test, reason: what failed, and why.
        depends: hash of what the verdict was reached on.
    """

    status: str
    test: str = ""
    reason: str = ""
    depends: str = ""

    @property
    def alive(self) -> bool:
        """Whether no test noticed."""
        return self.status in ("survived", "unreached")


@dataclass(kw_only=True)
class Findings:
    """Verdicts on the mutants of one module, by their names; `complete` unless the run was cut short."""

    path: str
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

    def baseline(self, module: str, state: str) -> Run | None:
        """Return how the tests of a module went without a mutant, if they and the module were the same then."""
        found = self._baselines.get(module)
        return Run(**found["run"]) if found is not None and found["state"] == state else None

    def keep_baseline(self, module: str, state: str, run: Run) -> None:
        """Keep how the tests of a module went."""
        self._baselines[module] = {"state": state, "run": run.__dict__}
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
        say: Callable[[str], None] = print,
    ) -> None:
        """Prepare runs of `jobs` mutants at a time; after so many `seconds` of processor time no other is planted."""
        self._project, self._scratch, self._store, self._jobs, self._say = project, scratch, store, jobs, say
        self._seconds = seconds

    def examine(self, target: Target, *, again: bool = False) -> Findings:
        """Return the verdicts on every mutant of a module.

        Args:
            target: the module and its tests.
            again: also repeat what was found before.

        Raises:
            RuntimeError: if the tests do not pass without a mutant.
        """
        mutants = mutants_of((self._project / target.path).read_text(encoding="utf-8"))
        findings = Findings(path=target.path, verdicts={mutant.name: Verdict(status="unreached") for mutant in mutants})
        open_ones = []
        for mutant in mutants:
            known = None if again else self._store.get(target.path, mutant.name)
            if known is not None and known.depends == self._depends(target, mutant, known):
                findings.verdicts[mutant.name] = known
            else:
                open_ones.append((mutant, known))
        if open_ones:
            self._examine(target, open_ones, findings)
        return findings

    def _examine(self, target: Target, open_ones: list[tuple[Mutant, Verdict | None]], findings: Findings) -> None:
        first = Copy(self._project, self._scratch / "0")
        baseline = Child(first, target.tests, watch=target.path, deselect=target.deselect).wait()
        if baseline.status != "passed":
            raise RuntimeError(
                f"the tests of {target.path} do not pass without a mutant: {baseline.test} {baseline.reason}; see "
                f"{first.folder / 'log.txt'}"
            )
        copies = [
            first,
            *(Copy(first.folder, self._scratch / str(n), with_bytecode=True) for n in range(1, self._jobs)),
        ]
        queue, running, done = list(reversed(open_ones)), dict[int, _Planted](), 0
        while queue or running:
            for place, copy in enumerate(copies):
                if place not in running and queue:
                    mutant, known = queue.pop()
                    running[place] = _Planted(copy, target, mutant, baseline, known)
            time.sleep(0.01)
            for place, planted in list(running.items()):
                if (verdict := planted.poll()) is None:
                    continue
                del running[place]
                verdict = replace(verdict, depends=self._depends(target, planted.mutant, verdict))
                findings.verdicts[planted.mutant.name] = verdict
                self._store.put(target.path, planted.mutant.name, verdict)
                done += 1
                if verdict.alive:
                    self._say(f"  {verdict.status}: {planted.mutant.name}")
                if done % 20 == 0:
                    self._store.save()
                    self._say(f"  {done} of {len(open_ones)} mutants of {target.path}")
        self._store.save()

    def _baseline(self, target: Target, copy: Copy) -> Run:
        """Return the run of all tests without a mutant."""
        state = self._state(target)
        known = self._store.baseline(target.path, state)
        if known is not None:
            return known
        baseline = Child(copy, target.tests, watch=target.path, deselect=target.deselect).wait()
        if baseline.status != "passed":
            raise RuntimeError(
                f"the tests of {target.path} do not pass without a mutant: {baseline.test} {baseline.reason}; see "
                f"{copy.folder / 'log.txt'}"
            )
        self._store.keep_baseline(target.path, state, baseline)
        return baseline

    def _state(self, target: Target) -> str:
        parts = [repr(target).encode(), *(_content(self._project / path) for path in (target.path, *target.tests))]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]

    def _depends(self, target: Target, mutant: Mutant, verdict: Verdict) -> str:
        """Return the hash of what a verdict stands on.

        For a mutant that was killed these are its function and the file of the test, else the whole module and all its tests.
        What they call elsewhere is left out: `--again` repeats everything.
        """
        killer = verdict.test.partition("::")[0].removesuffix(" (import)")
        if verdict.status in ("killed", "invalid") and killer:
            parts = [mutant.top.encode(), _content(self._project / killer)]
        else:
            parts = [self._state(target).encode()]
        return hashlib.sha256(b"\0".join([mutant.name.encode(), *parts])).hexdigest()[:16]


class _Planted:
    """One mutant in its copy while tests run."""

    def __init__(self, copy: Copy, target: Target, mutant: Mutant, baseline: Run, known: Verdict | None) -> None:
        self.mutant = mutant
        chosen = tests_that_reach(mutant, baseline)
        if known is not None and known.test in chosen:
            chosen = [known.test, *(name for name in chosen if name != known.test)]
        self._child, self._holding = None, None
        if chosen:
            limit = target.seconds + _TIME_FACTOR * sum(baseline.seconds[name] for name in chosen)
            files = dict.fromkeys(name.partition("::")[0] for name in chosen)
            self._holding = copy.changed(target.path, mutant.source)
            self._holding.__enter__()
            self._child = Child(copy, files, chosen=chosen, deselect=target.deselect, processor_seconds=limit)

    def poll(self) -> Verdict | None:
        """Return the verdict once there is one."""
        if self._child is None:
            return Verdict(status="unreached")
        run = self._child.poll()
        if run is None:
            return None
        self._holding.__exit__(None, None, None)
        if run.status == "passed":
            return Verdict(status="survived")
        if run.status == "failed" and "missing" in run.reason and "required" in run.reason and "argument" in run.reason:
            return Verdict(status="invalid", test=run.test, reason=run.reason)
        return Verdict(status="killed" if run.status == "failed" else "timeout", test=run.test, reason=run.reason)


def tests_that_reach(mutant: Mutant, baseline: Run) -> list[str]:
    """Return the tests that run a line of the mutant, fastest first; all of them for what runs while the module is imported."""
    reaching: set[str] = set()
    for line in mutant.lines:
        reaching |= set(baseline.contexts.get(str(line), []))
    chosen = set(baseline.seconds) if "" in reaching else reaching & set(baseline.seconds)
    return sorted(chosen, key=lambda name: (baseline.seconds[name], name))


def _processor_seconds() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


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
    killed, valid = sum(f.num_killed for f in findings), sum(f.num_valid for f in findings)
    lines.append(f"{'all':{width}}  {valid:7}  {killed:6}  {'':28}  {_percent(killed, valid):>9}")
    if bad:
        lines.append(
            "Nobody noticed these, and tests/mutation/survivors.toml does not say why; write a test, or a reason:"
        )
        lines += [f"  {path}: {name}" for path, name in bad]
    for found in findings:
        alive = set(found.survivors())
        stale = [name for name in explained.get(found.path, {}) if name not in alive]
        lines += [f"explained, but killed or gone: {found.path}: {name}" for name in stale]
    return "\n".join(lines), not bad and killed >= GOOD_SHARE * valid


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
