"""The Kronecker factors of a network's Fisher matrix (K-FAC): A over layer inputs, G over output gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ghostmask.engine.errors import InputError, bad_value
from ghostmask.engine.world import World
from ghostmask.masks.kernels.noise import generator
from ghostmask.masks.scoring.score_images import Chunk
from ghostmask.masks.scoring.scored_copy import full_float32, logits_of, scored_copy

METHOD = "mlprune"
"""The mask.method that errors name: the only one that uses these factors."""
ROWS_BYTES = 1 << 28
"""Patches of a convolution are laid out for as many images at once as fit into this."""


class KroneckerFactors:
    """Sums of a a^T and g g^T of the layers whose weights are named, over images given chunk by chunk.

    For a convolution, a is each patch of the input and g the gradient at each output pixel. The network is in eval
    mode: images do not depend on each other. Labels are drawn from its predictions, by (seed, image).

    Raises InputError for a layer that it cannot score: neither Linear nor Conv2d, a grouped convolution, or one whose
    weights are used without a call of the layer (as in torch's attention).
    """

    def __init__(self, net: nn.Module, names: Sequence[str], seed: int) -> None:
        self.seed = seed
        self.twin, self.weights = scored_copy(net, dict.fromkeys(names))
        self.twin.eval()
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.called: set[str] = set()
        for name, w in self.weights.items():
            outputs, inputs = w.shape[0], w[0].numel()
            # float64: the largest eigenvalue is thousands of times the mean diagonal, and float32's rounding of it as
            # large as the damping.
            self.sums[name] = (
                w.new_zeros(inputs, inputs, dtype=torch.float64), w.new_zeros(outputs, outputs, dtype=torch.float64)
            )  # fmt: skip
            layer = self.twin.get_submodule(name.removesuffix(".weight"))
            if not isinstance(layer, nn.Linear | nn.Conv2d):
                raise _not_scored(name, f"belongs to a {type(layer).__name__}")
            if isinstance(layer, nn.Conv2d) and layer.groups != 1:
                raise _not_scored(name, "belongs to a grouped convolution")
            layer.register_forward_hook(partial(self._hook, name))

    @full_float32()
    def add(self, chunk: Chunk) -> None:
        """Add this rank's images of a chunk. Raises InputError for a network whose output is not (N, classes)."""
        self.called.clear()
        logits = logits_of(self.twin, chunk.images, METHOD)
        labels = drawn_labels(logits.detach(), chunk.numbers, self.seed)
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        gradients = torch.autograd.grad(loss, list(self.weights.values()), allow_unused=True)
        for name, gradient in zip(self.weights, gradients, strict=True):
            if gradient is not None and name not in self.called:
                raise _not_scored(name, "is used without a call of its layer")

    def inverse_diagonals(self, damping: float, world: World) -> dict[str, tuple[Tensor, Tensor]]:
        """Collective: (diag(A^-1), diag(G^-1)) by weight name, float64; each rank inverts its share of the layers.

        damping: multiple of the mean diagonal that is added to each factor's diagonal before it is inverted (D25). The
        larger it is, the less the factors say and the more a score is w^2 alone.
        """
        result = {}
        for number, (name, pair) in enumerate(self.sums.items()):
            mine = number % world.size == world.rank
            diagonals = []
            for matrix in (world.all_reduce(m) for m in pair):
                nothing = torch.zeros(len(matrix), dtype=torch.float64, device=matrix.device)
                diagonals.append(world.all_reduce(_inverse_diagonal(matrix, damping) if mine else nothing))
            result[name] = (diagonals[0], diagonals[1])
        return result

    def _hook(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        self.called.add(name)
        inputs_sum, outputs_sum = self.sums[name]
        _add_inputs(inputs_sum, layer, inputs[0].detach())
        output.register_hook(lambda gradient: _add_outputs(outputs_sum, layer, gradient))


def drawn_labels(logits: Tensor, numbers: Tensor, seed: int) -> Tensor:
    """(N,) labels from softmax(logits), (N, K): a function of the logits, the seed and the images' numbers."""
    drawn = [generator(f"drawn label {seed} {number}").random() for number in numbers.tolist()]
    uniform = torch.tensor(drawn, dtype=torch.float64)
    reached = logits.double().softmax(1).cumsum(1) <= uniform.to(logits.device)[:, None]
    return reached.sum(1).clamp(max=logits.shape[1] - 1)


def _not_scored(name: str, why: str) -> InputError:
    fix = f"cannot score {name}, which {why}; name it in mask.dense_layers or use another method"
    return bad_value("mask.method", METHOD, fix)


def _add_inputs(total: Tensor, layer: nn.Module, x: Tensor) -> None:
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, x.shape[-1]).double()
        total.addmm_(rows.T, rows)
        return
    assert isinstance(layer, nn.Conv2d)
    pixels = x[0:1].numel() * layer.kernel_size[0] * layer.kernel_size[1] * total.element_size()
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    for part in torch.split(x, max(1, ROWS_BYTES // max(1, pixels))):
        padded = functional.pad(part, layer._reversed_padding_repeated_twice, mode)  # "same" and "valid" too
        patches = functional.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
        rows = patches.transpose(1, 2).reshape(-1, patches.shape[1]).double()
        total.addmm_(rows.T, rows)


def _add_outputs(total: Tensor, layer: nn.Module, gradient: Tensor) -> None:
    rows = gradient if isinstance(layer, nn.Linear) else gradient.movedim(1, -1)
    rows = rows.reshape(-1, len(total)).double()
    total.addmm_(rows.T, rows)


def _inverse_diagonal(matrix: Tensor, damping: float) -> Tensor:
    mean = matrix.diagonal().mean()
    # A layer that no signal or no gradient reaches has a factor of zeros; then nothing tells its weights apart.
    shift = damping * mean if mean > 0 else torch.ones_like(mean)
    damped = matrix + shift * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped)).diagonal().clone()
