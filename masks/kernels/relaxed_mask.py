"""The masked weights w m that ProbMask trains through, and their gradients (eq. 3-5).

    m = sigmoid((log s - log(1 - s) + L) / tau),    L = log u - log(1 - u) ~ Logistic(0, 1),    u = u(key, tensor, i)

is the paper's mask with one uniform number in place of its two Gumbel ones: their difference is Logistic(0, 1).
An operator of our own reads w and s and writes w m; it saves w, s and the key, and draws the noise a second time in
backward. (torch.compile would either save the noise or, with recomputation on, draw *other* noise.) It takes a bucket
of neighbouring tensors at once, on CUDA in one launch. Not all tensors in one: then no gradient could leave before the
last one is there, and DeepSpeed would have nothing to reduce while backward runs.

s is limited to [EPS, 1 - EPS] inside the sampling, and the gradient passes straight through that limit: at s = 1, where
every run starts, and at s = 0 the sigmoid would saturate and no probability would ever move again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ghostmask.masks.kernels import relaxed_mask_torch
from ghostmask.masks.kernels.compiled import kernels_for
from ghostmask.masks.kernels.memory_order import is_plain
from ghostmask.masks.kernels.noise import NoiseKey

EPS = 1e-6
"""Nearest that a probability comes to 0 and 1 in the sampling; the projection may well put s at 0 and 1 exactly."""
BUCKET = 1 << 22
"""Weights after which a bucket is full: six launches for ResNet-50."""


def relaxed_weights(
    weights: list[Tensor],
    probabilities: list[Tensor],
    key: NoiseKey | Tensor,
    temperature: float | Tensor,
    *,
    channels_last: bool = False,
) -> list[Tensor]:
    """[w m for each weight], of each weight's shape; differentiable in weights and probabilities.

    Under autocast in the type that convolutions compute in, otherwise in float32; 4-dimensional ones in channels_last
    order if asked for, otherwise in their weight's. probabilities: of the weights' shapes, in [0, 1]; both float32.
    temperature: tau > 0. The noise of a weight depends on the key, the tensor's place in the list and the weight's
    place in its tensor's *memory* (for a channels_last weight that is not its logical place). Compiled code passes
    `key.tensor(device)` and the temperature as a tensor: a number that changes would be compiled anew.
    """
    if not weights:
        return []
    device = weights[0].device
    key = key.tensor(device) if isinstance(key, NoiseKey) else key
    if not isinstance(temperature, Tensor):
        temperature = torch.tensor(temperature, dtype=torch.float32).to(device, non_blocking=True)
    active = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if active else weights[0].dtype
    masked: list[Tensor] = []
    for first, end in _buckets([w.numel() for w in weights]):
        part = slice(first, end)
        masked += relaxed_bucket(weights[part], probabilities[part], key, temperature, first, dtype, channels_last)
    return masked


def _buckets(sizes: list[int]) -> list[tuple[int, int]]:
    """(first, end) of runs of neighbouring tensors, each but the last of BUCKET weights or more."""
    edges, filled = [0], 0
    for number, size in enumerate(sizes):
        filled += size
        if filled >= BUCKET or number == len(sizes) - 1:
            edges.append(number + 1)
            filled = 0
    return list(itertools.pairwise(edges))


# Operators of torch's library, so that torch.compile, autograd and DeepSpeed take them as torch's own. Not through
# `torch.library.custom_op`: its handling of lists of tensors doubles the operator's time on the host.
torch.library.define(
    "ghostmask::relaxed_bucket",
    "(Tensor[] weights, Tensor[] probabilities, Tensor key, Tensor temperature, int number, ScalarType dtype,"
    " bool channels_last) -> Tensor[]",
)
torch.library.define(
    "ghostmask::relaxed_bucket_backward",
    "(Tensor[] grads, Tensor[] weights, Tensor[] probabilities, Tensor key, Tensor temperature, int number)"
    " -> (Tensor[], Tensor[])",
)
relaxed_bucket = torch.ops.ghostmask.relaxed_bucket.default
relaxed_bucket_backward = torch.ops.ghostmask.relaxed_bucket_backward.default


@torch.library.impl("ghostmask::relaxed_bucket", ("cpu", "cuda"))
def _forward(
    weights: list[Tensor],
    probabilities: list[Tensor],
    key: Tensor,
    temperature: Tensor,
    number: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> list[Tensor]:
    """w m of each tensor, the first of which is the `number`-th; see `relaxed_weights`.

    key: int64 scalar; temperature: float32 scalar.
    """
    outs = [_empty(w, dtype, channels_last) for w in weights]
    form = _form([*weights, *probabilities])
    form.forward(weights, probabilities, outs, key, temperature, number, EPS)
    return outs


@torch.library.impl("ghostmask::relaxed_bucket_backward", ("cpu", "cuda"))
def _backward(
    grads: list[Tensor],
    weights: list[Tensor],
    probabilities: list[Tensor],
    key: Tensor,
    temperature: Tensor,
    number: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """(dL/dw, dL/ds) = (g m, g w m (1 - m) / (tau s (1 - s))) of each tensor, each laid out as w and s are."""
    grads_w, grads_s = [torch.empty_like(w) for w in weights], [torch.empty_like(s) for s in probabilities]
    form = _form([*weights, *probabilities])
    form.backward(grads, weights, probabilities, grads_w, grads_s, key, temperature, number, EPS)
    return grads_w, grads_s


def _forward_shapes(weights: list[Tensor], *others: Any) -> list[Tensor]:
    dtype, channels_last = others[-2:]
    return [_empty(w, dtype, channels_last) for w in weights]


def _backward_shapes(
    grads: list[Tensor], weights: list[Tensor], probabilities: list[Tensor], *others: Any
) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.empty_like(w) for w in weights], [torch.empty_like(s) for s in probabilities]


torch.library.register_fake("ghostmask::relaxed_bucket", _forward_shapes)
torch.library.register_fake("ghostmask::relaxed_bucket_backward", _backward_shapes)


class _Differentiable(torch.autograd.Function):
    """The operator with its gradients. tensors: weights, then as many probabilities; others: the other arguments."""

    @staticmethod
    def forward(ctx: Any, others: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        key, temperature, ctx.number, _, _ = others
        ctx.save_for_backward(*tensors, key, temperature)
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(relaxed_bucket(*_halves(tensors), *others))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, key, temperature = ctx.saved_tensors
        grads_w, grads_s = relaxed_bucket_backward(list(grads), *_halves(tensors), key, temperature, ctx.number)
        return None, *grads_w, *grads_s


@torch.library.impl("ghostmask::relaxed_bucket", "Autograd")
def _with_gradients(weights: list[Tensor], probabilities: list[Tensor], *others: Any) -> list[Tensor]:
    return list(_Differentiable.apply(others, *weights, *probabilities))


def _halves(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(weights, probabilities) of weights and then as many probabilities."""
    return list(tensors[: len(tensors) // 2]), list(tensors[len(tensors) // 2 :])


def _empty(weight: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    order = torch.channels_last if channels_last and weight.dim() == 4 else torch.preserve_format
    return torch.empty_like(weight, dtype=dtype, memory_format=order)


def _form(tensors: list[Tensor]) -> Any:
    """The module that computes with tensors like these: compiled kernels, or torch where there are none."""
    device = tensors[0].device
    ours = all(t.dtype == torch.float32 and t.device == device for t in tensors)
    # On the CPU another order in memory is copied; on CUDA the kernels follow the two that networks have.
    ours = ours and (device.type == "cpu" or all(is_plain(t) for t in tensors))
    return (kernels_for(tensors[0], "ghostmask.masks.kernels.relaxed_mask") if ours else None) or relaxed_mask_torch
