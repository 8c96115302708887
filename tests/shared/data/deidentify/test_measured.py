"""Recall and precision on made-up notes, and how often real text is touched: floors under what the document states."""

from __future__ import annotations

from collections import Counter

import pytest

from shared.data.deidentify.config import DeidentifyConfig
from shared.data.deidentify.engine import open_deidentifier
from shared.errors import DataError
from simulations.data.builtin_data import load_banking77, load_bc5cdr
from simulations.data.demo_data import load_movie_reviews
from tests.shared.data.deidentify.synthetic_notes import Note, notes

RULES = open_deidentifier(DeidentifyConfig(engine="rules"))

# Of names, in percent; what has a shape is found nearly always.
NAME_FLOORS = {("en", "seen"): 96, ("zh", "seen"): 78, ("en", "unseen"): 45, ("zh", "unseen"): 47}
FLOORS = {"date": 89, "phone": 88, "id": 80, "age": 99, "email": 99, "url": 99, "ip": 99, "account": 99}


def measure(sample: list[Note]) -> tuple[dict[str, float], dict[str, float]]:
    """Return recall by true kind (all of it masked) and precision by masked kind (touches an identifier), in percent."""
    all_true, found, all_masked, right = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for note in sample:
        spans = RULES.find(note.text)
        covered = {i for span in spans for i in range(span.start, span.end)}
        for true in note.truth:
            all_true[true.kind] += 1
            found[true.kind] += covered.issuperset(range(true.start, true.end))
        for span in spans:
            all_masked[span.kind] += 1
            right[span.kind] += any(span.start < true.end and true.start < span.end for true in note.truth)
    return (
        {kind: 100 * found[kind] / all_true[kind] for kind in all_true},
        {kind: 100 * right[kind] / all_masked[kind] for kind in all_masked},
    )


@pytest.mark.parametrize(("language", "templates"), NAME_FLOORS)
def test_recall_and_precision_on_made_up_notes(language: str, templates: str) -> None:
    recall, precision = measure(notes(600, seed=1, language=language, templates=templates))
    too_low = {
        kind: value
        for kind, value in recall.items()
        if value < (NAME_FLOORS[language, templates] if kind == "name" else FLOORS[kind])
    }
    assert too_low == {}
    assert min(precision.values()) >= 97, precision


def test_the_figures_can_fail() -> None:
    """A rule that finds nothing, and one that masks what is no identifier, are seen by the measurement."""
    sample = notes(50, seed=1, language="en", templates="seen")
    shifted = [Note("x" * len(note.text), note.truth) for note in sample]
    assert set(measure(shifted)[0].values()) == {0.0}
    bare = [Note(note.text, ()) for note in sample]
    assert set(measure(bare)[1].values()) == {0.0}


def touched(texts: list[str]) -> float:
    """Return the share of texts in which anything is masked, in percent."""
    return 100 * sum(bool(RULES.find(text)) for text in texts) / len(texts)


def test_real_questions_to_a_bank_stay_as_they_are() -> None:
    try:
        texts = [record["text"] for record in load_banking77().train]
    except DataError as error:
        pytest.skip(str(error))
    assert touched(texts[:3000]) < 0.2


def test_real_medical_abstracts_stay_nearly_as_they_are() -> None:
    try:
        records = load_bc5cdr().train
    except DataError as error:
        pytest.skip(str(error))
    assert touched([" ".join(record["tokens"]) for record in records[:2000]]) < 1
    assert sum(RULES.mask_tokens(record["tokens"])[0] != record["tokens"] for record in records[:1000]) < 15


def test_what_is_masked_in_film_reviews_are_names() -> None:
    """They are full of real names, of actors and characters, so many are touched; nearly nothing else is masked."""
    try:
        texts = [record["text"] for record in load_movie_reviews()]
    except DataError as error:
        pytest.skip(str(error))
    counts = Counter(span.kind for text in texts[:3000] for span in RULES.find(text))
    assert 150 < counts["name"] < 500
    assert sum(counts.values()) - counts["name"] < 15
