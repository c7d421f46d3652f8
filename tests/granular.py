"""Small networks, their prunable units and scores: what tests of mask.granularity share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models
from torchvision.models.resnet import Bottleneck

from ghostmask.engine.registry import resolve
from ghostmask.engine.sharding.slices import Layout, Slice
from ghostmask.engine.world import World, single
from ghostmask.masks.granularity import units_of
from ghostmask.masks.prunable import prunable_weights
from ghostmask.masks.scoring.topk import Budget, largest
from ghostmask.masks.settings import Protecting
from ghostmask.models.cifar_resnet import CifarResNet
from ghostmask.models.flops import uses_of
from ghostmask.models.registry import MODELS

SHAPE = (3, 16, 16)


class Depthwise(nn.Module):
    """Inverted residual with squeeze-and-excitation, concatenation, a flattened map and a linear layer with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.expand, self.deep = nn.Conv2d(6, 10, 1, bias=False), nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.squeeze, self.excite = nn.Conv2d(10, 3, 1), nn.Conv2d(3, 10, 1)
        self.project, self.side = nn.Conv2d(10, 6, 1, bias=False), nn.Conv2d(6, 5, 1)
        self.head, self.fc = nn.Linear(11 * 16, 12), nn.Linear(12, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(images)))
        y = functional.hardswish(self.deep(functional.relu6(self.expand(x))))
        y = y * torch.sigmoid(self.excite(functional.relu(self.squeeze(functional.adaptive_avg_pool2d(y, 1)))))
        x = x + self.project(y)
        x = functional.avg_pool2d(torch.cat([x, self.side(x)], 1), 4)
        logits: Tensor = self.fc(functional.gelu(self.head(x.flatten(1))))
        return logits


def network(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    torch.manual_seed(0)
    shape = (3, 64, 64) if name in ("vgg19", "resnet18", "resnet50", "mobilenet_v3_small") else SHAPE
    if name == "depthwise":
        return Depthwise(), shape
    if name == "bottleneck":
        return CifarResNet(Bottleneck, (2, 1), (4, 6), 5), shape
    if name in MODELS:
        return resolve(MODELS[name])(5, shape), shape
    return models.get_model(name, weights=None, num_classes=5), shape


def settings(**values: Any) -> Protecting:
    return Protecting(method="magnitude", **values)


def units(name: str, **values: Any) -> tuple[Any, dict[str, nn.Parameter], nn.Module, tuple[int, int, int]]:
    net, shape = network(name)
    weights = prunable_weights(net)
    return units_of(settings(**values), net, weights, shape, lambda: uses_of(net, shape)), weights, net, shape


def scores_of(weights: dict[str, Tensor], seed: int = 1, coarse: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {n: torch.randn(w.shape, generator=generator).abs() for n, w in weights.items()}
    return {n: (t * 3).round() for n, t in drawn.items()} if coarse else drawn


def masks_of(made: Any, scores: dict[str, Tensor], budget: Budget, world: World | None = None) -> dict[str, Tensor]:
    world = world or single()
    shapes = {n: t.shape for n, t in scores.items()}
    part = Slice(Layout(shapes, world.size, 3000 if world.size > 1 else 0, 2), world)
    found = part.gathered(largest(part, part.cut(scores), budget))
    return found
