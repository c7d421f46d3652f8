"""How many images per second does the FFCV pipeline read, against torchvision's DataLoader on the same images?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ghostmask.benchmarks.row import Row, more_per_second
from ghostmask.benchmarks.timing import Bench, scratch
from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.open import open_dataset, prepare
from ghostmask.data_pipelines.source import SPLITS, Source
from ghostmask.data_pipelines.sources.cifar import PAD_CROP_FLIP
from ghostmask.engine.data import DataPipeline, Parts
from ghostmask.engine.spawn import fork_server
from ghostmask.engine.world import World

WORKERS = 2
PHOTOGRAPHS = ("data/imagenet/train", "../shared/data/imagenet_fullres", "../shared/data/imagenette224/train")
"""Where real JPEGs in class folders are looked for, from the working directory; without them some are generated."""
COPIES = 2
"""Times a small folder of photographs is linked, so that an epoch is long enough to time."""
CIFAR = {"data/cifar-10-batches-py": "CIFAR10", "data/cifar-100-python": "CIFAR100"}
"""Where real CIFAR images are looked for, as torchvision unpacks them; without them pixels are random."""
CIFAR_IMAGES = 20_000
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def rows(bench: Bench) -> list[Row]:
    """Cases loader_imagenet (half of the images JPEG, as by default), loader_imagenet_jpeg (all), loader_cifar,
    loader_cifar_resident, and those of `decoding`."""
    from ghostmask.benchmarks import decoding
    from ghostmask.data_pipelines.writing.write import write_images

    with scratch() as folder:
        source, what = photographs(folder, bench.quick)
        size = 8 if bench.quick else 32
        configs = {
            case: DataConfig(
                dataset="imagefolder", root=str(source), batch_size=size, num_workers=WORKERS, jpeg_fraction=fraction
            )
            for case, fraction in (("loader_imagenet", 0.5), ("loader_imagenet_jpeg", 1.0))
        }
        for config in configs.values():
            prepare(config, progress=False)
        pixels, kind = small_images(bench.quick)
        paths = {split: folder / f"{split}.beton" for split in SPLITS}
        for path in paths.values():
            write_images(_Pixels(pixels, None), path)
        found = [_photographs_row(case, config, what, bench) for case, config in configs.items()]
        found += [_cifar_row(paths, pixels, kind, bench), _resident_row(paths, pixels, kind, bench)]
        return [*found, *decoding.rows(bench, source / "train", what)]


def photographs(folder: Path, quick: bool) -> tuple[Path, str]:
    """(root with train/CLASS and val/CLASS, what they are)."""
    real = next((Path(p).resolve() for p in PHOTOGRAPHS if Path(p).is_dir()), None)
    root = folder / "photographs"
    if real is None or quick:
        _generate(root, 16 if quick else 1000)
        return root, "generated 500 x 375 JPEGs"
    classes = sorted(p for p in real.iterdir() if p.is_dir())
    for split in ("train", "val"):  # whose classes must be the same
        (root / split).mkdir(parents=True)
        for copy in range(COPIES):
            for path in classes:
                (root / split / f"{path.name}_{copy}").symlink_to(path)
    return root, f"{real.parent.name}/{real.name}"


def small_images(quick: bool) -> tuple[NDArray[np.uint8], str]:
    """((n, 32, 32, 3) pixels, what they are)."""
    folder = next((Path(path) for path in CIFAR if Path(path).is_dir()), None)
    if folder is None or quick:
        return np.random.default_rng(0).integers(0, 256, (64 if quick else CIFAR_IMAGES, 32, 32, 3), np.uint8), "random"
    from torchvision import datasets

    name = CIFAR[str(folder)]
    return np.ascontiguousarray(getattr(datasets, name)(folder.parent, train=True).data[:CIFAR_IMAGES]), name


def _photographs_row(case: str, config: DataConfig, what: str, bench: Bench) -> Row:
    from torchvision import datasets
    from torchvision.transforms import v2

    ours = open_dataset(config, 0, bench.world, Parts())
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
        ]
    )  # fmt: skip
    theirs = _data_loader(datasets.ImageFolder(f"{config.root}/train", transform), config.batch_size)
    rates = _interleaved(ours, theirs, 1 if bench.quick else 3, bench.world)
    ours.close()
    note = f"{what}, 224 x 224 random resized crops, {WORKERS} workers, {config.jpeg_fraction:.0%} stored as JPEG"
    return more_per_second(case, *rates, "images/s", f"{note}; baseline: torchvision's DataLoader", bar=2)


def _cifar_row(paths: dict[str, Path], pixels: NDArray[np.uint8], kind: str, bench: Bench) -> Row:
    from torchvision.transforms import v2

    from ghostmask.data_pipelines.loading.pipeline import BetonPipeline

    ours, size = _small_pipeline(BetonPipeline, paths, pixels, bench), 16 if bench.quick else 256
    transform = v2.Compose(
        [
            v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
        ]
    )  # fmt: skip
    theirs = _data_loader(_Pixels(pixels, transform), size)
    rates = _interleaved(ours, theirs, 1 if bench.quick else 3, bench.world)
    ours.close()
    what = f"{len(pixels):,} {kind} 32 x 32 images"
    note = f"{what} as torchvision's CIFAR datasets hand them out, pad-crop-flip, {WORKERS} workers"
    return more_per_second("loader_cifar", *rates, "images/s", f"{note}; baseline: its DataLoader", bar=5)


def _resident_row(paths: dict[str, Path], pixels: NDArray[np.uint8], kind: str, bench: Bench) -> Row:
    from ghostmask.data_pipelines.loading.pipeline import BetonPipeline
    from ghostmask.data_pipelines.loading.resident import ResidentPipeline

    pipelines = [_small_pipeline(each, paths, pixels, bench) for each in (ResidentPipeline, BetonPipeline)]
    rates: list[list[float]] = [[], []]
    for epoch in range(2 if bench.quick else 4):
        for pipeline, found in zip(pipelines, rates, strict=True):
            found.append(_rate(pipeline.train(epoch), bench.world))
    for pipeline in pipelines:
        pipeline.close()
    where = f"on the device, pad-crop-flip, {torch.get_num_threads()} torch threads"
    note = f"{len(pixels):,} {kind} 32 x 32 images that live {where}"
    ours, theirs = (median(found[1:]) for found in rates)
    return more_per_second(
        "loader_cifar_resident", ours, theirs, "images/s", f"{note}; baseline: FFCV's loader, {WORKERS} workers"
    )


def _small_pipeline(kind: Any, paths: dict[str, Path], pixels: NDArray[np.uint8], bench: Bench) -> DataPipeline:
    images = _Pixels(pixels, None)
    source = Source("pixels", 10, 32, MEAN, STD, PAD_CROP_FLIP, lambda _: images, lambda: "pixels", files=False)
    config = DataConfig(dataset="cifar10", batch_size=16 if bench.quick else 256, num_workers=WORKERS)
    none = dict.fromkeys(paths, "")
    pipeline: DataPipeline = kind(config, source, paths, 10, none, seed=0, world=bench.world, parts=Parts())
    return pipeline


class _Pixels(Dataset[Any]):
    """Images in memory, as (PIL image through a transform, label), or as an array without one."""

    def __init__(self, pixels: NDArray[np.uint8], transform: Any) -> None:
        self.pixels, self.transform = pixels, transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int, /) -> tuple[Any, int]:
        pixels = self.pixels[index]
        return (self.transform(Image.fromarray(pixels)) if self.transform else pixels), index % 10


def _data_loader(dataset: Any, size: int) -> Iterable[Any]:
    # Not a fork: this process has threads of numba's. The workers start before the clock does, and stay.
    context = fork_server("torchvision.transforms.v2", "ghostmask.benchmarks.loader")
    return DataLoader(
        dataset, size, shuffle=True, num_workers=WORKERS, drop_last=True, persistent_workers=True,
        multiprocessing_context=context,
    )  # fmt: skip


def _interleaved(ours: DataPipeline, theirs: Iterable[Any], repeats: int, world: World) -> tuple[float, float]:
    """(images/s of ours, of theirs): medians over epochs that take turns, after one epoch of each to warm up."""
    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    for epoch in range(1 + repeats):
        rates["ours"].append(_rate(ours.train(epoch), world))
        rates["theirs"].append(_rate(theirs, world))
    return median(rates["ours"][1:]), median(rates["theirs"][1:])


def _rate(batches: Iterable[Any], world: World) -> float:
    start, count = perf_counter(), 0
    for images, labels in batches:
        count += len(images.to(world.device, memory_format=torch.channels_last, non_blocking=True))
        labels.to(world.device, non_blocking=True)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return count / (perf_counter() - start)


def _generate(root: Path, count: int) -> None:
    """Smooth random JPEGs in two classes."""
    generator = np.random.default_rng(0)
    for split, number in (("train", count), ("val", 4)):
        for index in range(number):
            folder = root / split / f"class{index % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(generator.integers(0, 256, (24, 32, 3), np.uint8))
            small.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{index}.jpg", quality=90)
