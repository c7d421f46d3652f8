"""The masked weights w m that ProbMask trains through, and their gradients (eq. 3-5).

    m = sigmoid((log s - log(1 - s) + L) / tau),    L = log u - log(1 - u) ~ Logistic(0, 1),    u = u(key, tensor, i)

is the paper's mask with one uniform number in place of its two Gumbel ones: their difference is Logistic(0, 1).
An operator of our own per tensor reads w and s and writes w m; it saves w, s and the key, and draws the noise a second
time in backward. (torch.compile would either save the noise or, with recomputation on, draw *other* noise.)

s is limited to [EPS, 1 - EPS] inside the sampling, and the gradient passes straight through that limit: at s = 1, where
every run starts, and at s = 0 the sigmoid would saturate and no probability would ever move again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from masks.compiled import load_kernels, split_over_threads
from masks.noise import BLOCK, NoiseKey, random_words

EPS = 1e-6
"""Nearest that a probability comes to 0 and 1 in the sampling; the projection may well put s at 0 and 1 exactly."""
CHUNK = 1 << 20
"""Weights per step of the torch form (a multiple of 1024): bounds its temporary memory to about 100 MB."""
SMALLEST_RANGE = 16
"""Blocks of 1024 weights worth a thread of their own."""


def relaxed_weights(
    weights: list[Tensor], probabilities: list[Tensor], key: NoiseKey | Tensor, temperature: float | Tensor
) -> list[Tensor]:
    """[w m for each weight], of each weight's shape and memory layout; differentiable in weights and probabilities.

    probabilities: of the weights' shapes, in [0, 1]; both float32. temperature: tau > 0. The noise of a weight depends
    on the key, the tensor's place in the list and the weight's place in its tensor's *memory* (for a channels_last
    weight that is not its logical place). Compiled code passes `key.tensor(device)` and the temperature as a tensor:
    a number that changes would be compiled anew.
    """
    device = weights[0].device if weights else torch.device("cpu")
    key = key.tensor(device) if isinstance(key, NoiseKey) else key
    if not isinstance(temperature, Tensor):
        temperature = torch.tensor(temperature, dtype=torch.float32).to(device, non_blocking=True)
    pairs = zip(weights, probabilities, strict=True)
    return [relaxed_weight(w, s, key, temperature, number) for number, (w, s) in enumerate(pairs)]


def relaxed_mask(
    probability: Tensor, key: Tensor, temperature: Tensor, number: int, first: int = 0
) -> tuple[Tensor, Tensor]:
    """(m, 1 - m) of a vector of limited probabilities, the weights first, first + 1, ... of tensor `number`.

    In the probabilities' type; the operator's torch form, and with float64 the reference of the tests. 1 - m is
    computed as a sigmoid of its own: small values keep their digits.
    """
    words = random_words(key.to(probability.device), number, first, len(probability))
    # u / (1 - u) from the word and its complement: neither can be 0, and neither end loses digits.
    odds = (words.to(probability.dtype) + 0.5) * probability
    odds = odds / (((0xFFFFFFFF - words).to(probability.dtype) + 0.5) * (1 - probability))
    x = odds.log() / temperature
    return x.sigmoid(), (-x).sigmoid()


# torch.library's decorator, so that torch.compile, autograd and DeepSpeed take the operator as one of torch's own.
@torch.library.custom_op(
    "ghostmask::relaxed_weight",
    mutates_args=(),
    schema="(Tensor weight, Tensor probability, Tensor key, Tensor temperature, int number) -> Tensor",
)
def relaxed_weight(weight: Tensor, probability: Tensor, key: Tensor, temperature: Tensor, number: int) -> Tensor:
    """w m of one tensor, the `number`-th; see `relaxed_weights`. key: int64 scalar; temperature: float32 scalar."""
    out = torch.empty_like(weight)
    w, s, flat = _memory(weight, out), _memory(probability, out), _memory(out, out)
    if kernels := _kernels(weight, probability):
        arrays = [t.numpy() for t in (w, s, flat)]
        settings = _settings(key, temperature, number)
        work = lambda a, b: kernels.forward(*arrays, a, b, *settings)  # noqa: E731
        split_over_threads(work, -(-len(w) // BLOCK), SMALLEST_RANGE)
        return out
    for start in range(0, len(w), CHUNK):
        part = slice(start, start + CHUNK)
        m, _ = relaxed_mask(s[part].clamp(EPS, 1 - EPS), key, temperature, number, start)
        torch.mul(w[part], m, out=flat[part])
    return out


@torch.library.custom_op(
    "ghostmask::relaxed_weight_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor weight, Tensor probability, Tensor key, Tensor temperature, int number)"
    " -> (Tensor, Tensor)",
)
def relaxed_weight_backward(
    grad: Tensor, weight: Tensor, probability: Tensor, key: Tensor, temperature: Tensor, number: int
) -> tuple[Tensor, Tensor]:
    """(dL/dw, dL/ds) = (g m, g w m (1 - m) / (tau s (1 - s))) of one tensor, each laid out as w and s are."""
    grad_w, grad_s = torch.empty_like(weight), torch.empty_like(weight)
    g, w, s = _memory(grad, grad_w), _memory(weight, grad_w), _memory(probability, grad_w)
    flat_w, flat_s = _memory(grad_w, grad_w), _memory(grad_s, grad_w)
    if kernels := _kernels(weight, probability):
        arrays = [t.numpy() for t in (g, w, s, flat_w, flat_s)]
        settings = _settings(key, temperature, number)
        work = lambda a, b: kernels.backward(*arrays, a, b, *settings)  # noqa: E731
        split_over_threads(work, -(-len(w) // BLOCK), SMALLEST_RANGE)
    else:
        for start in range(0, len(w), CHUNK):
            part = slice(start, start + CHUNK)
            limited = s[part].clamp(EPS, 1 - EPS)
            m, rest = relaxed_mask(limited, key, temperature, number, start)
            torch.mul(g[part], m, out=flat_w[part])
            torch.mul(flat_w[part] * w[part], rest / (temperature * limited * (1 - limited)), out=flat_s[part])
    like = torch.empty_like(probability)
    return grad_w, grad_s if like.stride() == grad_s.stride() else like.copy_(grad_s)


@relaxed_weight.register_fake
def _(weight: Tensor, probability: Tensor, key: Tensor, temperature: Tensor, number: int) -> Tensor:
    return torch.empty_like(weight)


@relaxed_weight_backward.register_fake
def _(
    grad: Tensor, weight: Tensor, probability: Tensor, key: Tensor, temperature: Tensor, number: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(probability)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, probability, key, temperature, ctx.number = inputs
    ctx.save_for_backward(weight, probability, key, temperature)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    grad_w, grad_s = relaxed_weight_backward(grad, *ctx.saved_tensors, ctx.number)
    return grad_w, grad_s, None, None, None


relaxed_weight.register_autograd(_gradients, setup_context=_save)


def _memory(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor's elements in the order of `like`'s memory, as a vector: a view where their strides agree."""
    same = all(a == b for a, b, size in zip(tensor.stride(), like.stride(), like.shape, strict=True) if size > 1)
    if not same:
        tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    return tensor.detach().as_strided((like.numel(),), (1,), tensor.storage_offset())


def _kernels(weight: Tensor, probability: Tensor) -> Any:
    ours = weight.device.type == "cpu" and weight.dtype == probability.dtype == torch.float32
    return load_kernels("masks.relaxed_mask_cpu") if ours else None


def _settings(key: Tensor, temperature: Tensor, number: int) -> tuple[Any, ...]:
    bits = np.uint64(int(key) & 0xFFFFFFFFFFFFFFFF)
    return bits, np.uint64(number), np.float32(1 / float(temperature)), np.float32(EPS)
