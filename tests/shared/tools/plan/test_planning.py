"""The planner's arithmetic against dp-accounting used directly, against published numbers, and against itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import pld_privacy_accountant

from shared.epsilons import as_set
from shared.errors import ConfigError
from shared.privacy.accounting import PLD_DISCRETIZATION, GaussianSteps, compose_epsilon
from shared.privacy.filter import filter_epsilon, filter_orders
from shared.privacy.ledger_export import ChargedSteps, LedgerExport
from shared.privacy.plan import PrivacyPlan
from shared.tools.plan import affordability, planning
from shared.tools.plan.affordability import can_afford, spent
from shared.tools.plan.planning import Question, Setting, solve
from simulations.scenario import load_scenario

# n, B, E; noise multipliers for epsilon 1, 3, 8 at delta = 1 / n^1.1 (PLD).
TABLE = [
    (2_000, 256, 3, (2.149, 1.088, 0.668)),
    (2_000, 1024, 10, (6.959, 2.822, 1.366)),
    (10_000, 256, 10, (1.934, 0.984, 0.660)),
    (10_000, 512, 10, (2.636, 1.224, 0.758)),
    (50_000, 512, 10, (1.456, 0.827, 0.594)),
    (50_000, 1024, 3, (1.300, 0.811, 0.569)),
]
PUBLISHED = [
    (n, batch, epochs, epsilon, sigma)
    for n, batch, epochs, sigmas in TABLE
    for epsilon, sigma in zip((1.0, 3.0, 8.0), sigmas, strict=True)
]
TINY_EXCESS = 0.01  # what wide cells add to epsilon at rates below one in a hundred; 0.0065 was measured
BASE = Question(records=4_000, batch_size=200, epochs=5, noise_multiplier=1.1, delta=1e-6)


def random_questions(count: int) -> list[Question]:
    """Rates from 1 % to a quarter, noise from 0.7 to 2.5, up to 400 steps: epsilon from about 0.1 to 20."""
    generator = np.random.default_rng(20_260_101)

    def between(low: float, high: float) -> float:
        return float(np.exp(generator.uniform(np.log(low), np.log(high))))

    found = []
    for _ in range(count):
        records = round(between(500, 100_000))
        batch = max(1, round(records * between(0.01, 0.25)))
        found.append(
            Question(
                records=records,
                batch_size=batch,
                steps=round(between(1, 400)),
                noise_multiplier=between(0.7, 2.5),
                delta=between(1e-7, 1 / records) * 0.9,
            )
        )
    return found


def of_dp_accounting(setting: Setting, cell: float = 1e-4) -> float:
    accountant = pld_privacy_accountant.PLDAccountant(value_discretization_interval=cell)
    gaussian = dp_accounting.GaussianDpEvent(setting.noise_multiplier)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(setting.sample_rate, gaussian), setting.steps)
    return float(accountant.get_epsilon(setting.delta))


@pytest.mark.parametrize("question", random_questions(24))
def test_epsilon_is_that_of_dp_accounting(question: Question) -> None:
    setting = solve(question)
    assert setting.epsilon == pytest.approx(of_dp_accounting(setting, PLD_DISCRETIZATION), abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("question", random_questions(6))
def test_epsilon_agrees_with_dp_accounting(question: Question) -> None:
    setting = solve(question)
    expected = of_dp_accounting(setting)
    assert setting.epsilon == pytest.approx(expected, abs=1e-3)
    assert setting.epsilon >= expected - 1e-6  # wide cells are pessimistic
    assert setting.sample_rate == question.batch_size / question.records  # type: ignore[operator]


@pytest.mark.parametrize(
    ("sample_rate", "sigma", "steps"), [(0.0045, 2.9, 272), (0.008, 4.9, 318), (0.002, 1.5, 400), (0.01, 4.0, 2_000)]
)
def test_a_tiny_epsilon_is_never_too_small(sample_rate: float, sigma: float, steps: int) -> None:
    """Many steps at a small rate: each step's loss is far narrower than a cell, so that epsilon comes out too large."""
    setting = solve(Question(sample_rate=sample_rate, noise_multiplier=sigma, steps=steps, delta=3e-7))
    assert -1e-6 <= setting.epsilon - of_dp_accounting(setting) <= TINY_EXCESS


