"""The model card: `README.md` of a model folder, in the format of the Hugging Face hub.

Guarantees (tests: tests/shared/runtime/export/test_exports.py)
    * The privacy statement stands in it word for word as in `statement.json`; no epsilon is computed or put into other words.
    * Its lines of Python run as they stand, in the model's folder and without Silotune (`snippets`).
    * Metrics on records that were declared private are left out: no statement covers them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import excerpt, printable
from shared.files.json_files import Count, Finite, read_if_there
from shared.job.job import Job
from shared.job.kinds import TaskKind
from shared.privacy.statement import Statement
from shared.runtime.export.compression import Compression, compression_of
from shared.runtime.export.folder import ModelFolder, ModelRecord
from shared.runtime.export.snippets import snippet
from shared.runtime.thresholds import Thresholds
from shared.tasks import TASKS

_PIPELINES: dict[TaskKind, str] = {
    "sequence_classification": "text-classification",
    "pair_matching": "text-classification",
    "regression": "text-classification",
    "token_classification": "token-classification",
    "causal_lm": "text-generation",
    "replies": "text-generation",
    "image_classification": "image-classification",
}
_EMBEDDED = {"embedded:all-minilm-l6-v2": ("sentence-transformers/all-MiniLM-L6-v2", "en")}
"""Name on the hub and language of backbones that ship in a package."""


@dataclass(frozen=True, kw_only=True)
class _Evaluation:
    metrics: dict[str, Finite | None]
    round: Count | None = None
    thresholds: Thresholds | None = None


@dataclass(frozen=True, kw_only=True)
class _Dataset:
    test_kind: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Run:
    dataset: _Dataset = field(default_factory=_Dataset)


@dataclass(frozen=True, kw_only=True)
class _Site:
    declared_records: Count | None = None


def evaluated_on_private_records(folder: Path) -> bool:
    """True if there are metrics on a simulation's evaluation records, and these count as private: they are not for everybody."""
    run = read_if_there(folder / "run.json", _Run) if (folder / "evaluation.json").exists() else None
    return run is not None and run.dataset.test_kind == "private"


def model_card(source: ModelFolder, record: ModelRecord, tokenizer: Any) -> str:
    """Return the card of a model that is made of `source` and described by `record`.

    Args:
        tokenizer: of the backbone; None of images.

    Raises:
        RunError: if a record of the run is damaged.
    """
    job = source.job
    parts = [
        _front_matter(job, record),
        f"# {excerpt(job.name)[1:-1]}\n\n{_what(job, record)}",
        "## How to use\n\nThese lines run in the model's folder"
        f" with {_needs(record)} alone.\n\n```python\n{snippet(job, record, tokenizer)}```",
        "## Evaluation\n\n" + _evaluation(source.path, record),
        *(["## Compression\n\n" + _compression(compression)] if (compression := compression_of(record)) else []),
        "## Privacy\n\n" + _privacy(source.path),
        "## Training data\n\n" + _data(source),
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in _limits(job, record)),
        _origin(record),
    ]
    return printable("\n\n".join(parts), lines=True) + "\n"


def _inline(text: object) -> str:
    """Return words of a record for one line of Markdown: a line's end in them would begin something else."""
    return printable(str(text)).replace("`", "'").replace("|", "\\|")


def _front_matter(job: Job, record: ModelRecord) -> str:
    import yaml

    base, language = _EMBEDDED.get(job.model.backbone, (job.model.backbone if job.model.revision else None, None))
    found: dict[str, Any] = {
        **({"language": language} if language else {}),
        **({"base_model": base} if base else {}),
        "library_name": "onnx" if record.format == "onnx" else "transformers",
        "pipeline_tag": _PIPELINES[record.task],
        "tags": [
            "silotune",
            "differential-privacy",
            "federated-learning",
            *(["onnx"] if record.format == "onnx" else []),
        ],
    }
    lines = yaml.safe_dump(found, sort_keys=False, allow_unicode=True)
    # Whose data and whose model it is, the tool cannot know.
    return f"---\n{lines}# license: say under which terms you give this model on; the terms of the base model hold as well\n---"


def _what(job: Job, record: ModelRecord) -> str:
    task = TASKS[record.task]
    name = _EMBEDDED.get(
        job.model.backbone, (Path(job.model.backbone).name if not job.model.revision else job.model.backbone, "")
    )[0]
    lines = [
        f"A model for {task.about}, tuned from {name} at several sites by federated learning; records did not leave their sites.",
        f"- Format: {record.format}, {record.precision}" + (f", ONNX opset {record.opset}" if record.opset else ""),
    ]
    if record.labels:
        lines.append(
            "- Labels, in the order of the outputs: " + ", ".join(f"`{_inline(label)}`" for label in record.labels)
        )
    if job.task.target_range is not None:
        low, high = job.task.target_range
        lines.append(f"- Score: from {low:g} to {high:g}; outputs are in this unit and may lie a little outside")
    if not job.model.is_image_network:
        lines.append(f"- Length: at most {record.max_length} tokens of a text; longer ones are cut")
    if record.temperature != 1:
        lines.append(
            f"- Calibration: logits are divided by {record.temperature:.3f} already, so softmax gives calibrated probabilities"
        )
    for what, specs in (("Inputs", record.inputs), ("Outputs", record.outputs)):
        if specs:
            shown = [
                f"`{_inline(spec.name)}` {_inline(spec.dtype)} [{_inline(', '.join(map(str, spec.shape)))}]"
                for spec in specs
            ]
            lines.append(
                f"- {what}: " + ", ".join(shown[:4]) + (f" and so on, {len(shown)} in all" if len(shown) > 4 else "")
            )
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def _needs(record: ModelRecord) -> str:
    if record.format == "merged":
        return "transformers and torch"
    return "onnxruntime and NumPy" if record.task == "image_classification" else "onnxruntime and tokenizers"


