"""How a mask reaches a weight: the plain network is called with masked weights in place of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call


class MaskedModel(nn.Module):
    """images -> logits of `net` with its prunable weights replaced by sparsifier(weights).

        net.conv1.weight ----\\
        net.layer1....weight -+-> sparsifier -> masked weights -> functional_call(net, masked, images)
        (all of them at once)-/

    `net` keeps its parameters and names, so that it can be exported as it is. sparsifier: list of weights -> list of
    weights of the same shapes.
    """

    def __init__(self, net: nn.Module, names: Sequence[str], sparsifier: nn.Module) -> None:
        super().__init__()
        self.net, self.sparsifier, self.names = net, sparsifier, tuple(names)

    def forward(self, images: Tensor) -> Tensor:
        weights = [self.net.get_parameter(name) for name in self.names]
        masked = self.sparsifier(weights)
        logits: Tensor = functional_call(self.net, dict(zip(self.names, masked, strict=True)), (images,))
        return logits


class FixedMasks(nn.Module):
    """weights -> [w * m]: boolean masks, one per weight, kept as buffers so that checkpoints hold them."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = tuple(masks)
        for name, mask in masks.items():
            self.register_buffer(key(name), mask.clone())

    def forward(self, weights: list[Tensor]) -> list[Tensor]:
        return [w * self.get_buffer(key(n)) for n, w in zip(self.names, weights, strict=True)]

    def masks(self) -> dict[str, Tensor]:
        """The live masks by weight name."""
        return {n: self.get_buffer(key(n)) for n in self.names}

    @torch.no_grad()
    def replace(self, masks: Sequence[Tensor]) -> None:
        """Copy new masks, in the order of the names, over the old ones."""
        for name, mask in zip(self.names, masks, strict=True):
            self.get_buffer(key(name)).copy_(mask)


def present_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks with which `model` would be evaluated now, by weight name; empty where it is no MaskedModel."""
    if not isinstance(model, MaskedModel):
        return {}
    if isinstance(model.sparsifier, FixedMasks):
        return model.sparsifier.masks()
    training = model.sparsifier.training
    model.sparsifier.eval()
    weights = [model.net.get_parameter(name).detach() for name in model.names]
    with torch.no_grad():
        masked = model.sparsifier(weights)
    model.sparsifier.train(training)
    return {n: (m != 0) | (w == 0) for n, m, w in zip(model.names, masked, weights, strict=True)}


def key(name: str) -> str:
    """The name of a weight as torch allows it for a buffer or parameter: without dots."""
    return name.replace(".", "/")


def density_of(masks: Mapping[str, Tensor]) -> float:
    """Kept weights / weights of boolean masks; 1 without masks."""
    total = sum(m.numel() for m in masks.values())
    return sum(int(m.sum()) for m in masks.values()) / total if total else 1.0
