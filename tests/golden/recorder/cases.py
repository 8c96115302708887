"""What is recorded: command lines with their inputs, small enough that all of them take a minute or two.

A case touches the product by its command line and by scenario, run and site files only, so that it
runs before and after modules move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import inputs
from .inputs import BACKBONE, texts, write_scenario

Command = tuple[str, ...] | Callable[[Path], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Command lines that run one after the other in a folder of their own.

    Attributes:
        name: of the case, and of its folder.
        write: writes the inputs and returns the names of those that are not recorded.
        commands: arguments of `silotune`, or a step that has no command, called with the folder.
        stdin: what each command reads.
        helps: print the help of every command instead.
    """

    name: str
    write: Callable[[Path], tuple[str, ...]] | None = None
    commands: tuple[Command, ...] = ()
    stdin: str = ""
    helps: bool = False


SIMULATE = ("simulate", "scenario.toml", "--out", "run")


def _demo(folder: Path) -> tuple[str, ...]:
    """The built-in demo's settings on few records: the embedded MiniLM, int8 updates, all baselines."""
    short = {"training": {"rounds": 1, "local_steps": 2}}
    write_scenario(
        folder,
        model={"backbone": "embedded:all-minilm-l6-v2", "pooling": "mean"},
        lora={"rank": 8, "last_layers": 1, "train": "b"},
        training={
            "optimizer": "sgd",
            "momentum": 0.9,
            "learning_rate": 3.0,
            "weight_decay": 0.01,
            "schedule": "linear",
        },
        privacy={"epsilon": 8.0, "sample_rate": 0.125, "noise_multiplier": None},
        federation={"min_sites": 2, "update_dtype": "int8"},
        data={"train": inputs.labelled_texts(folder, 114), "num_test": 24},
        baselines={
            "arms": ["central-dp", "non-private", "non-private-all-layers", "federated-non-private"],
            "central_dp": short,
            "non_private": short,
            "non_private_all_layers": short,
            "federated_non_private": short,
        },
    )
    inputs.write_table(folder / "stream.csv", ("review",), [(text,) for text in texts(60)])
    return ()


def _gpt2(folder: Path) -> tuple[str, ...]:
    inputs.tiny_gpt2(folder)
    inputs.write_table(folder / "train.csv", ("review",), [(text,) for text in texts(60)])
    write_scenario(
        folder,
        task={"kind": "causal_lm", "labels": []},
        lora={"target_modules": ["c_attn", "c_proj", "c_fc"], "train": "b"},
        training={"optimizer": "adamw", "schedule": "linear"},
        data={"train": {"path": "train.csv", "columns": {"text": "review"}}},
        baselines={"arms": ["non-private"], "non_private": {"training": {"rounds": 1, "local_steps": 2}}},
    )
    return (BACKBONE,)


def _central(folder: Path) -> tuple[str, ...]:
    """A trusted coordinator adds the noise: a hundred sites with two records each."""
    inputs.tiny_bert(folder)
    rows = [
        (f"film {i % 10} cast {i // 10}", verdict, f"film {i % 10} cast {i // 10}")
        for i in range(100)
        for verdict in ("good", "bad")
    ]
    inputs.write_table(folder / "train.csv", ("review", "verdict", "film"), rows)
    inputs.write_table(folder / "test.csv", ("review", "verdict"), [("a dull plot", "bad"), ("a quiet joy", "good")])
    columns = {"text": "review", "label": "verdict"}
    write_scenario(
        folder,
        training={"local_steps": 1},
        privacy={
            "mechanism": "central",
            "unit": "site",
            "sample_rate": 1.0,
            "noise_multiplier": 2.0,
            "central": {"num_sites": 100, "site_sample_rate": 0.1},
        },
        federation={"min_sites": 100},
        data={
            "train": {"path": "train.csv", "columns": {**columns, "film": "film"}},
            "test": {"path": "test.csv", "columns": columns},
        },
        partition={"kind": "column", "column": "film", "num_sites": 100},
    )
    return (BACKBONE,)


