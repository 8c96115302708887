"""What a console's process loads and how much memory it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.client.console.homes import ask, charge, make_home, want_people

ROOT = Path(__file__).parents[3]
FORBIDDEN = (
    "torch",
    "transformers",
    "peft",
    "opacus",
    "flwr",
    "grpc",
    "matplotlib",
    "authlib",
    "dp_accounting",
    "scipy.stats",
)
MOST_MEGABYTES = 165
"""Of a small site, with what migrations load; one with 100,000 entries in its ledger and its log takes some 20 MB more."""

# The console of a home, served, with every page asked once by somebody who may see it.
SCRIPT = """
import json, sys, threading
from http.client import HTTPConnection
from pathlib import Path
import cli.commands, client.commands
from client.console.pages import NAVIGATION
from client.console.start import ROUTES, open_console
from client.site.home import SiteHome
from shared.web.application import make_application
from shared.web.roles import Role
from shared.http.serving import listen, make_server, place_at

home, place = SiteHome(Path(sys.argv[1])), place_at("127.0.0.1", 0, None, None)
listener = listen(place)
port = listener.getsockname()[1]
console = open_console(home, place=place, port=port, passphrase=None)
server = make_server(make_application(console, ROUTES)[0], place)
threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True).start()
account = console.accounts.from_issuer(issuer="i", subject="s", name="Olga", role=Role.OFFICER, address="a")
cookie = console.cookie("session") + "=" + console.sessions.begin(account.id, address="a", browser="b")
def ask(path):
    browser = HTTPConnection("127.0.0.1", port, timeout=30)
    browser.request("GET", path, headers={"cookie": cookie})
    return browser.getresponse().status
(budget,) = console.content.budgets.all()
more = [f"/budget/{budget.id}/line.json", f"/budget/{budget.id}/jobs", "/releases/log", "/releases/verified"]
more += [f"/budget/{budget.id}/forecast", f"/budget/{budget.id}/what-if", "/policy/edit", "/policy/versions/1", "/health/gpus"]
(asked,) = console.content.requests.all()
more += [f"/requests/{asked.request.id}", f"/requests/{asked.request.id}/facts"]
told = {path: ask(path) for path in [*(one.path for one in NAVIGATION), *more]}
status = Path("/proc/self/status").read_text()  # getrusage tells of the process that started this one
peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
print(json.dumps({"modules": sorted(sys.modules), "megabytes": peak, "told": told}))
"""


def run(script: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Return what a process of its own said that ran a script on a site's folder."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SILOTUNE_", "COV"))}
    done = subprocess.run(
        [sys.executable, "-c", script, str(home)],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done


def test_it_loads_nothing_of_training_and_stays_small(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    charge(home, rounds=20)
    want_people(home)
    ask(home)
    done = run(SCRIPT, home.path)
    found = json.loads(done.stdout)
    assert {path: status for path, status in found["told"].items() if status != 200} == {
        "/accounts": 403,
    }
    assert [name for name in FORBIDDEN if name in found["modules"]] == []
    assert found["megabytes"] < MOST_MEGABYTES


FLOOD = (
    """
from shared.web.accounting import bound_memory
bound_memory()
"""
    + SCRIPT.partition("(budget,) =")[0]
    + """
import random
(budget,) = console.content.budgets.all()
def resident(what):
    return int(Path("/proc/self/status").read_text().partition(what)[2].split()[0]) / 1024
def flood(number):
    drawn = random.Random(number)
    for _ in range(4):
        steps, rate, epsilon = drawn.randint(50_000, 100_000), 10 ** drawn.uniform(-6, 0), drawn.uniform(0.1, 7)
        told.append(ask(f"/budget/{budget.id}/what-if?steps={steps}&rate={rate:.5f}&by=noise&value={drawn.uniform(0.5, 3):.4f}"))
        told.append(ask(f"/budget/{budget.id}/what-if?steps=60&rate={rate:.5f}&value={epsilon:.4f}"))
told = []
threads = [threading.Thread(target=flood, args=(number,)) for number in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps({"told": sorted(set(told)), "megabytes": resident("VmRSS:"), "peak": resident("VmHWM:")}))
"""
)


def test_a_flood_of_what_if_leaves_the_console_small(tmp_path: Path) -> None:
    """What a composition took would stay with each of forty threads: 380 MB after half a minute of two accounts' asking.

    Rare records take the longest transforms, and what SciPy keeps of sixteen lengths took another 100 MB.
    """
    home = make_home(tmp_path)
    charge(home, rounds=4)
    done = run(FLOOD, home.path)
    found = json.loads(done.stdout)
    assert found["told"] == [200]
    assert found["megabytes"] < MOST_MEGABYTES
    assert found["peak"] < 200, "while one plan of 100,000 steps is computed"


TRYING = """
import threading
from pathlib import Path
from shared.web.accounts import passwords
def resident():
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024
passwords.fits("a long enough password", None)
before = resident()
for _ in range(2):
    threads = [threading.Thread(target=passwords.fits, args=("a long enough password", None)) for _ in range(26)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
print(resident() - before)
"""


def test_many_who_try_passwords_leave_no_memory_behind() -> None:
    """What argon2 took would stay with each thread that served somebody: half a gigabyte for 26."""
    done = subprocess.run(
        [sys.executable, "-c", TRYING],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 45
