"""What the README's accuracy tables hold, and how a figure is written: mean and standard deviation over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Figures = Mapping[str, Mapping[str, Any]]
"""Figures of rows by name, as `benchmarks.results` writes them."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured row.

    Attributes:
        name: what it is called on the command line.
        scenario: file in simulations/, without ending.
        changes: `--set` items.
        data: what the data is, and at how many sites.
        metric: how the metric is called in the table.
    """

    name: str
    scenario: str
    changes: tuple[str, ...] = ()
    data: str = ""
    metric: str = "accuracy"


def _row(name: str, data: str, metric: str = "accuracy") -> Row:
    return Row(name=name, scenario=name, data=data, metric=metric)


def _budget(epsilon: int, learning_rate: int) -> Row:
    changes = (f"privacy.epsilon={epsilon}", f"training.learning_rate={learning_rate}", "baselines.arms=[]")
    return Row(name=f"banking77-epsilon-{epsilon}", scenario="banking77", changes=changes)


TASKS = (
    _row("banking77", "bank questions, 77 intents; 6"),
    _row("bc5cdr", "chemicals and diseases in medical text; 8", "F1 of entities"),
    _row("chinese-reviews", "customer reviews in Chinese; 8"),
    _row("pairs", "which of ten answers belongs to a question; 4", "MRR (chance 0.29)"),
    _row("ratings", "how much a film was liked, -4 to 4; 8", "MAE (the mean alone: 1.76)"),
    _row("replies", "answers to questions, a small GPT-2; 3", "perplexity of the answer"),
    _row("digits", "8x8 images, a CNN without backbone; 6"),
)
BUDGETS = {1: _budget(1, 2), 3: _budget(3, 4)}
"""Of `banking77`, by epsilon; at 8 it is the scenario itself."""
DEMO, GPT2 = _row("demo", "movie reviews; 8"), _row("gpt2", "movie reviews, a small GPT-2; 6", "perplexity")

EPSILONS, SPREADS = (1, 3, 8), ("iid", "dirichlet")
_EIGHT_SITES = (
    "partition.num_sites=8",
    "federation.min_sites=8",
    "federation.update_dtype=float32",
    "training.weight_decay=0",
    "lora.train=none",
    "simulation.evaluate_every=16",
)
_SHARED = (
    *_EIGHT_SITES,
    "privacy.mechanism=distributed",
    "privacy.max_colluding=1",
    "privacy.spare_attempts=0",
    # Not what is measured here: what one site's inputs cost without any secure aggregation may be as large as it is.
    "privacy.epsilon_alone=1000",
    "privacy.sample_rate=1",
    "training.rounds=16",
    "training.local_steps=1",
    "baselines.central_dp.training.rounds=16",
    "baselines.central_dp.training.local_steps=1",
    "baselines.central_dp.training.weight_decay=0",
    "baselines.central_dp.privacy.sample_rate=1",
)
_SHARED_DATA: Mapping[str, tuple[str, tuple[float, float, float]]] = {
    # name of the scenario, whose own row has the figure without privacy: the data, and the learning rate at each of EPSILONS
    "demo": ("movie reviews", (4, 4, 4)),
    "banking77": ("bank questions, 77 intents", (6.5, 16, 16)),
    "chinese-reviews": ("customer reviews in Chinese", (4, 4, 4)),
}


def _shared_noise(scenario: str, spread: str, epsilon: int, rate: float) -> Row:
    arms = 'baselines.arms=["central-dp"]' if spread == "iid" else "baselines.arms=[]"  # one place has no partition
    changes = [*_SHARED, f"privacy.epsilon={epsilon}", f"partition.kind={spread}", arms]
    changes += [f"{section}.learning_rate={rate:g}" for section in ("training", "baselines.central_dp.training")]
    changes += ["partition.alpha=0.3"] if spread == "dirichlet" else []
    return Row(name=f"shared-noise-{scenario}-{spread}-{epsilon}", scenario=scenario, changes=tuple(changes))


SHARED_NOISE: Mapping[tuple[str, str, int], Row] = {
    (scenario, spread, epsilon): _shared_noise(scenario, spread, epsilon, rate)
    for scenario, (_, rates) in _SHARED_DATA.items()
    for epsilon, rate in zip(EPSILONS, rates, strict=True)
    for spread in SPREADS
}

_LOCAL_EPSILON = 3
_LOCAL_WAYS: Mapping[str, tuple[str, tuple[str, ...], tuple[float, float, float]]] = {
    # name: title, changes, and the learning rate of each of `_SHARED_DATA`: what `silotune new` writes for as much data and steps
    "four-steps": (
        "8 rounds of 4 steps",
        ("training.rounds=8", "training.local_steps=4", "privacy.sample_rate=0.5", "training.schedule=linear"),
        (1.9, 2.2, 1.4),
    ),
    "one-step": (
        "16 rounds of one step",
        ("training.rounds=16", "training.local_steps=1", "privacy.sample_rate=1", "training.schedule=linear"),
        (5.3, 6.2, 3.9),
    ),
    "constant": (
        "that, at a constant rate",
        ("training.rounds=16", "training.local_steps=1", "privacy.sample_rate=1", "training.schedule=constant"),
        (2.6, 3.0, 1.9),
    ),
    "centred": (
        "that, less the mean of the labels' names, momentum 0.8",
        (
            "training.rounds=16",
            "training.local_steps=1",
            "privacy.sample_rate=1",
            "training.schedule=constant",
            "training.momentum=0.8",
            "task.head_centre=label-names",
        ),
        (3.1, 3.6, 2.3),
    ),
}


def _local(scenario: str, way: str) -> Row:
    _, changes, rates = _LOCAL_WAYS[way]
    rate = rates[list(_SHARED_DATA).index(scenario)]
    changes = (*_EIGHT_SITES, *changes, f"training.learning_rate={rate}", f"privacy.epsilon={_LOCAL_EPSILON}")
    changes += ("partition.kind=dirichlet", "partition.alpha=0.3", "baselines.arms=[]")
    return Row(name=f"local-{scenario}-{way}", scenario=scenario, changes=changes)


LOCAL: Mapping[tuple[str, str], Row] = {
    (scenario, way): _local(scenario, way) for scenario in _SHARED_DATA for way in _LOCAL_WAYS
}
"""Sites that each add all of the noise, with labels skewed over them: what steps between averages cost."""

_ALL = (DEMO, *TASKS, *BUDGETS.values(), GPT2, *SHARED_NOISE.values(), *LOCAL.values())
ROWS: Mapping[str, Row] = {row.name: row for row in _ALL}
NON_PRIVATE = ("non-private-all-layers", "non-private")

_SHARES = ("accuracy", "f1", "micro_f1", "macro_f1")


def fill_tables(text: str, rows: Figures) -> str:
    """Return `text` with every table between its markers made anew from `rows`; what is not measured is left as a dash."""
    for name, build in _TABLES.items():
        begin, end = f"<!-- results: {name} -->\n", "<!-- end of results -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if found and closed:
            text = f"{before}{begin}{build(rows)}{end}{after}"
    return text


def figure(found: Mapping[str, Any] | None, arm: str) -> str:
    """Return an arm's mean and, of more than one seed, its standard deviation; a dash if it was not measured."""
    values = None if found is None else found["arms"].get(arm)
    if found is None or not values:
        return "–"
    if None in values:
        return "diverged"
    mean, deviation = _spread(values)
    share = found["metric"] in _SHARES
    digits = 1 if share else (0 if mean >= 100 else 3)
    scale = 100 if share else 1
    text = f"{mean * scale:,.{digits}f}" + (" %" if share else "")
    return text if deviation is None else f"{text} ± {deviation * scale:,.{digits}f}"