def _persons(folder: Path) -> tuple[str, ...]:
    """The unit is a patient with one to twelve records; sites release metrics of held-out patients."""
    inputs.tiny_bert(folder)
    sizes = [1, 2, 3, 4, 5, 6, 1, 2, 8, 12, 3, 4, 2, 1, 5, 3, 6, 2, 4, 6]
    people = [person for person, size in enumerate(sizes) for _ in range(size)]
    rows = [
        (text, inputs.label(number), f"mrn-{person}")
        for number, (text, person) in enumerate(zip(texts(len(people)), people, strict=True))
    ]
    inputs.write_table(folder / "train.csv", ("review", "verdict", "mrn"), rows[::2] + rows[1::2])
    columns = {"text": "review", "label": "verdict", "person": "mrn"}
    write_scenario(
        folder,
        privacy={"unit": "patient", "records_per_person": 3},
        data={"train": {"path": "train.csv", "columns": columns}, "evaluation_share": 0.3},
        site_metrics={"names": ["accuracy", "confusion", "loss"], "noise_multiplier": 2.0},
        baselines={"arms": ["central-dp"]},
    )
    return (BACKBONE,)


def _images(folder: Path) -> tuple[str, ...]:
    write_scenario(
        folder,
        model={"backbone": "cnn:small", "max_length": None},
        lora=None,
        task={
            "kind": "image_classification",
            "labels": [str(digit) for digit in range(10)],
            "image_shape": [1, 8, 8],
            "pixel_range": [0, 16],
        },
        privacy={"sample_rate": 0.05},
        data={"builtin": "digits", "num_test": None},
    )
    return ()


def _task(
    task: dict[str, Any], records: list[dict[str, Any]], *, gpt2: bool = False
) -> Callable[[Path], tuple[str, ...]]:
    """Return a writer of a scenario for another kind of task on a made backbone."""

    def write(folder: Path) -> tuple[str, ...]:
        (inputs.tiny_gpt2 if gpt2 else inputs.tiny_bert)(folder)
        inputs.write_lines(folder / "train.jsonl", records)
        columns = {role: role for role in records[0]}
        write_scenario(
            folder,
            task={"labels": [], **task},
            lora={"target_modules": ["c_attn"] if gpt2 else ["query", "value"]},
            data={"train": {"path": "train.jsonl", "columns": columns}},
        )
        return (BACKBONE,)

    return write


def _variants(folder: Path) -> tuple[str, ...]:
    """Choices of a scenario that take other ways through the code."""
    inputs.tiny_bert(folder)
    train = inputs.labelled_texts(folder, 72)
    data = {"train": train, "kind": "synthetic"}
    write_scenario(
        folder,
        "skewed",
        data=data,
        partition={"kind": "dirichlet", "alpha": 10.0, "min_records": 6},
        simulation={"threads": 1, "dropout_probability": 0.4, "clients_at_once": 1},
        training={"rounds": 3, "optimizer": "adamw"},
        federation={"min_sites": 1, "update_dtype": "bfloat16"},
    )
    write_scenario(
        folder,
        "early",
        data=data,
        training={"rounds": 4, "early_stopping": {"patience": 1, "min_delta": 1.0}},
    )
    write_scenario(folder, "folds", data={**data, "num_test": None}, training={"rounds": 1})
    write_scenario(folder, "repeats", data=data, training={"rounds": 1})
    write_scenario(
        folder,
        "sweep",
        data={**data, "num_confirm": 8},
        training={"rounds": 1},
        privacy={"noise_multiplier": None},
    )
    write_scenario(folder, "plain", data=data, privacy={"mechanism": "none", "noise_multiplier": None})
    return (BACKBONE,)


