"""ghostmask init: the config that it writes fits the folder, says why, and trains."""

from __future__ import annotations

import io
import json
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ghostmask.data_pipelines.open import describe
from ghostmask.engine.errors import InputError
from ghostmask.launcher.checks import check_config
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.init.choose import batch_size, epochs_for, image_side
from ghostmask.launcher.init.look import look
from ghostmask.launcher.main import main
from ghostmask.launcher.settings import load_config


def pictures(folder: Path, classes: int, each: int, size: tuple[int, int], *, contrast: int = 100) -> None:
    """Noise around a class's own gray, in class folders; the small ones can be learned."""
    draw = np.random.default_rng(0)
    for label in range(classes):
        place = folder / f"class {label}"  # with a space: names are what they are
        place.mkdir(parents=True)
        for i in range(each):
            pixels = draw.integers(0, 60, (size[1], size[0], 3)) + contrast * label // max(1, classes - 1)
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")


def written(folder: Path, out: Path) -> tuple[RunConfig, str]:
    assert main(["init", str(folder), "--out", str(out)]) == 0
    config = load_config(str(out))
    check_config(config, world_size=1)
    return config, out.read_text()


def test_photographs_get_a_network_and_a_size_for_photographs(tmp_path: Path) -> None:
    pictures(tmp_path / "images/train", 3, 4, (500, 375))
    pictures(tmp_path / "images/val", 3, 2, (500, 375))
    config, text = written(tmp_path / "images", tmp_path / "photographs.yaml")
    assert (config.data.dataset, config.data.image_size, config.model.name) == ("imagefolder", 224, "resnet18")
    assert config.data.root == str(tmp_path / "images")
    assert "# the images' median shorter side is 375\n" in text
    assert "12 training images in 3 classes" in text
    settings = [line for line in text.splitlines() if line.startswith("  ") and not line.startswith("  #")]
    reasons = [line for line in text.splitlines() if line.startswith("  #")]
    assert len(reasons) >= len(settings) > 12


def test_a_small_folder_s_config_is_prepared_and_trained_and_learns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "images/train", 2, 20, (20, 20))
    pictures(tmp_path / "images/val", 2, 10, (20, 20))
    file = tmp_path / "small.yaml"
    config, _ = written(tmp_path / "images", file)
    assert (config.data.image_size, config.model.name) == (16, "resnet20")
    assert config.data.batch_size == 8
    short = ["train.epochs=3", "finetune.epochs=1", "train.threads=1", "data.num_workers=1"]
    assert main(["prepare", str(file)]) == 0
    assert main(["train", str(file), f"run={tmp_path / 'run'}", *short]) == 0
    assert json.loads((tmp_path / "run/export/summary.json").read_text())["density"] == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("train", ["images/train", "images"])
def test_without_images_for_evaluation_a_share_of_each_class_is_kept_for_it(train: str, tmp_path: Path) -> None:
    pictures(tmp_path / train, 2, 30, (40, 32))
    config, text = written(tmp_path / "images", tmp_path / "small.yaml")
    assert config.data.val_fraction == 0.1
    assert "there are no images for evaluation" in text
    assert main(["prepare", str(tmp_path / "small.yaml")]) == 0
    found = describe(config.data)
    assert (found.num_classes, found.image_shape) == (2, (3, 32, 32))


def test_evaluation_images_without_class_folders_are_read_with_their_file_of_labels(tmp_path: Path) -> None:
    """As tiny-imagenet-200.zip unpacks."""
    pictures(tmp_path / "tiny/train", 2, 8, (64, 64))
    pictures(tmp_path / "tiny/val/images", 1, 4, (64, 64))
    for path in (tmp_path / "tiny/val/images/class 0").iterdir():
        path.rename(tmp_path / "tiny/val/images" / f"val_{path.name}")
    (tmp_path / "tiny/val/images/class 0").rmdir()
    for number, folder in enumerate(sorted((tmp_path / "tiny/train").iterdir())):
        folder.rename(folder.with_name(f"n{number}"))
    lines = "".join(f"val_{i}.png\tn{i % 2}\t0\t0\t62\t62\n" for i in range(4))
    (tmp_path / "tiny/val/val_annotations.txt").write_text(lines)
    config, _ = written(tmp_path / "tiny", tmp_path / "tiny.yaml")
    assert config.data.val_labels == str(tmp_path / "tiny/val/val_annotations.txt")
    assert (config.data.image_size, config.data.val_fraction) == (64, 0.0)
    assert main(["prepare", str(tmp_path / "tiny.yaml")]) == 0


def test_the_folder_of_the_training_images_means_the_one_above(tmp_path: Path) -> None:
    pictures(tmp_path / "images/train", 2, 4, (64, 64))
    pictures(tmp_path / "images/val", 2, 2, (64, 64))
    assert look(tmp_path / "images/train") == look(tmp_path / "images")
    assert look(tmp_path / "images").side == 64