def best_non_private(found: Mapping[str, Any] | None) -> str:
    """Return the figure of the best training without noise that has all records at one place."""
    measured = [arm for arm in NON_PRIVATE if found and found["arms"].get(arm) and None not in found["arms"][arm]]
    if found is None or not measured:
        return "–"
    sign = 1 if found["higher_is_better"] else -1
    return figure(found, max(measured, key=lambda arm: sign * _spread(found["arms"][arm])[0]))


def _spread(values: Any) -> tuple[float, float | None]:
    """Return mean and standard deviation of the seeds' values; of older rows only these were kept."""
    if isinstance(values, Mapping):
        return values["mean"], values["deviation"]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def when(rows: Sequence[Mapping[str, Any] | None]) -> str:
    """Return seeds, dates and machines of the rows that were measured, as one line of text."""
    found = [row for row in rows if row]
    if not found:
        return "Not measured yet: `make results`.\n"
    parts = sorted({_about(row) for row in found})
    return f"Mean ± standard deviation. {'; '.join(parts)}. Anew: `make results`.\n"


def _about(row: Mapping[str, Any]) -> str:
    machine = row["machine"]
    cores = f"{machine['cores']} cores of {machine['processor']}"
    precision = "bfloat16" if machine["bfloat16_in_hardware"] else "float32"
    seeds = f"{row['seeds']} seeds" if row["seeds"] > 1 else "one seed"
    return f"{seeds}, {row['date']}, {cores}, {precision}"


