"""What every mask method in the registry must do: density, equal ranks, resume. New methods join by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from memory_data import MemoryData
from memory_run import CONFIG, complete, configured

from ghostmask.engine.spawn import run_distributed
from ghostmask.launcher.config import RunConfig
from ghostmask.masks.mask_file import write_masks
from ghostmask.masks.methods.random_mask import random_mask
from ghostmask.masks.prunable import prunable_weights
from ghostmask.masks.registry import METHODS
from ghostmask.masks.scoring.allocation import layer_counts
from ghostmask.masks.scoring.topk import kept_count
from ghostmask.models.build import build_model

BATCH_NORM = configured(CONFIG, model={"name": "digits_resnet"})
"""A network with batch norm: its running statistics are each rank's own between epochs."""


@pytest.fixture(scope="module")
def mask_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What mask.method=file reads: a random mask of the density that all methods are asked for."""
    weights = prunable_weights(build_model(BATCH_NORM.model, 4, MemoryData.image_shape, seed=3))
    counts = layer_counts([w.shape for w in weights.values()], CONFIG.mask.density, "erk")
    masks = {n: random_mask(w, count, 1, n) for (n, w), count in zip(weights.items(), counts, strict=True)}
    path = tmp_path_factory.mktemp("file") / "mask.safetensors"
    write_masks(path, masks, {})
    return str(path)


def chosen(method: str, mask_file: str) -> RunConfig:
    """The configuration of a run with the method."""
    path = mask_file if method == "file" else ""
    return configured(BATCH_NORM, mask={"method": method, "path": path})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, mask_file: str) -> Any:
    """method -> the outcomes of an uninterrupted run on 2 ranks, made once."""
    made: dict[str, Any] = {}

    def get(method: str) -> Any:
        if method not in made:
            config = chosen(method, mask_file)
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
def test_a_run_killed_in_the_middle_and_resumed_ends_bit_identical(
    method: str, finished: Any, mask_file: str, tmp_path: Path
) -> None:
    config = chosen(method, mask_file)
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        run_distributed(complete, 2, str(tmp_path), config, 6)
    outcomes = run_distributed(complete, 2, str(tmp_path), config)
    assert outcomes[0].resumed_at in (3, 4), "it started over, or from nowhere it should have"
    assert [o.digest for o in outcomes] == [o.digest for o in finished(method)]
    fed = finished(method)[0].fed
    # A finder has seen the first steps' images before training did: the last time counts.
    resumed = max(i for i, (step, _) in enumerate(fed) if step == outcomes[0].resumed_at)
    tail = fed[resumed:]
    assert outcomes[0].fed == [f for f in tail if f in outcomes[0].fed], "the order of samples changed"
