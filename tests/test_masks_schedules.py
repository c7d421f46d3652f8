"""Do the density and temperature schedules pass through the papers' values?"""

from __future__ import annotations

import itertools

import pytest

from ghostmask.masks.schedules import cubic_density, linear_temperature, probability_rate

IMAGENET = {"start": 16, "end": 60}
CIFAR = {"start": 48, "end": 180}


@pytest.mark.parametrize("target", [0.1, 0.05, 0.01, 0.001])
@pytest.mark.parametrize("span", [IMAGENET, CIFAR])
def test_density_is_one_before_t1_and_the_target_after_t2(span: dict[str, float], target: float) -> None:
    assert cubic_density(0, target=target, **span) == 1
    assert cubic_density(span["start"], target=target, **span) == pytest.approx(1, abs=1e-15)
    assert cubic_density(span["end"], target=target, **span) == target
    assert cubic_density(10 * span["end"], target=target, **span) == target


def test_density_has_the_published_values_of_equation_7() -> None:
    assert cubic_density(38, target=0.1, **IMAGENET) == pytest.approx(0.1 + 0.9 / 8)  # half way: (1/2)^3
    assert cubic_density(27, target=0.05, **IMAGENET) == pytest.approx(0.05 + 0.95 * 27 / 64)  # a quarter: (3/4)^3
    assert cubic_density(114, target=0.01, **CIFAR) == pytest.approx(0.01 + 0.99 / 8)
    assert cubic_density(147, target=0.001, **CIFAR) == pytest.approx(0.001 + 0.999 / 64)


def test_density_falls_without_a_jump() -> None:
    values = [cubic_density(16 + 44 * i / 1000, target=0.02, **IMAGENET) for i in range(1001)]
    steps = [a - b for a, b in itertools.pairwise(values)]
    assert min(steps) >= 0
    assert max(steps) < 3.01e-3  # the steepest slope, 3 (1 - target) / 1000, is at the start


def test_density_is_one_minus_the_sparsity_of_gradual_magnitude_pruning() -> None:
    for t in range(20, 80):
        sparsity = 0.95 * (1 - (1 - (t - 20) / (79 - 20)) ** 3) if t < 79 else 0.95
        assert cubic_density(t, 20, 79, target=0.05) == pytest.approx(1 - sparsity, abs=1e-15)


def test_density_falls_at_once_where_start_and_end_are_one() -> None:
    assert [cubic_density(t, 5, 5, target=0.1) for t in (0, 4.9, 5, 6)] == [1.0, 1.0, 0.1, 0.1]


def test_temperature_falls_from_one_to_its_end() -> None:
    assert linear_temperature(0, 300) == 1
    assert linear_temperature(150, 300) == pytest.approx(0.97 * 0.5 + 0.03)
    assert linear_temperature(299, 300) == pytest.approx(0.97 / 300 + 0.03)
    assert linear_temperature(300, 300) == 0.03
    assert linear_temperature(400, 300) == 0.03
    assert linear_temperature(100, 100, end=0.5) == 0.5


@pytest.mark.parametrize(
    "call", ["cubic_density(1, 6, 5, 0.1)", "cubic_density(1, 5, 6, 0)", "cubic_density(1, 5, 6, 1.5)"]
)
def test_a_wrong_density_schedule_is_refused(call: str) -> None:
    with pytest.raises(ValueError, match="give"):
        eval(call)


@pytest.mark.parametrize(
    "call", ["linear_temperature(1, 0)", "linear_temperature(1, 5, 0)", "linear_temperature(1, 5, 2)"]
)
def test_a_wrong_temperature_schedule_is_refused(call: str) -> None:
    with pytest.raises(ValueError, match="give"):
        eval(call)


def test_the_rate_of_the_probabilities_is_inverse_to_the_steps_between_its_limits() -> None:
    assert probability_rate(440) == 41 / 440
    assert probability_rate(58_800) == probability_rate(500_400) == 6e-3
    assert probability_rate(1) == probability_rate(110) == 0.12
    rates = [probability_rate(steps) for steps in (1, 300, 400, 2_000, 6_834, 10**6)]
    assert rates == sorted(rates, reverse=True)