def _evaluation(folder: Path, record: ModelRecord) -> str:
    if evaluated_on_private_records(folder):
        return "The run was evaluated on records that were declared private. No statement covers such metrics, so none is given."
    found = read_if_there(folder / "evaluation.json", _Evaluation)
    if found is None:
        return "The run was not evaluated."
    rows = [
        f"| {_inline(name)} | {'undefined' if value is None else f'{value:.4g}'} |"
        for name, value in found.metrics.items()
    ]
    of = f" after round {found.round}" if found.round is not None else ""
    int8 = (
        " Weights in int8 change them a little; measure this model on records of yours."
        if record.precision == "int8"
        else ""
    )
    table = "\n".join(["| metric | value |", "| --- | --- |", *rows])
    before = "the export"
    if compression_of(record) is not None:
        before = (
            "it was compressed: **these are not the figures of this smaller model**; measure it on records of yours"
        )
    chosen = (
        f"\n\n{_thresholds(found.thresholds)}" if found.thresholds is not None and found.thresholds.fitted_on else ""
    )
    return f"The tuned model{of} on the run's evaluation records, measured before {before}.{int8}\n\n{table}{chosen}"


def _thresholds(found: Thresholds) -> str:
    return (
        f"Thresholds: the last bias holds a number for each label that raises macro F1, found on {found.fitted_on:,} other "
        f"public records. On the evaluation records macro F1 is {found.macro_f1_after:.4g} with them and "
        f"{found.macro_f1_before:.4g} without, accuracy {found.accuracy_after:.4g} and {found.accuracy_before:.4g}."
    )


def _compression(note: Compression) -> str:
    return (
        f"{len(note.layers_kept)} of {note.layers_before} layers are left, with feed-forward parts of {note.intermediate:,} of "
        f"{note.intermediate_before:,}. They learned from the larger model what it says of {note.public_texts:,} texts, public "
        f"ones by the word of whoever made this (file with SHA-256 `{note.public_texts_sha256}`); no record of a site was read. "
        f"On {note.public_texts_held_out:,} of them, held out, it answers like the larger model: {note.agreement}."
    )


def _privacy(folder: Path) -> str:
    found = read_if_there(folder / "statement.json", Statement)
    if found is None:
        return "The run left no privacy statement: **assume that nothing is protected.**"
    return (
        "This model was made from a released one without another look at private records (post-processing), so the "
        f"run's statement holds for it unchanged:\n\n```text\n{found.text.replace('```', '` ` `')}\n```"
    )


def _data(source: ModelFolder) -> str:
    job, sites = source.job, sorted(source.path.glob("sites/*/privacy.json"))
    lines = [f"Records are {TASKS[job.task.kind].content}. The unit of privacy is the {job.privacy.unit}."]
    if job.privacy.central:
        return lines[0]
    sizes = sorted((read_if_there(path, _Site) or _Site()).declared_records or 0 for path in sites)
    if sizes:
        declared = ", ".join(f"{size:,}" for size in sizes if size)
        lines.append(f"{len(sizes)} sites took part" + (f"; declared sizes: {declared} records." if declared else "."))
    return " ".join(lines)


def _limits(job: Job, record: ModelRecord) -> list[str]:
    found = ["What the privacy statement does not cover stands at its end."]
    if record.task in ("causal_lm", "replies"):
        found.append("It continues texts by what is likely, not by what is true.")
    else:
        found.append("It answers every text, also of a kind that it never saw. A probability is no reason.")
    if record.format == "merged" and record.task not in ("causal_lm", "replies"):
        found.append(
            "Use it in float32 or bfloat16: its last layer, which pools and normalises as in training, holds numbers that "
            "float16 cannot. It is made for answers, not for further training."
        )
    if record.precision == "int8":
        found.append(
            "int8 rounds by ranges that are taken over a whole batch, so an answer can change a little with the texts beside it; "
            "for one that does not, give one text a call."
        )
        found.append(
            "Sums of int8 do not overflow on processors with VNNI or ARM's dot products. On x86 without VNNI set ONNX Runtime's "
            "session option `session.x64quantprecision` to `1`, which is slower."
        )
    if job.privacy.mechanism == "none":
        found.append("It was trained without noise: texts of its training may be found in it.")
    return found


def _origin(record: ModelRecord) -> str:
    made = ", ".join(_inline(f"{name} {version}") for name, version in sorted(record.made_by.items()))
    return (
        f"Made from `{_inline(record.made_from)}` (SHA-256 `{record.made_from_sha256}`), "
        f"job `{record.job_sha256[:12]}`, with {made}. "
        "`model.json` describes the files; `job.json`, `statement.json` and others of the run lie beside it as they were."
    )
