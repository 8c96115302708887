"""The adapter against the real Presidio with a small model that is trained here; without Presidio, what is said instead."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest

from shared.data.deidentify.config import DeidentifyConfig
from shared.data.deidentify.engine import open_deidentifier
from shared.data.deidentify.presidio import MAX_CHARACTERS, PresidioUnusable, load_presidio
from shared.data.deidentify.report import MaskTally

HAS_PRESIDIO = importlib.util.find_spec("presidio_analyzer") is not None
needs_presidio = pytest.mark.skipif(not HAS_PRESIDIO, reason="needs presidio-analyzer (the extra `deid`)")
NAMES = ("zorvath", "mellindra", "quibbley", "tarkonen", "ospreyne", "vandelo")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spaCy model that knows a handful of names in small letters, which no rule finds; trained in a few seconds."""
    import spacy
    from spacy.training import Example

    rng = random.Random(0)
    spacy.util.fix_random_seed(0)
    nlp = spacy.blank("en")
    ner = nlp.add_pipe("ner")
    ner.add_label("PERSON")  # type: ignore[attr-defined]
    frames = ("today {} was tired again", "we met {} near the lake", "the report of {} is late", "{} sleeps well")
    examples = []
    for _ in range(120):
        name, frame = rng.choice(NAMES), rng.choice(frames)
        start = frame.index("{}")
        entities = [(start, start + len(name), "PERSON")]
        examples.append(Example.from_dict(nlp.make_doc(frame.format(name)), {"entities": entities}))
    nlp.initialize(lambda: examples)
    for _ in range(12):
        rng.shuffle(examples)
        for start in range(0, len(examples), 8):
            nlp.update(examples[start : start + 8])
    folder = tmp_path_factory.mktemp("spacy") / "names"
    nlp.to_disk(folder)
    return folder


@needs_presidio
def test_names_of_the_model_and_what_the_rules_find_are_united(model: Path) -> None:
    config = DeidentifyConfig(engine="presidio", models={"en": str(model)})
    deidentifier = open_deidentifier(config)
    text = "we met tarkonen near the lake"
    assert open_deidentifier(DeidentifyConfig(engine="rules")).mask(text)[0] == text
    assert deidentifier.mask(text)[0] == "we met [NAME] near the lake"
    both = deidentifier.mask(
        "we met tarkonen near the lake, on 5 May 2020, with card 4111 1111 1111 1111, says Dr Smith"
    )[0]
    assert both.startswith("we met [NAME] near the lake, on [DATE], with card [ACCOUNT]")
    assert "Smith" not in both
    assert deidentifier.engine == "presidio"
    tally = MaskTally()
    tally.describe(deidentifier)
    document = tally.document()
    assert document["engine"] == "presidio"
    assert set(document["presidio"]) == {"version", "models"}


@needs_presidio
def test_a_record_is_masked_by_itself_alone_with_presidio_too(model: Path) -> None:
    deidentifier = open_deidentifier(DeidentifyConfig(models={"en": str(model)}))
    texts = [f"we met {name} near the lake" for name in NAMES] + ["the report is late", "today was fine"]
    forwards = {text: deidentifier.mask(text)[0] for text in texts}
    backwards = {text: deidentifier.mask(text)[0] for text in reversed(texts)}
    assert forwards == backwards
    assert forwards["we met quibbley near the lake"] == "we met [NAME] near the lake"


@needs_presidio
def test_a_long_text_is_read_to_its_end(model: Path) -> None:
    deidentifier = open_deidentifier(DeidentifyConfig(engine="presidio", models={"en": str(model)}))
    filler = "the report is late. " * (MAX_CHARACTERS // 20 + 10)
    assert deidentifier.mask(f"{filler}we met mellindra near the lake")[0].endswith("we met [NAME] near the lake")


@needs_presidio
def test_a_model_without_names_or_for_another_language_is_refused(model: Path, tmp_path: Path) -> None:
    import spacy

    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(PresidioUnusable, match="recognises names"):
        load_presidio((("en", str(tmp_path / "blank")),))
    with pytest.raises(PresidioUnusable, match="for 'zh'"):
        load_presidio((("zh", str(model)),))
    with pytest.raises(PresidioUnusable, match="neither an installed package nor a folder"):
        load_presidio((("en", "en_core_web_nowhere"),))


@pytest.mark.skipif(HAS_PRESIDIO, reason="Presidio is installed here")
def test_without_presidio_auto_goes_by_the_rules_and_says_so() -> None:
    deidentifier = open_deidentifier(DeidentifyConfig())
    assert deidentifier.engine == "rules"
    tally = MaskTally()
    tally.describe(deidentifier)
    assert "not installed" in tally.document()["without_presidio"]
    for asked in (DeidentifyConfig(engine="presidio"), DeidentifyConfig(models={"en": "en_core_web_lg"})):
        with pytest.raises(PresidioUnusable, match="extra `deid`"):
            open_deidentifier(asked)
