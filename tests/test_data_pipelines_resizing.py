"""Do training images grow as said, by the epoch alone, and are they the same on any ranks and after a resume?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.loading.resizing import image_side
from ghostmask.data_pipelines.open import describe, open_dataset, prepare
from ghostmask.engine.data import Parts
from ghostmask.engine.errors import InputError
from ghostmask.engine.world import World
from ghostmask.launcher.checks import check_config
from ghostmask.launcher.settings import load_config


def _settings(**settings: Any) -> DataConfig:
    return DataConfig(dataset="imagefolder", **{"start_size": 160, "grow_from": 65, "grow_until": 76, **settings})


def test_sides_are_those_of_ffcvs_imagenet_recipe() -> None:
    def ffcv(epoch: int) -> int:  # get_resolution of ffcv-imagenet's train_imagenet.py, with its rn50_88_epochs.yaml
        low, high, start, end = 160, 192, 65, 76
        if epoch <= start or epoch >= end:
            return low if epoch <= start else high
        return int(np.round(np.interp([epoch], [start, end], [low, high])[0] / 32)) * 32

    assert [image_side(_settings(), 192, epoch) for epoch in range(90)] == [ffcv(epoch) for epoch in range(90)]


def test_sides_rise_from_the_first_to_the_full_one_through_multiples_of_32() -> None:
    sides = [image_side(_settings(start_size=96, grow_from=2, grow_until=12), 224, epoch) for epoch in range(20)]
    assert sides == sorted(sides)
    assert set(sides) == {96, 128, 160, 192, 224}
    assert (sides[2], sides[11], sides[12]) == (96, 224, 224)
    assert [image_side(_settings(grow_from=0, grow_until=1), 200, epoch) for epoch in (0, 1)] == [160, 200]


def test_without_a_first_side_nothing_changes() -> None:
    assert {image_side(DataConfig(), 224, epoch) for epoch in range(100)} == {224}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"start_size": 150}, "data.start_size = 150: give a multiple of 32"),
        ({"grow_until": 65}, "data.grow_until = 65: give an epoch after data.grow_from = 65"),
        ({"grow_from": -1}, "data.grow_from = -1"),
    ],
)
def test_odd_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        _settings(**settings)


def test_sides_that_do_not_fit_the_dataset_are_refused(root: Path) -> None:
    with pytest.raises(InputError, match=r"data\.start_size = 64: give a multiple of 32 below .* 64"):
        describe(_folder(root, start_size=64))
    with pytest.raises(InputError, match=r"data\.start_size = 32: images of cifar10 have one size"):
        describe(DataConfig(start_size=32, grow_until=1))
    with pytest.raises(InputError, match=r"data\.fast_decode = True: images of cifar10 have one size"):
        describe(DataConfig(fast_decode=True))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("data.start_size=160", "data.grow_until=301"), r"data\.grow_until = 301: train\.epochs = 300 ends before"),
        (("data.grow_until=3",), r"data\.grow_until = 3: is not read with data\.start_size=0"),
        (("data.window_pages=3",), r"data\.window_pages = 3: is not read with data\.order=random"),
        (
            ("data.dataset=imagefolder", "data.val_seed=3"),
            r"data\.val_seed = 3: is not read with data\.val_fraction=0",
        ),
    ],
)
def test_settings_that_a_run_would_not_read_are_refused(settings: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_config(load_config(None, list(settings)), 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for k in range(16):
            folder = root / split / f"class{k % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (90, 110, 3), np.uint8)).save(folder / f"{k}.png")
    prepare(_folder(root), progress=False)
    return root


def _folder(root: Path, **settings: Any) -> DataConfig:
    """Sides 32, 32, 32, 64, 64: epochs 0 to 4."""
    base = {"image_size": 64, "start_size": 32, "grow_from": 1, "grow_until": 4, "batch_size": 8, "num_workers": 1}
    return DataConfig(dataset="imagefolder", root=str(root), jpeg_fraction=0.5, **{**base, **settings})


def _open(root: Path, rank: int = 0, size: int = 1, **settings: Any) -> Any:
    parts = Parts(4, rank * (4 // size), 4 // size)
    return open_dataset(_folder(root, **settings), 0, World(rank, size, torch.device("cpu")), parts)


def test_training_images_have_the_side_of_their_epoch_and_evaluation_images_their_own(root: Path) -> None:
    pipeline = _open(root)
    for epoch, side in enumerate((32, 32, 32, 64, 64)):
        for batch in pipeline.train(epoch):
            assert batch.images.shape == (8, 3, side, side)
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert {batch.images.shape[2:] for batch in pipeline.evaluate()} == {(64, 64)}
    assert pipeline.image_shape == (3, 64, 64)


def test_small_images_are_those_of_a_run_whose_images_are_small_throughout(root: Path) -> None:
    settings = {"image_size": 32, "start_size": 0, "grow_from": 0, "grow_until": 0}
    prepare(_folder(root, **settings), progress=False)
    growing, small = _open(root), _open(root, **settings)
    for a, b in zip(growing.train(0), small.train(0), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_and_resumed_runs_get_the_same_pixels_in_any_order_of_epochs(root: Path, size: int) -> None:
    alone = _open(root)
    whole = {epoch: list(alone.train(epoch)) for epoch in range(5)}
    for rank in range(size):
        pipeline, each = _open(root, rank, size), 8 // size
        for epoch in (4, 0, 3):
            (rest,) = pipeline.train(epoch, first_step=1)
            assert torch.equal(rest.images, whole[epoch][1].images[rank * each : (rank + 1) * each])


def test_epochs_of_two_sides_may_be_open_at_once(root: Path) -> None:
    pipeline, alone = _open(root), _open(root)
    expected = [list(alone.train(epoch)) for epoch in (0, 4)]
    together = zip(pipeline.train(0), pipeline.train(4), strict=True)
    for small, large, (a, b) in zip(*expected, together, strict=True):
        assert torch.equal(small.images, a.images)
        assert torch.equal(large.images, b.images)
