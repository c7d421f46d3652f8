"""On what are scores computed: a copy of the network, so that the network itself is exactly what it was before."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from ghostmask.engine.batchnorm import batch_norms
from ghostmask.engine.world import World


def scored_copy(net: nn.Module, names: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """(copy of `net` in `dtype`, its parameters of those names), only they with gradients.

    What is done to the copy, forward passes and modes included, leaves weights, batch norm statistics, mode and hooks
    of `net` alone.
    """
    twin = copy.deepcopy(net).to(dtype).requires_grad_(False)
    for module in twin.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # scores read activations after the next layer has had them
    weights = {name: twin.get_parameter(name).requires_grad_(True) for name in names}
    return twin, weights


@contextmanager
def full_float32() -> Iterator[None]:
    """Within, convolutions on CUDA do not round to TF32: its 10 bits would make masks depend on how images are shared
    out over the ranks."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def share_batch_statistics(net: nn.Module, world: World) -> None:
    """Replace the batch norm layers by ones that normalise with the statistics of all ranks' images together.

    A loss summed over the ranks is then the loss of one rank with all images, and so are its derivatives, of any order.
    """
    for name, layer in batch_norms(net).items():
        net.set_submodule(name, _GlobalBatchNorm(layer, world))


class _GlobalBatchNorm(nn.Module):
    """Batch norm in training mode over the ranks, twice differentiable; it keeps no running statistics."""

    def __init__(self, layer: Any, world: World) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.world = layer.weight, layer.bias, layer.eps, world

    def forward(self, x: Tensor) -> Tensor:
        if self.world.size == 1 and x.numel() > x.shape[1]:  # torch refuses a single value per channel
            return functional.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        others = [d for d in range(x.dim()) if d != 1]
        count = self.world.all_reduce(torch.tensor([x.numel() // x.shape[1]], dtype=torch.float64))
        mean = sum_over_ranks(x.sum(others, keepdim=True), self.world) / count.item()
        centred = x - mean
        variance = sum_over_ranks((centred * centred).sum(others, keepdim=True), self.world) / count.item()
        shape = [-1 if d == 1 else 1 for d in range(x.dim())]
        normal = centred * torch.rsqrt(variance + self.eps)
        return normal if self.weight is None else normal * self.weight.view(shape) + self.bias.view(shape)


def sum_over_ranks(x: Tensor, world: World) -> Tensor:
    """Collective, in backward passes of any order too: x summed over the ranks; the gradient is summed likewise.

    Every rank must differentiate the same graph, or the ranks wait for each other for ever.
    """
    total: Tensor = _SumOverRanks.apply(x, world)
    return total


class _SumOverRanks(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world = world
        return world.all_reduce(x.contiguous().clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return sum_over_ranks(gradients[0], ctx.world), None
