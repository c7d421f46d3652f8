"""How the rest of the system gets data: describe a dataset, prepare its .beton files, open them for one rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghostmask.data_pipelines.beton import Manifest, peek_manifest, read_manifest
from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.loading.resizing import check_resizing
from ghostmask.data_pipelines.registry import DATASETS
from ghostmask.data_pipelines.source import SPLITS, Source
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
        manifest = peek_manifest(source.beton(config.root, "train"))
        if manifest is None:
            raise bad_value("data.root", config.root, source.absent)
        num_classes = manifest.num_classes
    shape = (3, source.image_size, source.image_size)
    return DatasetInfo(num_classes, shape, source.mean, source.std, source.files)


def count_train(config: DataConfig) -> int | None:
    """Training images in the .beton file that is there; None without one. Reads no image and imports no torch."""
    manifest = peek_manifest(_source(config).beton(config.root, "train"))
    return manifest.num_images if manifest else None


def check_prepared(config: DataConfig) -> None:
    """Raises InputError unless the .beton files are there. Imports no torch."""
    for split in SPLITS:
        _require_whole(config, _source(config).beton(config.root, split))


def check_batch(config: DataConfig, replicas: int) -> None:
    """Raises InputError unless the global batch can be cut into `replicas` parts of equal size. Needs no data."""
    rest = config.batch_size % replicas
    if rest:
        below, above = config.batch_size - rest, config.batch_size - rest + replicas
        near = f"{below} or {above}" if below else f"{above}"
        fix = f"give a multiple of train.replicas = {replicas}, such as {near}"
        raise bad_value("data.batch_size", config.batch_size, fix)


def prepare(config: DataConfig, progress: bool = True) -> dict[str, Path]:
    """Write the .beton files of splits train and eval that are not there, damaged, or older than their source; what an
    interrupted call has written is not written again.

    One process of a run calls it; others wait. Two processes at once are safe: the second waits for the first, and
    then finds the files. If the source is gone, valid files stay. Raises InputError if there is neither.
    Another process does the writing: a script that calls this at its top level needs `if __name__ == "__main__"`.
    """
    source = _source(config)
    from ghostmask.data_pipelines.writing.prepare import bring_up_to_date

    return bring_up_to_date(config, source, progress)


def preprocessing(config: DataConfig) -> dict[str, Any]:
    """What is done to an image before the network sees it in evaluation, as whoever uses the network must do it too.

    size: of the input; resize: shorter side before the centre is cropped, with `interpolation` (None = not at all);
    exif: whether images are turned as their EXIF data say; mean and std: per channel, of pixels in [0, 1]; classes:
    names in the order of the outputs; words: name -> the class in words. Of what only the .beton knows: [] and {}
    where there is none.
    """
    source = _source(config)
    manifest = peek_manifest(source.beton(config.root, "eval"))
    return {
        "size": source.eval_size or source.image_size,
        "resize": source.resize or None,
        "interpolation": source.interpolation or None,
        "exif": source.exif,
        "mean": list(source.mean),
        "std": list(source.std),
        "classes": manifest.classes if manifest else [],
        "words": manifest.words if manifest else {},
    }


def open_dataset(config: DataConfig, seed: int, world: World, parts: Parts) -> DataPipeline:
    """The batches of this rank: `parts` of every training batch, its share by rank of the evaluation images.

    Every rank opens for itself; no communication. Raises InputError if the batch cannot be cut into parts, or if the
    .beton files are missing or damaged, or too small for the batch or the number of ranks.
    """
    check_batch(config, parts.total)
    source = _source(config)
    paths = {split: source.beton(config.root, split) for split in SPLITS}
    manifests = {split: _require_whole(config, path) for split, path in paths.items()}
    num_classes = source.num_classes or manifests["train"].num_classes
    for split, manifest in manifests.items():
        if manifest.num_classes != num_classes:
            fix = (
                f"{paths[split]} has {manifest.num_classes} classes, not {num_classes}; run `ghostmask prepare CONFIG`"
            )
            raise bad_value("data.root", config.root, fix)
        if manifest.settings != source.settings.get(split, {}) or manifest.classes != manifests["train"].classes:
            fix = f"{paths[split]} was written with other settings or classes; run `ghostmask prepare CONFIG`"
            raise bad_value("data.root", config.root, fix)
    if manifests["train"].fingerprint != manifests["eval"].fingerprint:  # prepare was interrupted between them
        fix = f"{paths['train']} and {paths['eval']} are not of the same source; run `ghostmask prepare CONFIG`"
        raise bad_value("data.root", config.root, fix)
    _check_sizes(config, manifests, world.size)
    from ghostmask.data_pipelines.loading.threads import torch_threads_kept

    with torch_threads_kept():  # importing FFCV takes seconds: only what needs it does
        from ghostmask.data_pipelines.loading.pipeline import BetonPipeline
        from ghostmask.data_pipelines.loading.resident import ResidentPipeline

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
