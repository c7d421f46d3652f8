"""The loss that SNIP and GraSP differentiate: cross-entropy of chosen training images, batch norm over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from ghostmask.engine.errors import bad_value
from ghostmask.engine.world import World
from ghostmask.masks.scoring.score_images import Chunk
from ghostmask.masks.scoring.scored_copy import (
    draw_classifier,
    full_float32,
    logits_of,
    scored_copy,
    share_batch_statistics,
)

Chunks = Callable[[], Iterator[Chunk]]

NO_SECOND_DERIVATIVE = ("not implemented", "differentiate twice", "double backward", "does not require grad")
"""What torch says of a function without one; its other errors (memory, a lost rank) are not the network's fault."""


class ScoreLoss:
    """Derivatives of the summed cross-entropy of softmax(logits / temperature) by the weights of those names.

    weights: by name, those of the copy that is differentiated. chunks: gives the images anew for every pass.

    Batch norm normalises with each chunk's own statistics, over all ranks. ToST's and GraSP's code have it so too; the
    original SNIP in TensorFlow scores with `is_train=False`, that is, with running statistics that nothing has trained
    yet: mean 0 and variance 1, no normalisation at all. Everything else is in eval mode: nothing is drawn.
    """

    def __init__(
        self, net: nn.Module, names: Mapping[str, Tensor], chunks: Chunks, world: World, temperature: float = 1.0,
        *, method: str = "snip", fresh_classifier: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        """method: the mask.method that errors name. fresh_classifier: the copy's classifier has weights drawn by
        (seed,) alone, see `draw_classifier`; they are in `weights`, and belong into a score that multiplies by them."""
        self.twin, self.weights = scored_copy(net, names)
        self.twin.eval()
        if fresh_classifier:
            draw_classifier(self.twin, seed)
        share_batch_statistics(self.twin, world)
        self.chunks, self.world, self.temperature, self.method = chunks, world, temperature, method

    @full_float32()
    def gradient(self) -> list[Tensor]:
        """Collective: this rank's summand of the gradient, shaped like the weights; the sum over the ranks is it.

        Zero for a weight that the network does not use. Raises InputError, as `hessian_product` does, for a network
        whose output is not (N, classes).
        """
        total = [torch.zeros_like(w) for w in self.weights.values()]
        for chunk in self.chunks():
            _add(total, self._slopes(self._loss(chunk)))
        return total

    @full_float32()
    def hessian_product(self, vectors: list[Tensor]) -> list[Tensor]:
        """Collective: this rank's summand of H v, shaped like the weights; vectors: v, equal on every rank.

        Raises InputError for a network that has no second derivative.
        """
        total = [torch.zeros_like(w) for w in self.weights.values()]
        for chunk in self.chunks():
            first = self._slopes(self._loss(chunk), create_graph=True)
            along = torch.stack([(g * v).sum() for g, v in zip(first, vectors, strict=True)]).sum()
            try:
                _add(total, self._slopes(along))
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                if not any(words in reason for words in NO_SECOND_DERIVATIVE):
                    raise
                fix = (
                    f"needs second derivatives, which this network does not have ({reason}); snip needs first ones only"
                )
                raise bad_value("mask.method", self.method, fix) from error
        return total

    def _loss(self, chunk: Chunk) -> Tensor:
        logits = logits_of(self.twin, chunk.images, self.method) / self.temperature
        return functional.cross_entropy(logits, chunk.labels, reduction="sum")

    def _slopes(self, value: Tensor, create_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            value, list(self.weights.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
        )


def _add(total: list[Tensor], part: tuple[Tensor, ...]) -> None:
    for whole, term in zip(total, part, strict=True):
        whole.add_(term)
