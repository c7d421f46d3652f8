"""How one batch of images is decoded and augmented: FFCV operations, random by a word that travels with the index.

FFCV hands a compiled decoder the piece of the traversal order that makes a batch. Ours is a table (n, 2) of sample
index and random word (see `order`), so crop, shift and flip are functions of (seed, epoch, sample index) and nothing
compiled has to know the epoch. All three happen here, in the loader's threads and while an image is in the cache: on
whole batches, shift and flip took nine tenths of a CIFAR batch's time. The kernels are numba's, cached on disk: FFCV's
own closures call C by address, cannot be cached, and compile for about 15 s in every process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.libffcv import ctypes_imdecode, ctypes_resize, lib
from ffcv.pipeline.allocation_query import AllocationQuery
from numba import prange, types

from ghostmask.data_pipelines.source import Augmentation

EVAL_CROP_SHARE = 224 / 256
"""Side of the evaluation crop as a share of the image's shorter side."""
_LOW_AREA, _LOG_ASPECT, _TRIES = 0.08, math.log(4 / 3), 10

# int imdecode(source, bytes, height, width, out, crop_height, crop_width, x, y, scale_num, scale_denom, crop, flip)
imdecode: Any = types.ExternalFunction(
    "ghostmask_imdecode", types.int32(types.uintp, types.uint64, *[types.uint32] * 2, types.uintp, *[types.uint32] * 8)
)
# void resize(unused, source, rows, columns, first row, end row, first column, end column, out, out rows, out columns)
resize: Any = types.ExternalFunction("ghostmask_resize", types.void(*[types.int64] * 11))


