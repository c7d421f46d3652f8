"""Do images that live on the device give the very bits that FFCV's loader gives? Real FFCV throughout."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch

from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.loading.pipeline import BetonPipeline
from ghostmask.data_pipelines.loading.resident import ResidentPipeline
from ghostmask.data_pipelines.open import is_resident, open_dataset, prepare
from ghostmask.data_pipelines.source import SPLITS, Augmentation, Source
from ghostmask.data_pipelines.sources.cifar import PAD_CROP_FLIP
from ghostmask.data_pipelines.writing.write import write_images
from ghostmask.engine.data import Parts
from ghostmask.engine.errors import InputError
from ghostmask.engine.world import World, single

NUM = {"train": 100, "eval": 31}
SIZE, BATCH = 16, 12


class Pixels:
    """Random images."""

    def __init__(self, number: int) -> None:
        self.pixels = np.random.default_rng(number).integers(0, 256, (number, SIZE, SIZE, 3), np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]:
        return self.pixels[index], index % 7


def source(augmentation: Augmentation = PAD_CROP_FLIP) -> Source:
    moments = (0.49, 0.48, 0.44), (0.25, 0.24, 0.26)
    return Source("pixels", 7, SIZE, *moments, augmentation, lambda split: Pixels(NUM[split]), lambda: "pixels")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    found = {split: folder / f"{split}.beton" for split in SPLITS}
    for split, path in found.items():
        write_images(Pixels(NUM[split]), path, num_workers=1)
    return found


@pytest.mark.parametrize("augmentation", [PAD_CROP_FLIP, Augmentation(pad=2), Augmentation(flip=True), Augmentation()])
@pytest.mark.parametrize("parts", [Parts(), Parts(4, 2, 2), Parts(3, 1, 1)])
def test_every_batch_has_the_bits_of_ffcv_s_loader(
    augmentation: Augmentation, parts: Parts, paths: dict[str, Path]
) -> None:
    config = DataConfig(
        dataset="cifar10", batch_size=BATCH, num_workers=1, order="quasi_random" if parts.total == 4 else "random"
    )
    world = World(1, 2, torch.device("cpu"))
    both = [
        kind(config, source(augmentation), paths, 7, dict.fromkeys(paths, ""), seed=5, world=world, parts=parts)
        for kind in (BetonPipeline, ResidentPipeline)
    ]
    assert both[0].identity == both[1].identity
    assert both[0].steps_per_epoch == both[1].steps_per_epoch == 8
    passes = [[pipe.train(0), pipe.train(1), pipe.train(3, first_step=5), pipe.evaluate()] for pipe in both]
    seen = 0
    for theirs, ours in zip(*passes, strict=True):
        for theirs_batch, our_batch in zip_longest(theirs, ours):
            assert torch.equal(theirs_batch.images, our_batch.images)
            assert torch.equal(theirs_batch.labels, our_batch.labels)
            assert our_batch.images.is_contiguous(memory_format=torch.channels_last)
            seen += len(our_batch.labels)
    assert seen == (8 + 8 + 3) * BATCH // parts.total * parts.count + 15
    for pipe in both:
        pipe.close()


def test_the_setting_decides_where_images_live(tmp_path: Path) -> None:
    given = {"dataset": "synthetic", "root": str(tmp_path), "num_train": 24, "num_eval": 8, "batch_size": 8}
    prepare(DataConfig(**given), progress=False)  # type: ignore[arg-type]
    for resident, kind in (("auto", BetonPipeline), ("never", BetonPipeline), ("always", ResidentPipeline)):
        config = DataConfig(**given, resident=resident)  # type: ignore[arg-type]
        pipe = open_dataset(config, 0, single(), Parts())
        assert type(pipe) is kind
        pipe.close()


def test_auto_keeps_small_images_on_a_gpu_and_leaves_large_sets_to_the_loader() -> None:
    auto = DataConfig(dataset="cifar10")
    assert is_resident(auto, source(), 60_000, "cuda")
    assert not is_resident(auto, source(), 60_000, "cpu")
    assert not is_resident(auto, source(), 10_000_000, "cuda")
    assert is_resident(DataConfig(dataset="cifar10", resident="always"), source(), 10_000_000, "cpu")
    photographs = source(Augmentation(flip=True, resized_crop=True))
    assert not is_resident(auto, photographs, 100, "cuda")
    with pytest.raises(InputError, match=r"data\.resident = 'always'.*differ in size"):
        is_resident(DataConfig(dataset="imagefolder", resident="always"), photographs, 100, "cuda")
