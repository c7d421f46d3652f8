"""How does the top-k count a run of scores on the CPU: a numba kernel that releases the interpreter lock."""

from __future__ import annotations

import numba
import numpy as np

BITS, SIGN = np.int64(16), np.int64(63)
LOW = np.int64((1 << 16) - 1)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def count(bits, first, end, below_sign, shift, prefix, offset, counts):  # type: ignore[no-untyped-def]
    """counts[digit] += 1 for each score of a range whose image, shifted by `shift`, is (prefix, digit of 16 bits).

    bits: of the scores, as int32 or int64, in which all bits but the sign are `below_sign`. offset: 0, and 2^15 for the
    uppermost digit: that one is signed, and no prefix is before it.
    """
    for i in range(first, end):
        image = np.int64(bits[i]) ^ ((np.int64(bits[i]) >> SIGN) & below_sign)
        image += np.int64(image == -1)  # that is -0.0, which equals 0.0
        image >>= shift
        if offset or image >> BITS == prefix:
            counts[(image + offset) & LOW] += 1


def compile_all() -> None:
    """Compile the kernel (or load it from numba's cache) and run it once."""
    for number, integer, shift in ((np.float32, np.int32, 16), (np.float64, np.int64, 48)):
        bits = np.array([-0.0, 2.0, 0.0, -1.0], number).view(integer)
        upper, lower = np.zeros(1 << 16, np.int64), np.zeros(1 << 16, np.int64)
        count(bits, 0, 4, np.iinfo(integer).max, shift, 0, 1 << 15, upper)
        count(bits, 0, 4, np.iinfo(integer).max, 0, 0, 0, lower)
        if (upper.sum(), upper[1 << 15], lower.sum(), lower[0]) != (4, 2, 2, 2):
            raise RuntimeError("the compiled top-k gives wrong numbers here")