def test_what_other_datasets_unpack_is_known_by_its_names(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    config, _ = written(tmp_path, tmp_path / "cifar.yaml")
    assert (config.data.dataset, config.model.name, config.data.batch_size) == ("cifar100", "resnet32", 256)


def shard(path: Path, labels: list[bytes], suffix: str = "cls", image: bytes = b"") -> None:
    """Images of 120 x 100 pixels, or what is given for one."""
    if not image:
        file = io.BytesIO()
        Image.new("RGB", (120, 100)).save(file, "JPEG")
        image = file.getvalue()
    with tarfile.open(path, "w") as archive:
        for number, label in enumerate(labels):
            for kind, content in (("jpg", image), (suffix, label)):
                member = tarfile.TarInfo(f"{number}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def test_shards_are_looked_into(tmp_path: Path) -> None:
    for number in range(2):
        shard(tmp_path / f"flowers-train-{number}.tar", [str(i % 3).encode() for i in range(6)])
    found = look(tmp_path)
    assert (found.dataset, found.num_classes, found.num_train, found.side) == ("webdataset", 3, 12, 100)
    assert not found.split
    shard(tmp_path / "flowers-train-0.tar", [b'{"cls": 0}', b'{"class_id": 4}'], "json")  # as the loader reads them
    assert look(tmp_path).num_classes == 5


@pytest.mark.parametrize(
    ("labels", "suffix", "image", "said"),
    [
        ([b"cat"], "cls", b"", "0.cls holds b'cat': give the number of a class"),
        ([b"{"], "json", b"", "0.json holds"),
        ([b"0", b"1"], "cls", b"no image", "none of 2 images can be read"),
        ([], "cls", b"", "holds no image"),
    ],
)
def test_shards_that_cannot_be_trained_on_are_one_line(
    labels: list[bytes], suffix: str, image: bytes, said: str, tmp_path: Path
) -> None:
    shard(tmp_path / "train-0.tar", labels, suffix, image)
    with pytest.raises(InputError, match=said):
        look(tmp_path)
    (tmp_path / "train-0.tar").write_bytes(b"damaged")
    with pytest.raises(InputError, match="is not a whole, uncompressed tar file"):
        look(tmp_path)


def test_the_images_that_are_counted_are_those_that_prepare_takes(tmp_path: Path) -> None:
    """No hidden files, no folder in itself, and not the archive that they were unpacked from."""
    pictures(tmp_path / "images/train", 2, 4, (64, 64))
    pictures(tmp_path / "images/val", 2, 2, (64, 64))
    before = look(tmp_path / "images")
    (tmp_path / "images/train/class 0/._0.png").write_bytes(b"as macOS leaves")
    (tmp_path / "images/train/class 0/loop").symlink_to(tmp_path / "images/train/class 0")
    shard(tmp_path / "images/train.tar", [b"0", b"0", b"0"])
    assert look(tmp_path / "images") == before


@pytest.mark.parametrize("name", ["my flowers", "~flowers", 'it\'s #1: "x" = y'])
def test_the_next_command_can_be_typed_whatever_the_folder_is_called(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / name / "train", 2, 4, (20, 20))
    pictures(tmp_path / name / "val", 2, 2, (20, 20))
    monkeypatch.chdir(tmp_path)
    assert main(["init", f"./{name}"]) == 0
    *_, said = shlex.split(capsys.readouterr().out.partition("next: ")[2])
    assert load_config(said).data.root == str(tmp_path / name)
    (line,) = [line for line in Path(said).read_text().splitlines() if line.startswith("# next")]
    assert shlex.split(line.removeprefix("#"))[1:4] == ["ghostmask", "prepare", said]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ([], "is no folder"),
        (["images/readme.txt"], "holds no class folders with images"),
        (["images/train/a/1.png", "images/val/a/1.png"], "one class folder, a; give a folder further down"),
        (["images/train/a/1.png", "images/train/b/"], "no image in class folder b"),
        (["images/train/a/1.png", "images/train/b/1.png", "images/val/a/1.png"], r"they differ in \['b'\]"),
        (["images/train/a/1.png", "images/train/b/2.png"], "none of 2 images can be read"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_is_refused_with_the_reason(
    made: list[str], said: str, tmp_path: Path
) -> None:
    for name in made:
        place = tmp_path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir() if name.endswith("/") else place.write_bytes(b"no image")
    with pytest.raises(InputError, match=said):
        look(tmp_path / "images")


def test_a_file_that_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path / "images/train", 2, 4, (20, 20))
    pictures(tmp_path / "images/val", 2, 2, (20, 20))
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    assert main(["init", str(tmp_path / "images"), "--out", str(tmp_path / "mine.yaml")]) == 2
    assert "is there already; give another file" in capsys.readouterr().err
    assert (tmp_path / "mine.yaml").read_text() == "seed: 1\n"


def test_sizes_batches_and_epochs_follow_the_images() -> None:
    assert [image_side(side) for side in (8, 16, 28, 32, 64, 100, 200, 375)] == [16, 16, 32, 32, 64, 96, 224, 224]
    assert [batch_size(count) for count in (9, 100, 600, 5_000, 10**6)] == [2, 8, 16, 128, 256]
    assert [epochs_for(count) for count in (100, 10**4, 10**5, 10**6)] == [300, 200, 120, 100]


def test_images_are_counted_as_prepare_finds_them(tmp_path: Path) -> None:
    pictures(tmp_path / "train", 2, 3, (20, 20))
    pictures(tmp_path / "val", 2, 2, (20, 20))
    some = tmp_path / "train" / "class 0"
    (some / ".ipynb_checkpoints").mkdir()
    for hidden in (some / "._0.png", some / ".ipynb_checkpoints" / "0.png"):
        hidden.write_bytes(b"x")
    (some / "again").symlink_to(some)  # two such links would be followed until the end of time
    assert look(tmp_path).num_train == 6
