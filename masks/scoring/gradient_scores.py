"""The loss that SNIP and GraSP differentiate: cross-entropy of chosen training images, batch norm over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from ghostmask.engine.batchnorm import batch_norms
from ghostmask.engine.errors import bad_value
from ghostmask.engine.world import World
from ghostmask.masks.scoring.score_images import Chunk
from ghostmask.masks.scoring.scored_copy import GlobalBatchNorm, full_float32, logits_of, scored_copy

NO_SECOND_DERIVATIVE = ("not implemented", "differentiate twice", "double backward", "does not require grad")
"""What torch says of a function without one; its other errors (memory, a lost rank) are not the network's fault."""


class ScoreLoss:
    """Derivatives of the summed cross-entropy of softmax(logits / temperature) by the weights of those names.

    weights: by name, those of the copy (`twin`) that is differentiated: what a score multiplies its derivatives with.
    chunks: gives the images anew for every pass. method: the mask.method that errors name.

    Batch norm normalises with each chunk's own statistics, over all ranks (D23, D25). Everything else is in eval mode:
    nothing is drawn.
    """

    def __init__(
        self, net: nn.Module, names: Mapping[str, Tensor], chunks: Callable[[], Iterator[Chunk]], world: World,
        method: str, temperature: float = 1.0,
    ) -> None:  # fmt: skip
        self.twin, self.weights = scored_copy(net, names)
        self.twin.eval()
        for name, layer in batch_norms(self.twin).items():
            self.twin.set_submodule(name, GlobalBatchNorm(layer, world))
        self.chunks, self.world, self.temperature, self.method = chunks, world, temperature, method

    @full_float32()
    def gradient(self) -> list[Tensor]:
        """Collective: this rank's summand of the gradient, shaped like the weights; the sum over the ranks is it.

        Zero for a weight that the network does not use. Raises InputError, as `hessian_product` does, for a network
        whose output is not (N, classes).
        """
        total = [torch.zeros_like(w) for w in self.weights.values()]
        for chunk in self.chunks():
            for whole, term in zip(total, self._slopes(self._loss(chunk)), strict=True):
                whole.add_(term)
        return total

    @full_float32()
    def hessian_product(self, vectors: list[Tensor]) -> list[Tensor]:
        """Collective: this rank's summand of H v, shaped like the weights; vectors: v, equal on every rank.

        Raises InputError for a network that has no second derivative.
        """
        weights = list(self.weights.values())
        for chunk in self.chunks():
            first = self._slopes(self._loss(chunk), create_graph=True)
            along = torch.stack([(g * v).sum() for g, v in zip(first, vectors, strict=True)]).sum()
            try:
                # Not autograd.grad: for given inputs it leaves out a function without second derivative, silently.
                torch.autograd.backward(along)
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                if not any(words in reason for words in NO_SECOND_DERIVATIVE):
                    raise
                fix = f"needs second derivatives, which this network lacks ({reason}); snip needs first ones only"
                raise bad_value("mask.method", self.method, fix) from error
        products = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        for w in weights:
            w.grad = None
        return products

    def _loss(self, chunk: Chunk) -> Tensor:
        logits = logits_of(self.twin, chunk.images, self.method) / self.temperature
        return functional.cross_entropy(logits, chunk.labels, reduction="sum")

    def _slopes(self, value: Tensor, create_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            value, list(self.weights.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
