"""How the rest of the system gets data: describe a dataset, prepare its .beton files, open them for one rank."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ghostmask.data_pipelines.beton import Manifest, beton_path, peek_manifest, publish, read_manifest
from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.registry import DATASETS
from ghostmask.data_pipelines.resizing import check_resizing
from ghostmask.data_pipelines.source import SPLITS, Source
from ghostmask.engine.cores import usable_cores
from ghostmask.engine.errors import InputError, bad_value
from ghostmask.engine.registry import resolve

if TYPE_CHECKING:
    from ghostmask.engine.data import DataPipeline, Parts
    from ghostmask.engine.world import World


RESIDENT_BYTES = 1 << 30
"""Of a device's memory that data.resident=auto takes at most, 4 bytes for a pixel with its border."""


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a dataset without loading it."""

    num_classes: int
    image_shape: tuple[int, int, int]
    """(channels, height, width) of a training batch."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Per channel, of pixels in [0, 1]."""
    needs_source: bool
    """Whether data.root must hold source images (or a network to download them from) before `prepare`."""


def describe(config: DataConfig) -> DatasetInfo:
    """Reads no image and imports neither torch nor FFCV. Raises InputError if an image folder is absent."""
    source = _source(config)
    num_classes = source.num_classes
    if num_classes == 0:
        manifest = peek_manifest(beton_path(config.root, source.name, "train"))
        if manifest is None:
            raise bad_value(
                "data.root", config.root, "no train/CLASS folders and no .beton there; give the image folder"
            )
        num_classes = manifest.num_classes
    shape = (3, source.image_size, source.image_size)
    return DatasetInfo(num_classes, shape, source.mean, source.std, source.files)


def count_train(config: DataConfig) -> int | None:
    """Training images in the .beton file that is there; None without one. Reads no image and imports no torch."""
    manifest = peek_manifest(beton_path(config.root, _source(config).name, "train"))
    return manifest.num_images if manifest else None


def check_batch(config: DataConfig, replicas: int) -> None:
    """Raises InputError unless the global batch can be cut into `replicas` parts of equal size. Needs no data."""
    rest = config.batch_size % replicas
    if rest:
        below, above = config.batch_size - rest, config.batch_size - rest + replicas
        near = f"{below} or {above}" if below else f"{above}"
        fix = f"give a multiple of train.replicas = {replicas}, such as {near}"
        raise bad_value("data.batch_size", config.batch_size, fix)


def prepare(config: DataConfig, progress: bool = True) -> dict[str, Path]:
    """Write the .beton files of splits train and eval that are not there, damaged, or older than their source.

    One process of a run calls it; others wait. Two processes at once are safe: the second waits for the first, and
    then finds the files. If the source is gone, valid files stay. Raises InputError if there is neither.
    Another process does the writing: a script that calls this at its top level needs `if __name__ == "__main__"`.
    """
    source = _source(config)
    paths = {split: beton_path(config.root, source.name, split) for split in SPLITS}
    if _outdated(source, paths):
        try:
            paths["train"].parent.mkdir(parents=True, exist_ok=True)
            with _alone(paths["train"].parent / ".lock"):
                for split in _outdated(source, paths):
                    _write(source, split, paths[split], progress)
        except OSError as error:
            raise bad_value("data.root", config.root, f"the .beton files cannot be written there ({error})") from error
    return paths