def _consortium(folder: Path) -> tuple[str, ...]:
    """What a coordinator and a site do before they meet: keys, certificates, homes, a signed job."""
    train = inputs.labelled_texts(folder, 60)
    inputs.write_table(folder / "test.csv", ("review", "verdict"), [("a dull plot", "bad"), ("joy", "good")])
    write_scenario(
        folder,
        "job",
        model={"backbone": "embedded:all-minilm-l6-v2"},
        privacy={"noise_multiplier": None, "epsilon": 3.0},
        federation={"min_sites": 1},
        data=None,
        partition=None,
        simulation=None,
        evaluation={"path": "test.csv", "columns": train["columns"]},
    )
    return ()


_SITE = ("--name", "clinic", "--coordinator", "localhost:9092", "--data", "train.csv")
_COLUMNS = ("--column", "text=review", "--column", "label=verdict")
_SERVER = ("--role", "server", "--host", "localhost")
_CONSORTIUM = (
    ("pki", "init", "ca", "--name", "Consortium"),
    ("pki", "signer", "consortium"),
    ("coordinator", "init", "coordinator", "--host", "localhost"),
    ("pki", "approve", "ca", "coordinator/server.csr", *_SERVER, "--out", "server.crt"),
    ("pki", "publish", "ca", "coordinator/trust"),
    ("coordinator", "install", "coordinator", "--certificate", "server.crt", "--ca", "ca/ca.crt"),
    ("site", "init", "clinic", *_SITE, *_COLUMNS, "--signer", "consortium=consortium.pub"),
    ("pki", "approve", "ca", "clinic/clinic.csr", "--role", "site", "--out", "clinic.crt"),
    ("site", "install", "clinic", "--certificate", "clinic.crt", "--ca", "ca/ca.crt"),
    ("coordinator", "install", "coordinator", "--site", "clinic.crt"),
    ("site", "policy", "clinic"),
    ("site", "check", "clinic", "--offline", "--job", "job.toml", "--public", "test.csv"),
    ("site", "ledger", "clinic", "--export", "account.json"),
    ("site", "status", "clinic"),
    ("plan", "--job", "job.toml", "--ledger", "account.json", "--json"),
    ("coordinator", "submit", "coordinator", "job.toml", "--signer", "consortium.key"),
    ("coordinator", "status", "coordinator"),
    ("site", "rotate", "clinic"),
    ("pki", "approve", "ca", "clinic/clinic.csr", "--role", "site", "--out", "next.crt", "--rotate"),
    ("pki", "revoke", "ca", "clinic"),
    ("pki", "publish", "ca", "coordinator/trust"),
    ("pki", "show", "coordinator/trust"),
    ("audit-log", "verify", "clinic/audit", "--key", "clinic/log.pub"),
    ("audit-log", "show", "clinic/audit", "--json"),
)


def _federation(folder: Path) -> tuple[str, ...]:
    """Two sites with homes of their own, a job that asks for metrics which neither releases."""
    rows = [(text, inputs.label(number)) for number, text in enumerate(texts(130))]
    for name, part in (("clinic", rows[:48]), ("practice", rows[48:112])):
        inputs.write_table(folder / f"{name}.csv", ("review", "verdict"), part)
    inputs.write_table(folder / "test.csv", ("review", "verdict"), rows[112:])
    write_scenario(
        folder,
        "job",
        model={"backbone": "embedded:all-minilm-l6-v2"},
        lora={"last_layers": 1, "train": "b"},
        privacy={"noise_multiplier": None, "epsilon": 3.0},
        federation={"min_sites": 2, "update_dtype": "int8"},
        site_metrics={"names": ["accuracy"], "noise_multiplier": 2.0},
        data=None,
        partition=None,
        simulation=None,
        evaluation={"path": "test.csv", "columns": {"text": "review", "label": "verdict"}},
    )
    return ()


def _join(name: str) -> tuple[Command, ...]:
    """Return what makes a site, has its request approved and admits it."""
    home, certificate = f"homes/{name}", f"{name}.crt"
    place = ("--name", name, "--coordinator", "localhost:9092", "--data", f"{name}.csv")
    return (
        ("site", "init", home, *place, *_COLUMNS, "--signer", "consortium=consortium.pub"),
        ("pki", "approve", "ca", f"{home}/{name}.csr", "--role", "site", "--out", certificate, "--days", "3000"),
        ("site", "install", home, "--certificate", certificate, "--ca", "ca/ca.crt"),
        ("coordinator", "install", "coordinator", "--site", certificate),
    )


