"""Are the datasets what they say: digits' split, synthetic's patterns, CIFAR's pixels, folders of odd images?"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.open import describe, prepare
from ghostmask.data_pipelines.registry import DATASETS
from ghostmask.data_pipelines.source import Augmentation, Images
from ghostmask.data_pipelines.sources.cifar import cifar10, cifar100
from ghostmask.data_pipelines.sources.digits import digits, split_indices
from ghostmask.data_pipelines.sources.imagefolder import imagefolder, load_rgb
from ghostmask.data_pipelines.sources.synthetic import synthetic
from ghostmask.engine.errors import InputError

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _arrays(images: Images) -> tuple[np.ndarray, np.ndarray]:
    pairs = [images[i] for i in range(len(images))]
    return np.stack([p for p, _ in pairs]), np.array([label for _, label in pairs])


def test_digits_split_is_stratified_and_stable() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    labels = datasets.load_digits().target.astype(np.int64)
    train, evaluation = split_indices(labels)
    assert (len(train), len(evaluation)) == (1438, 359)
    assert sorted([*train, *evaluation]) == list(range(1797))
    for label in range(10):
        share = (labels[evaluation] == label).sum() / (labels == label).sum()
        assert abs(share - 0.2) < 0.004
    assert evaluation[:8].tolist() == [9, 13, 34, 36, 38, 48, 49, 55]


def test_digits_are_gray_and_match_their_mean_and_std() -> None:
    pytest.importorskip("sklearn")
    source = digits(DataConfig(dataset="digits"))
    pixels, _ = _arrays(source.images("train"))
    assert pixels.shape == (1438, 8, 8, 3)
    assert (pixels[..., 0] == pixels[..., 2]).all()
    assert pixels.max() == 255
    assert abs(pixels.mean() / 255 - source.mean[0]) < 1e-3
    assert abs(pixels.std() / 255 - source.std[0]) < 1e-3


def test_synthetic_images_are_learnable_by_a_linear_classifier() -> None:
    source = synthetic(DataConfig(dataset="synthetic", num_train=1024, num_eval=256))
    (x, y), (x_eval, y_eval) = _arrays(source.images("train")), _arrays(source.images("eval"))
    assert np.bincount(y, minlength=10).min() >= 102
    features, features_eval = (np.c_[a.reshape(len(a), -1) / 255.0 - 0.5, np.ones(len(a))] for a in (x, x_eval))
    ridge = features @ features.T + 100.0 * np.eye(len(features))
    weights = features.T @ np.linalg.solve(ridge, np.eye(10)[y])
    assert ((features_eval @ weights).argmax(1) == y_eval).mean() > 0.95
    one_pixel = (features[:, :1] @ np.ones((1, 1))).std()
    assert one_pixel > 0.1, "there must be noise"


def test_synthetic_images_are_the_same_every_time_and_differ_between_splits() -> None:
    source = synthetic(DataConfig(dataset="synthetic", image_size=8))
    train, evaluation = source.images("train"), source.images("eval")
    np.testing.assert_array_equal(train[5][0], source.images("train")[5][0])
    assert (train[5][0] != evaluation[5][0]).any()
    assert int(train[5][0].astype(np.int64).sum()) == 22230


def test_image_folder_reads_gray_and_palette_images_and_shrinks_the_shorter_side(tmp_path: Path) -> None:
    Image.new("L", (40, 30), 99).save(tmp_path / "gray.jpg")
    Image.new("P", (300, 100)).save(tmp_path / "palette.png")
    assert np.asarray(load_rgb(str(tmp_path / "gray.jpg"), 512)).shape == (30, 40, 3)
    assert np.asarray(load_rgb(str(tmp_path / "palette.png"), 50)).shape == (50, 150, 3)


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"broken\.jpg"):
        load_rgb(str(tmp_path / "broken.jpg"), 512)


def test_image_folder_without_val_or_with_other_classes_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "train" / "bird").mkdir(parents=True)
    (tmp_path / "train" / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "bird" / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "cat" / "a.png")
    source = imagefolder(DataConfig(dataset="imagefolder", root=str(tmp_path)))
    with pytest.raises(InputError, match=r"data\.root"):
        source.images("eval")
    (tmp_path / "val" / "dog").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "dog" / "a.png")
    with pytest.raises(InputError, match=r"differ in \['bird', 'cat', 'dog'\]"):
        source.images("eval")


def test_absent_cifar_that_cannot_be_downloaded_is_an_input_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy"):  # nobody listens there: as on a machine without a network
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    source = cifar10(DataConfig(root=str(tmp_path)))
    assert source.fingerprint() is None
    with pytest.raises(InputError, match=r"data\.root = .*cifar-10-batches-py is absent"):
        source.images("train")


def test_fixed_size_datasets_refuse_another_size() -> None:
    with pytest.raises(InputError, match=r"data\.image_size = 64"):
        cifar10(DataConfig(image_size=64))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "digits", "synthetic"])
def test_a_dataset_of_known_classes_can_be_described_without_its_files(name: str, tmp_path: Path) -> None:
    info = describe(DataConfig(dataset=name, root=str(tmp_path)))
    assert info.num_classes == (100 if name == "cifar100" else 10)
    assert info.image_shape == ((3, 8, 8) if name == "digits" else (3, 32, 32))
    assert info.needs_source == name.startswith("cifar")


def test_describing_absent_photographs_is_an_input_error(tmp_path: Path) -> None:
    for name in sorted(set(DATASETS) - {"cifar10", "cifar100", "digits", "synthetic"}):
        with pytest.raises(InputError, match=r"data\.root = .*no.* \.beton"):
            describe(DataConfig(dataset=name, root=str(tmp_path / "absent")))


@pytest.fixture(scope="module")
def cifar100_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (SHARED / "data" / "cifar100").is_dir():
        pytest.skip("no CIFAR-100 on this machine")
    root = tmp_path_factory.mktemp("cifar100")
    subprocess.run([sys.executable, str(SHARED / "tools" / "unpack_cifar100.py"), str(root)], check=True)
    return root


def test_a_subset_of_cifar_is_its_first_images_in_a_file_of_its_own(cifar100_root: Path) -> None:
    config = DataConfig(dataset="cifar100", root=str(cifar100_root))
    whole, part = cifar100(config), cifar100(replace(config, subset=300))
    images, first = whole.images("train"), part.images("train")
    assert (len(images), len(first), len(part.images("eval"))) == (50_000, 300, 10_000)
    assert [first[i][1] for i in range(300)] == [images[i][1] for i in range(300)]
    assert (first[299][0] == images[299][0]).all()
    assert part.beton("x", "train") != whole.beton("x", "train")
    assert part.beton("x", "eval") == whole.beton("x", "eval")


def test_cifar100_comes_out_of_ffcv_pixel_by_pixel(cifar100_root: Path, tmp_path: Path) -> None:
    import torchvision

    from ghostmask.data_pipelines.loading.decode import WholeImage
    from ghostmask.data_pipelines.loading.loader import BetonLoader
    from ghostmask.data_pipelines.loading.order import eval_rows
    from ghostmask.data_pipelines.writing.write import write_images

    source = cifar100(DataConfig(dataset="cifar100", root=str(cifar100_root)))
    assert source.fingerprint() == source.fingerprint()
    images = _First(source.images("eval"), 300)
    write_images(images, tmp_path / "x.beton")
    loader = BetonLoader(tmp_path / "x.beton", WholeImage(Augmentation()), 128, 1, 100)
    pixels = np.concatenate([batch.numpy().copy() for batch, _ in loader.batches(eval_rows(300, 0, 1))])
    loader.close()
    official = torchvision.datasets.CIFAR100(cifar100_root, train=False)
    np.testing.assert_array_equal(pixels, official.data[:300])
    assert loader.labels.tolist() == official.targets[:300]


class _First:
    def __init__(self, images: Images, count: int) -> None:
        self.images, self.count = images, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]:
        return self.images[index]


def test_an_image_folder_is_read_whatever_lies_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (20, 20), (i, 9, 9)).save(tmp_path / split / label / f"{i}.png")
    config = DataConfig(dataset="imagefolder", root=str(tmp_path), image_size=16)
    odd = tmp_path / "train" / "a"
    os.rename(odd / "0.png", os.fsencode(odd) + b"/caf\xe9.png")
    (odd / "more.jfif").write_bytes((odd / "1.png").read_bytes())
    (odd / ".DS_Store").touch()
    prepare(config, progress=False)
    said = capsys.readouterr().err
    assert f"{tmp_path / 'train'}: 1 files are left out, not images by their names: 1 with .jfif; " in said
    (odd / "gone.png").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"gone\.png is not a readable image"):
        prepare(config, progress=False)


def test_gray_of_16_bits_keeps_its_levels_and_what_has_none_is_refused(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 4096).reshape(64, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "ramp.png")
    pixels = np.asarray(load_rgb(str(tmp_path / "ramp.png"), 512))
    assert np.array_equal(pixels[..., 0], ramp.astype(np.uint16) >> 8)
    for name, values in (("deep.tif", ramp.astype(np.int32) * 1000), ("real.tif", ramp.astype(np.float32))):
        Image.fromarray(values).save(tmp_path / name)
        with pytest.raises(InputError, match=rf"{name} is not a readable image .gray of "):
            load_rgb(str(tmp_path / name), 512)


def test_one_class_folder_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "train" / "imagenet").mkdir(parents=True)
    with pytest.raises(InputError, match="holds one class folder, imagenet: are the images one folder too deep"):
        describe(DataConfig(dataset="imagefolder", root=str(tmp_path)))
