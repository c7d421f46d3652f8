"""On what are scores computed: a copy of the network, so that the network itself is exactly what it was before."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional

from ghostmask.engine.errors import bad_value
from ghostmask.engine.world import World
from ghostmask.masks.kernels.noise import hashed


def scored_copy(net: nn.Module, names: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """(copy of `net` in `dtype`, its parameters of those names), only they with gradients.

    What is done to the copy, forward passes and modes included, leaves weights, batch norm statistics, mode and hooks
    of `net` alone.
    """
    twin = copy.deepcopy(net).to(dtype).requires_grad_(False)
    for module in twin.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]  # scores read activations after the next layer has had them
    weights = {name: twin.get_parameter(name).requires_grad_(True) for name in names}
    return twin, weights


def logits_of(twin: nn.Module, images: Tensor, method: str) -> Tensor:
    """(N, classes) twin(images). Raises InputError, on every rank alike, for a network with any other output.

    method: the value of mask.method that the error names.
    """
    logits: object = twin(images)
    if isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == len(images):
        return logits
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    fix = f"scores one row of logits per image, (N, classes); this network gives {shape} for {len(images)} images"
    raise bad_value("mask.method", method, fix)


def draw_classifier(twin: nn.Module, seed: int) -> None:
    """Draw the weight of the classifier anew from N(0, 2 / (fan_in + fan_out)) (Xavier), a function of the seed alone.

    The classifier is the last of the convolutions and linear layers if it is a 1x1 convolution, else the last linear
    layer; a network that has neither stays as it is.
    """
    layers = [m for m in twin.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    found = [m for m in layers if isinstance(m, nn.Linear) or (m is layers[-1] and m.kernel_size == (1, 1))]
    if not found:
        return
    generator = torch.Generator().manual_seed(hashed(f"fresh classifier {seed}", 7))
    drawn = torch.empty(found[-1].weight.shape)  # on the CPU: the same on every device
    nn.init.xavier_normal_(drawn, generator=generator)
    with torch.no_grad():
        found[-1].weight.copy_(drawn)


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


class GlobalBatchNorm(nn.Module):
    """Batch norm in training mode that takes its statistics from all ranks' images together, and keeps none.

    A loss summed over the ranks is then the loss of one rank with all images, and so are its derivatives, of any order.
    """

    def __init__(self, layer: Any, world: World) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.world = layer.weight, layer.bias, layer.eps, world

    def forward(self, x: Tensor) -> Tensor:
        if self.world.size == 1 and x.numel() > x.shape[1]:  # torch refuses a single value per channel
            return functional.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        others = [d for d in range(x.dim()) if d != 1]
        count = self.world.all_reduce(torch.tensor([x.numel() // x.shape[1]], dtype=torch.float64))
        mean = _sum_over_ranks(x.sum(others, keepdim=True), self.world) / count.item()
        centred = x - mean
        variance = _sum_over_ranks((centred * centred).sum(others, keepdim=True), self.world) / count.item()
        shape = [-1 if d == 1 else 1 for d in range(x.dim())]
        normal = centred * torch.rsqrt(variance + self.eps)
        return normal if self.weight is None else normal * self.weight.view(shape) + self.bias.view(shape)


def _sum_over_ranks(x: Tensor, world: World) -> Tensor:
    """Collective, in backward passes of any order too: every rank must differentiate the same graph, or the ranks wait
    for each other for ever."""
    total: Tensor = all_reduce(x, group=world.group) if world.size > 1 else x  # type: ignore[no-untyped-call]
    return total
