"""How is one image decoded, cropped, shrunk, shifted and mirrored: compiled kernels, over the images of a batch.

numba's, cached on disk: FFCV's own closures call C by address, cannot be cached, and compile for about 15 s in every
process. A kernel stands in one file with all that it calls, since the cache does not see that another file has changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from ffcv.libffcv import ctypes_imdecode, ctypes_resize, lib
from numba import prange, types

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


def _spans(source: Any, target: Any, first: Any, count: Any, weights: Any) -> None:
    """Pixel x of `target` is the mean of source pixels first[x] + k, k < count[x], with weights[x, k]: OpenCV's table
    for INTER_AREA, target <= source."""
    scale = 1.0 / (np.float64(target) / np.float64(source))
    for x in range(target):
        start = x * scale
        end, cell = start + scale, min(scale, source - start)
        a, b = int(np.ceil(start)), min(int(np.floor(end)), source - 1)
        a, k = min(a, b), 0
        first[x] = a
        if a - start > 1e-3:
            first[x] = a - 1
            weights[x, k] = np.float32((a - start) / cell)
            k += 1
        for _ in range(a, b):
            weights[x, k] = np.float32(1.0 / cell)
            k += 1
        if end - b > 1e-3:
            weights[x, k] = np.float32(min(end - b, 1.0, cell) / cell)
            k += 1
        count[x] = k


def _shrink(pixels: Any, line: Any, top: Any, left: Any, h: Any, w: Any, out: Any) -> None:
    """out (H, W, 3) = the box of an image with `line` bytes a row, as OpenCV's INTER_AREA shrinks it, to the last bit.

    h >= H, w >= W, and not both multiples, for which OpenCV has another rounding. Twice as fast as OpenCV: sums stay in
    registers, and a row that two rows of `out` share is added up once.
    """
    side_h, side_w = out.shape[0], out.shape[1]
    row_first, row_count = np.empty(side_h, np.int64), np.empty(side_h, np.int64)
    first, count = np.empty(side_w, np.int64), np.empty(side_w, np.int64)
    row_weights = np.empty((side_h, h // side_h + 3), np.float32)
    weights = np.empty((side_w, w // side_w + 3), np.float32)
    spans(h, side_h, row_first, row_count, row_weights)
    spans(w, side_w, first, count, weights)
    across, total = np.empty(side_w * 3, np.float32), np.empty(side_w * 3, np.float32)
    done = -1
    for y in range(side_h):
        total[:] = 0
        for j in range(row_count[y]):
            row = row_first[y] + j
            if row != done:
                done = row
                start = (top + row) * line + left * 3
                for x in range(side_w):
                    at = start + first[x] * 3
                    red = green = blue = np.float32(0)
                    for k in range(count[x]):
                        weight = weights[x, k]
                        red += np.float32(pixels[at]) * weight
                        green += np.float32(pixels[at + 1]) * weight
                        blue += np.float32(pixels[at + 2]) * weight
                        at += 3
                    across[3 * x], across[3 * x + 1], across[3 * x + 2] = red, green, blue
            weight = row_weights[y, j]
            for i in range(side_w * 3):
                total[i] += weight * across[i]
        target = out[y].reshape(side_w * 3)
        for i in range(side_w * 3):
            target[i] = np.uint8(np.rint(min(total[i], np.float32(255))))


def _resized(pixels: Any, height: Any, width: Any, top: Any, left: Any, h: Any, w: Any, out: Any) -> None:
    """out (H, W, 3) = the box (h, w) at (top, left) of an image (height, width, 3), in one line of bytes, resized as
    OpenCV's INTER_AREA does it."""
    side_h, side_w = out.shape[0], out.shape[1]
    if h >= side_h and w >= side_w and (h % side_h or w % side_w):
        shrink(pixels, width * 3, top, left, h, w, out)
    else:
        resize(0, pixels.ctypes.data, height, width, top, top + h, left, left + w, out.ctypes.data, side_h, side_w)


def _fraction(h: Any, w: Any, side_h: Any, side_w: Any) -> Any:
    """1, 2, 4 or 8: the largest d for which a box (h, w), decoded at 1/d, is no smaller than what it becomes."""
    d = 1
    while d < 8 and h >= 2 * d * side_h and w >= 2 * d * side_w:
        d *= 2
    return d


def _crop(
    rows: Any, storage: Any, pointers: Any, sizes: Any, heights: Any, widths: Any, jpeg: Any, share: float, flip: Any,
    fast: Any, out: Any, damaged: Any,
) -> None:  # fmt: skip
    """out[k] = a crop of image rows[k, 0], resized, mirrored with its word's lowest bit if `flip`.

    share: of a centre square's side; 0 = random. fast: decode large JPEGs at a fraction of their size. damaged: (n,)
    out.
    """
    side_h, side_w = out.shape[1], out.shape[2]
    for k in prange(rows.shape[0]):
        i = np.int64(rows[k, 0])
        height, width = np.int64(heights[i]), np.int64(widths[i])
        start = np.int64(pointers[i])
        data = storage[start : start + np.int64(sizes[i])]
        if share > 0:
            h = w = max(1, int(share * min(height, width)))
            top, left = (height - h) // 2, (width - w) // 2
        else:
            top, left, h, w = random_box(height, width, rows[k, 1])
        damaged[k] = False
        if jpeg[i]:
            d = fraction(h, w, side_h, side_w) if fast else 1
            tall, wide = (height + d - 1) // d, (width + d - 1) // d
            pixels = np.empty(tall * wide * 3, np.uint8)
            failed = imdecode(
                data.ctypes.data, data.size, height, width, pixels.ctypes.data, height, width, 0, 0, 1, d, 0, 0
            )
            damaged[k] = failed != 0
            below, right = min(tall, (top + h + d // 2) // d), min(wide, (left + w + d // 2) // d)
            top, left = (top + d // 2) // d, (left + d // 2) // d
            resized(pixels, tall, wide, top, left, below - top, right - left, out[k])
            damaged[k] = damaged[k] or pixels.size < 0  # keeps `pixels` alive until here
        else:
            resized(data, height, width, top, left, h, w, out[k])
        if draws(rows[k, 1], 0, flip)[2]:
            mirror(out[k])


next_word = numba.njit(nogil=True, error_model="numpy")(_next_word)
random_box = numba.njit(nogil=True, error_model="numpy")(_random_box)
draws = numba.njit(nogil=True, error_model="numpy")(_draws)
mirror = numba.njit(nogil=True, error_model="numpy")(_mirror)
spans = numba.njit(nogil=True, error_model="numpy")(_spans)
shrink = numba.njit(nogil=True, error_model="numpy")(_shrink)
resized = numba.njit(nogil=True, error_model="numpy")(_resized)
fraction = numba.njit(nogil=True, error_model="numpy")(_fraction)
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
