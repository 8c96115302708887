"""A site's folder and the commands of its engineer: what each makes, and what it says to a mistake."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from client.ledger.account import PROMISES, Charge
from client.site.home import SiteHome, load_identity, open_log, open_site
from shared.data.datasets import write_jsonl
from shared.epsilons import rounded_up
from shared.errors import ConfigError, TrustError
from shared.job.job import Job
from shared.job.parsing import load_toml
from shared.models.backbones import backbone_sha256
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.trust import keystore
from shared.trust.audit_log import Event, read
from shared.trust.certificates import fingerprint, load_certificate
from shared.trust.node_keys import change_passphrase, load_private_key
from shared.trust.pki import approve, create_ca, make_request, revoke
from shared.trust.signed_job import round_fields, sign_job
from shared.trust.signing import Purpose, SigningKey, load_signing_key, save_signing_key
from shared.wire.messages import Order, TrainReply, TrainRequest
from simulations.federation.processes import change_toml
from tests.conftest import Outcome

Command = Callable[..., Outcome]
SIGNER = SigningKey.generate()


@pytest.fixture(autouse=True)
def _no_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SILOTUNE_PASSPHRASE", "SILOTUNE_PASSPHRASE_FILE"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def data(tmp_path: Path, records: list[dict[str, Any]]) -> Path:
    write_jsonl(tmp_path / "notes.jsonl", records)
    return tmp_path / "notes.jsonl"


@pytest.fixture
def init(silotune: Command, tmp_path: Path, data: Path) -> Callable[..., Outcome]:
    """Return `silotune site init` for the folder `north`; keyword arguments replace options."""

    def run(home: Path = tmp_path / "north", **options: object) -> Outcome:
        given: dict[str, object] = {
            "name": "north",
            "coordinator": "127.0.0.1:9",
            "data": data,
            "column": ["text=text", "label=label"],
            "signer": [f"consortium={SIGNER.verify_key.text}"],
        } | options
        arguments = []
        for option, value in given.items():
            for one in value if isinstance(value, list) else [value]:
                arguments += [f"--{option}", one]
        return silotune("site", "init", home, *arguments)

    return run


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    create_ca(tmp_path / "ca", name="Consortium", passphrase=None)
    return tmp_path / "ca"


@pytest.fixture
def home(init: Callable[..., Outcome], tmp_path: Path) -> SiteHome:
    """A folder that `init` made."""
    made = init()
    assert made.status == 0, made.err
    return SiteHome(tmp_path / "north")


@pytest.fixture
def certified(home: SiteHome, ca: Path) -> Path:
    """The certificate of the site's key, not installed."""
    return certify(ca, (home.path / "north.csr").read_bytes(), home.path.parent / "north.crt")


@pytest.fixture
def installed(home: SiteHome, ca: Path, certified: Path, silotune: Command) -> SiteHome:
    outcome = silotune("site", "install", home.path, "--certificate", certified, "--ca", ca / "ca.crt")
    assert outcome.status == 0, outcome.err
    return home


def certify(ca: Path, request: bytes, to: Path, *, role: str = "site", **options: Any) -> Path:
    to.write_bytes(approve(ca, request, role=role, passphrase=None, **options).public_bytes(Encoding.PEM))
    return to


def refused(outcome: Outcome, text: str, *, status: int = 1) -> None:
    """Check that a command ended with a message for a person."""
    assert outcome.status == status, outcome
    assert text in outcome.err
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err


# --- init ---


def test_init_makes_keys_request_settings_and_policy_and_says_what_is_next(
    init: Callable[..., Outcome], tmp_path: Path
) -> None:
    made = init()
    home = SiteHome(tmp_path / "north")
    assert made.status == 0
    for text in ("north.csr", "fingerprint", "silotune site install", "protected by file permissions"):
        assert text in made.out
    for path in (home.key, home.storage_key, home.log_key):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
    config = home.load_config()
    assert (config.name, config.coordinator, config.budget.epsilon) == ("north", "127.0.0.1:9", 8.0)
    assert load_toml(home.policy)["signers"] == {"consortium": SIGNER.verify_key.text}


