"""Which sample comes when if a file is larger than memory: page by page in random order, mixed within windows of pages.

The parts of a batch share out the pages, so that a rank reads those of its parts only:

    pages of the file, in a random order      p7 p2 | p2 p9 p4 | p4 p0 p5      each cut belongs to one part of V
    samples of one part, window by window     [p2 p9] [p4]                     in random order within a window

A function of (seed, epoch), of V and of where the samples lie in the file; not of the number of ranks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ghostmask.data_pipelines.loading.order import ORDER, raw_words


def quasi_random(
    seed: int, epoch: int, pages: NDArray[np.int64], *, batch_size: int, num_parts: int, window_pages: int
) -> NDArray[np.int64]:
    """(steps * batch_size,) samples, each at most once, as `order.permutation` gives them all.

    pages: (n,) of each sample its page. Every part of the batches has one stretch of the samples in page order, all of
    one length, so that two neighbours share a page where it is cut; the last incomplete batch is left out.
    window_pages: pages of all parts together that are mixed; a part has at least one.
    """
    steps = len(pages) // batch_size
    length = steps * batch_size // num_parts
    names, page = np.unique(pages, return_inverse=True)
    words = raw_words(seed, epoch, ORDER, len(names) + 2 * len(pages))
    place = np.empty(len(names), np.int64)
    place[np.argsort(words[: len(names)], kind="stable")] = np.arange(len(names))
    within, mixing = words[len(names) :].reshape(2, -1)
    line = np.lexsort((within, place[page]))[: length * num_parts]

    at = place[page[line]].reshape(num_parts, length)
    count = at[:, -1:] - at[:, :1] + 1
    num_windows = -(-count // max(1, window_pages // num_parts))
    window = (at - at[:, :1]) * num_windows // count
    stretches = line.reshape(num_parts, length)
    mixed = np.lexsort((mixing[stretches], window), axis=1)
    return np.asarray(np.take_along_axis(stretches, mixed, axis=1).T.reshape(-1))
