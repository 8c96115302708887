"""Make a bundle: wheels, locks, backbones, a list of hashes, and the words to install from it.

wheels/             what `locks/` names, as the index has it, and a wheel of this Silotune
locks/              build.txt, requirements.txt (as in the source), torch.txt and silotune.txt (made here), all with hashes
backbones/NAME/     copies of backbones
install.sh          verifies, makes a virtual environment and installs, without a network
verify.py           checks the bundle by Python's standard library alone; whoever runs it compares its own hash before
README.txt          the same by hand
SHA256SUMS          of all of these; `sha256sum --check` reads it
signature.json      a signature over all files, if a key was given

Formal guarantees (tests: tests/client/test_bundle.py)
    * A bundle stands at its place whole, checked, or not at all (test_a_bundle_that_cannot_be_made_leaves_nothing).
    * Everything in `wheels/` has its hash in `locks/`, and the hashes of the source's locks are those of the source
      (test_what_is_in_it_installs_without_an_index).
    * A byte that was changed, a file that was added or removed, and a link are refused on the other side
      (test_what_was_changed_on_the_way_is_refused).

Not guaranteed: torch and the wheel of Silotune have no hash before this machine gives them one, see `tools/lock.py`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from client.bundle import verify as verifier
from shared.errors import RunError
from shared.files.backup import new_folder
from shared.trust.signed_folder import sign_folder, verify_folder
from shared.trust.signing import SigningKey, VerifyKey
from shared.version import silotune_version

_HERE = Path(__file__).parent
_SOURCE_FILES = ("pyproject.toml", "constraints.txt", "docker/stage.py", "locks/build.txt", "locks/base.txt")
_PIP = "/opt/silotune/bin/pip install --no-index --find-links wheels --require-hashes --no-deps"
_README = """Silotune {version}: everything that a site needs, for {python} on {platform}.

1. Compare the list with the one that was made: read this line, by telephone, with whoever made the bundle:

    sha256sum SHA256SUMS

