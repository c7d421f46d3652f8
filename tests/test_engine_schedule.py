"""Is the learning rate the published function of the step?"""

from __future__ import annotations

import math

import pytest

from ghostmask.engine.schedule import LearningRate


def test_cosine_falls_from_one_to_zero_over_the_phase() -> None:
    rate = LearningRate("cosine", total=100)
    assert rate.factor(0) == 1
    assert rate.factor(50) == pytest.approx(0.5)
    assert rate.factor(25) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert rate.factor(99) == pytest.approx(0, abs=3e-4)


def test_warm_up_rises_in_equal_steps_and_hands_over_to_the_schedule_at_one() -> None:
    rate = LearningRate("cosine", total=100, warmup=10)
    rises = [rate.factor(s + 1) - rate.factor(s) for s in range(10)]
    assert rises == pytest.approx([1 / 11] * 10)
    assert rate.factor(10) == 1
    assert rate.factor(55) == pytest.approx(0.5)


def test_steps_multiply_at_each_milestone() -> None:
    rate = LearningRate("step", total=182, milestones=(90, 135), gamma=0.1)
    assert [rate.factor(s) for s in (0, 89, 90, 134, 135, 181)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_constant_stays() -> None:
    assert {LearningRate("constant", total=5).factor(s) for s in range(5)} == {1.0}
