"""The loss that SNIP and GraSP differentiate: cross-entropy of chosen training images, batch norm over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from ghostmask.engine.world import World
from ghostmask.masks.scoring.score_images import Chunk
from ghostmask.masks.scoring.scored_copy import full_float32, scored_copy, share_batch_statistics

Chunks = Callable[[], Iterator[Chunk]]


class ScoreLoss:
    """Derivatives of the summed cross-entropy of softmax(logits / temperature) by the weights of those names.

    chunks: gives the images anew for every pass. Batch norm uses each chunk's statistics, over all ranks.
    """

    def __init__(
        self, net: nn.Module, names: Mapping[str, Tensor], chunks: Chunks, world: World, temperature: float = 1.0
    ) -> None:
        self.twin, self.weights = scored_copy(net, names)
        share_batch_statistics(self.twin, world)
        self.chunks, self.world, self.temperature = chunks, world, temperature

    @full_float32()
    def gradient(self) -> list[Tensor]:
        """Collective: this rank's summand of the gradient, shaped like the weights; the sum over the ranks is it."""
        total = [torch.zeros_like(w) for w in self.weights.values()]
        for chunk in self.chunks():
            _add(total, torch.autograd.grad(self._loss(chunk), list(self.weights.values())))
        return total

    @full_float32()
    def hessian_product(self, vectors: list[Tensor]) -> list[Tensor]:
        """Collective: this rank's summand of H v, shaped like the weights; vectors: v, equal on every rank."""
        weights = list(self.weights.values())
        total = [torch.zeros_like(w) for w in weights]
        for chunk in self.chunks():
            first = torch.autograd.grad(self._loss(chunk), weights, create_graph=True)
            along = torch.stack([(g * v).sum() for g, v in zip(first, vectors, strict=True)]).sum()
            _add(total, torch.autograd.grad(along, weights))
        return total

    def _loss(self, chunk: Chunk) -> Tensor:
        logits = self.twin(chunk.images) / self.temperature
        return functional.cross_entropy(logits, chunk.labels, reduction="sum")


def _add(total: list[Tensor], part: tuple[Tensor, ...]) -> None:
    for whole, term in zip(total, part, strict=True):
        whole.add_(term)