def test_init_reads_a_signers_key_from_a_file(init: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "signer.pub").write_text(SIGNER.verify_key.text + "\n")
    assert init(signer=f"consortium={tmp_path / 'signer.pub'}").status == 0
    assert load_toml(tmp_path / "north" / "policy.toml")["signers"] == {"consortium": SIGNER.verify_key.text}


@pytest.mark.parametrize(
    ("options", "text", "status"),
    [
        ({"column": "text"}, "--column 'text' is not of the form NAME=VALUE.", 1),
        ({"signer": "somebody"}, "--signer 'somebody' is not of the form NAME=VALUE.", 1),
        ({"signer": "x=ed25519:abc"}, "'ed25519:abc' is not a public key", 1),
        ({"signer": "x=/nowhere/key.pub"}, "the public key /nowhere/key.pub does not exist", 1),
        ({"column": ["text=a", "text=b"]}, "--column names 'text' twice, with 'a' and 'b'; leave out one", 1),
        ({"signer": ["x=a", "x=b"]}, "--signer names 'x' twice", 1),
        ({"name": "../north"}, "name: expected 1 to 64 letters (a to z, A to Z), digits", 2),
        ({"coordinator": "host"}, "the address 'host' is not of the form host:port, for example", 1),
        ({"coordinator": "host:65536"}, "with a port from 1 to 65,535", 1),
        ({"data": "n\udce9.csv"}, "data.path: expected text that is valid UTF-8", 2),
        ({"epsilon": "0"}, "budget.epsilon", 2),
        ({"epsilon": "nan"}, "budget.epsilon", 2),
    ],
    ids=[
        "column",
        "signer",
        "key",
        "key file",
        "column twice",
        "signer twice",
        "name",
        "no port",
        "no such port",
        "path",
        "epsilon",
        "epsilon that is none",
    ],
)
def test_init_with_a_mistake_makes_nothing(
    init: Callable[..., Outcome], tmp_path: Path, options: dict[str, object], text: str, status: int
) -> None:
    refused(init(**options), text, status=status)
    assert not (tmp_path / "north").exists()
    assert init().status == 0


def test_init_does_not_touch_a_folder_that_is_a_site_already(init: Callable[..., Outcome], home: SiteHome) -> None:
    key = home.key.read_bytes()
    refused(init(), "is a site's folder already; choose another, or remove it first.")
    assert home.key.read_bytes() == key


# --- install ---


def test_certificates_may_come_through_a_pipe(home: SiteHome, certified: Path, ca: Path, silotune: Command) -> None:
    given = [(certified, home.certificate), (ca / "ca.crt", home.ca_certificate)]
    pipes = []
    for path, _ in given:
        reading, writing = os.pipe()
        os.write(writing, path.read_bytes())
        os.close(writing)
        pipes.append(reading)
    paths = [f"/dev/fd/{reading}" for reading in pipes]
    assert silotune("site", "install", home.path, "--certificate", paths[0], "--ca", paths[1]).status == 0
    assert [kept.read_bytes() for _, kept in given] == [path.read_bytes() for path, _ in given]
    for reading in pipes:
        os.close(reading)


def test_install_makes_the_identity_complete(installed: SiteHome, certified: Path) -> None:
    identity = load_identity(installed, passphrase=None)
    assert identity.address == "127.0.0.1:9"
    assert identity.certificate == load_certificate(certified)


def test_install_needs_the_ca_the_first_time(home: SiteHome, certified: Path, silotune: Command) -> None:
    refused(silotune("site", "install", home.path, "--certificate", certified), "give it with --ca the first time")


