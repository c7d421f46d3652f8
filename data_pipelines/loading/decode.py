"""How one batch of images is decoded and augmented: FFCV operations, random by a word that travels with the index.

FFCV hands a compiled decoder the piece of the traversal order that makes a batch. Ours is a table (n, 2) of sample
index and random word (see `order`), so crop, shift and flip are functions of (seed, epoch, sample index) and nothing
compiled has to know the epoch. All three happen here, in the loader's threads and while an image is in the cache: on
whole batches, shift and flip took nine tenths of a CIFAR batch's time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.pipeline.allocation_query import AllocationQuery

from ghostmask.data_pipelines.loading.pixels import copy_whole, crop, load_kernels
from ghostmask.data_pipelines.source import Augmentation

EVAL_CROP_SHARE = 224 / 256
"""Side of the evaluation crop as a share of the image's shorter side."""


class WholeImage(SimpleRGBImageDecoder):  # type: ignore[misc]  # FFCV has no types, and takes only its subclasses
    """Raw images of one size, shifted and mirrored as `augmentation` says: (n, H, W, 3) uint8."""

    def __init__(self, augmentation: Augmentation) -> None:
        super().__init__()
        self.augmentation = augmentation

    def declare_state_and_memory(self, previous_state: Any) -> Any:
        """FFCV's question: what comes out, and which buffer is needed."""
        shape = (int(self.metadata["height"][0]), int(self.metadata["width"][0]), 3)
        return replace(previous_state, jit_mode=True, shape=shape, dtype=np.dtype("u1")), AllocationQuery(
            shape, np.dtype("u1")
        )

    def generate_code(self) -> Callable[..., Any]:
        """FFCV's question: the function that fills the buffer."""
        load_kernels()
        pointers = np.ascontiguousarray(self.metadata["data_ptr"])
        pad, flip = self.augmentation.pad, self.augmentation.flip

        def decode(rows: Any, destination: Any, metadata: Any, storage_state: Any) -> Any:
            copy_whole(rows, storage_state[0], pointers, pad, flip, destination)
            return destination

        return decode


class ResizedCrop(SimpleRGBImageDecoder):  # type: ignore[misc]  # FFCV has no types
    """Images of any size, cropped at random or at their centre, resized and mirrored: (n, side, side, 3) uint8."""

    def __init__(self, size: int, augmentation: Augmentation, fast: bool = False) -> None:
        super().__init__()
        self.size, self.augmentation, self.fast = size, augmentation, fast
        self.side = 0
        """Of the crops that are made now, at the front of their buffer; 0 = size, which none exceeds."""

    def declare_state_and_memory(self, previous_state: Any) -> Any:
        """FFCV's question: what comes out, and which buffer is needed."""
        shape = (self.size, self.size, 3)
        return replace(previous_state, jit_mode=True, shape=shape, dtype=np.dtype("u1")), AllocationQuery(
            shape, np.dtype("u1")
        )

    def generate_code(self) -> Callable[..., Any]:
        """FFCV's question: the function that fills the buffer."""
        load_kernels()
        heights, widths = (np.ascontiguousarray(self.metadata[f]) for f in ("height", "width"))
        pointers, jpeg = np.ascontiguousarray(self.metadata["data_ptr"]), self.metadata["mode"] == 0
        share, flip = 0.0 if self.augmentation.resized_crop else EVAL_CROP_SHARE, self.augmentation.flip
        fast = self.fast
        sizes: list[Any] = []

        def decode(rows: Any, destination: Any, metadata: Any, storage_state: Any) -> Any:
            storage, starts, lengths = storage_state
            side = self.side or self.size
            shape = len(rows), side, side, 3
            out = destination.reshape(-1)[: math.prod(shape)].reshape(shape)
            if not sizes:
                sizes.append(lengths[np.searchsorted(starts, pointers)])
            damaged = np.empty(len(rows), dtype=np.bool_)
            crop(rows, storage, pointers, sizes[0], heights, widths, jpeg, share, flip, fast, out, damaged)
            if damaged.any():
                raise DamagedImage(int(rows[damaged.argmax(), 0]))
            return out

        return decode


class DamagedImage(Exception):
    """The JPEG of this sample index cannot be decoded."""
