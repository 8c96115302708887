"""Names that Microsoft Presidio finds: the one place that knows its interface.

The rules find names by the words around them; a trained recogniser finds others too, and finds names that are none. Only `PERSON`
is asked of it: for what has a shape the rules are used. Nothing is downloaded: models must be installed, or be folders.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.data.deidentify.spans import Span
from shared.errors import ConfigError

MAX_CHARACTERS = 100_000
"""Of one piece that the model reads at once; its memory grows with the length."""

_SIZES = ("lg", "trf", "md", "sm")
_LATIN, _HAN = re.compile(r"[A-Za-z]"), re.compile(r"[\u4e00-\u9fff]")
_NEEDED = frozenset({"tok2vec", "transformer", "curated_transformer", "ner"})


class PresidioUnusable(ConfigError):
    """Presidio or a model for it is not there. The text says what to install."""


class PresidioNames:
    """Presidio with one spaCy model for each language.

    Attributes:
        version: of Presidio.
        models: language -> name and version of the model.
    """

    def __init__(self, models: dict[str, Any], *, version: str) -> None:
        from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
        from presidio_analyzer.nlp_engine import SpacyNlpEngine
        from presidio_analyzer.predefined_recognizers import SpacyRecognizer

        self.version = version
        self.models = {
            language: f"{nlp.meta['lang']}_{nlp.meta['name']} {nlp.meta['version']}" for language, nlp in models.items()
        }
        engine = SpacyNlpEngine(models=[{"lang_code": language, "model_name": "loaded"} for language in models])
        engine.nlp = models  # loaded here, so that Presidio has no reason to download
        recognizers = [
            SpacyRecognizer(supported_language=language, supported_entities=["PERSON"]) for language in models
        ]
        registry = RecognizerRegistry(recognizers=recognizers, supported_languages=list(models))
        self._analyzer = AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=list(models))

    def find(self, text: str) -> Iterator[Span]:
        """Yield the names in `text`: in Chinese if it has such characters, in English if most of its letters are Latin."""
        for language in self.models:
            for offset, piece in _pieces(text):
                if not _is_written_in(language, piece):
                    continue
                for found in self._analyzer.analyze(text=piece, language=language, entities=["PERSON"]):
                    yield Span(offset + found.start, offset + found.end, "name")


@functools.lru_cache(maxsize=2)
def load_presidio(chosen: tuple[tuple[str, str], ...]) -> PresidioNames:
    """Return Presidio with the chosen models, (language, package or folder), or with the installed ones if none is chosen.

    Raises:
        PresidioUnusable: if it, spaCy or a model is missing, or a model recognises no names.
    """
    if importlib.util.find_spec("presidio_analyzer") is None or importlib.util.find_spec("spacy") is None:
        raise PresidioUnusable("Presidio is not installed. Install Silotune with its extra `deid`.")
    logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)
    places = dict(chosen) or _installed()
    if not places:
        raise PresidioUnusable(
            "Presidio is installed, but no spaCy model for it. Install en_core_web_lg or zh_core_web_lg, or name a "
            "package or folder under models."
        )
    models = {language: _load_model(language, place) for language, place in sorted(places.items())}
    return PresidioNames(models, version=importlib.metadata.version("presidio-analyzer"))


def _installed() -> dict[str, str]:
    from spacy.util import get_installed_models

    found: dict[str, str] = {}
    for language in ("en", "zh"):
        names = [name for name in get_installed_models() if name.startswith(f"{language}_core_web_")]
        if names:
            found[language] = min(names, key=lambda name: (_size(name), name))
    return found


def _size(name: str) -> int:
    part = name.split("_")[3]
    return _SIZES.index(part) if part in _SIZES else len(_SIZES)


def _load_model(language: str, place: str) -> Any:
    import spacy

    if not (spacy.util.is_package(place) or Path(place).is_dir()):
        raise PresidioUnusable(f"the spaCy model {place!r} is neither an installed package nor a folder; install it.")
    try:
        nlp = spacy.load(place)
    except (OSError, ValueError, ImportError) as error:
        raise PresidioUnusable(
            f"the spaCy model {place!r} cannot be loaded ({type(error).__name__}); install one for this version of spaCy."
        ) from error
    if nlp.lang != language or "ner" not in nlp.pipe_names:
        raise PresidioUnusable(
            f"the spaCy model {place!r} is for {nlp.lang!r}, with the parts {', '.join(nlp.pipe_names) or '(none)'}. Expected "
            f"one for {language!r} that recognises names (ner)."
        )
    nlp.select_pipes(enable=[name for name in nlp.pipe_names if name in _NEEDED])
    return nlp


def _is_written_in(language: str, text: str) -> bool:
    """Return whether a model of the language should read the text: a model for English makes up names in Chinese text."""
    latin, han = len(_LATIN.findall(text)), len(_HAN.findall(text))
    return han > 0 if language == "zh" else latin > han


def _pieces(text: str) -> Iterator[tuple[int, str]]:
    """Yield (offset, piece); a long text is cut at the last line end or space before the limit."""
    start = 0
    while start < len(text):
        end = min(start + MAX_CHARACTERS, len(text))
        if end < len(text):
            cut = max(text.rfind(mark, start + 1, end) for mark in "\n 。")
            end = cut + 1 if cut > start else end
        yield start, text[start:end]
        start = end
