"""A run killed at any moment, also while writing a checkpoint, ends on any ranks as one that was not killed."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest
from memory_run import CONFIG, Outcome, complete, configured

from ghostmask.engine.spawn import run_distributed

ALWAYS_SAVING = configured(
    CONFIG, model={"name": "digits_resnet"}, mask={"noises": 2}, checkpoint={"every_steps": 1, "keep": 2}
)
"""A network with batch norm and two noise groups; a checkpoint is being written during most of the run."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    return run_distributed(complete, 2, str(tmp_path_factory.mktemp("whole")), ALWAYS_SAVING)


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(s, marks=pytest.mark.soak) for s in range(3, 50))])
def test_a_run_killed_at_a_random_moment_ends_bit_identical(
    seed: int, uninterrupted: list[Outcome], tmp_path: Path
) -> None:
    draw = random.Random(seed)
    kills = [(draw.randrange(2, 19), draw.uniform(0.0, 0.15)) for _ in range(draw.choice((1, 1, 2)))]
    for step, delay_s in kills:
        # A second kill may find the run past that step already: then it ends, and the next call resumes its end.
        with contextlib.suppress(RuntimeError):
            run_distributed(complete, 2, str(tmp_path), ALWAYS_SAVING, step, delay_s)
    ranks = (2, 4, 1)[seed % 3]
    outcomes = run_distributed(complete, ranks, str(tmp_path), ALWAYS_SAVING)
    assert {o.digest for o in outcomes} == {uninterrupted[0].digest}
    whole, resumed = fed(uninterrupted), fed(outcomes)
    assert resumed == {step: whole[step] for step in resumed}, "the order of samples changed"


def fed(outcomes: list[Outcome]) -> dict[int, list[int]]:
    """Step -> the samples that all ranks together were fed in it."""
    found: dict[int, list[int]] = {}
    for outcome in outcomes:
        for step, samples in outcome.fed:
            found[step] = sorted({*found.get(step, []), *samples})
    return found