def _serve(folder: Path) -> None:
    """Run the submitted job."""
    from . import federation  # Flower is imported where something is recorded, not where cases are listed

    homes = [folder / "homes" / name for name in ("clinic", "practice")]
    federation.serve(folder / "coordinator", homes, "0001-golden")


_RUN = "coordinator/jobs/0001-golden/run"
_FEDERATION: tuple[Command, ...] = (
    ("pki", "init", "ca", "--name", "Consortium"),
    ("pki", "signer", "consortium"),
    ("coordinator", "init", "coordinator", "--host", "localhost"),
    ("pki", "publish", "ca", "coordinator/trust"),
    *_join("clinic"),
    *_join("practice"),
    ("coordinator", "submit", "coordinator", "job.toml", "--signer", "consortium.key"),
    _serve,
    ("coordinator", "status", "coordinator", "--json"),
    ("coordinator", "logs", "coordinator"),
    ("coordinator", "verify", f"{_RUN}/adapter", "--key", "coordinator/round.pub"),
    ("site", "ledger", "homes/clinic", "--json", "--export", "account.json"),
    ("site", "check", "homes/practice", "--offline", "--job", "job.toml", "--json"),
    ("plan", "--job", "job.toml", "--ledger", "account.json"),
    ("audit-log", "verify", "homes/clinic/audit", "--key", "homes/clinic/log.pub", "--json"),
    ("audit-log", "show", "coordinator/audit", "--json"),
    (
        *("report", _RUN, "--format", "html", "--out", "report.html"),
        *("--ledger", "account.json", "--sign", "coordinator"),
    ),
    ("report", "verify", "report.html", "--key", "coordinator/round.pub", "--json"),
    ("report", _RUN, "--format", "html", "--out", "site-report.html"),
    ("report", "sign", "site-report.html", "homes/clinic"),
    ("report", "sign", "report.html", "homes/clinic"),
    ("predict", _RUN, "a quiet joy", "--json"),
)


def _tools(folder: Path) -> tuple[str, ...]:
    """Commands beside a run, and what a user reads who made a mistake."""
    inputs.labelled_texts(folder, 120)
    notes = [("Seen by Dr. Anna Meyer on 3 May 2021, phone 030 1234567.",), ("Nothing to tell.",)]
    inputs.write_table(folder / "notes.csv", ("note",), notes)
    write_scenario(folder, "wrong", privcy={"epsilon": 3.0}, data=None)
    write_scenario(folder, "lost", data={"train": {"path": "lost.csv", "columns": {"text": "review"}}})
    (folder / "broken.toml").write_text("name = \n", encoding="utf-8")
    (folder / "empty").mkdir()
    return ()


_NUMBERS = ("--records", "10000", "--batch-size", "512", "--epsilon", "3")
_TOOLS = (
    ("version",),
    ("settings",),
    ("plan", *_NUMBERS, "--epochs", "10"),
    ("plan", *_NUMBERS, "--sweep", "epochs=1:5", "--out", "plan"),
    ("new", "train.csv", "--text", "review", "--label", "verdict", "--public", "--out", "new.toml"),
    ("deidentify", "notes.csv", "--out", "masked.csv", "--column", "note", "--engine", "rules"),
    ("simulate", "wrong.toml", "--out", "run"),
    ("simulate", "lost.toml", "--out", "run"),
    ("simulate", "broken.toml", "--out", "run"),
    ("simulate", "missing.toml", "--out", "run"),
    ("simulate", "lost.toml", "--out", "run", "--set", "privacy.epsilon=-1"),
    ("predict", "empty", "a text"),
    ("report", "empty"),
    ("audit", "empty"),
    ("audit-log", "verify", "empty"),
    ("site", "check", "empty"),
    ("coordinator", "status", "empty"),
    ("site", "nonsense"),
)


