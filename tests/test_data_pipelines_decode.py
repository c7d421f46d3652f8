"""Are images of any size cropped as said: at random from (seed, epoch, index) for training, at the centre otherwise?"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.loading import order
from ghostmask.data_pipelines.open import open_dataset, prepare
from ghostmask.engine.data import Parts
from ghostmask.engine.world import World

SHARED = Path(__file__).resolve().parents[2] / "shared"
SIDE, NUM_TRAIN = 32, 24


def _photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A smooth picture, so that JPEG changes it little."""
    return cv2.resize(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of many shapes in three classes, some gray, one tiny, one very wide."""
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for split, count in (("train", NUM_TRAIN), ("val", 9)):
        for k in range(count):
            folder = root / split / f"class{k % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            shape = {0: (12, 9), 1: (40, 400)}.get(k, (int(rng.integers(30, 120)), int(rng.integers(30, 120))))
            image = Image.fromarray(_photo(rng, *shape))
            (image.convert("L") if k % 5 == 4 else image).save(folder / f"{k:03}.jpg", quality=95)
    return root


def _config(root: Path, jpeg_fraction: float, **settings: object) -> DataConfig:
    base = {"dataset": "imagefolder", "root": str(root), "batch_size": 12, "num_workers": 1, "image_size": SIDE}
    return DataConfig(jpeg_fraction=jpeg_fraction, max_resolution=64, **{**base, **settings})  # type: ignore[arg-type]


def _gray_levels(images: torch.Tensor) -> np.ndarray:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((images.permute(0, 2, 3, 1) * std + mean) * 255).round().numpy().astype(np.int64)


def _open(config: DataConfig, rank: int = 0, size: int = 1):  # type: ignore[no-untyped-def]
    prepare(config, progress=False)
    return open_dataset(config, 0, World(rank, size, torch.device("cpu")), Parts(size, rank, 1))


def _stored(root: Path) -> list[np.ndarray]:
    """What the .beton holds when nothing is JPEG: the images in class order, shorter side at most 64."""
    from ghostmask.data_pipelines.sources.imagefolder import imagefolder

    images = imagefolder(_config(root, 0.0)).images("train")
    return [images[i][0].data for i in range(len(images))]


def test_training_crops_are_the_derived_boxes_resized(root: Path) -> None:
    from ghostmask.data_pipelines.loading.pixels import random_box

    pipeline = _open(_config(root, 0.0))
    stored = _stored(root)
    rows = order.train_rows(0, 2, num_train=NUM_TRAIN, batch_size=12, parts=Parts())
    images = np.concatenate([_gray_levels(b.images) for b in pipeline.train(2)])
    for (index, word), image in zip(rows, images, strict=True):
        source = stored[int(index)]
        top, left, height, width = random_box(*source.shape[:2], word)
        crop = source[top : top + height, left : left + width]
        expected = cv2.resize(crop, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.int64)
        expected = expected[:, ::-1] if word & np.uint64(1) else expected
        assert abs(image - expected).max() <= 1
    pipeline.close()


def test_training_without_augmentation_takes_the_centre_square(root: Path) -> None:
    pipeline = _open(_config(root, 0.0))
    unaugmented = _open(_config(root, 0.0, augment=False))
    rows = order.train_rows(0, 0, num_train=NUM_TRAIN, batch_size=12, parts=Parts())
    stored = _stored(root)
    images = np.concatenate([_gray_levels(b.images) for b in unaugmented.train(0)])
    for index, image in zip(rows[:, 0], images, strict=True):
        height, width = stored[int(index)].shape[:2]
        side = int(0.875 * min(height, width))
        top, left = (height - side) // 2, (width - side) // 2
        crop = stored[int(index)][top : top + side, left : left + side]
        assert abs(image - cv2.resize(crop, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.int64)).max() <= 1
    assert sum(len(b.labels) for b in pipeline.evaluate()) == 9
    pipeline.close()
    unaugmented.close()


def test_jpeg_and_raw_images_look_alike_and_gray_ones_have_three_equal_channels(root: Path) -> None:
    raw, jpeg = _open(_config(root, 0.0)), _open(_config(root, 1.0))
    gray = 0
    for a, b in zip(raw.train(0), jpeg.train(0), strict=True):
        x, y = _gray_levels(a.images), _gray_levels(b.images)
        assert 0 < abs(x - y).mean() < 4
        assert torch.equal(a.labels, b.labels)
        gray += (x == x[..., :1]).all(axis=(1, 2, 3)).sum()
    assert gray == 4  # images 4, 9, 14 and 19 of 24
    raw.close()
    jpeg.close()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_crops_do_not_depend_on_ranks_or_threads(root: Path, num_workers: int) -> None:
    whole = list(_open(_config(root, 0.5)).train(7))
    for rank in range(3):
        share = list(_open(_config(root, 0.5, num_workers=num_workers), rank, 3).train(7, first_step=1))
        assert torch.equal(whole[1].images[rank::3], share[0].images)
        assert len(share) == 1


@pytest.mark.parametrize(("pad", "flip"), [(0, False), (2, True), (1, False), (0, True), (8, True)])
def test_shift_and_flip_equal_padding_and_slicing_one_image(pad: int, flip: bool) -> None:
    from ghostmask.data_pipelines.loading.pixels import copy_whole, draws

    images = np.random.default_rng(0).integers(0, 256, (40, 7, 9, 3), dtype=np.uint8)
    rows = np.stack([np.arange(40, dtype=np.uint64)[::-1], order.sample_words(1, 2, np.arange(40))], 1)
    result = np.full((40, 7, 9, 3), 77, np.uint8)
    copy_whole(rows, images.reshape(-1), np.arange(40, dtype=np.uint64) * 189, pad, flip, result)
    for k in range(40):
        down, right, mirrored = draws(rows[k, 1], pad, flip)
        padded = np.pad(images[39 - k], ((pad, pad), (pad, pad), (0, 0)))
        expected = padded[down : down + 7, right : right + 9]
        np.testing.assert_array_equal(result[k], expected[:, ::-1] if mirrored else expected)


def _ffcvs_resize(image: np.ndarray, box: tuple[int, int, int, int], side: tuple[int, int]) -> np.ndarray:
    from ffcv.libffcv import ctypes_resize

    (top, left, h, w), out = box, np.empty((*side, 3), np.uint8)
    ctypes_resize(
        0, image.ctypes.data, *image.shape[:2], top, top + h, left, left + w, out.ctypes.data, *side
    )  # fmt: skip
    return out


def test_shrinking_gives_the_bits_of_ffcvs_resize() -> None:
    from ghostmask.data_pipelines.loading.pixels import load_kernels, resized

    load_kernels()
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)
    image[:100] = 255
    for _ in range(400):
        side = tuple(rng.integers(1, 60, 2).tolist())
        h, w = (int(rng.integers(1, most + 1)) for most in image.shape[:2])
        if rng.random() < 0.3:  # just larger, equal, twice as large
            h, w = side[0] * int(rng.integers(1, 4)) + int(rng.integers(0, 3)), side[1] + int(rng.integers(0, 3))
        top, left = int(rng.integers(0, 300 - h + 1)), int(rng.integers(0, 400 - w + 1))
        out = np.full((*side, 3), 77, np.uint8)
        resized(image.reshape(-1), 300, 400, top, left, h, w, out)
        np.testing.assert_array_equal(out, _ffcvs_resize(image, (top, left, h, w), side))


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((63, 500), 1),
        ((64, 64), 2),
        ((127, 1000), 2),
        ((128, 128), 4),
        ((1000, 255), 4),
        ((256, 300), 8),
        ((9999,) * 2, 8),
    ],
)
def test_a_jpeg_is_decoded_no_smaller_than_its_crop_becomes(box: tuple[int, int], expected: int) -> None:
    from ghostmask.data_pipelines.loading.pixels import fraction

    assert fraction(*box, SIDE, SIDE) == expected


def test_fast_decoding_changes_little_and_only_jpegs_with_large_crops(root: Path) -> None:
    exact, fast = (_open(_config(root, 0.5, fast_decode=on, image_size=16)) for on in (False, True))
    jpeg = exact._loaders["train"]._loader.reader.metadata["f0"]["mode"] == 0
    rows = order.train_rows(0, 1, num_train=NUM_TRAIN, batch_size=12, parts=Parts())
    changed = {}
    for a, b, indices in zip(exact.train(1), fast.train(1), rows[:, 0].astype(int).reshape(-1, 12), strict=True):
        for x, y, index in zip(_gray_levels(a.images), _gray_levels(b.images), indices, strict=True):
            changed[int(index)] = abs(x - y).mean()
    assert {index for index, by in changed.items() if by > 0} <= set(np.flatnonzero(jpeg).tolist())
    assert 0 < max(changed.values()) < 16  # a box moves by up to half a pixel of the smaller image
    exact.close()
    fast.close()


def test_draws_cover_every_place_evenly() -> None:
    from ghostmask.data_pipelines.loading.pixels import draws

    down, right, flip = np.array([draws(word, 4, True) for word in order.sample_words(0, 0, np.arange(81_000))]).T
    cells = np.bincount(down * 9 + right, minlength=81)
    assert cells.shape == (81,)
    assert abs(cells - 1000).max() < 5.5 * 1000**0.5
    assert abs(flip.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(down, flip)[0, 1]) < 0.02


def test_no_flip_without_flip() -> None:
    from ghostmask.data_pipelines.loading.pixels import draws

    assert not any(draws(word, 1, False)[2] for word in order.sample_words(0, 0, np.arange(1000)))


def test_random_boxes_lie_inside_and_are_distributed_like_torchvisions() -> None:
    from torchvision.transforms import RandomResizedCrop

    from ghostmask.data_pipelines.loading.pixels import random_box

    ours = np.array([random_box(300, 400, word) for word in order.sample_words(0, 0, np.arange(4000))])
    torch.manual_seed(0)
    image = torch.zeros(3, 300, 400)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    assert (ours >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= 300).all()
    assert (ours[:, 1] + ours[:, 3] <= 400).all()

    def quantities(boxes: np.ndarray) -> np.ndarray:
        area, aspect = boxes[:, 2] * boxes[:, 3] / 120_000, boxes[:, 3] / boxes[:, 2]
        return np.c_[boxes, area, area**2, aspect, aspect**2, boxes[:, 0] * boxes[:, 1]]

    a, b = quantities(ours), quantities(theirs)
    standard_error = np.sqrt((a.var(0) + b.var(0)) / 4000)
    assert (abs(a.mean(0) - b.mean(0)) < 4.5 * standard_error).all()


def test_more_workers_than_cores_are_a_warning_not_a_crash(root: Path) -> None:
    with pytest.warns(UserWarning, match=r"data\.num_workers = 4096: this machine has"):
        pipeline = _open(_config(root, 0.5, num_workers=4096))
    assert len(list(pipeline.train(0))) == 2
    pipeline.close()


def test_workers_are_a_ranks_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    from ghostmask.data_pipelines.loading.loader import usable_threads
    from ghostmask.engine.cores import usable_cores

    assert usable_threads(0) == usable_cores()
    for name, value in {"RANK": 1, "WORLD_SIZE": 64, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 64}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert usable_threads(0) == max(1, usable_cores() // 64)
    assert usable_threads(1) == 1


def test_shared_photographs_load(tmp_path: Path) -> None:
    source = SHARED / "data" / "imagenet_fullres"
    if not source.is_dir():
        pytest.skip("no photographs on this machine")
    for split in ("train", "val"):
        for folder in sorted(source.iterdir())[:6]:
            (tmp_path / split).mkdir(exist_ok=True)
            (tmp_path / split / folder.name).symlink_to(folder)
    pipeline = _open(
        DataConfig(dataset="imagefolder", root=str(tmp_path), batch_size=6, num_workers=1, max_resolution=256)
    )
    (batch,) = pipeline.train(0)
    assert batch.images.shape == (6, 3, 224, 224)
    assert 0.3 < batch.images.std() < 3
    assert sorted(batch.labels.tolist()) == list(range(6))
    pipeline.close()