@pytest.mark.parametrize(("n", "batch", "epochs", "epsilon", "sigma"), PUBLISHED)
def test_published_noise_multipliers(n: int, batch: int, epochs: int, epsilon: float, sigma: float) -> None:
    question = Question(records=n, batch_size=batch, epochs=epochs, epsilon=epsilon, delta=n**-1.1)
    setting = solve(question)
    assert setting.noise_multiplier == pytest.approx(sigma, rel=0.003)
    assert setting.steps == round(epochs * n / batch)
    assert epsilon - 1e-2 <= setting.epsilon <= epsilon


def test_the_demo_s_job_costs_what_its_plan_says() -> None:
    job = load_scenario(Path(str(files("simulations"))) / "demo.toml").job
    made = PrivacyPlan.from_job(job)
    question = Question(
        sample_rate=job.privacy.sample_rate,
        steps=job.training.planned_steps,
        noise_multiplier=made.noise_multiplier,
        delta=job.privacy.delta,
    )
    assert solve(question).epsilon == made.epsilon()


@pytest.mark.parametrize("epsilon", [0.7, 3.0, 8.0])
def test_noise_for_epsilon_and_back(epsilon: float) -> None:
    there = solve(replace(BASE, noise_multiplier=None, epsilon=epsilon))
    back = solve(replace(BASE, noise_multiplier=there.noise_multiplier))
    assert epsilon - 1e-2 <= back.epsilon <= epsilon
    assert back.epsilon == there.epsilon
    assert (there.solved_for, back.solved_for) == ("noise", "epsilon")
    # What is printed, four decimals, is what was accounted for.
    assert there.noise_multiplier == float(f"{there.noise_multiplier:.4f}")


