"""A bundle for a site without a network: made of a small source and small wheels, with the real pip; checked and installed."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from client import commands
from client.bundle.bundle import _copy_backbone, _run, make_bundle, verify_bundle
from shared.errors import RunError, TrustError
from shared.trust.signing import SigningKey, save_signing_key
from tests.conftest import Outcome

ROOT = Path(__file__).parents[2]
TORCH = version("torch")
KEY = SigningKey.generate()
PROJECT = """
[project]
name = "silotune"
version = "9.9.9"
description = "small"
license = "Apache-2.0"
license-files = ["LICENSE"]
requires-python = ">=3.11"
dependencies = ["alpha"]
scripts = { silotune = "cli:main" }
"""


def wheel(folder: Path, name: str, number: str = "1.0", requires: tuple[str, ...] = ()) -> Path:
    """Write a wheel with one module."""
    path = folder / f"{name}-{number}-py3-none-any.whl"
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n", *(f"Requires-Dist: {r}\n" for r in requires)]
    files = {
        f"{name}.py": "",
        f"{name}-{number}.dist-info/METADATA": "".join(lines),
        f"{name}-{number}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for file, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
        record += f"{file},sha256={digest},{len(content)}\n"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in (files | {f"{name}-{number}.dist-info/RECORD": record}).items():
            archive.writestr(zipfile.ZipInfo(file), content)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with locks of small wheels, which lie in its folder `wheels`."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("locks", "docker", "cli", "client", "shared", "wheels"):
        (folder / name).mkdir()
    shutil.copy(ROOT / "docker" / "stage.py", folder / "docker")
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "LICENSE").write_text("none")
    (folder / "cli" / "__init__.py").write_text("def main():\n    print('9.9.9')\n")
    for name in ("client", "shared"):
        (folder / name / "__init__.py").touch()
    for lock, name in (("build", "tool"), ("base", "alpha"), ("demo", "beta")):
        sha256 = hashlib.sha256(wheel(folder / "wheels", name).read_bytes()).hexdigest()
        (folder / "locks" / f"{lock}.txt").write_text(f"{name}==1.0 \\\n    --hash=sha256:{sha256}\n")
    wheel(folder / "wheels", "gamma")
    wheel(folder / "wheels", "gamma", "2.0")
    wheel(folder / "wheels", "torch", TORCH, ("alpha", "gamma"))
    (folder / "constraints.txt").write_text("alpha==1.0\ngamma==1.0\n")
    (folder / "backbone").mkdir()
    (folder / "backbone" / "config.json").write_text("{}")
    (folder / "backbone" / "model.safetensors").symlink_to(folder / "LICENSE")  # as in the hub's cache
    return folder


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "bundle"
    save_signing_key(folder.with_name("maker.key"), KEY, None)
    commands.write_bundle(
        folder,
        source=source,
        wheels=source / "wheels",
        backbone=[source / "backbone"],
        sign=folder.with_name("maker.key"),
    )
    return folder


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "bundle", symlinks=True))


def alone(bundle: Path) -> subprocess.CompletedProcess[str]:
    """Run the bundle's own verify.py with nothing but the standard library."""
    return subprocess.run(
        [sys.executable, "-I", "-S", str(bundle / "verify.py")], capture_output=True, text=True, check=False
    )


def test_a_bundle_holds_what_its_locks_name(made: Path) -> None:
    wheels = {path.name for path in (made / "wheels").iterdir()}
    named = {f"{name}-1.0-py3-none-any.whl" for name in ("tool", "alpha", "beta", "gamma")}
    assert wheels == named | {f"torch-{TORCH}-py3-none-any.whl", "silotune-9.9.9-py3-none-any.whl"}
    assert sorted(line.split(" ")[0] for line in (made / "locks" / "torch.txt").read_text().splitlines()[::2]) == [
        "gamma==1.0",
        f"torch=={TORCH}",
    ]
    assert (made / "backbones" / "backbone" / "model.safetensors").read_text() == "none"
    assert not (made / "backbones" / "backbone" / "model.safetensors").is_symlink()
    assert "@PYTHON@" not in (made / "install.sh").read_text()


def test_it_is_checked_by_the_standard_library_and_by_the_system_s_tool(made: Path) -> None:
    done = alone(made)
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256((made / "SHA256SUMS").read_bytes()).hexdigest() in done.stdout
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=made, check=False).returncode == 0


