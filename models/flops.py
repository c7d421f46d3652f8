"""What does one image cost: floating-point operations of a network, dense and under a mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def count_flops(net: nn.Module, image_shape: tuple[int, int, int], kept: Mapping[str, int] | None) -> tuple[int, int]:
    """(dense, sparse) floating-point operations of one forward pass of one image, a multiply-add counted as 2.

    Convolutions, linear layers and attention's projections only, without biases; what else may be masked (embeddings)
    costs nothing. kept: number of weights left per weight name ("layer1.0.conv1.weight"), each scaling its layer by
    kept / numel; names left out and None count as dense. image_shape: (channels, height, width). Runs on the meta
    device: nothing is computed, `net` is left as it was. Raises ValueError for a name in `kept` that is no weight of a
    layer.
    """
    layers = layer_flops(net, image_shape, kept).values()
    return sum(dense for dense, _ in layers), sum(sparse for _, sparse in layers)


def layer_flops(
    net: nn.Module, image_shape: tuple[int, int, int], kept: Mapping[str, int] | None
) -> dict[str, tuple[int, int]]:
    """(dense, sparse) of each layer by its weight's name, as `count_flops` adds them up; raises as it does."""
    parameters = dict(net.named_parameters(remove_duplicate=False))
    unknown = {name for name in kept or () if name not in parameters or parameters[name].ndim < 2}
    if unknown:
        raise ValueError(f"kept names no weight of a layer: {sorted(unknown)}")
    found = {}
    for name, positions in uses_of(net, image_shape).items():
        size = parameters[name].numel()
        found[name] = (2 * positions * size, 2 * positions * (kept or {}).get(name, size))
    return found


def uses_of(net: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, int]:
    """How often one image uses every weight of a layer, by its name: output pixels of a convolution, rows of a linear
    layer. As count_flops: on the meta device, `net` is left as it was."""
    positions: dict[str, int] = {}

    def count(name: str, times: int) -> None:
        positions[name] = positions.get(name, 0) + times

    def hook_of(name: str) -> Any:
        def hook(layer: Any, inputs: Any, output: Any) -> None:
            if isinstance(layer, nn.MultiheadAttention):  # it calls none of its projections as a layer
                tokens = output[0].numel() // layer.embed_dim
                count(f"{name}.in_proj_weight", tokens)
                count(f"{name}.out_proj.weight", tokens)
            else:
                channels = layer.weight.shape[0]
                count(f"{name}.weight", output.numel() // channels)

        return hook

    layers = {n: m for n, m in net.named_modules() if isinstance(m, (*LAYERS, nn.MultiheadAttention))}
    attended = {f"{n}.out_proj" for n, m in layers.items() if isinstance(m, nn.MultiheadAttention)}
    hooks = [m.register_forward_hook(hook_of(n)) for n, m in layers.items() if n not in attended]
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