MISTAKES = ("missing", "not a certificate", "other CA", "other key", "other name", "a server's", "expired", "no folder")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_install_refuses_and_changes_nothing(
    mistake: str, installed: SiteHome, ca: Path, certified: Path, tmp_path: Path, silotune: Command
) -> None:
    before = {path: path.read_bytes() for path in (installed.certificate, installed.ca_certificate, installed.key)}
    request, place, authority = (installed.path / "north.csr").read_bytes(), installed.path, ca / "ca.crt"
    wrong = tmp_path / "wrong.crt"
    if mistake == "missing":
        text = f"{wrong}"
    elif mistake == "not a certificate":
        wrong.write_text("hello")
        text = f"{wrong}"
    elif mistake == "other CA":
        create_ca(tmp_path / "other", name="Other", passphrase=None)
        certify(tmp_path / "other", request, wrong)
        text = "was not signed by this CA (Consortium)"
    elif mistake == "other key":
        certify(ca, make_request(name="north", role="site")[1], wrong, rotate=True)
        text = f"was not made for this site's key; send {installed.path / 'north.csr'} to the CA."
    elif mistake == "other name":
        certify(ca, make_request(name="south", role="site")[1], wrong)
        text = "the certificate was made for the site 'south', but this is the site 'north' (name in site.toml)"
    elif mistake == "a server's":
        request = make_request(name="hub", role="server", hosts=["localhost"])[1]
        certify(ca, request, wrong, role="server", hosts=["localhost"])
        text = "the certificate was made for the server 'hub'"
    elif mistake == "expired":
        certify(ca, request, wrong, days=1, now=datetime.now(UTC) - timedelta(days=2))
        text = "the certificate of north expired on "
    else:
        wrong, place = certified, tmp_path / "nowhere"
        text = "nowhere/site.toml"
    outcome = silotune("site", "install", place, "--certificate", wrong, "--ca", authority)
    refused(outcome, text, status=2 if mistake == "no folder" else 1)
    assert {path: path.read_bytes() for path in before} == before


def test_install_with_a_wrong_ca_leaves_the_good_one(
    installed: SiteHome, certified: Path, tmp_path: Path, silotune: Command
) -> None:
    create_ca(tmp_path / "other", name="Other", passphrase=None)
    wrong = tmp_path / "other" / "ca.crt"
    refused(
        silotune("site", "install", installed.path, "--certificate", certified, "--ca", wrong),
        "was not signed by this CA (Other)",
    )
    load_identity(installed, passphrase=None)


# --- rotate ---


def test_a_new_key_takes_over_when_its_certificate_is_installed(
    installed: SiteHome, ca: Path, tmp_path: Path, silotune: Command
) -> None:
    old = load_private_key(installed.key, None)
    rotated = silotune("site", "rotate", installed.path)
    assert rotated.status == 0
    assert "silotune pki approve --role site --rotate" in rotated.out
    # Until then the old key stays in use.
    assert load_identity(installed, passphrase=None).private_key.private_numbers() == old.private_numbers()
    new = load_private_key(installed.next_key, None)
    request = (installed.path / "north.csr").read_bytes()
    with pytest.raises(TrustError, match="approve with --rotate"):
        approve(ca, request, role="site", passphrase=None)
    certificate = certify(ca, request, tmp_path / "new.crt", rotate=True)
    assert silotune("site", "install", installed.path, "--certificate", certificate).status == 0
    identity = load_identity(installed, passphrase=None)
    assert identity.private_key.private_numbers() == new.private_numbers()
    assert not installed.next_key.exists()


