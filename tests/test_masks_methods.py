"""What every mask method in the registry must do: density, equal ranks, resume. New methods join by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from memory_run import CONFIG, complete, configured

from engine.spawn import run_distributed
from masks.registry import METHODS
from masks.topk import kept_count

BATCH_NORM = configured(CONFIG, model={"name": "digits_resnet"})
"""A network with batch norm: its running statistics are each rank's own between epochs."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """method -> the outcomes of an uninterrupted run on 2 ranks, made once."""
    made: dict[str, Any] = {}

    def get(method: str) -> Any:
        if method not in made:
            config = configured(BATCH_NORM, mask={"method": method})
            made[method] = run_distributed(complete, 2, str(tmp_path_factory.mktemp(method)), config)
        return made[method]

    return get


@pytest.mark.parametrize("method", METHODS)
def test_ranks_end_with_the_same_masks_at_exactly_the_density_asked_for(method: str, finished: Any) -> None:
    outcomes = finished(method)
    assert len({o.digest for o in outcomes}) == 1
    prunable = sum(m.numel() for m in outcomes[0].masks.values())
    if method == "dense":
        assert prunable == 0
        return
    assert outcomes[0].kept == kept_count(CONFIG.mask.density, prunable)
    pruned = [outcomes[0].weights[n][~m] for n, m in outcomes[0].masks.items()]
    assert not torch.cat(pruned).any()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_in_the_middle_and_resumed_ends_bit_identical(method: str, finished: Any, tmp_path: Path) -> None:
    config = configured(BATCH_NORM, mask={"method": method})
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        run_distributed(complete, 2, str(tmp_path), config, 6)
    outcomes = run_distributed(complete, 2, str(tmp_path), config)
    assert outcomes[0].resumed_at in (3, 4), "it started over, or from nowhere it should have"
    assert [o.digest for o in outcomes] == [o.digest for o in finished(method)]
    steps = [step for step, _ in finished(method)[0].fed]
    tail = finished(method)[0].fed[steps.index(outcomes[0].resumed_at) :]
    assert outcomes[0].fed == [f for f in tail if f in outcomes[0].fed], "the order of samples changed"