@pytest.mark.parametrize(
    "opened",
    [
        {"noise_multiplier": None},
        {"epochs": None},
        {"batch_size": None},
        {"batch_size": None, "epochs": None, "steps": 100},
        {"batch_size": None, "epochs": 0.1},
        {"batch_size": None, "records": None},
        {"batch_size": None, "records": None, "epochs": None, "steps": 7},
    ],
    ids=str,
)
def test_what_was_solved_for_keeps_to_epsilon(opened: dict[str, Any]) -> None:
    """And is the best that does: a little more of it does not."""
    setting = solve(replace(BASE, epsilon=2.0, **opened))
    assert setting.epsilon == compose_epsilon([setting.mechanism], setting.delta)
    assert setting.epsilon <= 2.0
    if setting.solved_for == "rate" and setting.records is None:
        assert setting.sample_rate == round(setting.sample_rate, 6)
    question = replace(BASE, epsilon=None, **{k: v for k, v in opened.items() if k != "noise_multiplier"})
    if setting.solved_for == "noise":
        more = [replace(question, noise_multiplier=setting.noise_multiplier * 0.999)]
    elif setting.solved_for == "steps":
        more = [replace(question, steps=setting.steps + 1)]
    else:  # no larger batch fits, also where the number of steps falls
        lattice = setting.records or 1_000_000
        found = round(setting.sample_rate * lattice)
        rates = [(found + k * max(1, found // 5_000)) / lattice for k in (1, 2, 3, 5, 9, 17, 200)]
        more = [replace(question, batch_size=None, sample_rate=rate) for rate in rates if rate <= 1]
        more = [one for one in more if one.steps or one.epochs / one.sample_rate > 0.5]  # type: ignore[operator]
    assert all(solve(one).epsilon > 2.0 for one in more)
    assert more or setting.steps == 1


def test_the_largest_batch_is_the_largest() -> None:
    """Few epochs: epsilon falls where the number of steps does, so several batches are the last of a stretch that fits."""
    for records, epochs, sigma, epsilon in (
        (24, 2, 3.0, 1.1),
        (30, 1.5, 2.0, 2.0),
        (20, 0.7, 2.0, 0.9),
        (3, 0.4, 2.0, 3.0),
        (5, 1.3, 2.0, 2.1),
    ):
        question = Question(records=records, epochs=epochs, noise_multiplier=sigma, delta=1e-5)
        fitting = [
            batch
            for batch in range(1, records + 1)
            if round(epochs * records / batch) >= 1 and solve(replace(question, batch_size=batch)).epsilon <= epsilon
        ]
        assert solve(replace(question, epsilon=epsilon)).batch_size == pytest.approx(max(fitting))


@pytest.mark.parametrize(("records", "smallest"), [(100, 1), (200, 2)])
def test_a_batch_may_take_as_many_steps_as_there_may_be(
    records: int, smallest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all of epsilon: of both, the smallest batch takes exactly the most."""
    monkeypatch.setattr(planning, "MAX_STEPS", 100)
    question = Question(records=records, epochs=1, noise_multiplier=1.0, delta=1e-5)
    at = solve(replace(question, batch_size=smallest))
    assert at.steps == 100
    assert solve(replace(question, epsilon=at.epsilon)).batch_size == pytest.approx(smallest)
    with pytest.raises(ConfigError, match="no batch is small enough"):
        solve(replace(question, epsilon=at.epsilon * (1 - 1e-12)))
    with pytest.raises(ConfigError, match=r"--epochs 1\.01 at sample rate 0\.01 is 101 steps; expected 1 to 100"):
        solve(replace(question, batch_size=smallest, epochs=1.01))


def test_an_epsilon_that_nothing_bounds_is_not_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "compose_epsilon", lambda *_: math.inf)
    with pytest.raises(ConfigError, match=r"cannot bound epsilon at delta 1e-06; use a larger delta or more noise\.$"):
        solve(BASE)


def test_everything_fits_where_the_noise_is_great() -> None:
    setting = solve(Question(records=50, epochs=3, noise_multiplier=300, epsilon=5))
    assert (setting.batch_size, setting.steps) == (50, 3)


def test_a_setting_in_other_words() -> None:
    setting = solve(replace(BASE, parameters=6_400))
    assert (setting.sample_rate, setting.steps, setting.epochs, setting.batch_size) == (0.05, 100, 5.0, 200.0)
    assert setting.signal_to_noise == pytest.approx(200 / 1.1)
    assert setting.signal_to_noise_vector == pytest.approx(200 / 1.1 / 80)
    without = replace(setting, records=None)
    assert (without.batch_size, without.signal_to_noise, without.signal_to_noise_vector) == (None, None, None)


def test_delta_follows_from_the_records() -> None:
    assert solve(replace(BASE, delta=None)).delta == 1e-5
    assert solve(replace(BASE, records=200_000, delta=None)).delta == 5e-7


DOMINATES = (
    "noise dominates: with %s the noise of one step is %s times as long as the longest possible sum of gradients. "
)
FEWER = "Use a larger batch, fewer steps, a larger epsilon, or fewer parameters (lora.rank, lora.last_layers)."


@pytest.mark.parametrize(
    ("changes", "subject", "text"),
    [
        (
            {"delta": 1e-4},
            "delta",
            "delta 0.0001 is weak for 4,000 records: it is above 1/(10 n) = 2.5e-05. Use --delta 1.0e-05 or less.",
        ),
        (
            {"noise_multiplier": 0.5, "epochs": 20},
            "epsilon",
            "epsilon 39.201 is a weak claim (above 10): the odds of a guess about one record may grow more than 22,000-fold. "
            "Use more noise, fewer steps or a smaller batch.",
        ),
        (
            {"batch_size": 2_999, "noise_multiplier": 9},
            "sampling",
            "sample_rate 0.75 leaves no amplification by sampling: every record is in most of the steps (above 0.5). "
            "The numbers above have that in. With few records it is a good choice, which `silotune new` makes; with many, try a "
            "smaller batch with more steps.",
        ),
        (
            {"batch_size": 20},
            "noise",
            DOMINATES % ("1,000 parameters (assumed; name yours with --parameters)", "1.7") + FEWER,
        ),
        ({"parameters": 200_000}, "noise", DOMINATES % ("200,000 parameters", "2.5") + FEWER),
    ],
)
def test_warnings(changes: dict[str, Any], subject: str, text: str) -> None:
    assert solve(BASE).warnings() == {}
    assert solve(replace(BASE, **changes)).warnings() == {subject: text}


@pytest.mark.parametrize(
    ("question", "text"),
    [
        (
            Question(),
            r"4 quantities are missing, and one can be found; give all but one of --batch-size \(or --sample-rate\), --epochs "
            r"\(or --steps\), --noise-multiplier or --epsilon\.$",
        ),
        (
            replace(BASE, noise_multiplier=None),
            r"^2 quantities are missing, and one can be found; give one of --noise-multiplier or --epsilon\.$",
        ),
        (replace(BASE, epsilon=3), "nothing is left to find; leave out"),
        (replace(BASE, sample_rate=0.1), "--batch-size and --sample-rate say the same"),
        (replace(BASE, steps=10), "--steps and --epochs say the same"),
        (replace(BASE, records=None), "--batch-size alone is no rate; add --records"),
        (replace(BASE, batch_size=4_001), "4,001, but there are 4,000 records"),
        (replace(BASE, delta=1 / 4_000), "below 1/n = 2.5e-04; use at most 1.0e-05"),
        (replace(BASE, delta=0.0), "from 1e-30 to below 1"),
        (replace(BASE, delta=math.nan), "from 1e-30 to below 1"),
        (
            replace(BASE, delta=None, records=None, batch_size=None, sample_rate=0.1),
            "delta is not known; give --records",
        ),
        (replace(BASE, records=10**400), r"--records is 10{39}\.\.\.0{20} \(401 characters\); expected"),
        (replace(BASE, steps=10**400, epochs=None), r"--steps is 10{39}\.\.\.0{20} \(401 characters\); expected"),
        (replace(BASE, records=0), "--records is 0; expected a number from 1"),
        (replace(BASE, epochs=-1.0), "--epochs is -1; expected a number above 0"),
        (replace(BASE, epochs=math.inf), "--epochs is inf"),
        (replace(BASE, noise_multiplier=0.1), "--noise-multiplier is 0.1; expected a number from 0.2 to 10,000"),
        (replace(BASE, noise_multiplier=math.nan), "--noise-multiplier is nan"),
        (replace(BASE, batch_size=None, sample_rate=1.5), "--sample-rate is 1.5; expected a number from 1e-09 to 1"),
        (replace(BASE, noise_multiplier=None, epsilon=0.0), "--epsilon is 0; expected a number from 1e-06 to 1,000"),
        (replace(BASE, parameters=0), "--parameters is 0"),
        (replace(BASE, epochs=0.01), "is 0 steps; expected 1 to"),
        (replace(BASE, noise_multiplier=0.3, epochs=1e5), "no useful epsilon can be stated"),
        (replace(BASE, epochs=None, epsilon=0.01, noise_multiplier=0.3), "not even one step fits in epsilon 0.01"),
        (replace(BASE, batch_size=None, epsilon=0.01, noise_multiplier=0.3, epochs=500), "no batch is small enough"),
    ],
)
def test_errors_say_what_was_found_and_what_to_do(question: Question, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        solve(question)


# --- limits and curves ---

LIMITS = [
    ("records", 1, 10**12, 0, 10**12 + 1),
    ("batch_size", 1, 10**12, 0, 10**12 + 1),
    ("sample_rate", 1e-9, 1.0, 0.99e-9, 1.001),
    ("steps", 1, 1 << 24, 0, (1 << 24) + 1),
    ("epochs", 1e-9, 1e6, 0.0, 1.001e6),
    ("noise_multiplier", 0.2, 1e4, 0.199, 10_001),
    ("epsilon", 1e-6, 1000.0, 0.99e-6, 1000.1),
    ("parameters", 1, 10**12, 0, 10**12 + 1),
    ("delta", 1e-30, 0.999, 0.99e-30, 1.0),
]


@pytest.mark.parametrize(("name", "least", "most", "below", "above"), LIMITS)
def test_each_number_has_its_limits(name: str, least: float, most: float, below: float, above: float) -> None:
    for within in (least, most):
        planning._check_ranges(Question(**{name: within}))  # type: ignore[arg-type]
    for outside in (below, above):
        with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')} is .*; expected a number (from|above) "):
            planning._check_ranges(Question(**{name: outside}))  # type: ignore[arg-type]


def test_warnings_begin_above_their_limits() -> None:
    at = Setting(
        noise_multiplier=0.8, sample_rate=0.5, steps=9, epsilon=10.0, delta=1 / 1000, records=100, parameters=3906
    )
    assert at.signal_to_noise_vector == pytest.approx(50 / 0.8 / math.sqrt(3906), rel=1e-12)
    assert at.signal_to_noise_vector > 1
    assert at.warnings() == {}
    assert list(replace(at, epsilon=10.0001).warnings()) == ["epsilon"]
    assert list(replace(at, sample_rate=0.5001).warnings()) == ["sampling"]
    assert list(replace(at, delta=1.001 / 1000).warnings()) == ["delta"]
    assert list(replace(at, parameters=3907).warnings()) == ["noise"]
    # The noise as long as the longest sum is no warning yet; without parameters a thousand are assumed.
    assert replace(at, noise_multiplier=0.5, parameters=10_000).warnings() == {}
    assert list(replace(at, noise_multiplier=50 / math.sqrt(999), parameters=None).warnings()) == ["noise"]
    assert replace(at, noise_multiplier=50 / math.sqrt(1001), parameters=None).warnings() == {}
    assert replace(at, records=None, delta=0.9).warnings() == {}


def test_a_delta_of_one_record_publishes_it() -> None:
    planning.check_delta_for(0.99e-3, 1000)
    with pytest.raises(ConfigError, match=r"must be below 1/n = 1\.0e-03; use at most 1\.0e-05"):
        planning.check_delta_for(1e-3, 1000)


def test_an_epsilon_is_stated_up_to_a_mean_loss_of_a_thousand() -> None:
    # Without sampling the mean loss is T / (2 sigma^2).
    planning.check_statable(GaussianSteps(noise_multiplier=0.5, sample_rate=1.0, steps=500))
    with pytest.raises(ConfigError, match="501 steps: it would be about a thousand or more"):
        planning.check_statable(GaussianSteps(noise_multiplier=0.5, sample_rate=1.0, steps=501))
    for steps, least in ((500, 0.5), (501, 1.0)):
        curve = planning.epsilon_by_noise(1.0, steps, least=0.5, most=0.5 * 2**14, delta=1e-5)
        assert curve[0][1] == least


def test_a_curve_by_steps_is_dense_where_it_is_steep() -> None:
    curve = planning.epsilon_by_steps(1.1, 0.05, most=200, delta=1e-5)
    assert [length for length, _ in curve] == sorted({1 + round(199 * (part / 14) ** 2) for part in range(15)})
    assert (len(curve), curve[0][0], curve[-1][0]) == (15, 1, 200)
    for length, epsilon in curve[::7]:
        assert epsilon == compose_epsilon([GaussianSteps(noise_multiplier=1.1, sample_rate=0.05, steps=length)], 1e-5)
    assert [length for length, _ in planning.epsilon_by_steps(1.1, 0.05, most=1, delta=1e-5)] == [1]


def test_a_curve_by_noise_leaves_out_what_has_no_epsilon() -> None:
    curve = planning.epsilon_by_noise(0.05, 100, least=0.5, most=8.0, delta=1e-5)
    assert [sigma for _, sigma in curve] == pytest.approx([0.5 * 16 ** (part / 14) for part in range(15)])
    for epsilon, sigma in curve[::7]:
        assert epsilon == compose_epsilon([GaussianSteps(noise_multiplier=sigma, sample_rate=0.05, steps=100)], 1e-5)
    # T / (2 sigma^2) is 1,000 at sigma 0.224; noise begins at the least that is accounted for.
    found = [sigma for _, sigma in planning.epsilon_by_noise(1.0, 100, least=0.01, most=2.0, delta=1e-5)]
    assert found == pytest.approx([0.2 * 10 ** (part / 14) for part in range(1, 15)])


@pytest.mark.parametrize("most", [3, 4, 5, 20, 64])
def test_the_largest_number_that_holds(most: int) -> None:
    for least in (1, 3):
        for last in range(least, most + 3):
            asked: list[int] = []
            found = planning.largest(lambda n, last=last, asked=asked: bool(asked.append(n)) or n <= last, least, most)
            assert found == min(last, most)
            assert all(least < n <= most for n in asked)
            assert len(asked) <= 2 * math.log2(max(found - least, 1) + 1) + 3


@pytest.mark.parametrize("opened", [{"steps": 400}, {"epochs": 4.0}])
def test_the_search_for_a_rate_begins_near_the_answer(opened: dict[str, Any]) -> None:
    question = Question(noise_multiplier=1.5, epsilon=2.0, delta=1e-5, **opened)
    guess = planning._likely_rate(question, 1.5, 2.0, 1e-5)
    assert guess == pytest.approx(solve(question).sample_rate, rel=0.5)


# --- sites ---

RUN = GaussianSteps(noise_multiplier=1.0, sample_rate=0.1, steps=20)


def export(*, cap: float = 8.0, runs: int = 1, delta: float = 1e-5, composition: str = "fixed") -> LedgerExport:
    charge = {"job_id": "a" * 64, "noise_multiplier": 1.2, "sample_rate": 0.1, "steps": 20, "committed": True}
    time = "2031-05-04T12:00:00.000+00:00"
    return LedgerExport(
        site="st-anna",
        dataset="notes",
        unit="record",
        declared_records=1024,
        epsilon=cap,
        delta=delta,
        composition=composition,  # type: ignore[arg-type]
        charges=tuple(ChargedSteps(**charge, round=number, time=time) for number in range(runs)),  # type: ignore[arg-type]
        num_entries=3,
        head_sha256="0" * 64,
        exported_at=time,
    )


def test_spent_is_the_composition_of_everything() -> None:
    account = export(runs=2)
    past = GaussianSteps(noise_multiplier=1.2, sample_rate=0.1, steps=40)
    assert spent(account, []) == compose_epsilon([past], 1e-5)
    assert spent(account, [RUN]) == compose_epsilon([past, RUN], 1e-5) > spent(account, [])
    assert spent(export(runs=0), []) == 0.0


def test_an_adaptive_account_is_measured_by_its_filter() -> None:
    account = export(composition="adaptive")
    orders = filter_orders(epsilon=8.0, delta=1e-5)
    expected = filter_epsilon([*account.mechanisms, RUN], delta=1e-5, orders=orders)
    assert spent(account, [RUN]) == expected > spent(export(), [RUN])
    answer = can_afford(account, RUN, local_steps=4, delta=1e-5)
    assert (answer.composition, answer.epsilon_after[0]) == ("adaptive", expected)
    fitting = [replace(RUN, steps=answer.steps_affordable + k) for k in (0, 1)]
    assert spent(account, fitting[:1]) <= 8.0 < spent(account, fitting[1:])


def test_affordable_is_what_the_cap_allows() -> None:
    """Each verdict, with caps just above and just below what it takes."""
    after = [spent(export(), [replace(RUN, steps=20 * count)]) for count in (1, 2, 3)]
    verdicts = ("no", "this run only", "this run and one more", "yes, all three")
    for count, epsilon in enumerate(after, start=1):
        for cap, fitting in ((epsilon, count), (epsilon * (1 - 1e-9), count - 1)):
            answer = can_afford(export(cap=cap), RUN, local_steps=4, delta=1e-5)
            assert (answer.num_runs, answer.verdict) == (fitting, verdicts[fitting])
            assert answer.epsilon_after == tuple(after)
            assert (answer.steps_affordable >= 20 * count) == (fitting == count)
            assert (answer.rounds is None) == (answer.noise_multiplier is None) == (fitting == 3)
            one_more = replace(RUN, steps=answer.steps_affordable + 1)
            assert spent(export(), [replace(RUN, steps=answer.steps_affordable)]) <= cap < spent(export(), [one_more])


@pytest.mark.parametrize(("cap", "wanted"), [(3.5, 1), (5.0, 3)])
def test_advice_makes_it_fit(cap: float, wanted: int) -> None:
    account = export(cap=cap)
    answer = can_afford(account, RUN, local_steps=4, delta=1e-5)
    assert answer.noise_multiplier is not None
    assert answer.rounds is not None
    for sigma, fits in ((answer.noise_multiplier, True), (answer.noise_multiplier - 0.01, False)):
        quieter = replace(RUN, noise_multiplier=sigma, steps=20 * wanted)
        assert (spent(account, [quieter]) <= cap) is fits
    for rounds, fits in ((answer.rounds, True), (answer.rounds + 1, False)):
        assert (spent(account, [replace(RUN, steps=4 * rounds * wanted)]) <= cap) is fits
    assert answer.advice == (
        f"{'It' if wanted == 1 else 'All three'} would fit with privacy.noise_multiplier = {as_set(answer.noise_multiplier)} or "
        f"more, or with training.rounds = {answer.rounds} or less and privacy.noise_multiplier = 1."
    )


@pytest.mark.parametrize(("sigma", "printed"), [(1.2345, "1.2345"), (1.23456, "1.2346"), (1.0001, "1.0001")])
def test_advice_of_fewer_rounds_names_noise_rounded_up(sigma: float, printed: str) -> None:
    """To the fourth decimal, like all noise that is printed; one that has no more stays as it is."""
    answer = can_afford(export(cap=4.0), replace(RUN, noise_multiplier=sigma), local_steps=4, delta=1e-5)
    assert answer.advice.endswith(f"or less and privacy.noise_multiplier = {printed}.")


@pytest.mark.parametrize(
    ("sigma", "needed", "expected"),
    [(1.0, 1.001, 1.01), (1.2345, 1.2346, 1.24), (1.2345, 1e4, 1e4), (1.2345, 10_000.001, None)],
)
def test_noise_is_advised_in_hundredths_from_the_next_one_to_the_most_that_there_is(
    monkeypatch: pytest.MonkeyPatch, sigma: float, needed: float, expected: float | None
) -> None:
    asked = []

    def rule(_: object, extra: Sequence[GaussianSteps], *, alone: bool) -> float:
        asked.extend(event.noise_multiplier for event in extra)
        return 1.0 if all(event.noise_multiplier >= needed for event in extra) else 100.0

    monkeypatch.setattr(affordability, "spent", rule)
    answer = can_afford(export(cap=50), replace(RUN, noise_multiplier=sigma), local_steps=4, delta=1e-5)
    assert answer.noise_multiplier == expected
    assert min(asked) == sigma  # less noise than the run's is not tried


def test_a_spent_budget_is_called_spent() -> None:
    answer = can_afford(export(cap=1.0, runs=5), RUN, local_steps=4, delta=1e-5)
    assert (answer.verdict, answer.steps_affordable, answer.noise_multiplier) == ("no", 0, None)
    assert "The budget is spent" in answer.advice


def test_a_weaker_delta_is_refused_whatever_the_budget() -> None:
    answer = can_afford(export(cap=50, runs=0), RUN, local_steps=4, delta=1e-4)
    assert answer.verdict == "no"
    assert answer.advice == "The job's delta 0.0001 is weaker than the site's 1e-05, so the site refuses it. Lower it."
    assert can_afford(export(cap=50, runs=0), RUN, local_steps=4, delta=1e-5).advice == ""
    both = can_afford(export(cap=3.5), RUN, local_steps=4, delta=1e-4).advice
    assert both.startswith(f"{answer.advice} It would fit with privacy.noise_multiplier = ")


def test_the_accountant_is_chosen_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affordability, "spent", lambda _, extra, alone: 1.0 + sum(event.steps for event in extra))
    answer = can_afford(export(cap=50), RUN, local_steps=4, delta=1e-5)
    assert (answer.epsilon_now, answer.epsilon_after, answer.steps_affordable) == (1.0, (21.0, 41.0, 61.0), 49)
