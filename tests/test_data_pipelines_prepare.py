"""Is what people's folders hold looked at, are evaluation images those of the files, and is no work done twice?"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import odd_images
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional

from ghostmask.data_pipelines.beton import peek_manifest
from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.open import open_dataset, prepare, preprocessing
from ghostmask.data_pipelines.photographs.places import Places, split_off
from ghostmask.data_pipelines.photographs.stored import Cropped, Kept
from ghostmask.data_pipelines.source import Source
from ghostmask.data_pipelines.sources.imagefolder import imagefolder
from ghostmask.engine.data import Parts
from ghostmask.engine.errors import InputError
from ghostmask.engine.world import single


def _config(root: Path, **settings: object) -> DataConfig:
    base = {"dataset": "imagefolder", "root": str(root), "batch_size": 2, "num_workers": 1, "image_size": 16}
    return DataConfig(**{**base, **settings})  # type: ignore[arg-type]


def _pictures(root: Path, number: int = 4, splits: tuple[str, ...] = ("train", "val")) -> None:
    for at, split in enumerate(splits):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for k in range(number):
                odd_images.picture(100 * at + 10 * label + k).save(root / split / name / f"{k}.png")


def _levels(config: DataConfig) -> tuple[np.ndarray, list[int]]:
    """(gray levels of all evaluation images, labels) as the loader gives them."""
    known = preprocessing(config)
    pipeline = open_dataset(config, 0, single(), Parts())
    batches = list(pipeline.evaluate())
    pipeline.close()
    images = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1)
    levels = (images * torch.tensor(known["std"]) + torch.tensor(known["mean"])) * 255
    assert (levels - levels.round()).abs().max() < 1e-3
    return levels.round().numpy().astype(np.uint8), torch.cat([batch.labels for batch in batches]).tolist()


@pytest.fixture(scope="module")
def odd_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes with an image of each kind."""
    root = tmp_path_factory.mktemp("odd")
    for split in ("train", "val"):
        odd_images.good(root / split / "a")
        odd_images.good(root / split / "b" / "deeper")
        shutil.copy(root / split / "a" / "gray.JPG", root / split / "b" / "deeper-gray.jpg")
    return root


@pytest.mark.parametrize(
    "settings",
    [{}, {"eval_size": 24, "eval_resize": 27, "interpolation": "bicubic"}, {"image_size": 128}, {"exif": True}],
)
def test_evaluation_images_are_those_of_the_files_to_the_last_bit(odd_root: Path, settings: dict[str, object]) -> None:
    config = _config(odd_root, **settings)
    prepare(config, progress=False)
    levels, labels = _levels(config)
    known = preprocessing(config)
    assert known["resize"] == {24: 27, 128: 146}.get(known["size"], known["size"])
    theirs = ImageFolder(str(odd_root / "val"))
    assert (labels, known["classes"]) == (theirs.targets, theirs.classes)
    for (path, _), ours in zip(theirs.samples, levels, strict=True):
        image = Image.open(path)
        if known["exif"] and image.getexif().get(0x0112) == 6:
            image = image.transpose(Image.Transpose.ROTATE_270)
        mode = functional.InterpolationMode(known["interpolation"])
        image = functional.resize(image.convert("RGB"), known["resize"], mode)
        np.testing.assert_array_equal(ours, np.asarray(functional.center_crop(image, known["size"])), err_msg=path)


def test_another_size_for_evaluation_writes_the_training_images_not_again(odd_root: Path) -> None:
    paths = prepare(_config(odd_root), progress=False)
    before = paths["train"].stat().st_mtime_ns
    other = prepare(_config(odd_root, eval_size=20), progress=False)
    assert (other["train"], other["train"].stat().st_mtime_ns) == (paths["train"], before)
    assert other["eval"] != paths["eval"]


@pytest.mark.parametrize("asked", [{"eval_resize": 15}, {"eval_size": 32, "eval_resize": 31}])
def test_a_crop_larger_than_the_image_is_refused(odd_root: Path, asked: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"data\.eval_resize = .*give at least data\.eval_size"):
        prepare(_config(odd_root, **asked), progress=False)