2. Check every file by the list, with the system's own tool. Before that nothing that lies here may be run, not even verify.py:

    sha256sum --check --strict --quiet SHA256SUMS

   Then that nothing else lies here, and no link (Python's standard library is enough):

    {python} -I verify.py

3. Install into /opt/silotune. Nothing is fetched:

    sh install.sh /opt/silotune

   or by hand:

    {python} -m venv /opt/silotune
    {pip} -r locks/build.txt
    {pip} --no-build-isolation --use-pep517 -r locks/requirements.txt
    {pip} -r locks/torch.txt
    {pip} -r locks/silotune.txt
    /opt/silotune/bin/silotune --version
{backbones}
Then go on with the site guide, from "Passphrase" on.
"""


def make_bundle(
    destination: Path,
    *,
    source: Path,
    extras: Sequence[str] = ("demo",),
    backbones: Sequence[Path] = (),
    wheels: Path | None = None,
    key: SigningKey | None = None,
) -> str:
    """Write a bundle to the new folder `destination`; return the SHA-256 of its list, which stands for the whole.

    Args:
        source: a checkout of Silotune, whose locks say what belongs to it.
        extras: of pyproject.toml.
        backbones: folders to copy.
        wheels: take packages from this folder alone; None: from pip's index.
        key: signs the folder.

    Raises:
        RunError: something is missing or cannot be had; there is no bundle then.
    """
    _check_source(source, extras)
    backbones = [path.resolve() for path in backbones]  # "." has a name, too
    if len({path.name for path in backbones}) < len(backbones):
        raise RunError("two of the backbones have the same name; rename one of the folders.")
    with new_folder(destination) as folder, tempfile.TemporaryDirectory() as scratch:
        target, locks = folder / "wheels", folder / "locks"
        for made in (target, locks):
            made.mkdir()
        shutil.copyfile(source / "locks" / "build.txt", locks / "build.txt")
        requirements = "".join(_text(source / "locks" / f"{name}.txt") for name in ("base", *extras))
        (locks / "requirements.txt").write_text(requirements, encoding="utf-8")
        # `--isolated`: no index and no folder that the environment or pip's settings name.
        where = [] if wheels is None else ["--isolated", "--no-index", "--find-links", str(wheels.resolve())]
        for lock in ("build", "requirements"):
            _download(target, [*where, "--require-hashes", "--no-deps", "-r", str(locks / f"{lock}.txt")])
        known = {_distribution(path) for path in target.iterdir()}
        _add(target, locks / "torch.txt", _torch(source, Path(scratch) / "torch", target, where), known)
        _add(target, locks / "silotune.txt", _own_wheel(source, Path(scratch)), set())
        for backbone in backbones:
            _copy_backbone(backbone, folder / "backbones" / backbone.name)
        _write_words(folder, backbones)
        sums = {path: verifier._sha256(str(path)) for path in sorted(folder.rglob("*")) if path.is_file()}
        lines = [f"{sha256}  {path.relative_to(folder).as_posix()}\n" for path, sha256 in sums.items()]
        (folder / verifier.SUMS).write_text("".join(lines), encoding="utf-8")
        if key is not None:
            sign_folder(folder, key)
        return _checked(folder)[2]


def verify_bundle(folder: Path, key: VerifyKey | None) -> tuple[int, int, str]:
    """Return the number of files of a bundle, their bytes, and the SHA-256 of its list, after checking every file.

    Args:
        key: must have signed it; None: signatures are not looked at.

    Raises:
        RunError, TrustError: what is wrong with it.
    """
    found = _checked(folder)
    if key is not None:
        verify_folder(folder, key)
    return found


def _checked(folder: Path) -> tuple[int, int, str]:
    try:
        return verifier.verify(str(folder))
    except (verifier.Damaged, OSError) as error:
        raise RunError(f"the bundle {folder} cannot be used: {error}. Do not install it; copy it anew.") from None


def _check_source(source: Path, extras: Sequence[str]) -> None:
    wanted = [*_SOURCE_FILES, *(f"locks/{extra}.txt" for extra in extras)]
    if missing := [name for name in wanted if not (source / name).is_file()]:
        raise RunError(
            f"{source} is no checkout of Silotune with these extras: {missing[0]} is missing. Give the folder of the source, "
            "from which this version was installed, with --source."
        )


def _download(target: Path, arguments: Sequence[str]) -> None:
    options = ["--no-build-isolation", "--dest", str(target), *arguments]
    _pip("download", options, "a package could not be had")


def _torch(source: Path, folder: Path, wheels: Path, where: Sequence[str]) -> list[Path]:
    """Return the wheel of torch, in the build that is installed here, and of what that build alone needs."""
    try:
        wanted = f"torch=={version('torch')}"
    except PackageNotFoundError:
        raise RunError("torch is not installed here, so its build cannot be chosen; install it first.") from None
    constraints = ["--constraint", str(source / "constraints.txt"), "--find-links", str(wheels)]
    _download(folder, [*where, *constraints, wanted])
    return sorted(folder.iterdir())


def _own_wheel(source: Path, scratch: Path) -> list[Path]:
    """Return a wheel of the code that a site gets: no coordinator, no simulation."""
    staged, built = scratch / "staged", scratch / "built"
    _run(
        [sys.executable, "-I", str(source / "docker" / "stage.py"), "site", str(staged)], "the code cannot be collected"
    )
    _pip("wheel", ["--no-deps", "--no-build-isolation", "--wheel-dir", str(built), str(staged)], "no wheel was built")
    return sorted(built.iterdir())


def _add(target: Path, lock: Path, files: Sequence[Path], known: set[str]) -> None:
    """Move files to the wheels and write their lock, but for distributions that are there already."""
    lines = []
    for path in files:
        name = _distribution(path)
        if name in known:
            continue
        number = path.name.split("-")[1]
        lines.append(f"{name}=={number} \\\n    --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n")
        shutil.move(path, target / path.name)
    lock.write_text("".join(lines), encoding="utf-8")


def _distribution(path: Path) -> str:
    """Return the normalised name of the distribution in a wheel or a source archive."""
    return re.sub(r"[-_.]+", "-", path.name.split("-")[0]).lower()


def _copy_backbone(source: Path, target: Path) -> None:
    if not (source / "config.json").is_file():
        raise RunError(f"{source} is no backbone: it holds no config.json.")
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if not path.name.isprintable() or "\\" in path.name:
            raise RunError(f"{source} holds {path.name!r}, which a list of hashes cannot name; rename it.")
        if not path.is_file():  # a link to a file is copied as that file: caches of the hub are made of links
            raise RunError(f"{path} is no file; expected a folder that holds the files of a backbone and nothing else.")
        shutil.copyfile(path, target / path.name)


def _write_words(folder: Path, backbones: Sequence[Path]) -> None:
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    copied = "".join(f"    backbones/{path.name}\n" for path in backbones)
    told = f"\nBackbones, to copy where policy.toml names them:\n\n{copied}" if backbones else ""
    facts = {"version": silotune_version(), "python": python, "platform": sysconfig.get_platform()}
    text = _README.format(**facts, pip=_PIP, backbones=told)
    (folder / "README.txt").write_text(text, encoding="utf-8")
    script = _text(_HERE / "install.sh").replace("@PYTHON@", python)
    (folder / "install.sh").write_text(script, encoding="utf-8")
    shutil.copyfile(verifier.__file__, folder / "verify.py")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _pip(command: str, options: Sequence[str], problem: str) -> None:
    _run([sys.executable, "-m", "pip", "--disable-pip-version-check", command, "--quiet", *options], problem)


def _run(command: Sequence[str], problem: str) -> None:
    # Packages that have to be built run code of theirs: it gets no passphrase.
    env = {name: value for name, value in os.environ.items() if not name.startswith("SILOTUNE_")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env | {"PYTHONPATH": ""})  # noqa: S603
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise RunError(f"{problem}: {said[-1].strip() if said else 'no reason was given'}. Mend that, then try again.")
