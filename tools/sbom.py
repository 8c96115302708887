"""Write the bill of materials of the images, in CycloneDX JSON, from the locks (`make sbom`).

    python tools/sbom.py FILE

It names what both images install: `locks/base.txt` and `locks/demo.txt` as they hold on Linux for the running Python, each with
the hashes of its files, and torch with the version of `constraints.txt`; its build, and so its hash, only the machine knows. The
work is done by cyclonedx-bom, which checks its own output against the schema; here is checked that nothing of the locks was lost.
The same locks give the same bytes. It runs with what `locks/sbom.txt` holds, without Silotune.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ("base", "demo")
SPECIFICATION = "1.6"
ON_LINUX = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}


def requirements(root: Path = ROOT) -> dict[str, str]:
    """Return name -> lines of a requirements file, of everything that holds on Linux for this Python."""
    found = {}
    for lock in LOCKS:
        for block in _blocks((root / "locks" / f"{lock}.txt").read_text(encoding="utf-8")):
            wanted = Requirement(block.partition(" \\")[0])
            if wanted.marker is None or wanted.marker.evaluate(ON_LINUX):
                # Without its marker, which was judged: a bill says what is there.
                found[wanted.name] = f"{wanted.name}{wanted.specifier} \\{block.partition(chr(92))[2]}"
    for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("torch=="):
            found["torch"] = f"{line}\n"
    return found


def _blocks(text: str) -> Iterator[str]:
    """Yield each requirement of a lock with its hashes."""
    block = ""
    for line in text.splitlines():
        if not line.startswith("#"):
            block += f"{line}\n"
            if not line.endswith("\\"):
                yield block
                block = ""


def write(output: Path, root: Path = ROOT) -> dict[str, Any]:
    """Write the bill and return it.

    Raises:
        SystemExit: the tool failed, or left something out.
    """
    wanted = requirements(root)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        file, made = Path(folder) / "requirements.txt", Path(folder) / "made.json"
        file.write_text("".join(wanted.values()), encoding="utf-8")
        command = [sys.executable, "-m", "cyclonedx_py", "requirements", "--pyproject", str(root / "pyproject.toml")]
        command += ["--output-reproducible", "--validate", "--spec-version", SPECIFICATION, "--output-format", "JSON"]
        done = subprocess.run([*command, "--output-file", str(made), str(file)], check=False)
        if done.returncode:
            raise SystemExit("error: cyclonedx-bom wrote no valid bill (its reason stands above).")
        text = made.read_text(encoding="utf-8")
    bill: dict[str, Any] = json.loads(text)
    _check(bill, wanted)
    output.write_text(text, encoding="utf-8")
    return bill


def _check(bill: dict[str, Any], wanted: dict[str, str]) -> None:
    """Compare versions and hashes with the locks: a bill that lacks one is worse than none."""
    found = {one["name"]: one for one in bill["components"]}
    for name, lines in wanted.items():
        version, hashes = lines.split("==")[1].split()[0], set(lines.split("sha256:")[1:])
        told = {
            one["content"]
            for place in found.get(name, {}).get("externalReferences", ())
            for one in place.get("hashes", ())
        }
        if found.get(name, {}).get("version") != version or told != {sha256.split()[0] for sha256 in hashes}:
            raise SystemExit(f"error: the bill does not hold {name} {version} as the locks do.")
    if other := found.keys() - wanted.keys():
        raise SystemExit(f"error: the bill holds what no lock names: {', '.join(sorted(other))}.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output", type=Path, metavar="FILE")
    output = parser.parse_args(arguments).output
    bill = write(output)
    sys.stdout.write(f"{output}: CycloneDX {bill['specVersion']}, {len(bill['components'])} components\n")


if __name__ == "__main__":
    main()
