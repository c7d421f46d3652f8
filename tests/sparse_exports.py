"""Exports of networks that nobody trained: sparse weights and batch-norm statistics that are not the first ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.export import network_facts, use, write_export
from ghostmask.launcher.settings import to_dict
from ghostmask.masks.prunable import prunable_weights
from ghostmask.models.build import build_model
from ghostmask.models.config import ModelConfig

DIGITS = (3, 8, 8)


def network(name: str, classes: int, shape: tuple[int, int, int], density: float, **options: Any) -> nn.Module:
    """In eval mode; each layer keeps its largest weights, and batch norm is that of a trained network."""
    net = build_model(ModelConfig(name, **options), classes, shape, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.3, 0.2)):
                    tensor.uniform_(low, high, generator=generator)
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.uniform_(-0.2, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
        for weight in prunable_weights(net).values():
            magnitude = weight.abs().flatten()
            if density < 1:
                weight[weight.abs() <= magnitude.kthvalue(int((1 - density) * len(magnitude))).values] = 0
    return net.eval()


def export(folder: Path, net: nn.Module, name: str, shape: tuple[int, int, int], **options: Any) -> dict[str, Any]:
    """Write `net` to `folder` as a finished run does; returns the summary. Accuracies are made up."""
    config = RunConfig(model=ModelConfig(name, **options))
    classes = len(net(torch.zeros(2, *shape))[0])
    masks: dict[str, Tensor] = {n: w.detach() != 0 for n, w in prunable_weights(net).items()}
    usage = use(config)
    facts = {
        "network": network_facts(net, config, classes, shape),
        "run": {"name": "first_try", "step": 90, "steps": 100},
        "data": {"training images": 96},
        "versions": {"torch": torch.__version__},
    }
    return write_export(
        folder, net, masks, accuracy=0.875, top5=0.99, image_shape=shape, config=to_dict(config), usage=usage,
        facts=facts,
    )  # fmt: skip
