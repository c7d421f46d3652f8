"""How many JPEGs per second and core become random 224 x 224 crops, against FFCV's own calls and torchvision's?"""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from ffcv.libffcv import ctypes_imdecode, ctypes_resize
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2

from ghostmask.benchmarks.row import Row, more_per_second
from ghostmask.benchmarks.timing import Bench, Work, interleaved
from ghostmask.data_pipelines.loading import order
from ghostmask.data_pipelines.loading.pixels import crop, load_kernels, random_box

SIDE, QUALITY = 224, 90


class Jpegs(NamedTuple):
    """Files one after the other in memory, as in a .beton."""

    storage: NDArray[np.uint8]
    pointers: NDArray[np.uint64]
    sizes: NDArray[np.uint64]
    shapes: NDArray[np.uint32]
    """(n, 2): height and width."""
    rows: order.Words


def rows(bench: Bench, photographs: Path, what: str) -> list[Row]:
    """Cases loader_decode (the exact crops, as training's default), loader_decode_torchvision, and for enlarged
    photographs loader_decode_large and loader_decode_fast (data.fast_decode). photographs: holds class folders."""
    load_kernels()
    found = []
    threads, torch_threads = numba.get_num_threads(), torch.get_num_threads()
    numba.set_num_threads(1)
    torch.set_num_threads(1)
    try:
        paths = list(islice(sorted(photographs.glob("*/*")), 8 if bench.quick else 250))
        for scale in (1, 2):
            found += _at_scale(_read(paths, scale), scale, what, bench)
    finally:
        numba.set_num_threads(threads)
        torch.set_num_threads(torch_threads)
    return found


def _at_scale(jpegs: Jpegs, scale: int, what: str, bench: Bench) -> list[Row]:
    count = len(jpegs.rows)
    out = {name: np.empty((count, SIDE, SIDE, 3), np.uint8) for name in ("exact", "fast", "ffcv")}
    files = [jpegs.storage[s : s + n].tobytes() for s, n in zip(jpegs.pointers, jpegs.sizes, strict=True)]
    work: dict[str, Work] = {
        "exact": lambda: _ours(jpegs, False, out["exact"]),
        "fast": lambda: _ours(jpegs, True, out["fast"]),
        "ffcv": lambda: _ffcv(jpegs, out["ffcv"]),
        "torchvision": lambda: _torchvision(files),
    }
    seconds = interleaved(work, 1 if bench.quick else 5, torch.device("cpu"))
    rate = {name: count / each for name, each in seconds.items()}
    height, width = np.median(jpegs.shapes, axis=0).astype(int)
    note = f"{count} JPEGs of {what}{' enlarged' * (scale > 1)}, median {width} x {height}, one core; baseline:"
    apart = abs(out["exact"].astype(np.int64) - out["ffcv"]).max()
    same = f"FFCV's imdecode and resize, whose crops differ by at most {apart} gray levels"
    if scale == 1:
        return [
            more_per_second("loader_decode", rate["exact"], rate["ffcv"], "images/s", f"{note} {same}"),
            more_per_second(
                "loader_decode_torchvision", rate["exact"], rate["torchvision"], "images/s",
                f"{note} Pillow and torchvision's transforms",
            ),
        ]  # fmt: skip
    by = abs(out["fast"].astype(np.int64) - out["exact"])
    changed = f"crops of {by.max((1, 2, 3)).astype(bool).mean():.0%} change, by {by.mean():.2g} gray levels"
    return [
        more_per_second("loader_decode_large", rate["exact"], rate["ffcv"], "images/s", f"{note} {same}"),
        more_per_second(
            "loader_decode_fast", rate["fast"], rate["exact"], "images/s",
            f"{note} exact crops; {changed} in the mean and {by.max()} at most",
        ),
    ]  # fmt: skip


def _read(paths: list[Path], scale: int) -> Jpegs:
    files, shapes = [], []
    for path in paths:
        image = Image.open(path).convert("RGB")
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=QUALITY)
        files.append(np.frombuffer(buffer.getvalue(), np.uint8))
        shapes.append((image.height, image.width))
    sizes = np.array([len(file) for file in files], np.uint64)
    pointers = np.cumsum(sizes, dtype=np.uint64) - sizes
    table = np.arange(len(files), dtype=np.uint64)
    words = order.sample_words(0, 0, table)
    return Jpegs(np.concatenate(files), pointers, sizes, np.array(shapes, np.uint32), np.stack([table, words], axis=1))


def _ours(jpegs: Jpegs, fast: bool, out: NDArray[np.uint8]) -> None:
    heights, widths = (np.ascontiguousarray(side) for side in jpegs.shapes.T)
    damaged, jpeg = np.empty(len(out), np.bool_), np.ones(len(out), np.bool_)
    crop(
        jpegs.rows, jpegs.storage, jpegs.pointers, jpegs.sizes, heights, widths, jpeg, 0.0, False, fast, out, damaged
    )  # fmt: skip
    assert not damaged.any()


def _ffcv(jpegs: Jpegs, out: NDArray[np.uint8]) -> None:
    """As FFCV's own decoder does it: the whole photograph, then OpenCV."""
    for k, (start, size, (height, width)) in enumerate(zip(jpegs.pointers, jpegs.sizes, jpegs.shapes, strict=True)):
        data, tall, wide = jpegs.storage[int(start) : int(start + size)], int(height), int(width)
        pixels = np.empty((tall, wide, 3), np.uint8)
        ctypes_imdecode(
            data.ctypes.data, data.size, tall, wide, pixels.ctypes.data, tall, wide, 0, 0, 1, 1, False, False
        )  # fmt: skip
        top, left, h, w = random_box(tall, wide, jpegs.rows[k, 1])
        ctypes_resize(
            0, pixels.ctypes.data, tall, wide, top, top + h, left, left + w, out[k].ctypes.data, SIDE, SIDE
        )  # fmt: skip


def _torchvision(files: list[bytes]) -> None:
    transform: Any = v2.Compose([v2.RandomResizedCrop(SIDE), v2.PILToTensor()])
    for file in files:
        transform(Image.open(io.BytesIO(file)))
