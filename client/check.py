"""`silotune site check`: everything that could stop a site, tested before it joins, with what to mend."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from client.ledger.account import PROMISES
from client.ledger.largest_job import unfinished
from client.link.client import welcome
from client.link.handshake import tls_facts
from client.node.node import credentials_of
from client.policy.policy import load_policy
from client.policy.verdicts import job_verdicts
from client.site.approving import ApprovalDesk
from client.site.config import SiteConfig
from client.site.home import SiteHome, load_identity, open_log, open_site
from shared.data.datasets import PERSON_ROLE, DataSource, FileFacts, read_records
from shared.data.deidentify.report import MaskTally
from shared.data.overlap import num_shared
from shared.epsilons import as_set, delta_rounded_up, rounded_up
from shared.errors import SilotuneError, printable
from shared.job.job import Job
from shared.job.values import PERSON_UNITS
from shared.privacy.sizes import default_delta
from shared.trust.audit_log import verify
from shared.trust.certificates import expiry_warning, fingerprint
from shared.trust.keystore import Seal, is_encrypted, load_secret
from shared.trust.signing import load_verify_key

if TYPE_CHECKING:
    from client.site.site import Site

Outcome = Literal["ok", "warning", "failed"]
_LEAST_FREE_BYTES = 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was tested.

    Attributes:
        name: what.
        outcome: "ok", "warning" or "failed".
        text: what was found and, if need be, what to do.
    """

    name: str
    outcome: Outcome
    text: str


def check_site(
    home: SiteHome,
    *,
    passphrase: str | None,
    connect: bool = True,
    job: Job | None = None,
    public: DataSource | None = None,
) -> Iterator[Finding]:
    """Yield one finding per test, in the order in which a person would mend them; releases nothing.

    Args:
        job: also tell which rules of the policy this job breaks, else which records it could not use.
        public: also tell how many of the records stand in this file, such as the coordinator's evaluation records.
        connect: also connect to the coordinator; a running node of the same site would be in the way.
    """
    opened = functools.cache(lambda: open_site(home, passphrase=passphrase))
    tests: list[tuple[str, Callable[[], tuple[Outcome, str]]]] = [
        ("settings", lambda: _settings(home)),
        ("policy", lambda: _policy(home)),
        ("keys", lambda: _keys(home, passphrase)),
        ("certificate", lambda: _certificate(home, passphrase)),
        ("data", lambda: _data(home)),
        ("device", lambda: _device(home)),
        ("disk", lambda: _disk(home)),
        ("ledger", lambda: _ledger(home, opened)),
        ("records", lambda: _known_records(home, opened)),
        ("audit log", lambda: _audit_log(home, passphrase)),
    ]
    if home.approvals.exists():
        tests.append(("approvals", lambda: _approvals(home, passphrase)))
    if job is not None:
        tests.append(("job", lambda: _job(home, opened(), job)))
    if public is not None:
        tests.append(("public records", lambda: _public(home, public)))
    if connect:
        tests += [
            ("connection", lambda: _connection(home, passphrase)),
            ("admission", lambda: _admission(home, passphrase)),
        ]
    for name, test in tests:
        try:
            outcome, text = test()
        except SilotuneError as error:
            outcome, text = "failed", str(error)
        except OSError as error:
            outcome, text = "failed", f"{error.filename or home.path}: {error.strerror}"
        yield Finding(name=name, outcome=outcome, text=text)


def _settings(home: SiteHome) -> tuple[Outcome, str]:
    config = home.load_config()
    budget = config.budget
    alone = (
        "" if budget.epsilon_alone is None else f" ({as_set(budget.epsilon_alone)} with each masked input by itself)"
    )
    text = (
        f"site {config.name}, budget epsilon {as_set(budget.epsilon)}{alone} at delta {delta_rounded_up(budget.delta)} for each "
        f"{budget.unit}, composition {budget.composition}"
    )
    if budget.composition == "fixed":
        return "warning", (
            f'{text}: the cap holds only if the plans of all runs are made before the first one starts; set "adaptive" if not'
        )
    return "ok", text