def test_bad_images_are_all_named_at_the_end_or_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _pictures(tmp_path)
    names = odd_images.bad(tmp_path / "train" / "cat")
    bad = [name for name in names if name not in {f"{k}.png" for k in range(4)}]
    with pytest.raises(InputError, match=r"data\.root: 6 of 14 images: .*chunk\.png.*cut\.jpg.*gone\.jpg") as said:
        prepare(_config(tmp_path), progress=False)
    (listed,) = re.findall(r"all of them: (\S+\.bad\.txt)", str(said.value))
    lines = Path(listed).read_text().splitlines()
    assert [line.split(" ")[0] for line in lines] == [str(tmp_path / "train" / "cat" / name) for name in bad]
    assert "zero.jpg is not a readable image (it is empty)" in lines[-1]
    assert not list((tmp_path / "beton").glob("*.beton"))
    paths = prepare(_config(tmp_path, bad_images="skip"), progress=False)
    assert "warning: left out: 6 of 14 images: " in capsys.readouterr().err
    manifest = peek_manifest(paths["train"])
    assert manifest is not None
    assert (manifest.num_images, manifest.counts, manifest.left_out) == (8, [4, 4], 6)
    for name in bad:
        (tmp_path / "train" / "cat" / name).unlink()
    clean = peek_manifest(prepare(_config(tmp_path), progress=False)["train"])
    assert clean is not None
    assert (clean.content, clean.left_out) == (manifest.content, 0)