def test_what_is_in_it_installs_without_an_index(made: Path) -> None:
    """The literal commands of the script, but for the virtual environment, and without writing."""
    locks = [f"-rlocks/{name}.txt" for name in ("build", "requirements", "torch", "silotune")]
    options = [
        "--no-index",
        "--find-links",
        "wheels",
        "--require-hashes",
        "--no-deps",
        "--dry-run",
        "--ignore-installed",
    ]
    command = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "install", *options, *locks]
    done = subprocess.run(command, cwd=made, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    would = done.stdout.splitlines()[-1]
    assert all(
        name in would for name in ("tool-1.0", "alpha-1.0", "beta-1.0", "gamma-1.0", f"torch-{TORCH}", "silotune-9.9.9")
    )
    script = (made / "install.sh").read_text()
    assert all(option in script for option in options[:5])
    assert all(lock.removeprefix("-r") in script for lock in locks)
    assert subprocess.run(["sh", "-n", str(made / "install.sh")], check=False).returncode == 0


def change_a_byte(bundle: Path) -> None:
    path = bundle / "wheels" / "alpha-1.0-py3-none-any.whl"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_a_link(bundle: Path) -> None:
    path = bundle / "locks" / "build.txt"
    path.rename(bundle.parent / "build.txt")
    path.symlink_to(bundle.parent / "build.txt")  # with the right content


def link_a_folder(bundle: Path) -> None:
    (bundle / "wheels").rename(bundle.parent / "wheels")
    (bundle / "wheels").symlink_to(bundle.parent / "wheels", target_is_directory=True)


def list_twice(bundle: Path) -> None:
    lines = (bundle / "SHA256SUMS").read_text()
    (bundle / "SHA256SUMS").write_text(lines + lines.splitlines()[0] + "\n")


CHANGES: dict[str, Callable[[Path], object]] = {
    "'wheels/alpha-1.0-py3-none-any.whl' was changed": change_a_byte,
    "'wheels/alpha-2.0-py3-none-any.whl' was added": lambda bundle: wheel(bundle / "wheels", "alpha", "2.0"),
    "'.hidden' was added": lambda bundle: (bundle / ".hidden").touch(),
    "'install.sh' is missing": lambda bundle: (bundle / "install.sh").unlink(),
    "'locks/build.txt' is no plain file": replace_by_a_link,
    "'wheels' is no plain file": link_a_folder,
    "'pipe' is no plain file": lambda bundle: os.mkfifo(bundle / "pipe"),
    "'README.txt' was changed": lambda bundle: (bundle / "README.txt").write_text("trust me"),
    "does not belong there": list_twice,
    "holds no SHA256SUMS": lambda bundle: (bundle / "SHA256SUMS").unlink(),
}


@pytest.mark.parametrize("text", CHANGES)
def test_what_was_changed_on_the_way_is_refused(bundle: Path, text: str) -> None:
    CHANGES[text](bundle)
    with pytest.raises(RunError, match="cannot be used") as refused:
        verify_bundle(bundle, None)
    assert text in str(refused.value)


def test_the_bundle_s_own_check_refuses_too_and_so_does_the_installation(bundle: Path) -> None:
    change_a_byte(bundle)
    done = alone(bundle)
    assert done.returncode == 1
    assert "alpha-1.0-py3-none-any.whl' was changed. Do not install" in done.stderr
    assert "Traceback" not in done.stderr
    script = subprocess.run(
        ["sh", str(bundle / "install.sh"), str(bundle.parent / "target")],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert script.returncode == 1
    assert not (bundle.parent / "target").exists()


def test_a_check_that_was_changed_is_found_before_it_is_run(bundle: Path) -> None:
    """By the words in the bundle, whose list was compared by telephone: whatever else lies there may be somebody else's."""
    commands = [line.strip() for line in (bundle / "README.txt").read_text().splitlines() if line.startswith("    ")]
    guide = (ROOT / "docs" / "site-guide.md").read_text()
    for told in (commands, guide[guide.index("cd silotune-bundle\n") :].splitlines()):
        first = next(place for place, command in enumerate(told) if "verify.py" in command or "install.sh" in command)
        assert "sha256sum --check --strict --quiet SHA256SUMS" in told[:first]
    (bundle / "verify.py").write_text("print('all as they were')")
    assert alone(bundle).returncode == 0
    done = [subprocess.run(command.split(), cwd=bundle, capture_output=True, check=False) for command in commands[:2]]
    assert [one.returncode for one in done] == [0, 1]


def test_the_installation_goes_where_it_is_told_and_takes_no_module_from_the_bundle(
    bundle: Path, tmp_path: Path
) -> None:
    (bundle / "verify.py").write_text("")  # as if it had been checked
    other = tmp_path / "elsewhere" / "bundle"
    other.mkdir(parents=True)
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "$PWD $*"\n[ "$2" = venv ] && mkdir -p "$3/bin" && cp "$0" "$3/bin/python"\nexit 0\n'
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["sh", "bundle/install.sh", "target"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": str(python), "CDPATH": str(other.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert {line.split()[0] for line in lines} == {str(bundle)}, done.stderr
    assert lines[1].endswith(f"-m venv {tmp_path}/target")
    assert all(line.split()[1:4] == ["-I", "-m", "pip"] for line in lines[2:])
    assert len(lines) == 6


def test_a_file_that_a_list_cannot_name_is_no_part_of_a_bundle(source: Path, tmp_path: Path) -> None:
    backbone = Path(shutil.copytree(source / "backbone", tmp_path / "backbone"))
    (backbone / "a\nb").touch()
    with pytest.raises(RunError, match=r"holds 'a\\nb', which a list of hashes cannot name"):
        _copy_backbone(backbone, tmp_path / "target")


def test_what_is_built_for_a_bundle_gets_no_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SILOTUNE_PASSPHRASE", "SILOTUNE_PASSPHRASE_FILE"):
        monkeypatch.setenv(name, "words")
    code = "import os, sys; sys.exit(', '.join(name for name in os.environ if 'SILOTUNE' in name) or 'none')"
    with pytest.raises(RunError, match="nothing was built: none"):
        _run([sys.executable, "-c", code], "nothing was built")


def test_the_signature_covers_the_list_and_a_wheel(bundle: Path, silotune: Callable[..., Outcome]) -> None:
    verify_bundle(bundle, KEY.verify_key)
    good = silotune("site", "verify-bundle", bundle, "--key", KEY.verify_key.text)
    assert "all as they were" in good.out
    with pytest.raises(TrustError):
        verify_bundle(bundle, SigningKey.generate().verify_key)
    # Somebody who writes another list as well: only the signature tells, and the number that is read by telephone.
    (bundle / "README.txt").write_text("trust me")
    sums = (bundle / "SHA256SUMS").read_text().splitlines()
    sha256 = hashlib.sha256(b"trust me").hexdigest()
    lines = [f"{sha256}  README.txt" if line.endswith("README.txt") else line for line in sums]
    (bundle / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    assert verify_bundle(bundle, None)[2] != hashlib.sha256("\n".join([*sums, ""]).encode()).hexdigest()
    with pytest.raises(TrustError, match="was changed after"):
        verify_bundle(bundle, KEY.verify_key)
    (bundle / "signature.json").unlink()
    refused = silotune("site", "verify-bundle", bundle, "--key", KEY.verify_key.text)
    assert refused.status == 1
    assert "signature.json" in refused.err


def test_a_bundle_that_cannot_be_made_leaves_nothing(
    source: Path, tmp_path: Path, silotune: Callable[..., Outcome]
) -> None:
    with pytest.raises(RunError, match=r"locks/nothing\.txt is missing"):
        make_bundle(tmp_path / "a", source=source, extras=["nothing"])
    (tmp_path / "empty").mkdir()
    done = silotune("site", "bundle", tmp_path / "a", "--source", source, "--wheels", tmp_path / "empty")
    assert done.status == 1
    assert "a package could not be had" in done.err
    assert "Traceback" not in done.err
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(RunError, match="is there already"):
        make_bundle(tmp_path / "there", source=source, wheels=source / "wheels")
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "there"}


def test_a_wheel_that_is_not_the_locked_one_is_no_part_of_a_bundle(source: Path, tmp_path: Path) -> None:
    wheels = Path(shutil.copytree(source / "wheels", tmp_path / "wheels"))
    (wheels / "alpha-1.0-py3-none-any.whl").unlink()
    wheel(wheels, "alpha", requires=("gamma",))  # the same name and version, other bytes
    with pytest.raises(RunError, match="a package could not be had"):
        make_bundle(tmp_path / "a", source=source, wheels=wheels)
