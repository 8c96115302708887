"""The words of the compliance report: what was trained, by whom, on what, and how far the guarantee goes.

The numbers and tables that prove it are in “server.reports.compliance.evidence”. A statement of privacy is never worded here:
it comes from “shared.privacy.statement”.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from server.reports.compliance import evidence, spending
from server.reports.compliance.checks import what_was_compared
from server.reports.compliance.document import (
    Block,
    Bullets,
    Document,
    Notice,
    Paragraph,
    SignatureLines,
    Table,
    entries,
    numbers,
    section,
    wide,
)
from server.reports.compliance.facts import Facts
from server.reports.run.formats import (
    NOT_RECORDED,
    format_delta,
    format_metric,
    format_seconds,
    format_time,
    metric_title,
    printable,
)
from shared.epsilons import rounded_up
from shared.job.job import Job
from shared.limits import MAX_TABLE_LABELS
from shared.tasks import task_of
from shared.trust.signed_file import Signer, fingerprint
from shared.version import silotune_version

_STATUS = {
    "completed": "completed",
    "running": "STILL RUNNING; this report is of what was durable when it was made",
    "stopped": "STOPPED BEFORE ITS END",
}


def compose_document(facts: Facts, *, now: datetime, signer: Signer | None, file_name: str) -> Document:
    """Put `facts` into words.

    Args:
        now: when the report is made.
        signer: who will sign the file; None if nobody does.
        file_name: of the report, to which its signature refers.
    """
    sections = (
        section("summary", "Summary", _summary(facts)),
        section("training", "What was trained", _training(facts)),
        section("participants", "By whom", _participants(facts)),
        section("data", "On what kind of data", _data(facts)),
        section("guarantee", "The guarantee", evidence.guarantee(facts)),
        section("ledger", "The sites' ledgers before and after", spending.ledgers(facts)),
        section("releases", "Every release", spending.releases(facts)),
        section("accountants", "Accountants compared", evidence.accountants(facts)),
        section("audits", "Audits", evidence.audits(facts)),
        section("versions", "Versions and hashes", evidence.versions(facts)),
        section("limits", "Limits of the guarantee, in plain words", _limits(facts)),
        section("signature", "Signatures", _signature(signer, file_name)),
    )
    return Document(
        title=f"Compliance report: {printable(facts.job.name)}",
        subtitle="Federated fine-tuning under differential privacy, made with Silotune",
        language="en",
        created=format_time(now.astimezone(UTC)),
        lead=tuple(_lead(facts)),
        sections=sections,
    )


def _lead(facts: Facts) -> Iterator[Block]:
    """What a reader must know before anything else."""
    if facts.discrepancies:
        count = len(facts.discrepancies)
        title = f"{count} thing{'s do' if count > 1 else ' does'} not fit together. Clear them up before relying on this report."
        yield Notice(level="danger", title=title, items=facts.discrepancies)
    if not facts.private:
        yield Notice(level="danger", title="No privacy guarantee holds for this run.", items=(_why_not_private(facts),))
    if facts.data.run.status != "completed":
        yield Notice(
            level="caution",
            title="The run is not complete.",
            items=("Later rounds would add releases and raise epsilon. Make the report again at its end.",),
        )
    if facts.simulated:
        yield Notice(
            level="caution",
            title="This run is a simulation.",
            items=(
                "All sites ran on one machine, through the code that real sites run. No organisation stands behind a site, and "
                "whoever ran it could read every record.",
            ),
        )
    if not facts.discrepancies:
        yield Notice(
            level="good",
            title="Nothing was found that does not fit together. What was compared:",
            items=what_was_compared(facts.data, facts.signed_job, facts.sites, facts.central),
        )


def _aggregation(job: Job) -> str:
    if job.privacy.shares_noise:
        return "secure sum of the sites' gradients; the coordinator takes the step"
    if job.privacy.central:
        return "sum of the clipped updates with noise, divided by a declared number"
    return f"mean of the sites' updates, weights {job.aggregation.weights}"


def _why_not_private(facts: Facts) -> str:
    if facts.job.privacy.mechanism == "none":
        return "The job asked for no noise (privacy.mechanism is none). Nothing that was released is protected."
    if facts.central is not None:
        return facts.guarantees[0].statement.one_site
    if not facts.sites:
        return "No site has released anything yet."
    return (
        f"{facts.join_sites(facts.unprotected)}: updates were released without noise, or with randomness that was "
        "injected for a test. Whoever knows its seed can remove the noise. No epsilon is stated for the run."
    )


def _summary(facts: Facts) -> Iterator[Block]:
    run, headline = facts.data.run, facts.headline
    privacy = "none is guaranteed"
    if headline is not None:
        privacy = (
            f"epsilon {rounded_up(headline.epsilon)} at delta {format_delta(headline.delta)} for one {headline.unit} "
            f"{headline.where}"
        )
        if (alone := facts.epsilon_alone) is not None:
            privacy += f"; {rounded_up(alone)} against everybody else together, if secure aggregation fails completely"
            privacy += f"; {facts.largest_at}"
    verdicts = [f"tier {audit.tier} {audit.verdict}" for audit in facts.data.audits]
    yield entries(
        ("Run", printable(facts.job.name)),
        ("State", _STATUS[run.status]),
        ("Time", f"{format_time(run.created)} to {format_time(run.finished)}"),
        ("Privacy", privacy),
        ("Sites", _number_of_sites(facts)),
        ("Rounds", _rounds(facts)),
        ("Result", _result(facts)),
        ("Audits", ", ".join(verdicts) or "none was made"),
        ("Discrepancies", str(len(facts.discrepancies)) if facts.discrepancies else "none found"),
    )


def _rounds(facts: Facts) -> str:
    federated = facts.data.federated
    done = f"{federated.rounds_done} of {federated.rounds_planned}"
    if facts.data.stopped_early:
        done += "; ended by the job's rule of early stopping, on public evaluation records"
    if federated.kept_round != federated.rounds_done:
        done += f"; the adapter is that of round {federated.kept_round}, the best on them"
    return done


def _number_of_sites(facts: Facts) -> str:
    if facts.central is not None:
        return f"{facts.central.record.num_sites_declared:,} declared"
    return str(len(facts.sites))


def _result(facts: Facts) -> str | None:
    federated, metric = facts.data.federated, facts.data.primary_metric
    value = federated.final(metric)
    if value is None:
        return None
    records = facts.data.run.test_records
    kind = facts.data.run.dataset.test_kind or "public"
    where = f" on {records:,} {kind} evaluation records" if records else f" on {kind} evaluation records"
    uncovered = "; this figure has no noise, and no epsilon covers it" if kind == "private" else ""
    return f"{metric_title(metric)} {format_metric(metric, value)}{where}{uncovered}"


def _training(facts: Facts) -> Iterator[Block]:
    job = facts.job
    training = job.training
    if job.model.is_image_network:
        what, sent = (
            "A small network for images, all of its weights. No model that was trained before lies below it.",
            "network",
        )
    else:
        what = "A small adapter and, for a classifier, its output layer. The language model below it was not changed."
        sent = "adapter"
    if job.privacy.shares_noise:
        way = (
            f"In each round the coordinator sent the {sent} out. Each site clipped every {job.privacy.unit}'s part of the "
            "gradient, added its share of the noise to their sum, and sent the result under masks, which cancel only in the "
            "sum over all sites. The coordinator took the optimiser's step with that sum. No record left a site."
        )
    else:
        way = f"The coordinator sent the {sent} out, sites improved it on their own records, and {_way_back(facts)}"
    yield Paragraph(text=f"{what} {way}")
    yield entries(
        *_model_entries(job),
        ("Task", task_of(job).about),
        ("Labels", _labels(job.task.labels)),
        (
            "Length",
            _length(job)
            + (f" planned, {facts.data.federated.rounds_done} executed" if facts.data.stopped_early else ""),
        ),
        (
            "Optimiser",
            f"{training.optimizer}, learning rate {training.learning_rate:g}, schedule {training.schedule}",
        ),
        ("Aggregation", _aggregation(job)),
        (
            "Updates sent in",
            "masked words of 64 bits" if job.privacy.shares_noise else job.federation.update_dtype,
        ),
        ("Took", format_seconds(facts.data.run.seconds)),
        ("Job (SHA-256)", job.sha256),
        mono=("Job (SHA-256)",),
    )


def _length(job: Job) -> str:
    rounds = _count(job.training.rounds, "round")
    if job.privacy.shares_noise:
        spare = _count(job.privacy.spare_attempts_for(job.training.rounds), "spare attempt")
        return f"{rounds} of one step of the coordinator, and {spare}"
    return f"{rounds} of {_count(job.training.local_steps, 'step')} at each site"


def _model_entries(job: Job) -> list[tuple[str, str | None]]:
    if job.model.is_image_network:
        return [("Network", printable(job.model.backbone))]
    last = job.lora.last_layers
    layers = "all layers" if last is None else "the last layer" if last == 1 else f"the last {last} layers"
    factors = "factor B only; A is fixed" if job.lora.train == "b" else "both factors"
    adapter = f"LoRA of rank {job.lora.rank} on {', '.join(job.lora.target_modules)} of {layers}; {factors}"
    return [
        ("Language model", printable(job.model.backbone)),
        ("Its revision", job.model.revision),
        ("Adapter", "none; the head alone is trained" if job.lora.train == "none" else adapter),
    ]


def _labels(labels: Sequence[str]) -> str:
    """The names of few labels; of many the first ones and how many there are."""
    shown = ", ".join(map(printable, labels[:MAX_TABLE_LABELS]))
    return shown if len(labels) <= MAX_TABLE_LABELS else f"{shown} … ({len(labels):,} in all)"


def _way_back(facts: Facts) -> str:
    if facts.central is not None:
        return "sent it back unprotected; the coordinator clipped each update, added noise to their sum and published only that."
    if facts.job.privacy.mechanism == "none":
        return "sent it back without noise. Such an update may give away the records that it was trained on."
    return "every record's part was clipped and noise added before it came back. No record left a site."


def _participants(facts: Facts) -> Iterator[Block]:
    rows = tuple(
        (
            facts.called(site.release.site),
            f"{site.release.declared_records:,}",
            str(len(site.release.rounds)),
            str(len(site.release.unanswered)) if site.release.unanswered else "0",
        )
        for site in facts.sites
    )
    if facts.signed_job is not None:
        signed = facts.signed_job
        yield entries(
            ("Coordinator", printable(facts.coordinator or NOT_RECORDED)),
            ("Coordinator's key", signed.coordinator.text),
            ("Its fingerprint", fingerprint(signed.coordinator)),
            ("Job signed by", signed.signer.text),
            ("Signer's fingerprint", fingerprint(signed.signer)),
            ("Job signed on", f"{format_time(signed.issued)}, valid until {format_time(signed.not_after)}"),
            mono=("Coordinator's key", "Its fingerprint", "Job signed by", "Signer's fingerprint"),
        )
        yield Paragraph(
            text="Sites connect with certificates of the consortium's CA and train only jobs that are signed by whom their "
            "own policy names. Compare the fingerprints with those that you were given by another way.",
            role="note",
        )
    else:
        where = "a simulation has none" if facts.simulated else "the run folder does not lie in a coordinator's folder"
        yield Paragraph(text=f"No coordinator's signature stands behind this run: {where}.")
    if rows:
        caption = (
            "Sites. The declared size is public: a round number that the site chose, not the count of its records."
        )
        columns = (wide("Site"), *numbers("Declared size", "Updates released", "Requests never answered"))
        yield Table(caption=caption, columns=columns, rows=rows)


def _data(facts: Facts) -> Iterator[Block]:
    dataset, job = facts.data.run.dataset, facts.job
    total = sum(site.release.declared_records for site in facts.sites)
    most = job.privacy.model_dump().get("records_per_person")  # of jobs whose unit is a person
    yield entries(
        ("Kind", task_of(job).content),
        ("Data set", printable(dataset.name) if dataset.name else None),
        (
            "Training records",
            f"{dataset.train_records:,}" if facts.simulated and dataset.train_records else None,
        ),
        ("Declared sizes", f"{total:,} in all {_count(len(facts.sites), 'site')}" if facts.sites else None),
        _size_of_a_record(job),
        ("Unit of privacy", ", ".join(f"one {guarantee.unit}" for guarantee in facts.guarantees)),
        ("Most records of one person in a step", str(most) if most else None),
        (
            "Evaluation records",
            f"{facts.data.run.test_records:,}, {dataset.test_kind or 'public'}"
            if facts.data.run.test_records
            else None,
        ),
    )
    yield Paragraph(
        text="What the records say, whom they concern and on what legal basis they are processed is known to the sites "
        "only. This report cannot tell; each site's own record of processing does.",
    )


def _size_of_a_record(job: Job) -> tuple[str, str]:
    if job.task.image_shape is not None:
        channels, height, width = job.task.image_shape
        return "Every image", f"{height:,} x {width:,} pixels, {_count(channels, 'channel')}"
    return "Longest text", f"{job.model.max_length:,} tokens; what is longer was cut"


def _limits(facts: Facts) -> Iterator[Block]:
    headline = facts.headline
    if headline is not None:
        unit = headline.unit
        yield Paragraph(
            text=f"Differential privacy limits what anybody can learn about one {unit} from everything that was released, "
            f"whatever else they know. With epsilon {rounded_up(headline.epsilon)}, the odds of any guess about one {unit} "
            f"rise by a factor of at most {_factor(headline.epsilon)}, except with probability "
            f"{format_delta(headline.delta)}. It is a limit for the worst case, not a forecast. For comparison: epsilon 1 is "
            "a factor of 2.8, epsilon 3 of 21, epsilon 8 of 2,981. Whether a factor is small enough is "
            "a judgement, and not one of mathematics."
        )
        if (alone := facts.epsilon_alone) is not None:
            yield Paragraph(
                text=f"That is the first promise. Of the second, against everybody else together if secure aggregation fails "
                f"completely, epsilon is {rounded_up(alone)} and the factor at most {_factor(alone)}."
            )
    yield Paragraph(text="The guarantee does not cover:")
    yield Bullets(items=facts.not_covered)
    yield Paragraph(text="Beyond that:")
    yield Bullets(
        items=(
            "It does not make the data anonymous in the sense of a law, and it is no judgement on whether the processing is "
            "lawful or fair.",
            "It limits what shows of single persons. What holds for many records in common, such as how a group writes, is "
            "meant to be learnt and is not hidden.",
            "The coordinator's files tell what it received. What a site released by another way, only the site knows.",
            "An audit can refute a claim and cannot prove one.",
            "A signature proves who handed this file out and that no byte was changed since. It does not make what it says "
            "true.",
        )
    )


def _signature(signer: Signer | None, file_name: str) -> Iterator[Block]:
    if signer is None:
        yield Paragraph(
            text=f"When this report was made it was not signed. If {file_name}.sig.json lies beside it, somebody signed it "
            "later; “silotune report verify” tells who."
        )
    else:
        yield Paragraph(
            text=f"This file is signed (Ed25519). The signature lies beside it in {file_name}.sig.json; pass both on. A byte "
            "changed in either of them, and the check fails."
        )
        yield entries(
            ("Signed by", f"{printable(signer.name)} ({signer.role})"),
            ("Public key", signer.verify_key.text),
            ("Fingerprint", fingerprint(signer.verify_key)),
            ("Check", f"silotune report verify {file_name} --key {signer.verify_key.text}"),
            mono=("Public key", "Fingerprint", "Check"),
        )
        yield Paragraph(
            text="Take the key from whom you trust, not from this page: whoever forges a report prints their own key on it.",
            role="note",
        )
    yield SignatureLines(roles=("For the coordinator", "For data protection"))
    yield Paragraph(
        text=f"Made by Silotune {silotune_version()}. Signing by hand adds to the electronic signature.",
        role="note",
    )


def _factor(epsilon: float) -> str:
    """Return e to the epsilon that is printed, rounded up."""
    epsilon = math.ceil(epsilon * 1000) / 1000
    if epsilon > 30:
        return f"10 to the {math.ceil(epsilon / math.log(10))}"
    value = math.exp(epsilon)
    return f"{math.ceil(value * 10 - 1e-9) / 10:.1f}" if value < 20 else f"{math.ceil(value - 1e-9):,}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
