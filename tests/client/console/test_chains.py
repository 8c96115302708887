"""Whether log and ledger are unbroken: said as it is now, and not computed for every page."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.budget.accounts import Budgets
from client.console.audit import chains
from client.console.audit.chains import Chains
from shared.trust.audit_chain import log_file
from shared.trust.keystore import Seal, load_secret
from tests.client.console.homes import charge, make_home


def test_it_is_checked_when_a_file_was_written_and_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_home(tmp_path)
    charge(home, jobs=["one"], rounds=2)
    now, checks = [1_800_000_000], []
    real = chains.verify
    monkeypatch.setattr(chains, "verify", lambda *args, **more: (checks.append(now[0]), real(*args, **more))[1])
    budgets = Budgets(home, Seal(load_secret(home.storage_key, passphrase=None)))
    found = Chains(home, budgets, now=lambda: now[0])
    first = found.checked()
    assert (first.problem, first.log is not None) == ("", True)
    now[0] += 599
    assert found.checked() is first
    now[0] += 1
    assert found.checked().at == now[0]
    charge(home, jobs=["two"], rounds=1)
    assert found.checked().log != first.log
    assert len(checks) == 3
    # 1. A changed entry of the log, of the same length.
    path = log_file(home.audit, 1)
    good = path.read_bytes()
    path.write_bytes(good.replace(b'"round":0', b'"round":9', 1))
    assert "was changed after it was written" in found.checked().problem
    path.write_bytes(good)
    assert found.checked().problem == ""
    # 2. A ledger that is not the one of before.
    ledger = home.path / "ledger.db"
    content = ledger.read_bytes()
    ledger.write_bytes(content[:-200] + b"x" * 200)
    assert found.checked().problem
    ledger.write_bytes(content)
    assert found.checked().problem == ""
    now[0] -= 100_000
    assert found.checked().at == now[0], "a clock that was set back"
