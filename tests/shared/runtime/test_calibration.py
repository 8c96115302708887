"""A temperature makes probabilities as good as they say, and changes no answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.optimize import minimize_scalar

from shared.errors import AdapterError
from shared.runtime.calibration import (
    BINS,
    CALIBRATION_FILE,
    calibration_error,
    fit_temperature,
    load_temperature,
    reliability,
    save_temperature,
)


def drawn(scale: float, *, count: int = 4000, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `scale` times as large as those that the labels were drawn by."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, generator=generator, dtype=torch.float64) * 2
    targets = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    return logits * scale, targets


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_the_temperature_is_how_much_too_sure_the_model_is(scale: float) -> None:
    assert fit_temperature(*drawn(scale)) == pytest.approx(scale, rel=0.06)


@pytest.mark.parametrize("scale", [0.3, 5.0])
def test_the_temperature_is_that_of_a_general_optimiser(scale: float) -> None:
    logits, targets = drawn(scale, count=300, seed=3)

    def loss(log_temperature: float) -> float:
        tempered = logits / torch.tensor(log_temperature).exp()
        return float(torch.nn.functional.cross_entropy(tempered, targets, label_smoothing=3 / 2 / 302))

    expected = minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-9}).x
    assert fit_temperature(logits, targets) == pytest.approx(float(torch.tensor(expected).exp()), rel=1e-3)


def test_it_holds_on_records_that_it_was_not_fitted_on() -> None:
    temperature = fit_temperature(*drawn(5.0, seed=1))
    logits, targets = drawn(5.0, seed=2)
    before, after = (calibration_error(reliability(some, targets)) for some in (logits, logits / temperature))
    assert before > 0.15
    assert after < 0.03
    assert torch.equal(logits.argmax(dim=1), (logits / temperature).argmax(dim=1))


@pytest.mark.parametrize(("count", "classes"), [(20, 2), (61, 4), (1000, 77)])
def test_answers_that_are_all_right_support_no_certainty(count: int, classes: int) -> None:
    """Rule of succession: after n right answers of n the next is right with (n + 1) / (n + 2)."""
    targets = torch.arange(count) % classes
    logits = 9 * torch.nn.functional.one_hot(targets, classes).double()
    confidence = (logits / fit_temperature(logits, targets)).softmax(dim=1).max(dim=1).values
    assert confidence.tolist() == pytest.approx([(count + 1) / (count + 2)] * count, rel=1e-9)


def test_worthless_answers_have_the_temperature_at_the_end() -> None:
    targets = torch.tensor([0, 1] * 50)
    logits = torch.nn.functional.one_hot(targets, 2).double()
    assert fit_temperature(1 - logits, targets) == pytest.approx(100.0, rel=1e-6)


def test_the_error_is_the_mean_distance_of_confidence_and_accuracy() -> None:
    """Eight answers at 0.75, of which half are right: 25 points."""
    logits = torch.tensor([[0.75, 0.25]] * 8, dtype=torch.float64).log()
    bins = reliability(logits, torch.tensor([0, 1] * 4))
    assert calibration_error(bins) == pytest.approx(0.25)
    assert len(bins) == BINS
    assert [one.count for one in bins if one.count] == [8]
    certain = reliability(torch.tensor([[500.0, 0.0]], dtype=torch.float64), torch.tensor([0]))
    assert certain[-1].count == 1


def test_the_temperature_lies_beside_the_adapter(tmp_path: Path) -> None:
    assert load_temperature(tmp_path) == 1.0
    save_temperature(tmp_path, 2.5)
    assert load_temperature(tmp_path) == 2.5


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"temperature": 0}', '{"temperature": "2"}', '{"temperature": NaN}', "[" * 100_000]
)
def test_a_damaged_temperature_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / CALIBRATION_FILE).write_text(content)
    with pytest.raises(AdapterError, match=r"holds no temperature from 0\.05 to 100"):
        load_temperature(tmp_path)
