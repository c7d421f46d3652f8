"""The settings of data: which images, where they lie, how they are batched. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ghostmask.data_pipelines.registry import DATASETS
from ghostmask.engine.config import may_change, path_field, require, require_number
from ghostmask.engine.errors import unknown_name

ORDERS = ("random", "quasi_random")


@dataclass(frozen=True)
class DataConfig:
    """A dataset, its .beton files and its loader."""

    dataset: str = "cifar10"
    """One of `ghostmask show datasets`."""
    root: str = path_field("data", changes=True)
    """Folder with the source images (or where to download them); .beton files are written to ROOT/beton."""
    batch_size: int = 256
    """Global batch: images of all ranks together per optimizer step."""
    augment: bool = True
    """Random crop and flip of training images."""
    num_workers: int = may_change(0)
    """FFCV worker threads per rank; 0 = cores / ranks on this machine."""
    resident: str = may_change("auto")
    """Keep all images on the device and augment them there, in whole batches (the same bits as FFCV's loader, which is
    then not used): always, never, or auto = on a GPU, where they are of one size and take less than 1 GB."""
    image_size: int = 0
    """Side of a training image in pixels; 0 = the dataset's own."""
    fast_decode: bool = False
    """Image folders: decode a JPEG whose crop is shrunk to half or less at 1/2, 1/4 or 1/8 of its size: faster, and
    other pixels (docs/performance.md)."""
    start_size: int = 0
    """Image folders: side of training images at first, a multiple of 32; it grows by 32 pixels at once from epoch
    grow_from to image_size in epoch grow_until; 0 = image_size in every epoch. Evaluation images do not change."""
    grow_from: int = 0
    """Epoch of the run before which training images have start_size."""
    grow_until: int = 0
    """Epoch of the run from which on training images have image_size."""
    order: str = "random"
    """random; or quasi_random, for .beton files larger than memory: read in whole pages (8 MiB), in random order."""
    window_pages: int = 256
    """order=quasi_random: pages whose images are mixed, all ranks together; a node needs memory for twice its share."""
    max_resolution: int = 512
    """Longest shorter side that an image folder's .beton keeps."""
    jpeg_fraction: float = 0.5
    """Share of training photographs stored as JPEG, the rest raw; in [0, 1]."""
    eval_size: int = 0
    """Side of an evaluation photograph in pixels; 0 = that of a training image."""
    eval_resize: int = 0
    """Shorter side that an evaluation photograph is resized to before its centre is cropped; 0 = 256/224 of the crop's
    side from a side of 128 on, and the crop's side (nothing but what is too long is cut off) for smaller images."""
    interpolation: str = "bilinear"
    """How evaluation photographs are resized: bilinear or bicubic, antialiased, by torchvision on Pillow's image."""
    exif: bool = False
    """Turn photographs as their EXIF data say; false = as they are stored, as torchvision reads them."""
    val_labels: str = path_field("", changes=True)
    """For ROOT/val without class folders: a file of lines "name label" (Kaggle's LOC_val_solution.csv too), of one
    label per image in the order of names, or ILSVRC2012's devkit (.tar.gz) or ground truth beside its meta.mat."""
    val_fraction: float = 0.0
    """Share of each class that is taken from the training photographs for evaluation, where there are no others."""
    val_seed: int = 0
    """Another seed takes another share."""
    bad_images: str = may_change("stop")
    """Images that cannot be read: stop (when all have been looked at) or skip them."""
    subset: int = 0
    """CIFAR: only the first so many training images, for short runs; 0 = all. (They come in no order.)"""
    num_train: int = 1024
    """dataset=synthetic only: training images."""
    num_eval: int = 256
    """dataset=synthetic only: evaluation images."""
    num_classes: int = 10
    """dataset=synthetic only: classes."""

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise unknown_name("data.dataset", self.dataset, DATASETS)
        require_number("data.batch_size", self.batch_size, 1, 2**24)
        require_number("data.num_workers", self.num_workers, 0, 65_536)
        if self.resident not in ("auto", "always", "never"):
            raise unknown_name("data.resident", self.resident, ("auto", "always", "never"))
        require_number("data.image_size", self.image_size, 0, 4096)
        require_number("data.start_size", self.start_size, 0, 4096)
        require(self.start_size % 32 == 0, "data.start_size", self.start_size, "give a multiple of 32, such as 160")
        require_number("data.grow_from", self.grow_from, 0, 1e6)
        require_number("data.grow_until", self.grow_until, 0, 1e6)
        require(
            not self.start_size or self.grow_from < self.grow_until,
            "data.grow_until", self.grow_until, f"give an epoch after data.grow_from = {self.grow_from}",
        )  # fmt: skip
        if self.order not in ORDERS:
            raise unknown_name("data.order", self.order, ORDERS)
        require_number("data.window_pages", self.window_pages, 1, 1e6)
        require_number("data.max_resolution", self.max_resolution, 16, 65_535)
        require_number("data.jpeg_fraction", self.jpeg_fraction, 0, 1)
        require_number("data.subset", self.subset, 0, 50_000)
        require_number("data.num_train", self.num_train, 1, 1e8)
        require_number("data.num_eval", self.num_eval, 1, 1e8)
        require_number("data.num_classes", self.num_classes, 2, 25_000)
        require_number("data.eval_size", self.eval_size, 0, 4096)
        require_number("data.eval_resize", self.eval_resize, 0, 65_535)
        require(self.interpolation in ("bilinear", "bicubic"), "data.interpolation", self.interpolation,
                "use bilinear or bicubic")  # fmt: skip
        require(0 <= self.val_fraction < 1, "data.val_fraction", self.val_fraction, "give a number in [0, 1)")
        require_number("data.val_seed", self.val_seed, 0, 2**32 - 1)
        require(self.bad_images in ("stop", "skip"), "data.bad_images", self.bad_images, "use stop or skip")
        require(bool(self.root), "data.root", self.root, "give a folder")