def _lines(header: Sequence[str], body: Sequence[Sequence[str]], about: str) -> str:
    ruled = [header, ["---"] * len(header), *body]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in ruled)
    return f"{about}\n{table}"


def _demo(rows: Figures) -> str:
    found = rows.get(DEMO.name)
    arms = {
        "federated DP": "federated",
        "central DP at the same epsilon": "central-dp",
        "non-private, the same layer": "non-private",
        "non-private, LoRA in all layers": "non-private-all-layers",
    }
    body = [[title, figure(found, arm)] for title, arm in arms.items()]
    return _lines(["training", "accuracy"], body, when([found]))


def _tasks(rows: Figures) -> str:
    header = ["scenario", "data; sites", "metric", "federated DP", "central DP", "non-private", "seconds a seed"]
    body = []
    for row in TASKS:
        found = rows.get(row.name)
        seconds = f"{found['seconds_each']:,.0f}" if found else "–"
        private = [figure(found, arm) for arm in ("federated", "central-dp")]
        body.append([f"`{row.name}`", row.data, row.metric, *private, best_non_private(found), seconds])
    return _lines(header, body, when([rows.get(row.name) for row in TASKS]))


def _budgets(rows: Figures) -> str:
    whole = rows.get("banking77")
    by_epsilon = {**{epsilon: rows.get(row.name) for epsilon, row in BUDGETS.items()}, 8: whole}
    header = ["epsilon", *map(str, by_epsilon), "no privacy, six banks", "no privacy, one place"]
    cells = [figure(found, "federated") for found in by_epsilon.values()]
    body = [["accuracy", *cells, figure(whole, "federated-non-private"), best_non_private(whole)]]
    return _lines(header, body, when(list(by_epsilon.values())))


def _shared_noise_table(rows: Figures) -> str:
    header = ["data", "training", *(f"epsilon {epsilon}" for epsilon in EPSILONS), "non-private"]
    body = []
    for scenario, (data, _) in _SHARED_DATA.items():
        by_spread = {s: [rows.get(SHARED_NOISE[scenario, s, epsilon].name) for epsilon in EPSILONS] for s in SPREADS}
        best = best_non_private(rows.get(scenario))
        for title, spread, arm in (
            ("central DP", "iid", "central-dp"),
            ("eight sites, IID", "iid", "federated"),
            ("eight sites, Dirichlet 0.3", "dirichlet", "federated"),
        ):
            body.append([data, title, *(figure(found, arm) for found in by_spread[spread]), best])
            data = best = ""
    return _lines(header, body, when([rows.get(row.name) for row in SHARED_NOISE.values()]))


def _local_table(rows: Figures) -> str:
    """Mean over seeds, and which share of the gap between four steps and one place with the same epsilon a way closes."""
    header = ["data", *(title for title, _, _ in _LOCAL_WAYS.values()), "one place"]
    body = []
    for scenario, (data, _) in _SHARED_DATA.items():
        central = rows.get(SHARED_NOISE[scenario, "iid", _LOCAL_EPSILON].name)
        found = {way: rows.get(LOCAL[scenario, way].name) for way in _LOCAL_WAYS}
        cells = [figure(row, "federated") + _share_of_gap(found["four-steps"], row, central) for row in found.values()]
        body.append([data, *cells, figure(central, "central-dp")])
    return _lines(header, body, when([rows.get(row.name) for row in LOCAL.values()]))


def _share_of_gap(before: Any, after: Any, central: Any) -> str:
    if not (before and after and central) or before is after:
        return ""
    low, found, high = (
        _spread(row["arms"][arm])[0]
        for row, arm in ((before, "federated"), (after, "federated"), (central, "central-dp"))
    )
    return f" ({100 * (found - low) / (high - low):.0f} % of the gap)" if high > low else ""


def _gpt2(rows: Figures) -> str:
    found = rows.get(GPT2.name)
    untrained = "–" if found is None else f"{statistics.mean(found['untrained']):,.0f}"
    body = [["held-out perplexity", untrained, figure(found, "federated"), best_non_private(found)]]
    return _lines(["", "untuned", "federated DP", "non-private"], body, when([found]))


_TABLES: Mapping[str, Callable[[Figures], str]] = {
    "demo": _demo,
    "tasks": _tasks,
    "budgets": _budgets,
    "shared-noise": _shared_noise_table,
    "local": _local_table,
    "gpt2": _gpt2,
}