def test_the_new_key_is_under_the_passphrase_of_the_others(
    installed: SiteHome, silotune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a rotation without the variable would leave the site's key without protection."""
    monkeypatch.setattr(keystore, "SCRYPT_N", 2**4)
    change_passphrase(installed.key_files, old=None, new="words")
    for typed, said in ((None, "there is no passphrase"), ("wrods", "the passphrase is wrong")):
        monkeypatch.delenv("SILOTUNE_PASSPHRASE", raising=False)
        if typed:
            monkeypatch.setenv("SILOTUNE_PASSPHRASE", typed)
        refused = silotune("site", "rotate", installed.path)
        assert (refused.status, said in refused.err) == (1, True)
        assert not installed.next_key.exists()
    monkeypatch.setenv("SILOTUNE_PASSPHRASE", "words")
    installed.key.unlink()  # lost: that is what a rotation may be for
    assert silotune("site", "rotate", installed.path).status == 0
    load_private_key(installed.next_key, "words")


def test_a_renewal_for_the_old_key_is_installed_while_a_rotation_is_open(
    installed: SiteHome, ca: Path, tmp_path: Path, silotune: Command
) -> None:
    request = (installed.path / "north.csr").read_bytes()
    assert silotune("site", "rotate", installed.path).status == 0
    renewed = certify(ca, request, tmp_path / "renewed.crt", days=30)
    assert silotune("site", "install", installed.path, "--certificate", renewed).status == 0
    assert installed.next_key.exists()
    load_identity(installed, passphrase=None)


def test_only_the_latest_of_two_rotations_counts(
    installed: SiteHome, ca: Path, tmp_path: Path, silotune: Command
) -> None:
    silotune("site", "rotate", installed.path)
    first = certify(ca, (installed.path / "north.csr").read_bytes(), tmp_path / "first.crt", rotate=True)
    silotune("site", "rotate", installed.path)
    refused(
        silotune("site", "install", installed.path, "--certificate", first), "was not made for this site's key; send "
    )
    load_identity(installed, passphrase=None)


def test_rotate_without_a_site_is_refused(tmp_path: Path, silotune: Command) -> None:
    refused(silotune("site", "rotate", tmp_path / "nowhere"), "site.toml", status=2)


# --- who the site is ---


def test_a_site_without_a_certificate_is_told_where_to_send_its_request(home: SiteHome) -> None:
    with pytest.raises(TrustError, match=r"the site has no ca\.crt.*Send .*north\.csr to whoever runs the CA"):
        load_identity(home, passphrase=None)


def test_an_expired_certificate_is_no_identity(installed: SiteHome) -> None:
    with pytest.raises(TrustError, match=r"the certificate of north expired on .*; request a new one"):
        load_identity(installed, passphrase=None, now=datetime.now(UTC) + timedelta(days=400))


def test_a_certificate_of_another_ca_is_no_identity(installed: SiteHome, tmp_path: Path) -> None:
    create_ca(tmp_path / "other", name="Other", passphrase=None)
    installed.ca_certificate.write_bytes((tmp_path / "other" / "ca.crt").read_bytes())
    with pytest.raises(TrustError, match=r"was not signed by this CA \(Other\)"):
        load_identity(installed, passphrase=None)


def test_a_certificate_for_another_key_is_no_identity(installed: SiteHome, ca: Path) -> None:
    certify(ca, make_request(name="north", role="site")[1], installed.certificate, rotate=True)
    with pytest.raises(TrustError, match="was made for another key than"):
        load_identity(installed, passphrase=None)


def test_a_site_that_was_renamed_is_told_so(installed: SiteHome) -> None:
    change_toml(installed.config, name="elsewhere")
    with pytest.raises(TrustError, match=r"made for the site 'north', but this is the site 'elsewhere'"):
        load_identity(installed, passphrase=None)


def test_a_site_without_a_coordinator_is_told_which_line_is_missing(installed: SiteHome) -> None:
    config = load_toml(installed.config)
    del config["coordinator"]
    installed.config.write_text(tomli_w.dumps(config))
    with pytest.raises(ConfigError, match='coordinator = "host:9092"'):
        load_identity(installed, passphrase=None)


# --- check ---


def findings(outcome: Outcome) -> dict[str, tuple[str, str]]:
    return {found["name"]: (found["outcome"], found["text"]) for found in json.loads(outcome.out)}


def test_check_finds_nothing_wrong_with_a_good_site(installed: SiteHome, silotune: Command) -> None:
    checked = silotune("site", "check", installed.path, "--offline", "--json")
    assert checked.status == 0, checked.out
    found = findings(checked)
    assert {name for name, (outcome, _) in found.items() if outcome == "failed"} == set()
    assert found["settings"][1] == "site north, budget epsilon 8 at delta 1e-05 for each record, composition adaptive"
    assert found["data"][1].startswith("60 records, columns text as text, label as label, longest text ")
    assert found["certificate"][0] == "ok"
    key = load_certificate(installed.certificate).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert found["certificate"][1].endswith(f"for the policies of other sites: {fingerprint(key)}")
    assert "not begun" in found["ledger"][1]
    shown = silotune("site", "check", installed.path, "--offline")
    assert (shown.status, "audit log: unbroken" in shown.out) == (0, True)


def test_check_tells_of_both_caps(installed: SiteHome, silotune: Command) -> None:
    budget = load_toml(installed.config)["budget"]
    change_toml(installed.config, budget=budget | {"epsilon_alone": 30.0})
    change_toml(installed.policy, max_epsilon_alone=25.0, peers={"west": "0" * 64, "east": "1" * 64})
    one = {"sample_rate": 0.125, "steps": 4}
    charge = Charge(
        job_id="d" * 64,
        round=1,
        request_sha256="a" * 64,
        mechanism=GaussianSteps(noise_multiplier=1.0, **one),
        together=GaussianSteps(noise_multiplier=2.0, **one),
        attempt=1,
    )
    ledger = open_site(installed, passphrase=None).ledger()
    ledger.reserve(charge)
    spent = {promise: ledger.spent_epsilon(promise=promise) for promise in PROMISES}
    found = findings(silotune("site", "check", installed.path, "--offline", "--json"))
    assert "budget epsilon 8 (30 with each masked input by itself) at delta 1e-05" in found["settings"][1]
    assert "epsilon at most 8 (25 by masked inputs alone) a job" in found["policy"][1]
    assert "at least 2 sites; [peers] names 2 other sites; a job of epsilon 8, which" in found["policy"][1]
    text = (
        f"epsilon {rounded_up(spent['together'])} of 8 spent, {rounded_up(spent['alone'])} of 30 with each masked input"
    )
    assert text in found["ledger"][1]
    shown = silotune("site", "ledger", installed.path).out
    assert f"epsilon {rounded_up(spent['together'], 4)} of 8 spent at delta 1e-05 for each record" in shown
    assert f"epsilon {rounded_up(spent['alone'], 4)} of 30 spent with each masked input by itself" in shown
    by_job = [compose_epsilon([GaussianSteps(noise_multiplier=sigma, **one)], 1e-5) for sigma in (2.0, 1.0)]
    assert shown.splitlines()[-1].split() == ["d" * 12, "1", "4", *(rounded_up(epsilon, 4) for epsilon in by_job)]
    said = json.loads(silotune("site", "ledger", installed.path, "--json").out)
    assert (said["epsilon_spent"], said["epsilon_alone_spent"]) == (spent["together"], spent["alone"])
    assert (said["epsilon_budget"], said["epsilon_alone_budget"]) == (8.0, 30.0)
    assert [said[of]["d" * 64] for of in ("jobs", "jobs_alone")] == by_job
    change_toml(installed.config, budget=budget | {"epsilon_alone": 7.0})
    shown = silotune("site", "check", installed.path, "--offline")
    assert "epsilon_alone is 7, below epsilon 8" in shown.out


def test_check_without_a_certificate_says_what_to_do(home: SiteHome, silotune: Command) -> None:
    shown = silotune("site", "check", home.path, "--offline")
    assert shown.status == 1
    assert "north.csr to whoever runs the CA, then: silotune site install" in shown.out
    assert "Traceback" not in shown.out + shown.err


def broken_policy(home: SiteHome) -> None:
    home.policy.write_text("tasks = [")


def lost_data(home: SiteHome) -> None:
    Path(home.load_config().data.path).unlink()


def other_column(home: SiteHome) -> None:
    config = load_toml(home.config)
    change_toml(home.config, data=config["data"] | {"columns": {"text": "note", "label": "label"}})


def readable_key(home: SiteHome) -> None:
    home.storage_key.chmod(0o644)


def changed_log(home: SiteHome) -> None:
    open_log(home, passphrase=None).append(Event.NODE_STARTED)
    file = next(home.audit.glob("audit-*.jsonl"))
    file.write_text(file.read_text().replace("node.started", "node.stopped"))


def soon_expired(home: SiteHome) -> None:
    ca = home.path.parent / "ca"
    certify(ca, (home.path / "north.csr").read_bytes(), home.certificate, days=10)


@pytest.mark.parametrize(
    ("harm", "name", "outcome", "text"),
    [
        (broken_policy, "policy", "failed", "policy.toml"),
        (lost_data, "data", "failed", "notes.jsonl"),
        (other_column, "data", "failed", "note"),
        (readable_key, "keys", "failed", "storage.key"),
        (changed_log, "audit log", "failed", "audit"),
        (soon_expired, "certificate", "warning", "the certificate of north expires in"),
    ],
)
def test_check_names_what_is_wrong(
    installed: SiteHome, silotune: Command, harm: Callable[[SiteHome], None], name: str, outcome: str, text: str
) -> None:
    harm(installed)
    checked = silotune("site", "check", installed.path, "--offline", "--json")
    found = findings(checked)
    assert found[name][0] == outcome
    assert text in found[name][1]
    assert checked.status == (1 if outcome == "failed" else 0)
    assert "Traceback" not in checked.out + checked.err


def test_check_says_when_the_coordinator_cannot_be_reached(installed: SiteHome, silotune: Command) -> None:
    checked = silotune("site", "check", installed.path, "--json")
    assert checked.status == 1
    for name in ("connection", "admission"):
        assert findings(checked)[name][0] == "failed"
        assert "the coordinator at 127.0.0.1:9 cannot be reached" in findings(checked)[name][1]


def test_check_says_when_the_address_is_none(installed: SiteHome, silotune: Command) -> None:
    change_toml(installed.config, coordinator="hub.example.org")
    found = findings(silotune("site", "check", installed.path, "--json"))
    assert found["connection"] == (
        "failed",
        "the address 'hub.example.org' is not of the form host:port, for example fl.example.org:9092.",
    )


def test_check_of_a_folder_that_is_none_says_so(tmp_path: Path, silotune: Command) -> None:
    checked = silotune("site", "check", tmp_path / "nowhere", "--offline", "--json")
    assert checked.status == 1
    assert findings(checked)["settings"][0] == "failed"
    assert not (tmp_path / "nowhere").exists()


# --- passphrases ---


def test_keys_under_a_passphrase_open_with_it_and_with_no_other(
    init: Callable[..., Outcome], ca: Path, tmp_path: Path, silotune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.trust.keystore.SCRYPT_N", 2**10)
    monkeypatch.setenv("SILOTUNE_PASSPHRASE", "correct horse")
    assert "its keys are encrypted" in init().out
    home = SiteHome(tmp_path / "north")
    certificate = certify(ca, (home.path / "north.csr").read_bytes(), tmp_path / "north.crt")
    silotune("site", "install", home.path, "--certificate", certificate, "--ca", ca / "ca.crt")
    good = findings(silotune("site", "check", home.path, "--offline", "--json"))
    assert good["keys"] == ("ok", "readable with the passphrase")
    sealed = home.log_key.read_bytes()
    save_signing_key(home.log_key, load_signing_key(home.log_key, "correct horse"), None, replace=True)
    assert findings(silotune("site", "check", home.path, "--offline", "--json"))["keys"][0] == "warning"
    home.log_key.write_bytes(sealed)
    monkeypatch.setenv("SILOTUNE_PASSPHRASE", "wrong horse")
    bad = silotune("site", "check", home.path, "--offline", "--json")
    assert bad.status == 1
    assert findings(bad)["keys"][0] == findings(bad)["certificate"][0] == "failed"
    refused(silotune("site", "ledger", home.path), "passphrase")
    monkeypatch.delenv("SILOTUNE_PASSPHRASE")
    refused(silotune("site", "ledger", home.path), "passphrase")


# --- policy, status, ledger ---


def test_policy_is_shown_as_it_is_understood(home: SiteHome, silotune: Command) -> None:
    shown = silotune("site", "policy", home.path)
    assert shown.status == 0
    assert json.loads(shown.out)["signers"] == {"consortium": SIGNER.verify_key.text}


def test_a_policy_with_a_mistake_is_refused_by_its_key(home: SiteHome, silotune: Command) -> None:
    change_toml(home.policy, max_epsilon=3.0)
    refused(silotune("site", "policy", home.path), "max_epsilon", status=2)


def test_a_policy_with_the_placeholder_is_refused(
    init: Callable[..., Outcome], tmp_path: Path, silotune: Command
) -> None:
    assert init(signer=[]).status == 0
    refused(silotune("site", "policy", tmp_path / "north"), "still holds the placeholder of the template", status=2)


def test_status_of_a_site_that_never_ran(home: SiteHome, silotune: Command) -> None:
    shown = silotune("site", "status", home.path)
    assert (shown.status, "not running" in shown.out) == (1, True)
    told = f"it does not run; start it with: silotune site start {home.path}"
    assert json.loads(silotune("site", "status", home.path, "--json").out) == {
        "state": "not running",
        "healthy": False,
        "troubles": [told],
    }


def test_start_of_a_folder_that_is_none_says_so(tmp_path: Path, silotune: Command) -> None:
    refused(silotune("site", "start", tmp_path / "nowhere"), "nowhere", status=2)
    refused(silotune("site", "start", tmp_path), "site.toml", status=2)


def test_the_ledger_shows_what_was_spent_and_for_which_job(
    home: SiteHome,
    silotune: Command,
    tiny_bert: Path,
    private_job: Callable[..., Job],
    request_for: Callable[..., TrainRequest],
) -> None:
    empty = silotune("site", "ledger", home.path)
    assert (empty.status, "epsilon 0.0000 of 8 spent at delta 1e-05" in empty.out) == (0, True)
    change_toml(home.policy, backbones={str(tiny_bert): backbone_sha256(tiny_bert)})
    site = open_site(home, passphrase=None)
    job = private_job(federation={"min_sites": 2})
    assert isinstance(site.answer(ordered(request_for(job))), TrainReply)
    spent = site.ledger().spent_epsilon()
    shown = silotune("site", "ledger", home.path)
    assert shown.status == 0
    assert (
        f"epsilon {rounded_up(spent, 4)} of 8 spent at delta 1e-05 for each record; the chain is unbroken" in shown.out
    )
    assert job.sha256[:12] in shown.out
    said = json.loads(silotune("site", "ledger", home.path, "--json").out)
    assert said["epsilon_spent"] == pytest.approx(spent)
    assert said["jobs"] == {job.sha256: pytest.approx(site.ledger().spent_epsilon(job.sha256))}


def ordered(request: TrainRequest) -> TrainRequest:
    """Return a request that was signed in every way."""
    now = datetime.now(UTC)
    key = SigningKey.generate()
    signed = sign_job(
        request.job, signer=SIGNER, coordinator=key.verify_key, issued=now, not_after=now + timedelta(days=1)
    )
    sent_at = now.isoformat()
    fields = round_fields(job_sha256=request.job.sha256, round_number=1, adapter=request.adapter, sent_at=sent_at)
    signature = key.sign(Purpose.ROUND, fields)
    return replace(request, order=Order(signed_job=signed, sent_at=sent_at, signature=signature))


def test_a_ledger_that_was_taken_away_is_missed(installed: SiteHome, silotune: Command) -> None:
    site = open_site(installed, passphrase=None)
    site.ledger()
    assert any(entry.event == Event.LEDGER_ENTRY for entry in read(installed.audit))
    (installed.path / "ledger.db").unlink()
    refused(silotune("site", "ledger", installed.path), "was replaced by an older copy, or by another ledger")


def test_a_revoked_certificate_is_not_seen_by_the_site_itself(installed: SiteHome, ca: Path, silotune: Command) -> None:
    # A site holds no revocation list: the coordinator refuses its key, and the node then says so.
    revoke(ca, "north", passphrase=None)
    assert silotune("site", "check", installed.path, "--offline").status == 0
