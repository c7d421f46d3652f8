"""Masks that chance draws: how many weights each layer keeps (evenly, or by the layers' shapes), and which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.kernels.noise import generator, hashed, uniforms
from ghostmask.masks.method import MaskMethod
from ghostmask.masks.prunable import prunable_weights
from ghostmask.masks.scoring.allocation import layer_counts
from ghostmask.masks.settings import InUnits, choice, granularity, number
from ghostmask.masks.units.blocks import Blocks, Kernels


@dataclass(frozen=True)
class Allocated(InUnits):
    """A method whose layers keep as many weights as their shapes say."""

    granularity: str = granularity(
        {"channel": "channels that are added up go together, and no layer has a density of its own; use kernel"}
    )
    """What is drawn as one: weight, kernel (of a convolution, between one input and one output channel), or weights in
    N:M like 2:4 (N of every M neighbouring input channels, which decides each layer's density)."""
    allocation: str = choice("erk", "er", "uniform")
    """uniform (the same density in every layer), er or erk (by the layers' shapes; erk counts kernel sizes)."""
    min_per_layer: int = number(0, 0)
    """Weights (or kernels: mask.granularity) that every layer keeps at least."""


class Drawn(MaskMethod):
    """Round(density n) weights in all, or the kernels that have room in that; each of a layer is equally likely."""

    first_dense: ClassVar[bool] = False
    """Whether allocation=uniform keeps all of the network's first layer."""

    def counts(self) -> list[int]:
        """How many weights each layer keeps, by mask.allocation or by its blocks."""
        s, shapes = self.settings, [w.shape for w in self.weights.values()]
        if isinstance(self.units, Blocks):
            return self.units.counts(shapes)
        first = next(iter(prunable_weights(self.net, (), s.only)))
        dense = self.first_dense and s.allocation == "uniform" and first in self.weights
        lengths = list(self.units.lengths.values()) if isinstance(self.units, Kernels) else [1] * len(shapes)
        units = layer_counts(shapes, s.density, s.allocation, s.min_per_layer, first_dense=dense, lengths=lengths)
        return [count * length for count, length in zip(units, lengths, strict=True)]

    def drawn(self) -> dict[str, Tensor]:
        """Collective: whole masks, functions of the seed, as on all ranks."""
        seed, kept = self.recipe.seed, self.counts()
        if self.units is None:
            each = zip(self.weights.items(), kept, strict=True)
            return {name: random_mask(w, count, seed, name) for (name, w), count in each}
        part = Slice.even(self.weights, self.world)
        numbers = random_numbers(part, f"random mask {seed}")
        if isinstance(self.units, Blocks):
            return part.gathered(self.units.largest(part, numbers, self.units.budget(seed)))
        assert isinstance(self.units, Kernels)
        return part.gathered(self.units.largest_of_layers(part, numbers, self.units.numbers(kept), seed))


def random_mask(like: Tensor, kept: int, seed: int, name: str) -> Tensor:
    """Bool tensor of the shape and device of `like`, `kept` ones at random: a function of (seed, name), as on all
    ranks."""
    order = generator(f"random mask {seed} {name}").permutation(like.numel())
    mask = torch.zeros(like.numel(), dtype=torch.bool)
    mask[torch.from_numpy(order[:kept])] = True
    return mask.view(like.shape).to(like.device)


def random_numbers(part: Slice, text: str) -> Tensor:
    """(n,) float32, uniform in (0, 1): functions of the text and of each element's index."""
    key, drawn = hashed(text, 8), torch.empty(part.numel, device=part.world.device)
    for run, own in part.views(drawn):
        own.copy_(uniforms(key, run.first, run.numel, drawn.device))
    return drawn
