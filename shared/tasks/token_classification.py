"""Token classification: a tag for each word, as in the recognition of named entities; IOB2 tags, cross-entropy.

A word is tagged at its first piece; its further pieces, and the tokenizer's special tokens, have no target and no loss.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from shared.data.cells import value_fault
from shared.data.records import named
from shared.errors import DataError
from shared.job.kinds import RULES
from shared.models.batches import IGNORED, Batch, Example
from shared.models.heads import TokenClassifier, init_linear
from shared.tasks.base import Evaluation, Prediction, Record
from shared.tasks.predicting import Explained, Place, Predicting, Read, log_odds
from shared.tasks.tokens import mean_over_own_tokens, read_words, token_losses

OUTSIDE = "O"
MOST_WORDS_PER_TOKEN = 64
# A run of letters and digits, a single character of a script without spaces, or a single other mark.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|[^\w\s]")


class TokenClassification(Predicting):
    """See `shared.tasks.base.Task`. Records have `tokens`, a list of words (of characters, in Chinese), and `tags`, as many."""

    kind = "token_classification"
    about = "entities: a tag for each word of a text"
    content = "texts with a tag for each word"
    roles = RULES["token_classification"].roles
    primary_metric = RULES["token_classification"].primary_metric
    higher_is_better = True
    by_word = True

    def build_head(self, backbone: nn.Module, hidden_size: int, *, seed: int) -> nn.Module:
        """Return a linear classifier of every token, drawn from the public seed."""
        head = TokenClassifier(hidden_size, len(self.config.labels))
        init_linear(head.linear, seed=seed, name="head.linear")
        return head

    def targets(self, records: Sequence[Record]) -> Sequence[Any]:
        """Return the class of every word of every record; "O" throughout where a record has no `tags`."""
        labels = self.config.labels
        index = {label: i for i, label in enumerate(labels)}
        targets = []
        for row, record in enumerate(records, start=1):
            words = _words(record, "tokens", row)
            tags = [OUTSIDE] * len(words) if "tags" not in record else _words(record, "tags", row)
            if len(tags) != len(words):
                raise DataError(
                    f"{named(record, row)} has {len(words)} tokens but {len(tags)} tags; each word needs one."
                )
            if not index.keys() >= {*tags}:
                # The tag itself may be private: only its row is named.
                raise DataError(
                    f"{named(record, row)} has a tag that is not among task.labels ({', '.join(labels)}). Mend the data "
                    "or add the tag to the job."
                )
            targets.append([index[tag] for tag in tags])
        return targets

    def tokenized(self, records: Sequence[Record], tokenizer: Any, max_length: int, **options: Any) -> Any:
        """Return the pieces that the tokenizer makes of words, as far as `max_length` tokens reach."""
        words = [
            read_words(_words(record, "tokens", row), tokenizer, max_length)
            for row, record in enumerate(records, start=1)
        ]
        return tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length, **options)

    def encode(self, records: Sequence[Record], tokenizer: Any, max_length: int) -> list[Example]:
        """Cut words into pieces and put each tag on the first piece of its word; words beyond `max_length` are cut off."""
        targets = self.targets(records)
        if not records:
            return []
        encoded = self.tokenized(records, tokenizer, max_length)
        examples = []
        for row, (ids, own) in enumerate(zip(encoded["input_ids"], targets, strict=True)):
            pieces = torch.full((len(ids),), IGNORED, dtype=torch.int64)
            for place, word in first_pieces(encoded.word_ids(row)):
                pieces[place] = own[word]
            if bool((pieces == IGNORED).all()):
                raise DataError(
                    f"{named(records[row], row + 1)} has no word that the tokenizer knows within model.max_length {max_length}; "
                    "remove it or raise model.max_length."
                )
            examples.append(Example(torch.tensor(ids, dtype=torch.int64), pieces))
        return examples

    def question(self, text: str, name: str, tokenizer: Any, max_length: int) -> Record:
        """Return the record of a text with the words that the model reads and where they stand.

        Without those of which the tokenizer makes no token, such as a zero-width space: a word is found by the number of its tag.
        """
        # More words than that are beyond what the model reads, whatever its tokenizer makes of them.
        places = word_places(text, MOST_WORDS_PER_TOKEN * max_length)
        if not places:
            raise DataError(f"{name} has no words.")
        words = [text[begin:end] for begin, end in places]
        read = [
            word for _, word in first_pieces(self.tokenized([{"tokens": words}], tokenizer, max_length).word_ids(0))
        ]
        read = read or list(range(len(words)))  # which `encode` refuses
        return {"text": text, "tokens": [words[word] for word in read], "places": [places[word] for word in read]}

    def answer(self, record: Record, example: Example, output: Tensor) -> Prediction:
        """Return the entities with their places in the text; words beyond the model's length have no tag."""
        text, places, found = record["text"], record["places"], []
        for kind, first, last in entities(self._tags(example, output)):
            begin, end = places[first][0], places[last][1]
            found.append({"kind": kind, "text": text[begin:end], "start": begin, "end": end})
        return {"text": text, "entities": found}

    def _tags(self, example: Example, output: Tensor) -> list[str]:
        """Return the likeliest tag of each word that the model read."""
        own = torch.as_tensor(example.target) != IGNORED
        return [self.config.labels[i] for i in output[: example.length][own].argmax(dim=-1).tolist()]

    def shown(self, prediction: Prediction) -> str:
        """Return the text with its entities in brackets."""
        text = str(prediction["text"])
        for entity in reversed(prediction["entities"]):
            begin, end = entity["start"], entity["end"]
            text = f"{text[:begin]}[{text[begin:end]} | {entity['kind']}]{text[end:]}"
        return text

    def places(self, record: Record, encoded: Any) -> tuple[Place | None, ...]:
        """Return the places of the words in the whole text: the tokenizer sees each word alone."""
        words = record["places"]
        return tuple(None if word is None else (0, *words[word], word) for word in encoded.word_ids(0))

    def explained(self, read: Read, outputs: Tensor, label: str | None, word: int | None) -> Explained:
        """Return the log-odds of a label at a word; by default at the first word of the first entity."""
        if word is None:
            found = entities(self._tags(read.example, outputs[0]))
            if not found:
                raise DataError("the model finds no entity in the text; name the word to explain by --word N.")
            number = found[0][1]
        else:
            number = word - 1
        first = (torch.as_tensor(read.example.target) != IGNORED).nonzero().flatten().tolist()
        if not 0 <= number < len(first):
            raise DataError(
                f"--word is {word}, but the model reads {len(first)} words of the text; give 1 to {len(first)}."
            )
        place, where = first[number], f" at word {number + 1} ({read.record['tokens'][number]})"
        return log_odds(self.config.labels, outputs[0, place], label, lambda found: found[:, place], where)

    def probe(self, input_ids: Tensor, number: int) -> Example:
        """Return an example with all tags in turn, and none at the first and the last token."""
        targets = (torch.arange(len(input_ids)) + number) % len(self.config.labels)
        if len(input_ids) > 2:
            targets[[0, -1]] = IGNORED
        return Example(input_ids, targets)

    def check_site(self, examples: Sequence[Example]) -> None:
        """Refuse an empty site and one whose words all have one tag."""
        super().check_site(examples)
        seen = torch.unique(torch.cat([torch.as_tensor(example.target) for example in examples]))
        if len(seen[seen != IGNORED]) < 2:
            raise DataError("all words of the site have one and the same tag; leave the site out, or mend its tags.")

    def per_example_loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross-entropy over each example's own words, each times its tag's weight, [B], from [B, T, labels]."""
        return mean_over_own_tokens(
            outputs,
            batch.targets,
            label_smoothing=self.config.label_smoothing,
            class_weights=self.config.class_weights,
        )

    def evaluate(self, parts: Iterable[tuple[Tensor, Batch]]) -> Evaluation:
        """Return precision, recall and F1 of whole entities, together and by kind, and the loss and accuracy by word.

        An entity is found if its kind, its first and its last word are right (Tjong Kim Sang and De Meulder 2003), as seqeval
        counts them.
        """
        from seqeval.metrics import classification_report

        labels = self.config.labels
        predicted: list[list[str]] = []
        true: list[list[str]] = []
        loss, words, right = 0.0, 0, 0
        for outputs, batch in parts:
            nll, counts = token_losses(outputs, batch.targets)
            best = outputs.argmax(dim=-1)
            loss += float(nll.double().sum())
            words += int(counts.sum())
            right += int((counts & (best == batch.targets)).sum())
            for guessed, targets, own in zip(best.cpu(), batch.targets.cpu(), counts.cpu(), strict=True):
                predicted.append([labels[i] for i in guessed[own].tolist()])
                true.append([labels[i] for i in targets[own].tolist()])
        report = classification_report(true, predicted, output_dict=True, zero_division=0)
        metrics: dict[str, float | None] = {"loss": loss / words, "accuracy": right / words}
        if not any(entities(tags) for tags in true):
            return Evaluation(metrics=metrics | dict.fromkeys(_MEASURES), note=f"{_COUNTED} {_NO_ENTITY}")
        overall = report.pop("micro avg")
        metrics |= {name: float(overall[key]) for name, key in _MEASURES.items()}
        kinds = [kind for kind in report if not kind.endswith(" avg")]
        for kind in sorted(kinds):
            known = report[kind]["support"] > 0
            metrics |= {
                f"{name} {kind}": float(report[kind][key]) if known else None for name, key in _MEASURES.items()
            }
        return Evaluation(metrics=metrics, note=_COUNTED)


_COUNTED = (
    "Entities count as whole ones: kind, first and last word must be right. Tags are read leniently, as seqeval and conlleval "
    "do by default: an I- tag that continues nothing begins an entity."
)
_NO_ENTITY = "The evaluation data has no entity, so precision, recall and F1 are not defined."
_MEASURES = {"precision": "precision", "recall": "recall", "f1": "f1-score"}


def first_pieces(word_of_piece: Sequence[int | None]) -> list[tuple[int, int]]:
    """Return (place, word) of the first piece of every word; special tokens have no word."""
    found, last = [], None
    for place, word in enumerate(word_of_piece):
        if word is not None and word != last:
            found.append((place, word))
        last = word
    return found


def word_places(text: str, most: int | None = None) -> list[tuple[int, int]]:
    """Return begin and end of the first `most` words and marks of a text that nobody has cut; of Chinese and Japanese, the
    characters."""
    return [found.span() for found in islice(_WORD.finditer(text), most)]


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return (kind, first word, last word) of the entities in IOB tags; an I- that continues nothing begins an entity."""
    found: list[tuple[str, int, int]] = []
    for word, tag in enumerate(tags):
        mark, _, kind = tag.partition("-")
        if mark == "I" and found and found[-1][0] == kind and found[-1][2] == word - 1:
            found[-1] = (kind, found[-1][1], word)
        elif mark in ("B", "I"):
            found.append((kind, word, word))
    return found


def _words(record: Record, role: str, row: int) -> list[str]:
    """Return the words of a cell: a list, or text with spaces between them."""
    value = record[role]
    if (fault := value_fault(role, value)) is not None:
        raise DataError(f"{named(record, row)} has {fault}; mend the data.")
    words: list[str] = value.split() if isinstance(value, str) else list(value)
    if not words or not all(word.strip() for word in words):
        what = "words" if role == "tokens" else role
        raise DataError(
            f"{named(record, row)} has no {what}, or an empty one; expected a list of {what}, or text with spaces."
        )
    return words
