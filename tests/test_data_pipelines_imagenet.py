"""Are ILSVRC2012's tar files as they are downloaded the same dataset as the folders that torchvision makes of them?"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import odd_images
import pytest

from ghostmask.data_pipelines.beton import Manifest, peek_manifest
from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.open import describe, prepare, preprocessing
from ghostmask.data_pipelines.photographs.val_labels import DEVKIT, TRUTH
from ghostmask.data_pipelines.sources.imagenet import TRAIN, VAL, imagenet
from ghostmask.engine.errors import InputError

WNIDS = {"n02": "tench, Tinca tinca", "n01": "goldfish", "n03": "white shark, man-eater"}
"""Class folders in the order of ILSVRC2012's own numbers, which is not that of their names."""
TRUTHS = [3, 1, 1, 2, 3, 2]


def _config(root: Path, dataset: str = "imagenet", **settings: object) -> DataConfig:
    base = {"dataset": dataset, "root": str(root), "batch_size": 2, "num_workers": 1, "image_size": 16}
    return DataConfig(**{**base, **settings})  # type: ignore[arg-type]


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def _jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    odd_images.picture(seed, 30 + seed % 7, 40).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three archives, and the same images in folders below `folders`."""
    root = tmp_path_factory.mktemp("ilsvrc")
    folders = root / "folders"
    with tarfile.open(root / TRAIN, "w") as train:
        for number, wnid in enumerate(WNIDS):
            inner = io.BytesIO()
            (folders / "train" / wnid).mkdir(parents=True)
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for k in (3, 1, 2):
                    content = _jpeg(10 * number + k)
                    _add(archive, f"{wnid}_{k}.JPEG", content)
                    (folders / "train" / wnid / f"{wnid}_{k}.JPEG").write_bytes(content)
            _add(train, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(root / VAL, "w") as val:
        for k in (4, 1, 2, 6, 5, 3):  # the archive's order means nothing
            name, wnid = f"ILSVRC2012_val_{k:08}.JPEG", list(WNIDS)[TRUTHS[k - 1] - 1]
            _add(val, name, _jpeg(100 + k))
            (folders / "val" / wnid).mkdir(parents=True, exist_ok=True)
            (folders / "val" / wnid / name).write_bytes(_jpeg(100 + k))
    return root


@pytest.fixture(scope="module")
def with_devkit(root: Path) -> Path:
    scipy_io = pytest.importorskip("scipy.io")
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(k, wnid, words, 0) for k, (wnid, words) in enumerate(WNIDS.items(), 1)]
    synsets = np.array([*rows, (4, "n00", "fish", 3)], dtype=fields)
    meta = io.BytesIO()
    scipy_io.savemat(meta, {"synsets": synsets.reshape(-1, 1)})
    with tarfile.open(root / DEVKIT, "w:gz") as archive:
        _add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        _add(archive, f"ILSVRC2012_devkit_t12/data/{TRUTH}", "\n".join(map(str, TRUTHS)).encode() + b"\n")
    return root


def _manifests(config: DataConfig) -> list[Manifest]:
    found = [peek_manifest(path) for path in prepare(config, progress=False).values()]
    return [manifest for manifest in found if manifest is not None]


def test_the_archives_are_the_dataset_that_their_folders_are(with_devkit: Path) -> None:
    assert describe(_config(with_devkit)).num_classes == 3
    packed = _manifests(_config(with_devkit))
    folders = _manifests(_config(with_devkit / "folders", "imagefolder"))
    assert [m.content for m in packed] == [m.content for m in folders]
    assert [m.counts for m in packed] == [[3, 3, 3], [2, 2, 2]] == [m.counts for m in folders]
    known = preprocessing(_config(with_devkit))
    assert known["classes"] == ["n01", "n02", "n03"]
    assert known["words"]["n02"] == "tench, Tinca tinca"


def test_flat_validation_images_and_the_devkit_are_an_image_folder_too(with_devkit: Path, tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to(with_devkit / "folders" / "train")
    (tmp_path / "val").mkdir()
    for path in (with_devkit / "folders" / "val").rglob("*.JPEG"):
        (tmp_path / "val" / path.name).symlink_to(path)
    (tmp_path / "devkit").mkdir()
    with tarfile.open(with_devkit / DEVKIT) as archive:
        archive.extractall(tmp_path / "devkit", filter="data")
    expected = _counts_by_name(_config(with_devkit))
    unpacked = tmp_path / "devkit" / "ILSVRC2012_devkit_t12" / "data" / TRUTH
    for labels in (with_devkit / DEVKIT, unpacked):
        assert _counts_by_name(_config(tmp_path, "imagefolder", val_labels=str(labels))) == expected


def _counts_by_name(config: DataConfig) -> list[str]:
    from ghostmask.data_pipelines.registry import DATASETS
    from ghostmask.engine.registry import resolve

    images = resolve(DATASETS[config.dataset])(config).images("eval")
    return [f"{Path(images.name(i)).name.split(' ')[-1]} {images.places.labels[i]}" for i in range(len(images))]


def test_without_a_devkit_the_labels_may_come_from_a_file_or_from_the_training_images(
    root: Path, tmp_path: Path
) -> None:
    for name in (TRAIN, VAL):
        (tmp_path / name).symlink_to(root / name)
    with pytest.raises(InputError, match=rf"there is no .*{DEVKIT}; download it .or give data\.val_labels"):
        prepare(_config(tmp_path), progress=False)
    rows = [f"ILSVRC2012_val_{k:08},{list(WNIDS)[truth - 1]} 1 2 3 4" for k, truth in enumerate(TRUTHS, 1)]
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(rows))
    by_file = _config(tmp_path, val_labels=str(tmp_path / "LOC_val_solution.csv"))
    assert _manifests(by_file)[1].counts == [2, 2, 2]
    with pytest.raises(InputError, match=r"data\.val_fraction = 0\.3: there are evaluation photographs of their own"):
        prepare(_config(tmp_path, val_fraction=0.3), progress=False)
    (tmp_path / VAL).unlink()
    assert [m.counts for m in _manifests(_config(tmp_path, val_fraction=0.3))] == [[2, 2, 2], [1, 1, 1]]


def test_a_download_that_was_cut_off_is_named(root: Path, tmp_path: Path) -> None:
    content = (root / TRAIN).read_bytes()
    (tmp_path / TRAIN).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"{TRAIN}.* is not a whole, uncompressed tar file"):
        imagenet(_config(tmp_path, val_fraction=0.3)).images("train")
    (tmp_path / TRAIN).write_bytes(b"<html>")
    with pytest.raises(InputError, match=rf"{TRAIN} is not a whole, uncompressed tar file"):
        describe(_config(tmp_path))


def test_a_damaged_image_in_an_archive_is_named(with_devkit: Path, tmp_path: Path) -> None:
    content = (with_devkit / TRAIN).read_bytes()
    at = content.index(_jpeg(11))
    (tmp_path / TRAIN).write_bytes(content[:at] + bytes(200) + content[at + 200 :])
    with pytest.raises(InputError, match=rf"1 of \d images: .*{TRAIN}: n01/n01_1\.JPEG is not a readable image"):
        prepare(_config(tmp_path, val_fraction=0.3, val_seed=1), progress=False)


def test_a_devkit_that_cannot_be_read_does_not_matter_where_no_label_is_read_of_it(root: Path, tmp_path: Path) -> None:
    (tmp_path / TRAIN).write_bytes((root / TRAIN).read_bytes())
    (tmp_path / DEVKIT).write_bytes(b"x")
    assert imagenet(_config(tmp_path, val_fraction=0.3)).class_words() == {}
    with pytest.raises(InputError, match="it cannot be read"):
        imagenet(_config(tmp_path)).class_words()
