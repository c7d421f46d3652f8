"""How does the radix search make and count its keys on the CPU: numba kernels that release the interpreter lock."""

from __future__ import annotations

import numba
import numpy as np

SIGN = np.int64(63)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def keys(bits, among, first, end, below_sign, infinity, lowest, out):  # type: ignore[no-untyped-def]
    """out = keys of the scores in a range; returns how many of them are nan.

    bits: of the scores, as int32 or int64, in which all bits but the sign are `below_sign` and those of +inf
    `infinity`. among: bools, whose False gives the key `lowest`, or of length 0: all.
    """
    nans, some = 0, len(among) > 0
    for i in range(first, end):
        bit = np.int64(bits[i])
        key = bit ^ ((bit >> SIGN) & below_sign)
        key += np.int64(key == -1)  # that is -0.0, which equals 0.0
        if bit & below_sign > infinity:
            nans += 1
            key = np.int64(below_sign)
        out[i] = lowest if some and not among[i] else key
    return nans


@numba.njit(nogil=True, cache=True, error_model="numpy")
def count(keys, first, end, base, shift, bins, row):  # type: ignore[no-untyped-def]
    """row[j] += 1 for each key of a range with key >> shift = base + j, 0 <= j < bins."""
    for i in range(first, end):
        place = (np.int64(keys[i]) >> shift) - base
        if place >= 0 and place < bins:
            row[place] += 1


def compile_all() -> None:
    """Compile the kernels (or load them from numba's cache) and run them once."""
    for number, integer in ((np.float32, np.int32), (np.float64, np.int64)):
        scores, most = np.array([-0.0, 2.0, 0.0, -1.0, np.nan], number), np.iinfo(integer).max
        infinity = np.array([np.inf], number).view(integer)[0]
        out, row = np.zeros(5, integer), np.zeros(4, np.int64)
        for among in (np.zeros(0, np.bool_), np.ones(5, np.bool_)):
            nans = keys(scores.view(integer), among, 0, 5, int(most), int(infinity), int(np.iinfo(integer).min), out)
        count(out, 0, 5, -1, np.iinfo(integer).bits - 2, 4, row)
        if nans != 1 or out[0] != out[2] or not out[3] < out[0] < out[1] < out[4] or row.tolist() != [1, 2, 2, 0]:
            raise RuntimeError(f"the compiled top-k gives wrong numbers here: {nans} {out} {row}")
