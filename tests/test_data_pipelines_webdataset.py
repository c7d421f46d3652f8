"""Are WebDataset's shards read where they lie, with the labels that they hold, whatever is in their way named?"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import odd_images
import pytest
import torch

from ghostmask.data_pipelines.beton import peek_manifest
from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.open import describe, open_dataset, prepare
from ghostmask.data_pipelines.sources.webdataset import webdataset
from ghostmask.engine.data import Parts
from ghostmask.engine.errors import InputError
from ghostmask.engine.world import single


def _config(root: Path, **settings: object) -> DataConfig:
    base = {"dataset": "webdataset", "root": str(root), "batch_size": 2, "num_workers": 1, "image_size": 30}
    return DataConfig(**{**base, **settings})  # type: ignore[arg-type]


def _shard(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, parts in samples:
            for extension, content in parts.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def _image(seed: int, kind: str) -> bytes:
    buffer = io.BytesIO()
    options = {"lossless": True} if kind == "webp" else {}
    odd_images.picture(seed, 30, 30).save(buffer, format=kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def _samples(first: int, labels: list[int]) -> list[tuple[str, dict[str, bytes]]]:
    samples = []
    for k, label in enumerate(labels, first):
        by_json = {"json": json.dumps({"label": label, "url": "x"}).encode(), "txt": b"a caption"}
        samples.append(
            (f"part/{k:06}", {"webp": _image(k, "webp"), "cls": str(label).encode()} if k % 2 else
             {**by_json, "png": _image(k, "png")})
        )  # fmt: skip
    return samples


@pytest.mark.parametrize("places", [("train/{}.tar", "val/{}.tar"), ("set-train-{}.tar", "set-val-{}.tar")])
def test_images_of_shards_have_their_labels(tmp_path: Path, places: tuple[str, str]) -> None:
    train, val = places
    _shard(tmp_path / train.format("0001"), _samples(4, [2, 0, 1]))
    _shard(tmp_path / train.format("0000"), _samples(0, [0, 1, 2, 2]))
    _shard(tmp_path / val.format("0000"), _samples(20, [1, 0, 1]))
    with pytest.raises(InputError, match=r"says how many classes there are; run `ghostmask prepare CONFIG`"):
        describe(_config(tmp_path))
    paths = prepare(_config(tmp_path), progress=False)
    assert describe(_config(tmp_path)).num_classes == 3
    manifest = peek_manifest(paths["eval"])
    assert manifest is not None
    assert (manifest.counts, manifest.num_classes) == ([1, 2, 0], 3)
    images = webdataset(_config(tmp_path, jpeg_fraction=0.0)).images("train")
    assert len(images) == 7
    for index in range(7):
        number = int(Path(images.name(index)).stem)  # type: ignore[attr-defined]
        stored, got = images[index]
        assert got == [0, 1, 2, 2, 2, 0, 1][number]
        np.testing.assert_array_equal(stored.data, np.asarray(odd_images.picture(number, 30, 30)))  # type: ignore[union-attr]
    pipeline = open_dataset(_config(tmp_path), 0, single(), Parts())
    assert torch.cat([batch.labels for batch in pipeline.evaluate()]).tolist() == [1, 0, 1]
    pipeline.close()


def test_shards_for_training_only_are_split_by_a_fraction(tmp_path: Path) -> None:
    _shard(tmp_path / "train" / "0.tar", _samples(0, [0, 1] * 5))
    with pytest.raises(InputError, match=r"no val/\*\.tar and no \*val\*\.tar there; .* or data\.val_fraction"):
        prepare(_config(tmp_path), progress=False)
    counts = [peek_manifest(path).counts for path in prepare(_config(tmp_path, val_fraction=0.2), False).values()]  # type: ignore[union-attr]
    assert counts == [[4, 4], [1, 1]]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"jpg": b"x"}, r"a has jpg, and not one of \.cls, \.json"),
        ({"cls": b"1", "txt": b"x"}, r"a has cls, txt, and not one of jpg, jpeg, png, webp"),
        ({"jpg": b"x", "cls": b"tench"}, r"a\.cls holds b'tench': give the number of a class"),
        ({"jpg": b"x", "cls": b"-1"}, r"a\.cls holds b'-1': give the number"),
        ({"jpg": b"x", "json": b'{"caption": "x"}'}, r"a\.json holds .*: give the number of a class"),
    ],
)
def test_what_a_shard_lacks_is_named(tmp_path: Path, parts: dict[str, bytes], said: str) -> None:
    _shard(tmp_path / "train" / "0.tar", [*_samples(0, [0, 1]), ("a", parts)])
    with pytest.raises(InputError, match=rf"0\.tar: {said}"):
        webdataset(_config(tmp_path, val_fraction=0.5)).images("train")


def test_a_compressed_shard_and_a_class_that_training_has_not_are_refused(tmp_path: Path) -> None:
    _shard(tmp_path / "train" / "0.tar", _samples(0, [0, 1]))
    _shard(tmp_path / "val" / "0.tar", _samples(0, [0, 5]))
    with pytest.raises(InputError, match="eval has images of class 5, train has 2 classes"):
        prepare(_config(tmp_path), progress=False)
    with tarfile.open(tmp_path / "train" / "1.tar", "w:gz"):
        pass
    with pytest.raises(InputError, match=r"train/1\.tar is not a whole, uncompressed tar file .*; unpack"):
        prepare(_config(tmp_path), progress=False)


def test_hidden_shards_are_not_looked_at_and_one_for_both_splits_is_refused(tmp_path: Path) -> None:
    _shard(tmp_path / "train-0.tar", _samples(0, [0, 1]))
    (tmp_path / "._train-0.tar").write_bytes(b"x")
    _shard(tmp_path / "val-0.tar", _samples(2, [0, 1]))
    assert [len(webdataset(_config(tmp_path)).images(split)) for split in ("train", "eval")] == [2, 2]
    (tmp_path / "val-0.tar").rename(tmp_path / "trainval-0.tar")
    with pytest.raises(InputError, match=r"trainval-0\.tar has train and val in its name; put the shards into folders"):
        webdataset(_config(tmp_path))


def test_a_shard_that_is_replaced_while_others_are_written_is_another_source(tmp_path: Path) -> None:
    _shard(tmp_path / "train" / "0.tar", _samples(0, [0, 1] * 2))
    source = webdataset(_config(tmp_path, val_fraction=0.5))
    before = source.fingerprint()
    source.images("train")
    _shard(tmp_path / "train" / "0.tar", _samples(4, [1, 0] * 3))
    assert source.fingerprint() == before, "what is written is of the places that were found then"
    assert webdataset(_config(tmp_path, val_fraction=0.5)).fingerprint() != before


def test_two_samples_of_one_name_are_refused(tmp_path: Path) -> None:
    _shard(tmp_path / "train" / "0.tar", [*_samples(0, [0, 1]), *_samples(1, [0])])
    with pytest.raises(InputError, match=r"0\.tar: part/000001\.webp is there twice"):
        webdataset(_config(tmp_path, val_fraction=0.5)).images("train")
