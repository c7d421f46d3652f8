"""Are .beton files whole or absent: atomic writing, skipping what is there, one clear error for a damaged one?"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ghostmask.data_pipelines.beton import beton_path, manifest_path, peek_manifest, publish, read_manifest
from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.open import open_dataset, prepare
from ghostmask.data_pipelines.sources.synthetic import SyntheticImages
from ghostmask.data_pipelines.writing.journal import RECORD
from ghostmask.data_pipelines.writing.write import journal_path, write_images
from ghostmask.engine.data import Parts
from ghostmask.engine.errors import InputError
from ghostmask.engine.world import single


def _config(root: Path, **settings: object) -> DataConfig:
    base = {"dataset": "synthetic", "num_train": 40, "num_eval": 8, "image_size": 8, "batch_size": 8, "num_workers": 1}
    return DataConfig(root=str(root), **{**base, **settings})  # type: ignore[arg-type]


def _folder_of_images(root: Path, last: int = 3) -> DataConfig:
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for k in range(last):
                Image.new("RGB", (20 + k, 24), (40 * k, 9, 200)).save(root / split / label / f"{k}.png")
    return DataConfig(dataset="imagefolder", root=str(root), batch_size=2, num_workers=1, image_size=16)


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    paths = prepare(_config(tmp_path), progress=False)
    before = {split: path.stat().st_mtime_ns for split, path in paths.items()}
    assert prepare(_config(tmp_path), progress=False) == paths
    assert before == {split: path.stat().st_mtime_ns for split, path in paths.items()}
    leftovers = {p.name for p in (tmp_path / "beton").iterdir()} - {".lock"}
    assert leftovers == {p.name for path in paths.values() for p in (path, manifest_path(path))}


def test_other_settings_get_other_files(tmp_path: Path) -> None:
    assert not set(prepare(_config(tmp_path), False).values()) & set(
        prepare(_config(tmp_path, num_eval=9), False).values()
    )


def test_a_changed_source_is_written_again_and_an_absent_one_keeps_the_files(tmp_path: Path) -> None:
    config = _folder_of_images(tmp_path)
    paths = prepare(config, progress=False)
    assert read_manifest(paths["train"]).num_images == 6
    Image.new("RGB", (30, 30)).save(tmp_path / "train" / "dog" / "new.png")
    assert read_manifest(prepare(config, progress=False)["train"]).num_images == 7
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    assert read_manifest(prepare(config, progress=False)["train"]).num_images == 7
    assert open_dataset(config, 0, single(), Parts()).num_classes == 2


def test_a_killed_writer_leaves_no_beton_and_no_process_and_the_next_one_recovers(tmp_path: Path) -> None:
    config = _config(tmp_path, num_train=400, image_size=256)
    (tmp_path / "run.yaml").write_text(
        f"data: {{dataset: synthetic, root: {tmp_path}, num_train: 400, num_eval: 8, image_size: 256}}\n"
    )
    before = _shared_memory()
    command = [sys.executable, "-m", "ghostmask", "prepare", str(tmp_path / "run.yaml")]
    writer = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    path = beton_path(tmp_path, "synthetic-n400-e8-c10-s256", "train")
    partial = path.with_name(f".{path.stem}.partial")
    _wait_until(lambda: partial.exists() and partial.stat().st_size > 1 << 23)
    children = [pid for pid in _session(writer.pid) if pid != writer.pid]
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    assert partial.exists(), "killed too late to test anything"
    assert not path.exists()
    assert len(children) > 1
    _wait_until(lambda: not any(_runs(child) for child in children))
    assert not _shared_memory() - before, "what is in shared memory stays until the next start of the machine"
    with pytest.raises(InputError, match=r"there is no .*s256-train\.beton; run `ghostmask prepare CONFIG`"):
        open_dataset(config, 0, single(), Parts())
    journal = journal_path(partial)
    assert journal.stat().st_size > 32 * RECORD.itemsize, "a page holds 42 images"
    assert read_manifest(prepare(config, progress=False)["train"]).num_images == 400
    assert not partial.exists()
    assert not journal.exists()


def _session(leader: int) -> list[int]:
    """The processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            pid, rest = stat.read_text().split(" ", 1)
            if int(rest.rsplit(")", 1)[1].split()[3]) == leader:
                found.append(int(pid))
    return found


def _shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("psm_")}  # semaphores are other processes'