def test_a_folder_of_only_bad_images_is_refused_though_they_may_be_skipped(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            odd_images.bad(tmp_path / split / name)
    with pytest.raises(InputError, match="12 of 12 images"):
        prepare(_config(tmp_path, bad_images="skip"), progress=False)


def test_classes_are_torchvisions_and_links_do_not_go_round(
    odd_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = imagefolder(_config(odd_root)).images("train")
    assert isinstance(images, Kept)
    theirs = ImageFolder(str(odd_root / "train")).samples
    ours = [(images.name(i), int(images.places.labels[i])) for i in range(len(images))]
    assert sorted(ours) == sorted(theirs)
    assert ours != sorted(ours), "a page holds images of all classes"
    _pictures(tmp_path)
    (tmp_path / "train" / "cat" / "again").symlink_to(tmp_path / "train")
    assert len(imagefolder(_config(tmp_path)).images("train")) == 12  # the other class once more
    assert "again/cat is a link to a folder that it lies in" in capsys.readouterr().err


def test_hidden_files_change_nothing_and_are_no_classes(tmp_path: Path) -> None:
    _pictures(tmp_path)
    before = imagefolder(_config(tmp_path)).fingerprint()
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train" / "cat" / ".ipynb_checkpoints").mkdir()
    odd_images.picture(1).save(tmp_path / "train" / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png")
    (tmp_path / "train" / "cat" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"x")
    source = imagefolder(_config(tmp_path))
    assert (source.fingerprint(), source.num_classes) == (before, 2)
    os.utime(tmp_path / "train" / "cat" / "0.png", (1, 1))
    assert imagefolder(_config(tmp_path)).fingerprint() != before


def test_an_empty_class_and_a_folder_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    _pictures(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "emu").mkdir()
    with pytest.raises(InputError, match="class folders without an image: emu"):
        prepare(_config(tmp_path), progress=False)
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody who may not read a folder")
    closed = tmp_path / "train" / "cat" / "closed"
    closed.mkdir(mode=0o700)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.is_relative_to(tempfile.gettempdir()):
            folder.chmod(0o755)
    code = (
        "import os\nfrom ghostmask.data_pipelines.sources.imagefolder import imagefolder\n"
        "from ghostmask.data_pipelines.config import DataConfig\nos.setuid(65534)\n"
        f"imagefolder(DataConfig(dataset='imagefolder', root={str(tmp_path)!r})).images('train')"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr
    assert f"{closed} cannot be read (Permission denied)" in said


def test_flat_evaluation_images_get_their_labels_from_a_file(tmp_path: Path) -> None:
    _pictures(tmp_path)
    expected, _ = _levels_of(_config(tmp_path))
    for name in ("cat", "dog"):
        for path in (tmp_path / "val" / name).iterdir():
            path.rename(tmp_path / "val" / f"{name[0]}{path.name}")
        (tmp_path / "val" / name).rmdir()
    with pytest.raises(InputError, match=r"has no class folders; name the file with its labels as data\.val_labels"):
        prepare(_config(tmp_path), progress=False)
    names = sorted(path.name for path in (tmp_path / "val").iterdir())
    classes = ["cat" if name[0] == "c" else "dog" for name in names]
    forms = {
        "lines": "\n".join(f"{n} {c}" for n, c in zip(names[::-1], classes[::-1], strict=True)),
        "numbers": "\n".join(f"{n}\t{int(c == 'dog')}" for n, c in zip(names, classes, strict=True)),
        "kaggle": "ImageId,PredictionString\n"
        + "\n".join(f"{Path(n).stem},{c} 8 1 9 2" for n, c in zip(names, classes, strict=True)),
        "alone": "\n".join(classes),
    }
    for form, text in forms.items():
        (tmp_path / form).write_text(text + "\n")
        got, labels = _levels_of(_config(tmp_path, val_labels=str(tmp_path / form)))
        np.testing.assert_array_equal(got, expected)
        assert labels == [0] * 4 + [1] * 4
    for text, said in (
        ("c0.png cat\n", "no label for 7 images"),
        ("cat\n" * 7, "7 labels for 8"),
        ("cow\n" * 8, "cow is"),
    ):
        (tmp_path / "wrong").write_text(text)
        with pytest.raises(InputError, match=rf"data\.val_labels = .*{said}"):
            prepare(_config(tmp_path, val_labels=str(tmp_path / "wrong")), progress=False)


def _levels_of(config: DataConfig) -> tuple[np.ndarray, list[int]]:
    prepare(config, progress=False)
    return _levels(config)


def test_a_share_for_evaluation_is_drawn_by_seed_and_stays_when_images_go(tmp_path: Path) -> None:
    _pictures(tmp_path, 20, ("train",))
    with pytest.raises(InputError, match=r"there is no folder .*val; give one .* or data\.val_fraction"):
        prepare(_config(tmp_path), progress=False)

    def drawn(**settings: object) -> set[str]:
        images = {s: imagefolder(_config(tmp_path, **settings)).images(s) for s in ("train", "eval")}
        names = {s: {some.name(i) for i in range(len(some))} for s, some in images.items()}  # type: ignore[attr-defined]
        assert not names["train"] & names["eval"]
        assert len(names["train"] | names["eval"]) == sum(1 for _ in (tmp_path / "train").rglob("*.png"))
        assert isinstance(images["eval"], Cropped)
        return names["eval"]

    with pytest.raises(InputError, match=r"data\.val_labels = 'x': there are no evaluation photographs of their own"):
        drawn(val_fraction=0.2, val_labels="x")
    first = drawn(val_fraction=0.2)
    assert sorted(Path(name).parent.name for name in first) == ["cat"] * 4 + ["dog"] * 4
    assert first == drawn(val_fraction=0.2)
    assert first != drawn(val_fraction=0.2, val_seed=1)
    gone = next(path for path in sorted((tmp_path / "train" / "cat").iterdir()) if str(path) not in first)
    gone.unlink()
    assert first == drawn(val_fraction=0.2)
    for path in (tmp_path / "train").iterdir():
        path.rename(tmp_path / path.name)
    (tmp_path / "train").rmdir()
    assert sorted(Path(name).parent.name for name in drawn_flat(tmp_path)) == ["cat"] * 4 + ["dog"] * 4


def drawn_flat(root: Path) -> list[str]:
    """Of class folders that lie in the root itself, beside what prepare writes."""
    prepare(_config(root, val_fraction=0.2), progress=False)
    images = imagefolder(_config(root, val_fraction=0.2)).images("eval")
    return [images.name(i) for i in range(len(images))]  # type: ignore[attr-defined]


def test_a_class_of_one_image_keeps_it_for_training() -> None:
    from ghostmask.data_pipelines.photographs.places import Place

    places = Places.of(Path(), (), [Place(f"{k}", min(k, 1), -1, 0, 0, 0) for k in range(6)])
    train, evaluation = split_off(places, 0.9, 0)
    assert (train.labels.tolist(), len(evaluation)) == ([0, 1], 4)


def test_interrupted_work_is_not_done_again_though_images_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _pictures(tmp_path, 3)
    noise = np.random.default_rng(0)
    for k in range(60):
        pixels = noise.integers(0, 256, (512, 700, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "train" / "dog" / f"n{k:02}.png", compress_level=0)
    (tmp_path / "e.yaml").touch()
    settings = [f"data.{k}={v}" for k, v in vars(_config(tmp_path, jpeg_fraction=0.0)).items() if k in
                ("dataset", "root", "image_size", "jpeg_fraction")]  # fmt: skip
    command = [sys.executable, "-m", "ghostmask", "prepare", str(tmp_path / "e.yaml"), *settings]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as first:
        journal = tmp_path / "beton" / ".imagefolder-r512-j0-train.journal"
        end = time.monotonic() + 120
        while not journal.exists() or journal.stat().st_size < 600:
            assert time.monotonic() < end
            time.sleep(0.002)
        first.send_signal(signal.SIGTERM)
        first.communicate()
    assert first.returncode == 75
    partial = journal.with_suffix(".partial")
    with open(partial, "r+b") as file:  # a mark in what is done, which doing it again would remove
        file.seek(1 << 23)
        assert file.read(8) != bytes(8)
        file.seek(1 << 23)
        file.write(b"a mark..")
    (tmp_path / "train" / "cat" / "0.png").unlink()
    config = _config(tmp_path, jpeg_fraction=0.0)
    beton = prepare(config, progress=False)["train"]
    assert beton.read_bytes()[1 << 23 :][:8] == b"a mark.."
    manifest = peek_manifest(beton)
    assert manifest is not None
    capsys.readouterr()
    prepare(config)
    said = f"ghostmask: nothing to do: the .beton files in {beton.parent} are whole and as new as their source\n"
    assert capsys.readouterr().err == said
    shutil.rmtree(tmp_path / "beton")
    anew = peek_manifest(prepare(config, progress=False)["train"])
    assert anew is not None
    assert (manifest.content, manifest.counts) == (anew.content, anew.counts) == (anew.content, [2, 63])


def test_the_disk_is_looked_at_before_anything_is_written(small_disk: Path) -> None:
    config = DataConfig(dataset="synthetic", root=str(small_disk), num_train=400, num_eval=8, image_size=64)
    with pytest.raises(InputError, match=r"data\.root: .*/beton: about 5,013,504 bytes are needed and [\d,]+ are free"):
        prepare(config, progress=False)
    assert [path.name for path in (small_disk / "beton").iterdir()] == [".lock"]


def test_a_disk_that_gets_full_is_named(small_disk: Path) -> None:
    config = DataConfig(dataset="synthetic", root=str(small_disk), num_train=8, num_eval=8, image_size=32)
    (small_disk / "ballast").write_bytes(bytes(1 << 20))  # the images have room, FFCV's whole pages have not
    with pytest.raises(InputError, match=rf"data\.root: {small_disk}/beton cannot be written to .No space left"):
        prepare(config, progress=False)


def test_an_image_larger_than_a_page_and_one_on_which_a_worker_dies_are_named(tmp_path: Path) -> None:
    _pictures(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (3600, 3600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "train" / "cat" / "large.bmp")
    with pytest.raises(
        InputError, match=r"large\.bmp takes [\d,]+ bytes, more than FFCV's page of 8,388,608; give a sm"
    ):
        prepare(_config(tmp_path, max_resolution=4000), progress=False)
    from ghostmask.data_pipelines.writing.write import write_images

    with pytest.raises(InputError, match=r"died with exit code -9 .*; it was at image 5"):
        write_images(Deadly(), tmp_path / "x.beton")


class Deadly:
    """Images of which one kills who looks at it."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]:
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros((4, 4, 3), np.uint8), 0


def test_training_refuses_files_of_other_classes(tmp_path: Path) -> None:
    _pictures(tmp_path)
    config = _config(tmp_path)
    paths = prepare(config, progress=False)
    manifest = peek_manifest(paths["eval"])
    assert manifest is not None
    assert (manifest.classes, manifest.settings["size"]) == (["cat", "dog"], 16)
    text = paths["eval"].with_suffix(".json")
    text.write_text(text.read_text().replace('"cat"', '"cow"'))
    with pytest.raises(InputError, match="was written with other settings or classes; run `ghostmask prepare CONFIG`"):
        open_dataset(config, 0, single(), Parts())
    manifest = json.loads(text.read_text().replace('"cow"', '"cat"'))
    text.write_text(json.dumps({**manifest, "fingerprint": "of before"}))
    with pytest.raises(InputError, match="are not of the same source; run `ghostmask prepare CONFIG`"):
        open_dataset(config, 0, single(), Parts())
    text.write_text(json.dumps({**manifest, "settings": {**manifest["settings"], "size": 17}}))
    for _ in range(2):  # prepare sees what train sees
        prepare(config, progress=False)
        open_dataset(config, 0, single(), Parts()).close()


def test_a_source_says_what_it_is() -> None:
    assert isinstance(imagefolder(DataConfig(dataset="imagefolder", root="nowhere")), Source)
