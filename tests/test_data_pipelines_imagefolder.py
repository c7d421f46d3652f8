"""Are the images of a folder found under the names that they have, whatever links lie among them?"""

from __future__ import annotations

from pathlib import Path

import odd_images
import pytest

from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.photographs.photograph import BadImage
from ghostmask.data_pipelines.photographs.stored import Cropped
from ghostmask.data_pipelines.sources.imagefolder import imagefolder
from ghostmask.engine.errors import InputError


def _images(root: str, split: str = "train", **settings: object) -> Cropped:
    images = imagefolder(DataConfig(dataset="imagefolder", root=root, **settings)).images(split)  # type: ignore[arg-type]
    return images  # type: ignore[return-value]  # Kept has the same methods


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            odd_images.picture(0).save(tmp_path / split / name / "0.png")
    return tmp_path


@pytest.mark.parametrize("named", [".", "../{}", "{}/"])
def test_the_root_may_be_where_one_is(root: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.chdir(root)
    images = _images(named.format(root.name if named[0] == "." else root))
    assert sorted(Path(images.name(i)).resolve() for i in range(2)) == sorted(root.glob("train/*/0.png"))
    assert len(images.places.read(0)) > 0


def test_a_link_to_itself_is_a_bad_image_or_no_folder(root: Path) -> None:
    (root / "train" / "cat" / "1.png").symlink_to("1.png")
    (root / "train" / "cow").symlink_to("cow")
    images = _images(str(root))
    at = [images.name(i) for i in range(3)].index(str(root / "train" / "cat" / "1.png"))
    with pytest.raises(BadImage, match=r"1\.png is not a readable image \(Too many levels of symbolic links\)"):
        images[at]


def test_an_image_is_not_resized_into_gigabytes_and_a_crop_fits_on_a_page(root: Path) -> None:
    odd_images.picture(0, 1, 20_000).save(root / "val" / "cat" / "0.png")
    with pytest.raises(BadImage, match=r"cat/0\.png would become 5,120,000 pixels long in evaluation"):
        _images(str(root), "eval")[0]
    odd_images.picture(0, 30, 10_000).save(root / "val" / "cat" / "0.png")
    assert _images(str(root), "eval")[0][0].data.shape == (224, 224, 3)
    with pytest.raises(InputError, match=r"data\.eval_size = 1673: .*give at most 1672"):
        _images(str(root), eval_size=1673)
    assert len(_images(str(root), eval_size=1672)) == 2


def test_the_longest_image_is_the_longest_jpeg(root: Path) -> None:
    for width, said in ((65_500, None), (65_501, "more than 65,500")):
        odd_images.picture(0, 1, width).save(root / "train" / "cat" / "0.png")
        images = _images(str(root), jpeg_fraction=1.0)
        at = [images.name(i).endswith("cat/0.png") for i in range(2)].index(True)
        if said is None:
            assert images[at][0].data.ndim == 1
        else:
            with pytest.raises(BadImage, match=said):
                images[at]