def _policy(home: SiteHome) -> tuple[Outcome, str]:
    policy = load_policy(home.policy)
    config = _readable(home)
    others = len(policy.peers.keys() - ({config.name} if config else set()))
    alone = "" if policy.max_epsilon_alone is None else f" ({as_set(policy.max_epsilon_alone)} by masked inputs alone)"
    text = (
        f"jobs signed by {', '.join(policy.signers)}; epsilon at most {as_set(policy.max_epsilon_per_job)}{alone} a job, "
        f"{len(policy.backbones)} backbones, at least {policy.min_sites} sites"
        + (f"; [peers] names {others:,} other site{'s' * (others != 1)}" if policy.peers else "")
        + (
            f"; each job needs {policy.approvals_needed} approvals of people here"
            if policy.approval == "required"
            else ""
        )
    )
    too_much = unfinished(config.budget.caps(), policy.model_dump()) if config else ""
    minded = [one for one in (policy.uneven_eyes, too_much) if one]
    return ("warning", "; ".join([text, *minded])) if minded else ("ok", text)


def _approvals(home: SiteHome, passphrase: str | None) -> tuple[Outcome, str]:
    states = [state for _, state in ApprovalDesk(home, passphrase=passphrase).requests()]
    waiting = states.count("waiting")
    text = f"{waiting} of {len(states)} jobs wait for people here"
    return ("warning", f"{text}; see: silotune site requests {home.path}") if waiting else ("ok", text)


def _readable(home: SiteHome) -> SiteConfig | None:
    """Return the site's settings; None if they cannot be read, which is told elsewhere."""
    try:
        return home.load_config()
    except SilotuneError:
        return None


def _keys(home: SiteHome, passphrase: str | None) -> tuple[Outcome, str]:
    Seal(load_secret(home.storage_key, passphrase=passphrase))
    open_log(home, passphrase=passphrase)
    if passphrase is None:
        return "warning", "readable, protected by file permissions only; a passphrase would protect a stolen disk"
    if not all(is_encrypted(path.read_bytes()) for path in home.key_files):
        return (
            "warning",
            "readable, and not encrypted although a passphrase is set: silotune site passphrase encrypts them",
        )
    return "ok", "readable with the passphrase"


def _certificate(home: SiteHome, passphrase: str | None) -> tuple[Outcome, str]:
    identity = load_identity(home, passphrase=passphrase)
    if warning := expiry_warning(identity.certificate, datetime.now(UTC)):
        return "warning", f"{warning} See `silotune site rotate`."
    return "ok", (
        f"valid until {identity.certificate.not_valid_after_utc:%Y-%m-%d}; fingerprint of its key, for the policies of other "
        f"sites: {fingerprint(identity.private_key.public_key())}"
    )


def _data(home: SiteHome) -> tuple[Outcome, str]:
    config = home.load_config()
    tally = MaskTally()
    facts = FileFacts()
    records = read_records(config.data, base=home.path, tally=tally, facts=facts)
    columns = ", ".join(f"{column} as {role}" for role, column in config.data.columns.items())
    text = f"{len(records):,} records, columns {columns}{facts.line()}"
    if config.data.deidentify is not None:
        text += f"; de-identified {tally.line()}"
    if PERSON_ROLE in config.data.columns:
        return _persons(config, records, text)
    return _delta(config, len(records), text)


def _delta(config: SiteConfig, num_units: int, text: str) -> tuple[Outcome, str]:
    """Judge the budget's delta by the number of records or persons that there are: jobs are judged by the declared one."""
    if config.budget.delta >= 1 / num_units:
        return "warning", (
            f"{text}; budget.delta is {delta_rounded_up(config.budget.delta)}, but with {num_units:,} "
            f"{config.budget.unit}s it must be below "
            f"1/n = {1 / num_units:.1e}, or a job may publish one of them: use at most {default_delta(num_units):.1e}"
        )
    return "ok", text


def _persons(config: SiteConfig, records: list[dict[str, Any]], text: str) -> tuple[Outcome, str]:
    """Judge the id column; only counts are told, never an id."""
    from shared.privacy.persons import Persons

    persons = Persons.from_ids([record[PERSON_ROLE] for record in records])
    unit = config.budget.unit
    if unit not in PERSON_UNITS:
        return "warning", (
            f'{text}; budget.unit is "{unit}", so the id column is not used and a person with several records is protected '
            'less. Set it to "patient" or "customer" before anything is charged'
        )
    text += f", {persons.count:,} {unit}s with up to {persons.most_records:,} records"
    if persons.most_records == 1 and persons.count > 1:
        return "warning", f"{text}; every record has an id of its own: is it the {unit}'s id and not the record's?"
    return _delta(config, persons.count, text)


def _device(home: SiteHome) -> tuple[Outcome, str]:
    import torch

    from shared.runtime.runtime import choose_device

    device = choose_device(home.load_config().compute)
    if device.type == "cuda":
        return "ok", f"{torch.cuda.get_device_name()}, {torch.cuda.mem_get_info()[0] / 2**30:.0f} GiB free"
    return "warning", "no CUDA device is used; training on the processor works and is slower"


