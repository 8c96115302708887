"""What the process of a coordinator's console loads and how much memory it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.client.console.test_process import FORBIDDEN, MOST_MEGABYTES
from tests.server.console.homes import copy, go_on, job_of, make_home, say, submit

ROOT = Path(__file__).parents[3]

# The console of a home, served, with every page asked once by somebody who may see it.
SCRIPT = """
import json, sys, threading
from pathlib import Path
import httpx
import cli.commands, server.commands
from fastapi.routing import APIRoute
from server.console.start import ROUTES, open_console
from server.store.home import CoordinatorHome
from shared.web.application import make_application
from shared.web.roles import Role
from shared.http.serving import listen, make_server, place_at

home, place = CoordinatorHome(Path(sys.argv[1])), place_at("127.0.0.1", 0, None, None)
listener = listen(place)
port = listener.getsockname()[1]
console = open_console(home, place=place, port=port, passphrase=None)
guarded, app = make_application(console, ROUTES)
server = make_server(guarded, place)
threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True).start()
told = {}
paths = sorted(r.path for r in app.routes if "GET" in r.methods and not r.path.endswith("/events"))
paths = [path.replace("{run}", "0001-triage").replace("{name}", "live.js") for path in paths]
paths += ["/runs/0001-triage/curve.json?metric=loss"]
for role in Role:
    account = console.accounts.from_issuer(issuer="i", subject=role.value, name=role.value, role=role, address="a")
    cookies = {console.cookie("session"): console.sessions.begin(account.id, address="a", browser="b")}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", cookies=cookies, timeout=30) as browser:
        for path in paths:
            told.setdefault(path, []).append(browser.get(path).status_code)
status = Path("/proc/self/status").read_text()  # getrusage tells of the process that started this one
peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
print(json.dumps({"modules": sorted(sys.modules), "megabytes": peak, "told": told}))
"""


def test_it_loads_nothing_of_training_and_stays_small(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    go_on(submit(home, job_of(), 1, state="running"), 5)
    other = submit(home, job_of("many"), 2, state="completed")
    go_on(other, 8)
    copy(other, range(3, 1001))
    say(home, job="0001-triage")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SILOTUNE_", "COV"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(home.path)],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {path: codes for path, codes in found["told"].items() if max(codes) >= 500} == {}
    own = {path: codes for path, codes in found["told"].items() if path.startswith(("/runs", "/sites", "/jobs"))}
    assert len(own) >= 12
    # Without what they ask for these three show nothing.
    assert {path for path, codes in own.items() if 200 not in codes} == {
        "/runs/compare",
        "/runs/0001-triage/curve.json",
        "/runs/0001-triage/reports/{file}",
    }
    assert [name for name in FORBIDDEN if name in found["modules"]] == []
    assert found["megabytes"] < MOST_MEGABYTES
