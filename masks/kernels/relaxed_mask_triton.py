"""What does the relaxed mask do with a bucket of tensors on CUDA: Triton kernels, one launch for all of them.

The same words as masks.kernels.noise and the same formulas as the torch form in masks.relaxed_mask. A program takes 4096
weights: from 1024 Philox counters, all four words of each. It finds its tensor in a table of addresses. A table holds
nothing but addresses and sizes, so it is kept on the device for the next call with the same tensors: weights stay where
they are, and the caching allocator gives gradients the same places again and again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ghostmask.masks.kernels.memory_order import is_plain
from torch import Tensor

from ghostmask.masks.kernels.noise import BLOCK, LANES, ROUNDS, NoiseKey, random_words

BLOCKS = tl.constexpr(4)
"""Noise blocks of 1024 weights per program."""
HEAD = tl.constexpr(2)
"""Columns of a table row before the roles: the tensor's first program, its number of weights."""
ROLE = tl.constexpr(3)
"""Columns of a role (weight, probability, ...): address, and the two dimensions in which its memory order differs."""
LANES_ = tl.constexpr(LANES)
BLOCK_ = tl.constexpr(BLOCK)
ROUNDS_ = tl.constexpr(ROUNDS)
LIMIT = tl.constexpr(125.0)
ROWS = 64
"""Rows of a table unless a bucket has more tensors: one compilation for nearly all buckets."""
TABLES = 256
"""Tables kept; ResNet-50 needs 12 per step."""
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def forward(weights: list[Tensor], probabilities: list[Tensor], outs: list[Tensor], key: Tensor, temperature: Tensor,
            number: int, eps: float) -> None:  # fmt: skip
    """out = w m of each tensor, the first of which is the `number`-th; out of any float type.

    All tensors here and below, but for incoming gradients, are contiguous, in logical or in channels_last order.
    """
    table, programs, rows = _table(weights, probabilities, outs)
    _forward[(programs,)](table, len(weights), key, temperature, number, eps, rows, TYPES[outs[0].dtype])


def backward(grads: list[Tensor], weights: list[Tensor], probabilities: list[Tensor], grads_w: list[Tensor],
             grads_s: list[Tensor], key: Tensor, temperature: Tensor, number: int, eps: float) -> None:  # fmt: skip
    """grad_w = g m and grad_s = g w m (1 - m) / (tau s (1 - s)) of each tensor; g of any float type and order."""
    grads = [g if is_plain(g) else g.contiguous() for g in grads]
    table, programs, rows = _table(weights, probabilities, grads, grads_w, grads_s)
    _backward[(programs,)](table, len(weights), key, temperature, number, eps, rows, TYPES[grads[0].dtype])


_Table = tuple[Tensor, int, int]
_tables: dict[tuple[object, ...], _Table] = {}


def _table(weights: list[Tensor], *others: list[Tensor]) -> _Table:
    """(int64 (tensors, HEAD + ROLE x roles) on the tensors' device, number of programs, tensors up to a power of 2)."""
    device = weights[0].device
    # A stream of its own: the copy to the device is ordered before the launches of one stream only.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    places = ((t.data_ptr(), t.stride()) for role in (weights, *others) for t in role)
    key = (device, stream, *(w.shape for w in weights), *places)
    if (known := _tables.get(key)) is not None:
        return known
    rows, programs = [], 0
    for tensors in zip(weights, *others, strict=True):
        row = [programs, tensors[0].numel()]
        for tensor in tensors:
            row += [tensor.data_ptr(), *_reordering(tensors[0], tensor)]
        rows.append(row)
        programs += triton.cdiv(tensors[0].numel(), BLOCKS.value * BLOCK)
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    if len(_tables) == TABLES:
        del _tables[next(iter(_tables))]
    _tables[key] = made = table, programs, max(ROWS, triton.next_power_of_2(len(rows)))
    return made


def _reordering(weight: Tensor, tensor: Tensor) -> tuple[int, int]:
    """(a, b): the weight's element (o a + x) b + y in memory is the tensor's (o b + y) a + x; (1, 1) in equal order."""
    strides = zip(tensor.stride(), weight.stride(), weight.shape, strict=True)
    if all(a == b for a, b, size in strides if size > 1):
        return 1, 1
    channels, pixels = weight.shape[1], weight.shape[2] * weight.shape[3]
    return (channels, pixels) if weight.is_contiguous() else (pixels, channels)