def _disk(home: SiteHome) -> tuple[Outcome, str]:
    free = shutil.disk_usage(home.path).free
    text = f"{free / 2**30:.1f} GiB free at {home.path}"
    return ("ok", text) if free > _LEAST_FREE_BYTES else ("warning", f"{text}; keep at least 2 GiB free")


def _ledger(home: SiteHome, opened: Callable[[], Site]) -> tuple[Outcome, str]:
    if not (home.path / "ledger.db").exists():
        opened().outbox.check_charged([])  # a ledger that was removed
        return "ok", "not begun; the first accepted job begins it"
    ledger = opened().checked_ledger()
    spent = {promise: ledger.spent_epsilon(promise=promise) for promise in PROMISES}
    caps = {promise: ledger.budget.cap(promise) for promise in PROMISES}
    outcome: Outcome = "ok" if all(spent[promise] < caps[promise] for promise in PROMISES) else "warning"
    text = f"epsilon {rounded_up(spent['together'])} of {as_set(caps['together'])} spent"
    if (spent["alone"], caps["alone"]) != (spent["together"], caps["together"]):
        text += f", {rounded_up(spent['alone'])} of {as_set(caps['alone'])} with each masked input by itself"
    return outcome, f"chain unbroken, {len(ledger.entries())} entries, {text}"


def _known_records(home: SiteHome, opened: Callable[[], Site]) -> tuple[Outcome, str]:
    """Judge the declared size, and whether the records were charged under another name."""
    site = opened()
    if (home.path / "ledger.db").exists() and (found := site.warnings()):
        return "warning", "; ".join(found)
    if found := site.size_warnings():
        return "warning", "; ".join(found)
    return "ok", f"declared to the coordinator as {site.declared_records:,}; not charged under another name here"


def _public(home: SiteHome, public: DataSource) -> tuple[Outcome, str]:
    config = home.load_config()
    own = read_records(config.data, base=home.path)
    found = num_shared(own, read_records(public))
    text = f"{found:,} of the {len(own):,} records stand in {public.path} as well"
    if not found:
        return "ok", text
    return "warning", (
        f"{text}. What is measured on it is then too good, and a decision by it (early stopping, which run is kept) reads "
        "private records without noise: tell the coordinator's operator to take other public records"
    )


def _job(home: SiteHome, site: Site, job: Job) -> tuple[Outcome, str]:
    broken = [one for one in job_verdicts(load_policy(home.policy), job, site=site.config.name) if not one.kept]
    refused = [one for one in broken if one.refuses]
    told = "; ".join(one.sentence for one in refused or broken)
    if refused:
        return "failed", f"{job.name} would be refused: {told}"
    left_out = site.examine(job)
    cut = (
        f"; {left_out.num_full:,} fill model.max_length {job.model.max_length} and are cut there"
        if left_out.num_full
        else ""
    )
    if broken:
        cut += f"; it would be trained, and no metrics released: {told}"
    if not left_out:
        outcome: Outcome = "warning" if broken else "ok"
        return outcome, f"{job.name} can use all {left_out.num_records:,} records that are not held out{cut}"
    without = "It would be trained without them, and the" if left_out.rows else "The"
    return "warning", f"{job.name}: {left_out}. {without} coordinator is not told{cut}"


def _audit_log(home: SiteHome, passphrase: str | None) -> tuple[Outcome, str]:
    open_log(home, passphrase=passphrase)
    found = verify(home.audit, verify_head=load_verify_key(home.path / "log.pub"))
    return "ok", f"unbroken, {found.entries} entries" + "".join(f"; {note}" for note in found.notes)


def _connection(home: SiteHome, passphrase: str | None) -> tuple[Outcome, str]:
    identity, proxy = load_identity(home, passphrase=passphrase), home.load_config().proxy
    facts = tls_facts(identity.address, identity.ca_certificate, proxy=proxy)
    through = "" if proxy is None else " through the proxy"
    return "ok", f"{identity.address} answers{through} over {facts.tls_version}, ALPN {facts.alpn}"


def _admission(home: SiteHome, passphrase: str | None) -> tuple[Outcome, str]:
    identity = load_identity(home, passphrase=passphrase)
    found = welcome(identity.address, credentials_of(home, passphrase=passphrase), proxy=home.load_config().proxy)
    return (
        "ok",
        f"the coordinator admits this site as {printable(found.site)}; it runs Silotune {printable(found.software)}",
    )
