"""Images from end to end: a small federation on handwritten digits, resumed, predicted from, loaded without Silotune."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from server.reports.compliance import write_compliance_report
from server.rounds.observer import Observer
from server.runs.folder import load_job
from shared.job.compute import ComputeConfig
from shared.runtime.inference import load_tuned, predict
from simulations.data.builtin_data import load_digits
from simulations.running import sites
from simulations.running.engine import run_scenario
from simulations.scenario import load_scenario
from tests.integration.test_independent import run_alone

CPU = ComputeConfig(device="cpu", precision="float32")
NUM_SITES = 3


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits 0 and 1 as CSV, the pixels of an image in one cell."""
    folder = tmp_path_factory.mktemp("digits")
    records = [record for record in load_digits().train if record["label"] in "01"][:90]
    rows = [f"{' '.join(map(str, record['pixels']))},{record['label']}" for record in records]
    (folder / "digits.csv").write_text("\n".join(["scan,digit", *rows]) + "\n")
    raw: dict[str, Any] = {
        "name": "digits",
        "model": {"backbone": "cnn:small"},
        "task": {
            "kind": "image_classification",
            "labels": ["0", "1"],
            "image_shape": [1, 8, 8],
            "pixel_range": [0, 16],
        },
        "training": {"rounds": 2, "local_steps": 4, "optimizer": "sgd", "learning_rate": 0.5},
        "privacy": {"delta": 1e-5, "sample_rate": 0.5, "noise_multiplier": 0.5, "max_grad_norm": 1.0},
        "data": {
            "train": {"path": "digits.csv", "columns": {"pixels": "scan", "label": "digit"}},
            "num_test": 30,
        },
        "partition": {"num_sites": NUM_SITES},
        "federation": {"update_dtype": "int8"},
        "simulation": {"threads": 1},
    }
    (folder / "scenario.toml").write_text(tomli_w.dumps(raw))
    return folder / "scenario.toml"


def run(path: Path, folder: Path, **options: Any) -> Any:
    sites.forget_simulated_sites()  # a resumed run is another process: sites are read from their folders anew
    return run_scenario(load_scenario(path), folder, observer=lambda arm: Observer(), injected_seed="images", **options)


@pytest.fixture(scope="module")
def finished(scenario: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "digits"
    run(scenario, folder)
    return folder


def test_a_federation_on_images_learns_and_accounts(finished: Path) -> None:
    found = json.loads((finished / "evaluation.json").read_text())
    assert found["metrics"]["accuracy"] >= 0.85
    assert {"macro_f1", "auc", "loss"} <= found["metrics"].keys()
    assert sum(map(sum, found["confusion"])) == 30
    for number in range(1, NUM_SITES + 1):
        record = json.loads((finished / "sites" / f"site-{number}" / "privacy.json").read_text())
        assert (record["steps_executed"], record["events"][0]["noise_multiplier"]) == (8, 0.5)
        # Injected randomness protects nobody, so no epsilon is claimed.
        assert (record["randomness"], record["epsilon_spent"]) == ("injected", None)
    assert (finished / "report.html").exists()


def test_stop_and_resume_gives_the_same_network_bit_for_bit(scenario: Path, finished: Path, tmp_path: Path) -> None:
    assert run(scenario, tmp_path / "run", stop_after=1).round_number == 1
    run(scenario, tmp_path / "run", resume=True)
    for name in ("model.safetensors", "silotune_state.safetensors", "README.md"):
        mine, theirs = (folder / "adapter" / name for folder in (tmp_path / "run", finished))
        assert mine.read_bytes() == theirs.read_bytes(), name


def test_predict_reads_images_as_numbers(finished: Path, silotune: Callable[..., Any]) -> None:
    records = [record for record in load_digits().test or [] if record["label"] in "01"][:40]
    images = [" ".join(map(str, record["pixels"])) for record in records]
    done = silotune("predict", finished, *images, "--json")
    assert done.status == 0, done.err
    answers = [json.loads(line) for line in done.out.splitlines()]
    assert [answer["pixels"] for answer in answers] == images
    right = [answer["label"] == record["label"] for answer, record in zip(answers, records, strict=True)]
    assert sum(right) >= 34
    shown = silotune("predict", finished, images[0].replace(" ", ",")).out.split()
    assert shown == [answers[0]["label"], f"{answers[0]['probability']:.3f}"]
    bad = silotune("predict", finished, images[0], "1 2 3")
    assert bad.status != 0
    assert "record 2 has pixels of shape [3], expected 64" in bad.err


def test_the_readme_of_the_network_gives_our_predictions(finished: Path, tmp_path: Path) -> None:
    images = [record["pixels"] for record in (load_digits().test or [])[:5]]
    job = load_job(finished)
    ours = predict(load_tuned(finished, job, CPU), [" ".join(map(str, pixels)) for pixels in images])
    adapter = finished / "adapter"
    program = (adapter / "README.md").read_text().split("```python\n")[1].split("```")[0]
    program = program.replace("ADAPTER", repr(str(adapter))).replace("PIXELS", repr(images))
    program += "\nimport json\nprint(json.dumps({'p': logits.softmax(-1).tolist(), 'labels': labels}))\n"
    theirs = run_alone(program, tmp_path)
    assert theirs["labels"] == ["0", "1"]
    mine = [list(prediction["probabilities"].values()) for prediction in ours]
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs["p"]), rtol=1e-4, atol=2e-5)
    assert float((torch.tensor(mine)[:, 0] - 0.5).abs().max()) > 0.1, "an untrained network would agree as well"


def test_the_compliance_report_speaks_of_images(finished: Path) -> None:
    text = write_compliance_report(finished, "html", out=None, accounts=[], signer=None).read_text()
    assert "A small network for images, all of its weights" in text
    assert "8 x 8 pixels, 1 channel" in text
    for foreign in ("LoRA", "language model", "Longest text"):
        assert foreign not in text.replace("The text on which the backbone was pre-trained", ""), foreign
