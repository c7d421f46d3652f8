"""How are the marked elements of a chunk appended to an array? For numba kernels: without a branch per element.

With AVX-512 by its compress instruction, which numba has no word for; elsewhere one element after the other.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
COMPRESSES = bool(binding.get_host_cpu_features().get("avx512f", False))


def _generate_compress(typingctx, values, marked, start, out, count):  # type: ignore[no-untyped-def]
    """The same for 16 elements from `start` on; returns how many were written."""
    signature = types.int64(values, marked, types.int64, out, types.int64)

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointers = [context.make_array(signature.args[i])(context, builder, arguments[i]).data for i in (0, 1, 3)]
        word, lanes = ir.IntType(32), ir.VectorType(ir.IntType(32), LANES)
        byte_lanes, bit_lanes = ir.VectorType(ir.IntType(8), LANES), ir.VectorType(ir.IntType(1), LANES)
        address = lambda number, index, to: builder.bitcast(  # noqa: E731
            builder.gep(pointers[number], [arguments[index]]), to.as_pointer()
        )
        loaded = builder.load(address(0, 2, lanes))
        marks = builder.load(address(1, 2, byte_lanes))
        loaded.align, marks.align = 4, 1
        mask = builder.icmp_unsigned("!=", marks, ir.Constant(byte_lanes, [0] * LANES))
        kind = ir.FunctionType(ir.VoidType(), [lanes, word.as_pointer(), bit_lanes])
        store = cgutils.get_or_insert_function(builder.module, kind, "llvm.masked.compressstore.v16i32")
        builder.call(store, [loaded, address(2, 4, word), mask])
        return builder.zext(builder.ctpop(builder.bitcast(mask, ir.IntType(LANES))), ir.IntType(64))

    return signature, generate


_compress: Any = intrinsic(_generate_compress)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def append(values, marked, out, count):  # type: ignore[no-untyped-def]
    """Write values[i] (float32) where marked[i] (uint8) is not 0 to out[count:], in order; returns the new count.

    out may be overwritten as far as count + len(values).
    """
    done = 0
    if COMPRESSES:
        done = len(values) // LANES * LANES
        for start in range(0, done, LANES):
            count += _compress(values, marked, start, out, count)
    for i in range(done, len(values)):
        out[count] = values[i]  # what is not marked is overwritten by the next
        count += np.int64(marked[i] != 0)
    return count
