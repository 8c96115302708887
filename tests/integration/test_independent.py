"""Others can check us: the adapter works without Silotune, and epsilon follows from the record with an accountant alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from server.rounds.observer import Observer
from server.runs.folder import load_job
from shared.job.compute import ComputeConfig
from shared.models.batches import Example
from shared.runtime.inference import load_tuned, predict
from simulations.running.engine import run_scenario
from simulations.scenario import load_scenario

TEXTS = [
    "a quiet joy",
    "it bores, it drags and ends far too late for a film of this length, which nobody should have to sit through at all",
    "warm",
]
CPU = ComputeConfig(device="cpu", precision="float32")
ALONE = """
import sys
foreign = {"shared", "server", "client", "simulations", "cli", "flwr", "opacus"} & set(sys.modules)
assert not foreign, foreign
"""


def run_alone(program: str, folder: Path) -> Any:
    """Run `program` in a Python process that starts elsewhere; it prints one JSON line."""
    script = folder / "alone.py"
    script.write_text(program + ALONE)
    done = subprocess.run(
        [sys.executable, "-I", str(script)], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def snippet(adapter: Path, backbone: str) -> str:
    """The code block of the adapter's README with its three placeholders filled in, and nothing else changed."""
    text = (adapter / "README.md").read_text().split("```python\n")[1].split("```")[0]
    for placeholder, value in (("BACKBONE", backbone), ("ADAPTER", str(adapter)), ("TEXTS", TEXTS)):
        if placeholder != "TEXTS" or "TEXTS" in text:
            assert placeholder in text
        text = text.replace(placeholder, repr(value))
    return text


def alone(program: str) -> str:
    """Return code that runs `program` in a name space of its own, `scope`: what it does not import it does not have."""
    return f"scope = {{}}\nexec({program!r}, scope)\n"


VARIANTS: list[dict[str, Any]] = [
    {"lora": {"train": "b"}},
    {"lora": {"train": "both", "last_layers": 3}, "model": {"pooling": "first"}},
    {"lora": {"train": "none"}},
]


@pytest.fixture(scope="module")
def compared(
    write_scenario: Callable[..., Path], tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Any], list[Any], list[Any]]:
    """Our predictions of BERT, our logits of GPT-2, and what one process says of both by the READMEs of the adapters."""
    folder = tmp_path_factory.mktemp("independent")
    bert, predictions = of_bert(write_scenario, folder)
    gpt2, logits = of_gpt2(write_scenario, folder, tiny_gpt2)
    program = f"import json\nimport torch\nanswers = []\n{bert}{gpt2}print(json.dumps(answers))\n"
    return predictions, logits, run_alone(program, folder)


def of_bert(write_scenario: Callable[..., Path], place: Path) -> tuple[str, list[Any]]:
    program, ours = "", []
    for number, sections in enumerate(VARIANTS):
        folder = place / f"run-{number}"
        scenario = load_scenario(write_scenario(place, training={"rounds": 2, "local_steps": 4}, **sections))
        finished = run_scenario(scenario, folder, observer=lambda arm: Observer())
        if sections["lora"]["train"] == "both":
            assert any(n.endswith(".residual") and bool(t.any()) for n, t in finished.adapter.items())
        job = load_job(folder)
        runtime = load_tuned(folder, job, CPU)
        ours.append(predict(runtime, TEXTS))
        program += alone(snippet(folder / "adapter", job.model.backbone))
        program += "answers.append({'p': scope['logits'].softmax(-1).tolist(), 'labels': list(scope['labels'])})\n"
        # The comparison must be able to fail: the untrained model says something else.
        runtime.load(runtime.initial_global(job.lora.train == "both"))
        before = predict(runtime, TEXTS)
        assert max(abs(b["probability"] - m["probability"]) for b, m in zip(before, ours[-1], strict=True)) > 1e-3
    return program, ours


def of_gpt2(write_scenario: Callable[..., Path], place: Path, tiny_gpt2: Path) -> tuple[str, list[Any]]:
    program, ours = "", []
    for train in ("b", "both"):
        path = write_scenario(
            place,
            model={"backbone": str(tiny_gpt2)},
            lora={"target_modules": ["c_attn"], "train": train},
            task={"kind": "causal_lm", "labels": []},
            training={"rounds": 2},
            data={"train": {"path": "train.csv", "columns": {"text": "review"}}},
        )
        folder = place / train
        run_scenario(load_scenario(path), folder, observer=lambda arm: Observer())
        job = load_job(folder)
        runtime = load_tuned(folder, job, CPU)
        tokens = [runtime.tokenizer(text)["input_ids"][:20] for text in TEXTS]
        examples = [Example(torch.tensor(ids)) for ids in tokens]
        ours.append([outputs[0] for example in examples for outputs, _ in runtime.outputs([example])])
        program += alone(snippet(folder / "adapter", job.model.backbone))
        program += "model = scope['model']\nwith torch.no_grad():\n"
        program += f"    answers.append([model(torch.tensor([ids])).logits[0].tolist() for ids in {tokens!r}])\n"
        runtime.load(runtime.initial_global(train == "both"))
        (untrained,) = (outputs[0] for outputs, _ in runtime.outputs(examples[:1]))
        assert not torch.allclose(untrained, ours[-1][0], atol=1e-3)
    return program, ours


def test_the_readme_of_the_adapter_gives_our_predictions(compared: tuple[list[Any], list[Any], list[Any]]) -> None:
    ours, _, answers = compared
    for mine, theirs in zip(ours, answers[: len(VARIANTS)], strict=True):
        assert theirs["labels"] == ["bad", "good"]
        for prediction, probabilities in zip(mine, theirs["p"], strict=True):
            assert probabilities == pytest.approx(list(prediction["probabilities"].values()), abs=2e-5)


def test_peft_alone_gives_our_gpt2_logits(compared: tuple[list[Any], list[Any], list[Any]]) -> None:
    _, ours, answers = compared
    for mine, theirs in zip(ours, answers[len(VARIANTS) :], strict=True):
        for logits, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(logits, torch.tensor(other), rtol=1e-4, atol=1e-4)


ACCOUNTANT = """
import json, sys
import dp_accounting
from dp_accounting.pld import PLDAccountant

results = {}
for path in PATHS:
    record = json.load(open(path))
    assert record["relation"] == "add or remove one record" and record["unit"] == "record"
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event in record["events"]:
        gaussian = dp_accounting.GaussianDpEvent(event["noise_multiplier"])
        sampled = dp_accounting.PoissonSampledDpEvent(event["sample_rate"], gaussian)
        accountant.compose(sampled, event["steps"])
    results[record["site"]] = accountant.get_epsilon(record["delta"])
print(json.dumps(results))
"""


def test_epsilon_follows_from_the_record_with_dp_accounting_alone(finished_run: Path, tmp_path: Path) -> None:
    paths = sorted(finished_run.glob("sites/*/privacy.json"))
    assert len(paths) == 3
    theirs = run_alone(ACCOUNTANT.replace("PATHS", repr(list(map(str, paths)))), tmp_path)
    statement = json.loads((finished_run / "statement.json").read_text())
    for path in paths:
        record = json.loads(path.read_text())
        assert record["epsilon_spent"] == pytest.approx(theirs[record["site"]], rel=2e-3)
        assert record["epsilon_spent"] >= theirs[record["site"]] * (1 - 1e-6), "ours may err on the safe side only"
        assert f"({record['epsilon_spent']:.3f}, 1e-05)" in record["statement"]
    assert f"({max(theirs.values()):.2f}"[:-1] in statement["one_site"]
