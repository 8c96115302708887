"""Does a version say the truth: its files, its signature, and the statement against what was executed?

Formal guarantees (tests: tests/server/registry/test_attacks.py)
    * `verify` raises if a file of the version was changed, added or removed (test_any_changed_file_is_found), if another than a
      trusted key signed (test_a_foreign_key_is_refused), or if manifest and files say different things
      (test_a_summary_that_says_more_than_the_files_is_found).
    * Epsilon is composed anew from the executed steps, as the compliance report does; whatever that report would name as not
      fitting together fails here (test_an_edited_statement_is_found_whoever_signed_it).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from server.records.privacy import SiteRecord
from server.registry.manifest import MANIFEST_FILE, Summary
from server.registry.registry import Version
from server.reports.compliance.facts import Facts
from server.reports.compliance.reading import read_facts
from shared.errors import ModelError, TrustError, excerpt
from shared.files.bounded import read_named_text
from shared.runtime.export.folder import ModelFolder
from shared.tasks import task_of
from shared.trust.signed_folder import SIGNATURE_FILE, file_hashes, verify_folder
from shared.trust.signed_job import SignedJob


@dataclass(frozen=True)
class Examined:
    """What the files of a model say, none of which contradicts another.

    Attributes:
        folder: the model.
        facts: of its run, recomputed.
        signed: its job as it was signed, None of a simulation.
        summary: for the manifest.
    """

    folder: ModelFolder
    facts: Facts
    signed: SignedJob | None
    summary: Summary


def examine(path: Path, signed: SignedJob | None = None) -> Examined:
    """Read a model folder that has its run's records, and recompute its statement.

    Args:
        signed: the job as it was signed; a run at its coordinator has it by itself.

    Raises:
        TrustError: if something does not fit together.
        ModelError, RunError: if a file is missing or malformed, or the run was not completed.
    """
    # 1. The model itself: hashes, if it says some, and of whose job it is.
    folder = ModelFolder.read(path)
    folder.check()

    # 2. What was executed, and what was said of it.
    facts = read_facts(path, signed=signed)
    if not facts.data.complete:
        raise ModelError(
            f"the run of {path} is {facts.data.run.status}, not completed, so it has no final statement; finish it first."
        )
    problems = [*facts.discrepancies, *_evaluated_otherwise(facts)]

    # 3. The coordinator's signature on the adapter, which is a part of the model where there is one.
    adapter = path / "adapter"
    if facts.signed_job is not None and (adapter / SIGNATURE_FILE).exists():
        verify_folder(adapter, facts.signed_job.coordinator)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise TrustError(
            f"{path} does not fit together, so no claim of it can be relied on:\n{listed}\nAsk whoever made the run."
        )
    return Examined(folder, facts, facts.signed_job, _summary(folder, facts))


def verify(version: Version) -> Examined:
    """Check all of a version whose manifest was read and trusted (`Registry.version`).

    Raises:
        TrustError: saying what does not hold.
        ModelError, RunError: if its files cannot be read as a model.
    """
    # 1. Every file that is there or should be, against the manifest.
    found, signed = file_hashes(version.path), version.manifest.files
    found.pop(MANIFEST_FILE, None)
    for name in sorted({*found, *signed}):
        if found.get(name) != signed.get(name):
            what = "is missing" if name not in found else "was added" if name not in signed else "was changed"
            raise TrustError(
                f"{str(version.path / name)!r} {what} after {version.reference} was signed; do not use it."
            )

    # 2. What they say: the statement against what was executed, the job against its signature.
    examined = examine(version.model, read_signed_job(version))

    # 3. What the manifest says of them.
    if examined.summary != version.manifest.summary:
        stated, computed = version.manifest.summary.model_dump(), examined.summary.model_dump()
        differ = ", ".join(key for key, value in computed.items() if stated[key] != value)
        raise TrustError(
            f"the manifest of {version.reference} does not say what its files do ({differ}); do not use it."
        )
    return examined


def read_signed_job(version: Version) -> SignedJob | None:
    """Return the signed job of a version, None if it has none; raises as `SignedJob.from_json`."""
    if not version.signed_job.exists():
        return None
    return SignedJob.from_json(read_named_text(version.signed_job), source=str(version.signed_job))


def _evaluated_otherwise(facts: Facts) -> list[str]:
    """Return where evaluation.json speaks of another task than the job is."""
    evaluation, job = facts.data.federated.evaluation, facts.job
    if evaluation is None:
        return []
    task, found = task_of(job), list[str]()
    labels = evaluation.labels
    if labels is not None and tuple(labels) != job.task.labels:
        found.append(
            f"evaluation.json has the labels {excerpt(list(labels))}, the job {excerpt(list(job.task.labels))}"
        )
    if evaluation.confusion is not None:
        shape = {len(evaluation.confusion), *map(len, evaluation.confusion)}
        if shape != {len(job.task.labels)}:
            found.append(
                f"the confusion matrix of evaluation.json has other sides ({shape}) than {len(job.task.labels)} labels"
            )
    if evaluation.primary_metric != task.primary_metric:
        found.append(
            f"evaluation.json is about {excerpt(evaluation.primary_metric)}, the job's task about {task.primary_metric!r}"
        )
    if evaluation.higher_is_better not in (None, task.higher_is_better):
        found.append(
            f"evaluation.json says that {task.primary_metric} is better {'low' if task.higher_is_better else 'high'}"
        )
    return found


def _summary(folder: ModelFolder, facts: Facts) -> Summary:
    evaluation, headline, arm = facts.data.federated.evaluation, facts.headline, facts.data.federated
    return Summary(
        format=folder.format,
        precision=folder.precision,
        task=folder.record.task,
        metric=evaluation.primary_metric if evaluation else None,
        value=evaluation.primary if evaluation else None,
        higher_is_better=facts.data.higher_is_better if evaluation else None,
        # As it was stated: it agrees with what was recomputed, and the last digit is that of the statement.
        epsilon=arm.epsilon if headline else None,
        epsilon_alone=_alone(facts) if headline else None,
        delta=headline.delta if headline else None,
        unit=headline.unit if headline else None,
        job=facts.job.name,
        job_sha256=facts.job.sha256,
        job_signer=facts.signed_job.signer.text if facts.signed_job else None,
        data=facts.data.run.dataset.name,
        sites=[] if facts.central else list(facts.data.site_names),  # a trusted coordinator names none
        audits=[f"tier {audit.tier}: {audit.verdict}" for audit in facts.data.audits],
    )


def _alone(facts: Facts) -> float | None:
    """Return the largest epsilon of what one site sends by itself, as it was stated; None where noise is not shared."""
    stated = (site.epsilon_alone for site in facts.data.federated.sites if isinstance(site, SiteRecord))
    return max((epsilon for epsilon in stated if epsilon is not None), default=None)
