"""What does one image cost: floating-point operations of a network, dense and under a mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def count_flops(net: nn.Module, image_shape: tuple[int, int, int], kept: Mapping[str, int] | None) -> tuple[int, int]:
    """(dense, sparse) floating-point operations of one forward pass of one image, a multiply-add counted as 2.

    Convolutions and linear layers only, without biases. kept: number of weights left per weight name
    ("layer1.0.conv1.weight"), each scaling its layer by kept / numel; names left out and None count as dense.
    image_shape: (channels, height, width). Runs on the meta device: nothing is computed, `net` is left as it was.
    Raises ValueError for a name in `kept` that is no weight of a convolution or linear layer.
    """
    layers = {name: m for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    unknown = set(kept or ()) - {f"{name}.weight" for name in layers}
    if unknown:
        raise ValueError(f"kept names no convolution or linear layer: {sorted(unknown)}")
    positions = _count_positions(net, layers, image_shape)
    dense = sparse = 0
    for name, layer in layers.items():
        size = layer.weight.numel()
        dense += 2 * positions[name] * size
        sparse += 2 * positions[name] * (kept or {}).get(f"{name}.weight", size)
    return dense, sparse


def _count_positions(net: nn.Module, layers: dict[str, Any], image_shape: tuple[int, int, int]) -> dict[str, int]:
    """How often one image uses every weight of each layer: output pixels of a convolution, rows of a linear layer."""
    positions = dict.fromkeys(layers, 0)

    def hook_of(name: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            positions[name] += output.numel() // layers[name].weight.shape[0]

        return hook

    hooks = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    training = {module: module.training for module in net.modules()}
    state = {name: tensor.to("meta") for name, tensor in (*net.named_parameters(), *net.named_buffers())}
    try:
        net.eval()  # batch norm in training mode refuses a batch of one image
        with torch.no_grad():
            functional_call(net, state, (torch.empty(1, *image_shape, device="meta"),))
    finally:
        for handle in hooks:
            handle.remove()
        for module, was_training in training.items():
            module.training = was_training
    return positions
