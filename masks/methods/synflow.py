"""synflow: no data at all; weights through which the network's total synaptic flow passes stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ghostmask.engine.batchnorm import batch_norms
from ghostmask.engine.data import DataPipeline
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.one_shot import OneShot
from ghostmask.masks.scoring.scored_copy import scored_copy
from ghostmask.masks.scoring.topk import largest
from ghostmask.masks.settings import FromTrained, Protecting, number


@dataclass(frozen=True)
class Settings(Protecting, FromTrained):
    """synflow."""

    iterations: int = number(100, 1, 1e5)
    """Pruning steps from density 1 to mask.density."""


class SynFlow(OneShot):
    """SynFlow (Tanaka et al. 2020): R = sum of the outputs for an input of ones, all parameters at their absolute
    values; score w dR/dw. At iteration i of mask.iterations the largest scores stay, at density^(i / iterations).

    In float64 (R of a deep network overflows float32) and eval mode. Each rank scores the same network, but decides
    its own slice of the weights only: the masks are equal whatever the ranks' arithmetic does.
    """

    Settings = Settings
    blind_at_zero = True
    paper = (
        'Tanaka et al. 2020, "Pruning neural networks without any data by iteratively conserving synaptic flow", '
        "https://arxiv.org/abs/2006.05467"
    )
    aliases = ("synaptic_flow", "data_free")

    def find(self, data: DataPipeline) -> dict[str, Tensor]:
        steps, part = self.settings.iterations, Slice.even(self.weights, self.world)
        twin, weights = scored_copy(self.net, self.weights, torch.float64)
        twin.eval()
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.abs_()
            for layer in batch_norms(twin).values():
                if layer.running_mean is not None:
                    layer.running_mean.zero_()  # a trained network's means would cut flow off at its ReLUs
        full = [w.detach().clone() for w in weights.values()]
        ones = torch.ones(1, *data.image_shape, dtype=torch.float64, device=self.world.device)
        masks: dict[str, Tensor] = {}
        kept: Tensor | None = None
        for i in range(1, steps + 1):
            flow = flow_scores(twin, list(weights.values()), ones)
            scores = part.cut(dict(zip(weights, flow, strict=True)))
            kept = largest(part, scores, self.budget(self.settings.density ** (i / steps)), among=kept)
            masks = part.gathered(kept)
            with torch.no_grad():
                for w, dense, mask in zip(weights.values(), full, masks.values(), strict=True):
                    torch.mul(dense, mask, out=w)
        return masks


def flow_scores(net: torch.nn.Module, weights: list[Tensor], ones: Tensor) -> list[Tensor]:
    """w dR/dw for each of the weights, R = sum of net(ones): shaped like the weights."""
    gradients = torch.autograd.grad(net(ones).sum(), weights)
    return [w.detach() * g for w, g in zip(weights, gradients, strict=True)]