def _wait_until(condition: object, timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


def _runs(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_an_unreadable_image_stops_the_writer_and_is_named(tmp_path: Path) -> None:
    config = _folder_of_images(tmp_path)
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"\x89PNG but broken")
    with pytest.raises(
        InputError, match=r"1 of 6 images: .*cat/1\.png is not a readable image .*data\.bad_images=skip"
    ):
        prepare(config, progress=False)
    assert not list((tmp_path / "beton").glob("*.beton"))


def test_missing_files_name_the_fix(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.root = .*there is no .*; run `ghostmask prepare CONFIG`"):
        open_dataset(_config(tmp_path), 0, single(), Parts())


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, Path, bytes]:
    """Settings, the training .beton and its content."""
    config = _config(tmp_path_factory.mktemp("sound"))
    path = prepare(config, progress=False)["train"]
    return config, path, path.read_bytes()


@pytest.mark.parametrize("damage", ["empty", "truncated", "header", "garbage", "one bit"])
def test_a_damaged_file_is_one_clear_error(sound: tuple[DataConfig, Path, bytes], damage: str) -> None:
    config, path, content = sound
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    wrong = {
        "empty": b"",
        "truncated": content[:-100],
        "header": b"\xff" * 64 + content[64:],
        "garbage": os.urandom(len(content)),
        "one bit": bytes(flipped),
    }
    path.write_bytes(wrong[damage])
    with pytest.raises(InputError, match=r"^data\.root = .*is damaged: .*; run `ghostmask prepare CONFIG`$"):
        open_dataset(config, 0, single(), Parts())


def test_damaged_and_unfinished_files_are_written_again(tmp_path: Path) -> None:
    config = _config(tmp_path)
    paths = prepare(config, progress=False)
    manifest_path(paths["train"]).unlink()
    paths["eval"].write_bytes(paths["eval"].read_bytes()[:1000])
    with pytest.raises(InputError, match="was not written to its end"):
        open_dataset(config, 0, single(), Parts())
    prepare(config, progress=False)
    pipeline = open_dataset(config, 0, single(), Parts())
    assert len(list(pipeline.train(0))) == 5
    pipeline.close()


def test_a_jpeg_damaged_after_its_check_stops_the_epoch_with_its_index(tmp_path: Path) -> None:
    from ffcv.reader import Reader

    config = DataConfig(**{**_folder_of_images(tmp_path).__dict__, "jpeg_fraction": 1.0})
    path = prepare(config, progress=False)["train"]
    start = int(Reader(str(path)).metadata["f0"]["data_ptr"][4])
    content = bytearray(path.read_bytes())
    content[start : start + 64] = bytes(64)
    path.write_bytes(content)
    manifest = peek_manifest(path)
    assert manifest is not None
    known = {name: value for name, value in asdict(manifest).items() if name not in ("num_bytes", "crc32", "format")}
    publish(_copy(path), path, **known)
    pipeline = open_dataset(config, 0, single(), Parts())
    with pytest.raises(InputError, match="is damaged: image 4 cannot be decoded"):
        list(pipeline.train(0))
    assert sum(len(batch.labels) for batch in pipeline.evaluate()) == 6
    pipeline.close()


def _copy(path: Path) -> Path:
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    return copy


def test_a_folder_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "beton").write_text("a file where a folder must be")
    with pytest.raises(InputError, match=r"data\.root"):
        prepare(_config(tmp_path), progress=False)


def test_torchs_threads_are_left_alone_by_writing(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    prepare(_config(tmp_path), progress=False)
    assert torch.get_num_threads() == before


class FewImages:
    """Six images of two sizes, and their labels."""

    def __init__(self, labels: list[int]) -> None:
        draw = np.random.default_rng(0)
        self.images = [draw.integers(0, 256, (8 + i % 2, 9, 3)).astype(np.uint8) for i in range(6)]
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> tuple[np.ndarray[Any, Any], int]:
        return self.images[index], self.labels[index]


def test_what_the_data_are_depends_on_images_labels_and_order_and_not_on_how_they_are_written(tmp_path: Path) -> None:
    def content(images: Any, num_workers: int = 1) -> str:
        draw.append(str(len(draw)))
        return write_images(images, tmp_path / "x.beton", num_workers=num_workers, identity=draw[-1]).content

    draw: list[str] = []
    same = content(FewImages([0, 1, 0, 1, 0, 1]))
    assert content(FewImages([0, 1, 0, 1, 0, 1]), num_workers=3) == same
    assert content(FewImages([1, 0, 0, 1, 0, 1])) != same
    swapped = FewImages([0, 1, 0, 1, 0, 1])
    swapped.images[0], swapped.images[2] = swapped.images[2], swapped.images[0]
    assert content(swapped) != same
    one_pixel = FewImages([0, 1, 0, 1, 0, 1])
    one_pixel.images[5][0, 0, 0] ^= 1
    assert content(one_pixel) != same


def test_a_beton_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> int:
        raise OSError(errno.EIO, "Input/output error")

    config = _config(tmp_path)
    prepare(config, progress=False)
    monkeypatch.setattr("ghostmask.data_pipelines.beton.checksum", fails)
    with pytest.raises(
        InputError, match=r"-train\.beton cannot be read \(Input/output error\); run `ghostmask prepare"
    ):
        open_dataset(config, 0, single(), Parts())


def test_a_writer_whose_parent_is_gone_touches_nothing(tmp_path: Path) -> None:
    from ghostmask.data_pipelines.writing import writer

    partial, gone = tmp_path / "x.partial", SimpleNamespace(is_alive=lambda: False)
    partial.write_bytes(b"of another prepare")
    with pytest.raises(SystemExit):
        writer.write(
            SyntheticImages(True, 4, 2, 8), partial, journal=journal_path(partial), num_workers=1, name=None,
            identity="", parent=gone,
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["x.partial"]
    assert partial.read_bytes() == b"of another prepare"
