"""Write `constraints.txt` and `locks/`: every version that is installed, with the hashes of its files (`make lock`).

    python tools/lock.py             keep the versions that stand there, add what pyproject.toml asks for anew
    python tools/lock.py --upgrade   take the newest versions that pyproject.toml allows

`base.txt` holds what the product needs, `EXTRA.txt` what each extra of pyproject.toml adds to it, `build.txt` what builds
packages that come as source, and `sbom.txt` what `make sbom` runs by itself. pip installs from them with
`--require-hashes --no-deps --no-build-isolation`, `build.txt` first, so no file comes in that was not named here, whatever an
index serves. The versions hold together for all extras at once and for every Python that pyproject.toml allows (markers tell
them apart).

torch is the exception: which build fits (CPU, one of several of CUDA, a vendor's own) only the machine knows, and each has
other files. `constraints.txt` pins its version; its build, and the CUDA libraries that come with one, have no hash.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
LOCKS = ROOT / "locks"
BASE, BUILD, SBOM = "base", "build", "sbom"
CHOSEN_BY_THE_MACHINE = re.compile(r"torch|triton|(nvidia|cuda)-(?!ml-py$).*")
HEADER = "# Written by `make lock`; do not edit.\n"


def blocks(text: str) -> dict[str, str]:
    """Return the requirements of a file by `name==version ; marker`, each with its lines of hashes."""
    found = re.split(r"^(?=[A-Za-z0-9])", re.sub(r"^ *#.*\n", "", text, flags=re.MULTILINE), flags=re.MULTILINE)
    return {block.partition("\\")[0].strip(): block.rstrip() + "\n" for block in found if "==" in block}


def name_of(requirement: str) -> str:
    """Return the name of `name==version ; marker`."""
    return requirement.partition("==")[0]


def compiled(arguments: Sequence[str], output: Path) -> dict[str, str]:
    """Let uv find versions for what is asked; those that `output` has already are kept."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--universal", "--quiet", "--no-header", "--no-annotate"]
    done = subprocess.run([*command, "--output-file", str(output), *arguments], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(
            f"error: uv found no versions that fit (its reason stands above); nothing in {LOCKS.name}/ changed."
        )
    return blocks(output.read_text(encoding="utf-8"))


def locks(upgrade: bool) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return the requirements of each lock, and the lines of all versions."""
    project = "pyproject.toml"
    extras = tomllib.loads((ROOT / project).read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    with tempfile.TemporaryDirectory() as folder:
        everything = Path(folder) / "everything.txt"
        everything.write_text(CONSTRAINTS.read_text(encoding="utf-8"), encoding="utf-8")
        versions = compiled(
            [project, "--all-extras", "--group", BUILD, "--group", SBOM, *(["--upgrade"] if upgrade else [])],
            everything,
        )
        pinned = ["--generate-hashes", "--constraint", str(everything)]
        base = compiled([project, *pinned], Path(folder) / "base.txt")
        found = {BASE: base}
        for group in (BUILD, SBOM):
            found[group] = compiled(["--group", group, *pinned], Path(folder) / f"{group}.txt")
        for extra in extras:
            whole = compiled([project, *pinned, "--extra", extra], Path(folder) / f"{extra}.txt")
            found[extra] = {line: block for line, block in whole.items() if line not in base}
    kept = [line for line in versions if name_of(line) == "torch" or not CHOSEN_BY_THE_MACHINE.fullmatch(name_of(line))]
    return {
        extra: {line: block for line, block in lock.items() if not CHOSEN_BY_THE_MACHINE.fullmatch(name_of(line))}
        for extra, lock in found.items()
    }, kept


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that pyproject.toml allows")
    found, versions = locks(parser.parse_args(arguments).upgrade)
    for extra, lock in found.items():
        (LOCKS / f"{extra}.txt").write_text(HEADER + "".join(lock.values()), encoding="utf-8")
    CONSTRAINTS.write_text(HEADER + "".join(f"{line}\n" for line in versions), encoding="utf-8")
    sys.stdout.write("".join(f"locks/{extra}.txt: {len(lock)} packages\n" for extra, lock in found.items()))


if __name__ == "__main__":
    main()