@triton.jit(do_not_specialize=["count", "number"])  # type: ignore[untyped-decorator]
def _forward(table, count, key, temperature, number, eps, ROWS: tl.constexpr, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    row, tensor, numel, block = _my_part(table, count, ROWS, 3)
    w, s = _role(row, 0, tl.float32), _role(row, 1, tl.float32)
    out = _role(row, 2, TYPE)
    words = _words(key, number + tensor, block)
    inverse = 1.0 / tl.load(temperature)
    for k in tl.static_range(4):
        i = block * BLOCK_ + k * LANES_ + tl.arange(0, LANES_)[None, :]
        inside = i < numel
        probability = _probability(s, row, i, inside, eps)
        odds = _inverse_odds(words[k], probability, inverse)
        value = tl.load(w + i, mask=inside, other=0.0) / (1.0 + odds)
        tl.store(out + _place(row, 2, i), value.to(TYPE), mask=inside)


@triton.jit(do_not_specialize=["count", "number"])  # type: ignore[untyped-decorator]
def _backward(table, count, key, temperature, number, eps, ROWS: tl.constexpr, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    row, tensor, numel, block = _my_part(table, count, ROWS, 5)
    w, s = _role(row, 0, tl.float32), _role(row, 1, tl.float32)
    g, grad_w, grad_s = _role(row, 2, TYPE), _role(row, 3, tl.float32), _role(row, 4, tl.float32)
    words = _words(key, number + tensor, block)
    inverse = 1.0 / tl.load(temperature)
    for k in tl.static_range(4):
        i = block * BLOCK_ + k * LANES_ + tl.arange(0, LANES_)[None, :]
        inside = i < numel
        probability = _probability(s, row, i, inside, eps)
        odds = _inverse_odds(words[k], probability, inverse)
        m = 1.0 / (1.0 + odds)
        kept = tl.load(g + _place(row, 2, i), mask=inside, other=0.0).to(tl.float32) * m
        slope = kept * tl.load(w + i, mask=inside, other=0.0) * (odds * m)
        tl.store(grad_w + _place(row, 3, i), kept, mask=inside)
        slope = slope * (inverse / (probability * (1.0 - probability)))
        tl.store(grad_s + _place(row, 4, i), slope, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _my_part(table, count, ROWS: tl.constexpr, ROLES: tl.constexpr):  # type: ignore[no-untyped-def]
    """(row of this program's tensor, number of the tensor, its weights, this program's blocks (BLOCKS, 1))."""
    COLUMNS: tl.constexpr = HEAD + ROLE * ROLES
    program = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    starts = tl.load(table + rows * COLUMNS, mask=rows < count, other=0x7FFFFFFF)
    tensor = tl.sum((starts <= program).to(tl.int32), 0) - 1
    row = table + tensor * COLUMNS
    block = (program - tl.load(row).to(tl.int32)) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    return row, tensor, tl.load(row + 1).to(tl.int32), block


@triton.jit  # type: ignore[untyped-decorator]
def _role(row, ROLE_NUMBER: tl.constexpr, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(row + HEAD + ROLE * ROLE_NUMBER).to(tl.pointer_type(TYPE))


@triton.jit  # type: ignore[untyped-decorator]
def _place(row, ROLE_NUMBER: tl.constexpr, i):  # type: ignore[no-untyped-def]
    """Where the weight's element i lies in the memory of another role."""
    a = tl.load(row + HEAD + ROLE * ROLE_NUMBER + 1).to(tl.int32)
    b = tl.load(row + HEAD + ROLE * ROLE_NUMBER + 2).to(tl.int32)
    if a > 1:
        rest = i % (a * b)
        i = i - rest + (rest % b) * a + rest // b
    return i


@triton.jit
def _words(key, number, block):  # type: ignore[no-untyped-def]
    """The four words (BLOCKS, LANES) of each counter of masks.kernels.noise; a tensor has fewer than 2^31 weights."""
    counter = block * LANES_ + tl.arange(0, LANES_)[None, :]
    zero = counter * 0
    return tl.philox(tl.load(key), counter, zero, zero + number, zero, n_rounds=ROUNDS_)


@triton.jit
def _probability(s, row, i, inside, eps):  # type: ignore[no-untyped-def]
    """s limited to [eps, 1 - eps]; nan stays nan."""
    probability = tl.load(s + _place(row, 1, i), mask=inside, other=0.5)
    probability = tl.where(probability < eps, eps, probability)
    return tl.where(probability > 1.0 - eps, 1.0 - eps, probability)


@triton.jit
def _inverse_odds(word, probability, inverse):  # type: ignore[no-untyped-def]
    """(1 - m) / m, limited to 2^-125 .. 2^125."""
    ratio = (word.to(tl.float32) + 0.5) * probability
    ratio = ratio / (((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * (1.0 - probability))
    x = -tl.log2(ratio) * inverse
    x = tl.where(x < -LIMIT, -LIMIT, x)
    return tl.exp2(tl.where(x > LIMIT, LIMIT, x))


def compile_all() -> None:
    """Compile the kernels and compare a tensor of 1500 weights with the noise they should have."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    key, temperature = NoiseKey(0, 0, 0, 0).tensor(device), torch.ones((), device=device)
    w, s = torch.full((1500,), 2.0, device=device), torch.full((1500,), 0.5, device=device)
    out, grad_w, grad_s = torch.empty_like(w), torch.empty_like(w), torch.empty_like(w)
    forward([w], [s], [out], key, temperature, 3, 1e-6)
    backward([w], [w], [s], [grad_w], [grad_s], key, temperature, 3, 1e-6)
    # At s = 1/2 and tau = 1 the mask is u itself.
    expected = 2 * (random_words(key, 3, 0, 1500).float() + 0.5) / 2**32
    if not torch.allclose(out, expected, rtol=1e-5) or not torch.allclose(grad_w, expected, rtol=1e-5):
        raise RuntimeError("the compiled relaxed mask gives wrong numbers here")
