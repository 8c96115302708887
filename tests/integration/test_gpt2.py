"""GPT-2 from end to end: sites tune it privately on text it has not seen, and the saved adapter continues texts."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import tomli_w
from rich.console import Console

import simulations
from client.site.site import Site
from shared.data.datasets import write_jsonl
from shared.errors import DataError
from shared.job.compute import ComputeConfig
from shared.job.parsing import load_toml
from shared.runtime.inference import Decoding, generate, load_tuned
from shared.runtime.runtime import Runtime, load_runtime
from simulations.data.demo_data import load_movie_reviews
from simulations.data.small_gpt2 import Recipe, public_documents, small_gpt2
from simulations.running.engine import run_scenario
from simulations.running.live import LiveView
from simulations.scenario import Scenario, load_scenario

NUM_TRAIN, NUM_TEST = 1200, 150
# Seconds-sized: it only has to be better than chance.
RECIPE = Recipe(
    vocab_size=800,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_positions=48,
    steps=100,
    batch_size=8,
    learning_rate=0.01,
)
QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Scenario, Path, Runtime]:
    """The built-in scenario, smaller, run to its end: (scenario, run folder, runtime)."""
    try:
        documents = public_documents()
        reviews = load_movie_reviews()
    except DataError as error:
        pytest.skip(f"the public and the private text cannot be had here: {error}")
    folder = tmp_path_factory.mktemp("gpt2")
    backbone = small_gpt2(RECIPE, [*documents[:60], *documents[-2500:]], cache=folder, console=QUIET)
    for name, records in {"train": reviews[:NUM_TRAIN], "test": reviews[-NUM_TEST:]}.items():
        write_jsonl(folder / f"{name}.jsonl", records)
    raw = load_toml(Path(simulations.__path__[0]) / "gpt2.toml")
    raw["data"] = {n: {"path": f"{n}.jsonl", "columns": {"text": "text"}} for n in ("train", "test")}
    raw["model"] |= {"backbone": str(backbone), "max_length": 40}
    raw["training"] |= {"rounds": 3, "local_steps": 4, "learning_rate": 0.1}
    raw |= {"partition": {"kind": "iid", "num_sites": 2}, "federation": {"min_sites": 2}, "baselines": {}}
    (folder / "scenario.toml").write_text(tomli_w.dumps(raw))
    scenario = load_scenario(folder / "scenario.toml")
    with LiveView(QUIET) as view:
        # Injected: over draws from the operating system the ratio varies by two points around 0.94.
        run_scenario(scenario, folder / "run", observer=view.observer, injected_seed="gpt2")
    return scenario, folder / "run", load_runtime(scenario.job, ComputeConfig())


def test_private_tuning_lowers_the_perplexity_of_unseen_reviews(finished: tuple[Scenario, Path, Runtime]) -> None:
    scenario, run_dir, runtime = finished
    examples = runtime.encode(load_movie_reviews()[-NUM_TEST:])
    runtime.load(runtime.initial)
    start = runtime.evaluate(examples).metrics["perplexity"]
    tuned = load_tuned(run_dir, scenario.job, ComputeConfig()).evaluate(examples).metrics["perplexity"]
    recorded = json.loads((run_dir / "evaluation.json").read_text())["metrics"]["perplexity"]
    assert tuned == pytest.approx(recorded, rel=1e-4)
    assert tuned < 0.98 * start
    # The model knew something before: a uniform guess has the perplexity of the vocabulary.
    assert start < 0.8 * RECIPE.vocab_size


def test_every_site_spent_its_budget_and_no_more(finished: tuple[Scenario, Path, Runtime]) -> None:
    scenario, run_dir, _ = finished
    spent = [Site(path.parent).ledger().spent_epsilon() for path in run_dir.glob("sites/*/home/site.toml")]
    assert len(spent) == 2
    assert all(0.9 * scenario.job.privacy.epsilon < epsilon <= scenario.job.privacy.epsilon for epsilon in spent)


def test_the_saved_adapter_continues_a_text(finished: tuple[Scenario, Path, Runtime]) -> None:
    scenario, run_dir, _ = finished
    runtime = load_tuned(run_dir, scenario.job, ComputeConfig())
    found = generate(runtime, "The film is", Decoding(num_sequences=3, max_new_tokens=12, seed=0))
    assert len(set(found)) == 3
    assert all(found)


def test_plain_peft_gives_the_same_continuation(finished: tuple[Scenario, Path, Runtime]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scenario, run_dir, _ = finished
    backbone = scenario.job.model.backbone
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(backbone), run_dir / "adapter").eval()
    batch = tokenizer("The film is", return_tensors="pt")
    ids = model.generate(**batch, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    theirs = tokenizer.decode(ids[0, batch.input_ids.shape[1] :], skip_special_tokens=True)
    runtime = load_tuned(run_dir, scenario.job, ComputeConfig())
    assert generate(runtime, "The film is", Decoding(max_new_tokens=12, temperature=0.0)) == [theirs]
