"""How CIFAR-10 and CIFAR-100 are found: torchvision reads ROOT/cifar-10-batches-py and ROOT/cifar-100-python.

Where they are missing they are downloaded. Augmentation as in the papers: pad 4, crop 32, flip.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.source import Augmentation, Images, Source, as_images, fingerprint_files, fixed_size
from ghostmask.engine.errors import bad_value

Channels = tuple[float, float, float]
PAD_CROP_FLIP = Augmentation(pad=4, flip=True)
DOWNLOAD_TIMEOUT_S = 30.0


def cifar10(config: DataConfig) -> Source:
    """50,000 + 10,000 images of 10 classes, 32 x 32."""
    return _cifar(config, "CIFAR10", "cifar-10-batches-py", 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def cifar100(config: DataConfig) -> Source:
    """50,000 + 10,000 images of 100 classes, 32 x 32."""
    return _cifar(config, "CIFAR100", "cifar-100-python", 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def _cifar(config: DataConfig, name: str, folder: str, num_classes: int, *moments: Channels) -> Source:
    mean, std = moments
    root = Path(config.root)

    def images(split: str) -> Images:
        dataset = _read_or_download(name, root, folder, split == "train")
        if split == "train" and config.subset:
            dataset.data, dataset.targets = dataset.data[: config.subset], dataset.targets[: config.subset]
        return as_images(dataset)

    def fingerprint() -> str | None:
        files = [p for p in (root / folder).glob("*") if p.is_file()]
        return fingerprint_files(root, files) if files else None

    def class_names() -> list[str]:
        return list(_read_or_download(name, root, folder, train=False).classes)

    stem = f"{config.dataset}-first{config.subset}" if config.subset else config.dataset
    return Source(
        stem, num_classes, fixed_size(config, 32), mean, std, PAD_CROP_FLIP, images, fingerprint,
        class_names=class_names, eval_name=config.dataset,
    )  # fmt: skip


def _read_or_download(name: str, root: Path, folder: str, train: bool) -> Any:
    import torchvision.datasets

    dataset = getattr(torchvision.datasets, name)
    try:
        return dataset(root, train=train)
    except RuntimeError:  # torchvision: not found, or a checksum differs
        pass
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        return dataset(root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        fix = f"{root / folder} is absent or incomplete and could not be downloaded ({error}); put it there"
        raise bad_value("data.root", str(root), fix) from error
    finally:
        socket.setdefaulttimeout(timeout)