def open_dataset(config: DataConfig, seed: int, world: World, parts: Parts) -> DataPipeline:
    """The batches of this rank: `parts` of every training batch, its share by rank of the evaluation images.

    Every rank opens for itself; no communication. Raises InputError if the batch cannot be cut into parts, or if the
    .beton files are missing or damaged, or too small for the batch or the number of ranks.
    """
    check_batch(config, parts.total)
    source = _source(config)
    paths = {split: beton_path(config.root, source.name, split) for split in SPLITS}
    manifests = {split: _require_whole(config, path) for split, path in paths.items()}
    num_classes = source.num_classes or manifests["train"].num_classes
    for split, manifest in manifests.items():
        if manifest.num_classes != num_classes:
            fix = (
                f"{paths[split]} has {manifest.num_classes} classes, not {num_classes}; run `ghostmask prepare CONFIG`"
            )
            raise bad_value("data.root", config.root, fix)
    _check_sizes(config, manifests, world.size)
    from ghostmask.data_pipelines.threads import torch_threads_kept

    with torch_threads_kept():  # importing FFCV takes seconds: only what needs it does
        from ghostmask.data_pipelines.pipeline import BetonPipeline
        from ghostmask.data_pipelines.resident import ResidentPipeline

    contents = {split: manifest.content for split, manifest in manifests.items()}
    images = sum(manifest.num_images for manifest in manifests.values())
    kind = ResidentPipeline if is_resident(config, source, images, world.device.type) else BetonPipeline
    return kind(config, source, paths, num_classes, contents, seed=seed, world=world, parts=parts)


def is_resident(config: DataConfig, source: Source, num_images: int, device: str) -> bool:
    """Whether data.resident keeps these images on the device. Raises InputError where it cannot."""
    fits = not source.augmentation.resized_crop
    if config.resident == "always" and not fits:
        fix = f"images of data.dataset={config.dataset} differ in size, which only FFCV's loader reads; use auto"
        raise bad_value("data.resident", config.resident, fix)
    small = num_images * (source.image_size + 2 * source.augmentation.pad) ** 2 * 4 <= RESIDENT_BYTES
    return fits and (config.resident == "always" or (config.resident == "auto" and device == "cuda" and small))


def _source(config: DataConfig) -> Source:
    source: Source = resolve(DATASETS[config.dataset])(config)
    check_resizing(config, source)
    return source


def _require_whole(config: DataConfig, path: Path) -> Manifest:
    try:
        return read_manifest(path)
    except InputError as error:
        raise bad_value("data.root", config.root, f"{error}; run `ghostmask prepare CONFIG`") from error


def _check_sizes(config: DataConfig, manifests: dict[str, Manifest], num_ranks: int) -> None:
    num_train, num_eval = manifests["train"].num_images, manifests["eval"].num_images
    if config.batch_size > num_train:
        raise bad_value("data.batch_size", config.batch_size, f"give at most the {num_train} training images")
    if num_ranks > num_eval:
        fix = f"{num_ranks} ranks are more than its {num_eval} evaluation images; use at most {num_eval} ranks"
        raise bad_value("data.dataset", config.dataset, fix)


def _outdated(source: Source, paths: dict[str, Path]) -> list[str]:
    """The splits that must be written."""
    fingerprint = source.fingerprint()
    outdated = []
    for split, path in paths.items():
        try:
            manifest = read_manifest(path)
        except InputError:
            outdated.append(split)
            continue
        if fingerprint is not None and manifest.fingerprint != fingerprint:
            outdated.append(split)
    return outdated


def _write(source: Source, split: str, path: Path, progress: bool) -> None:
    images = source.images(split)
    fingerprint = source.fingerprint()
    if fingerprint is None or not len(images):
        raise InputError(f"data.dataset: {source.name} has no {split} images")
    from ghostmask.data_pipelines.threads import torch_threads_kept

    with torch_threads_kept():
        from ghostmask.data_pipelines.write import write_images

    num_workers = usable_cores() if source.augmentation.resized_crop else 1
    partial = path.with_name(f".{path.stem}.partial")
    try:
        content = write_images(
            images,
            partial,
            jpeg_fraction=source.jpeg_fraction,
            num_workers=num_workers,
            name=path.name if progress else None,
        )
        publish(
            partial, path, fingerprint=fingerprint, num_images=len(images), num_classes=source.num_classes,
            content=content,
        )  # fmt: skip
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time; a killed holder lets go by itself."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)  # not "w": that waits for ever for a pipe
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