_REPLIES = [{"prompt": text, "response": inputs.LINES[n % 6]} for n, text in enumerate(texts(48))]
_TAGS = ["O", "B-film", "I-film", "O", "B-cast"]
_ENTITIES = [{"tokens": text.split()[:5], "tags": _TAGS[: len(text.split()[:5])]} for text in texts(48)]
_PAIRS = [
    {"text": text, "pair": inputs.LINES[(n // 2) % 6], "label": ["other", "match"][n % 2]}
    for n, text in enumerate(texts(48))
]
_RATINGS = [{"text": text, "score": 1 + n % 5} for n, text in enumerate(texts(48))]

_ALL = (
    Case(name="help", helps=True),
    Case(
        name="demo",
        write=_demo,
        commands=(
            ("plan", "--job", "scenario.toml"),
            ("simulate", "scenario.toml", "--out", "run", "--json"),
            ("predict", "run", "a warm and clever film", "a dull and predictable story"),
            ("report", "run"),
            ("pki", "signer", "officer"),
            ("report", "run", "--format", "html", "--sign", "officer.key"),
            ("report", "verify", "run/compliance-report.html", "--key", "officer.pub"),
            ("audit", "run"),
            ("explain", "run", "The plot is dull.", "--html", "why.html"),
            ("monitor", "run", "stream.csv", "--text", "review", "--window", "20", "--out", "watch"),
        ),
    ),
    Case(
        name="gpt2",
        write=_gpt2,
        commands=(SIMULATE, ("generate", "run", "the film", "--num", "2", "--seed", "7", "--json")),
    ),
    Case(
        name="central",
        write=_central,
        commands=(SIMULATE, ("report", "run", "--format", "html"), ("predict", "run", "a quiet joy")),
    ),
    Case(
        name="persons",
        write=_persons,
        commands=((*SIMULATE, "--stop-after", "1"), (*SIMULATE, "--resume")),
    ),
    Case(
        name="images",
        write=_images,
        commands=(SIMULATE, ("simulate", "scenario.toml", "--out", "stopped", "--stop-after", "1")),
    ),
    Case(
        name="replies",
        write=_task({"kind": "replies"}, _REPLIES, gpt2=True),
        commands=(SIMULATE, ("generate", "run", "the film", "--temperature", "0")),
    ),
    Case(
        name="entities",
        write=_task({"kind": "token_classification", "labels": ["O", "B-film", "I-film", "B-cast"]}, _ENTITIES),
        commands=(SIMULATE, ("predict", "run", "what a bright cast")),
    ),
    Case(
        name="pairs",
        write=_task({"kind": "pair_matching", "labels": ["other", "match"]}, _PAIRS),
        commands=(SIMULATE, ("predict", "run", "what a cast\ta dull plot")),
    ),
    Case(
        name="ratings",
        write=_task({"kind": "regression", "target_range": [1, 5]}, _RATINGS),
        commands=(SIMULATE, ("predict", "run", "what a bright cast")),
    ),
    Case(
        name="variants",
        write=_variants,
        commands=(
            ("simulate", "skewed.toml", "--out", "skewed"),
            ("simulate", "early.toml", "--out", "early"),
            ("simulate", "folds.toml", "--out", "folds", "--folds", "2"),
            ("simulate", "repeats.toml", "--out", "repeats", "--set", "simulation.repeats=2"),
            ("simulate", "plain.toml", "--out", "plain"),
            ("sweep", "sweep.toml", "--axis", "privacy.epsilon=2,inf", "--out", "sweep"),
            ("ensemble", "skewed", "early", "--scenario", "early.toml"),
            ("predict", "skewed", "--with", "early", "--json"),
        ),
        stdin="a quiet joy\n\nit bores\n",
    ),
    Case(name="consortium", write=_consortium, commands=_CONSORTIUM),
    Case(name="federation", write=_federation, commands=_FEDERATION),
    Case(name="tools", write=_tools, commands=_TOOLS),
)

CASES = {case.name: case for case in _ALL}