def _next_word(state: Any) -> Any:
    """(new state, uniform float in [0, 1)) of a SplitMix64 stream."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    word = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    word = word ^ (word >> np.uint64(31))
    return state, np.float64(word >> np.uint64(11)) * 2.0**-53


def _random_box(height: Any, width: Any, word: Any) -> Any:
    """(top, left, height, width): torchvision's RandomResizedCrop.get_params with SplitMix64 from `word`."""
    state = word
    for _ in range(_TRIES):
        state, u = next_word(state)
        area = height * width * (_LOW_AREA + (1 - _LOW_AREA) * u)
        state, u = next_word(state)
        aspect = np.exp((2 * u - 1) * _LOG_ASPECT)
        w, h = int(np.rint(np.sqrt(area * aspect))), int(np.rint(np.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            state, u = next_word(state)
            top = int(u * (height - h + 1))
            state, u = next_word(state)
            return top, int(u * (width - w + 1)), h, w
    w = min(width, int(np.rint(height * (4 / 3))))
    h = min(height, int(np.rint(width * (4 / 3))))
    return (height - h) // 2, (width - w) // 2, h, w


def _draws(word: Any, pad: Any, flip: Any) -> Any:
    """(shift down, shift right, whether to mirror): shifts in [0, 2 pad], from bit fields of the word.

    The shifts' bias against uniform is below 2^-16 x (2 pad + 1).
    """
    places = np.uint64(2 * pad + 1)
    down = ((word >> np.uint64(16)) & np.uint64(0xFFFF)) * places >> np.uint64(16)
    right = ((word >> np.uint64(32)) & np.uint64(0xFFFF)) * places >> np.uint64(16)
    return np.int64(down), np.int64(right), flip and (word & np.uint64(1)) != 0


def _mirror(image: Any) -> None:
    """Swap left and right of (H, W, 3) in place."""
    height, width = image.shape[0], image.shape[1]
    for row in range(height):
        for left in range(width // 2):
            for channel in range(3):
                kept = image[row, left, channel]
                image[row, left, channel] = image[row, width - 1 - left, channel]
                image[row, width - 1 - left, channel] = kept


def _copy_whole(rows: Any, storage: Any, pointers: Any, pad: Any, flip: Any, out: Any) -> None:
    """out[k] = raw image rows[k, 0] among `pad` zeros, cropped and mirrored as its word says; out: (n, H, W, 3)."""
    height, line = out.shape[1], out.shape[2] * 3
    for k in prange(rows.shape[0]):
        down, right, mirrored = draws(rows[k, 1], pad, flip)
        offset = (right - pad) * 3  # from a byte of the line to the one it comes from
        first, end = max(0, -offset), min(line, line - offset)
        start = np.int64(pointers[np.int64(rows[k, 0])])
        for row in range(height):
            pixels, source = out[k, row].reshape(line), row + down - pad
            if 0 <= source < height:
                from_ = start + source * line + offset
                pixels[:first] = 0
                pixels[first:end] = storage[from_ + first : from_ + end]
                pixels[end:] = 0
            else:
                pixels[:] = 0
        if mirrored:
            mirror(out[k])


def _crop(
    rows: Any, storage: Any, pointers: Any, sizes: Any, heights: Any, widths: Any, jpeg: Any, share: float, flip: Any,
    out: Any, damaged: Any,
) -> None:  # fmt: skip
    """out[k] = a crop of image rows[k, 0], resized, mirrored with its word's lowest bit if `flip`.

    share: of a centre square's side; 0 = random. damaged: (n,) out.
    """
    side_h, side_w = out.shape[1], out.shape[2]
    for k in prange(rows.shape[0]):
        i = np.int64(rows[k, 0])
        height, width = np.int64(heights[i]), np.int64(widths[i])
        start = np.int64(pointers[i])
        data = storage[start : start + np.int64(sizes[i])]
        if jpeg[i]:
            pixels = np.empty(height * width * 3, np.uint8)
            failed = imdecode(
                data.ctypes.data, data.size, height, width, pixels.ctypes.data, height, width, 0, 0, 1, 1, 0, 0
            )
            damaged[k] = failed != 0
            address = pixels.ctypes.data
        else:
            pixels = np.empty(0, np.uint8)
            damaged[k] = False
            address = data.ctypes.data
        if share > 0:
            h = w = max(1, int(share * min(height, width)))
            top, left = (height - h) // 2, (width - w) // 2
        else:
            top, left, h, w = random_box(height, width, rows[k, 1])
        resize(0, address, height, width, top, top + h, left, left + w, out[k].ctypes.data, side_h, side_w)
        damaged[k] = damaged[k] or pixels.size < 0  # keeps `pixels` alive until here
        if draws(rows[k, 1], 0, flip)[2]:
            mirror(out[k])


next_word = numba.njit(nogil=True, error_model="numpy")(_next_word)
random_box = numba.njit(nogil=True, error_model="numpy")(_random_box)
draws = numba.njit(nogil=True, error_model="numpy")(_draws)
mirror = numba.njit(nogil=True, error_model="numpy")(_mirror)
copy_whole = numba.njit(nogil=True, error_model="numpy", parallel=True)(_copy_whole)
crop = numba.njit(nogil=True, error_model="numpy", parallel=True)(_crop)


@functools.cache
def load_kernels() -> None:
    """Bind the kernels to FFCV's C functions, keep OpenCV from starting threads of its own, and cache compilations."""
    for name, function in (("ghostmask_imdecode", ctypes_imdecode), ("ghostmask_resize", ctypes_resize)):
        llvmlite.binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    # cv::setNumThreads(int): inside our loop over images, each resize would otherwise ask for all cores.
    with contextlib.suppress(AttributeError):
        lib._ZN2cv13setNumThreadsEi(1)
    for kernel in (copy_whole, crop):
        with contextlib.suppress(RuntimeError):  # no writable folder for the cache: compile in every process
            kernel.enable_caching()


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

    def __init__(self, size: int, augmentation: Augmentation) -> None:
        super().__init__()
        self.size, self.augmentation = size, augmentation
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
        sizes: list[Any] = []

        def decode(rows: Any, destination: Any, metadata: Any, storage_state: Any) -> Any:
            storage, starts, lengths = storage_state
            side = self.side or self.size
            shape = len(rows), side, side, 3
            out = destination.reshape(-1)[: math.prod(shape)].reshape(shape)
            if not sizes:
                sizes.append(lengths[np.searchsorted(starts, pointers)])
            damaged = np.empty(len(rows), dtype=np.bool_)
            crop(rows, storage, pointers, sizes[0], heights, widths, jpeg, share, flip, out, damaged)
            if damaged.any():
                raise DamagedImage(int(rows[damaged.argmax(), 0]))
            return out

        return decode


class DamagedImage(Exception):
    """The JPEG of this sample index cannot be decoded."""
