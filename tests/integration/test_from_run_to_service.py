"""docs/from-run-to-service.md, executed: every block of bash and Python in its order, in one shell, with tiny models."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from simulations.federation.processes import free_port
from tests.server.compression.kinds import public_file
from tests.server.registry.conftest import small_run  # noqa: F401 (a fixture)
from tests.server.serving.conftest import writer_run  # noqa: F401 (a fixture)

PAGE = Path(__file__).parents[2] / "docs" / "from-run-to-service.md"
SHOWN = "@@@"


def script() -> str:
    """Return the page's blocks as one script that says where each begins."""
    parts = ["set -euo pipefail"]
    for number, (language, block) in enumerate(re.findall(r"```(bash|python)\n(.*?)```", PAGE.read_text(), re.DOTALL)):
        parts.append(f"echo; echo {SHOWN}{number}")
        parts.append(block if language == "bash" else f"python - <<'END_OF_BLOCK'\n{block}END_OF_BLOCK")
    return "\n".join(parts)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_every_command_of_the_page_does_what_it_says(
    small_run: Path,  # noqa: F811
    writer_run: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    # 1. What the page takes as given.
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").symlink_to(small_run)
    (tmp_path / "runs" / "gpt2").symlink_to(writer_run)
    public_file(tmp_path / "public.txt")
    text = script()
    for port in ("8460", "8461"):
        assert port in text
        text = text.replace(port, str(free_port()))
    (tmp_path / "page.sh").write_text(text)

    # 2. The page.
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SILOTUNE_MODELS": str(tmp_path / "models"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "page.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shown = re.split(rf"\n{SHOWN}\d+\n", done.stdout)[1:]

    # 3. What it shows.
    assert "films:1" in shown[0]
    (piped,) = eval(shown[2])  # noqa: S307 (what our own page printed)
    first = json.loads(shown[5].strip())
    assert first["version"] == "films:1"
    assert piped["label"] == first["predictions"][0]["label"]
    assert piped["score"] == pytest.approx(first["predictions"][0]["probability"], abs=1e-3)
    listed, asked = (eval(line) for line in shown[6].splitlines())  # noqa: S307
    assert listed == ["films"]
    # Asked alone, where the first was asked beside another: the last bit depends on the shape of the batch.
    (alone,) = asked["predictions"]
    assert alone["label"] == first["predictions"][0]["label"]
    assert alone["probabilities"] == pytest.approx(first["predictions"][0]["probabilities"], abs=1e-6)
    assert json.loads(shown[7].strip().splitlines()[-1])["version"] == "films:3"
    said = "".join(shown[9].split())
    assert said
    assert said[: len(said) // 2] == said[len(said) // 2 :], "whole and in pieces"
