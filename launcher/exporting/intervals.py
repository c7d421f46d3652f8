"""Between which two numbers does every channel of a network stay, whatever image it sees?

Interval arithmetic over the graph. A channel whose two ends are equal is a constant: nothing reaches it, or ReLU cuts
off all that does.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from ghostmask.models.blurpool import blurred

Interval = tuple[Tensor, Tensor]
"""(C,) lower and (C,) upper ends, float64; infinite where nothing is known."""

MONOTONE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardsigmoid)
OTHER_ACTIVATIONS = (nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.ELU)
SAME = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
"""In eval mode; means and maxima lie between the ends."""
PADDED = (nn.AvgPool2d,)
"""Zeros around the image may count."""
MONOTONE_CALLS: dict[Any, Any] = {torch.relu: torch.relu, functional.relu: torch.relu, "relu": torch.relu}
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


def role(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """What a node does to channels: "mix" (a convolution or linear layer: new ones), "each" (every channel by itself),
    "add" (channel by channel of several), or "opaque" (anything else, of which nothing is known)."""
    if node.op == "call_module":
        layer = modules[str(node.target)]
        if isinstance(layer, nn.Conv2d):
            plain = layer.padding_mode == "zeros"
            depthwise = layer.groups == layer.in_channels == layer.out_channels > 1
            return "each" if depthwise and plain else "mix" if layer.groups == 1 and plain else "opaque"
        if isinstance(layer, nn.Linear):
            return "mix" if len(_shape(node.args[0])) == 2 else "opaque"
        each = (*MONOTONE, *OTHER_ACTIVATIONS, *SAME, *PADDED, nn.BatchNorm2d, nn.BatchNorm1d)
        return "each" if isinstance(layer, each) else "opaque"
    if node.op not in ("call_function", "call_method") or not node.args:
        return "opaque"
    inputs = [a for a in node.args if isinstance(a, fx.Node)]
    same = all(_shape(a)[:2] == _shape(node)[:2] for a in inputs)
    if node.target in ADDITIONS and len(inputs) == 2 == len(node.args) and not node.kwargs:
        return "add" if _shape(inputs[0]) == _shape(inputs[1]) else "opaque"
    if node.target is blurred or node.target in MONOTONE_CALLS:
        return "each"
    if node.target in (functional.dropout, "contiguous"):
        return "each"
    if node.target in ("mean", torch.mean, functional.adaptive_avg_pool2d) and same and len(_shape(inputs[0])) == 4:
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        pooled = node.target is functional.adaptive_avg_pool2d
        return "each" if pooled or (isinstance(dims, list | tuple) and {d % 4 for d in dims} == {2, 3}) else "opaque"
    if node.target in ("flatten", torch.flatten, "view", "reshape") and same and len(_shape(node)) == 2:
        return "each"
    return "opaque"


def intervals(graph: fx.GraphModule) -> dict[fx.Node, Interval]:
    """Node -> the interval of each of its channels (dimension 1), float64, on the CPU.

    graph: its nodes have meta["shape"]. Convolution: b + sum over (w+ lo + w- hi) to b + sum over (w+ hi + w- lo),
    where zeros around the image count as values.
    """
    modules = dict(graph.named_modules())
    found: dict[fx.Node, Interval] = {}
    for node in graph.graph.nodes:
        shape = _shape(node)
        if node.op == "output" or len(shape) < 2:
            continue
        kind = role(node, modules)
        inputs = [found[a] for a in node.args if isinstance(a, fx.Node) and a in found]
        if kind == "add" and len(inputs) == 2:
            (low, high), (other_low, other_high) = inputs
            found[node] = (low + other_low, high + other_high)
        elif kind in ("mix", "each") and len(inputs) == 1:
            found[node] = _through(node, modules, *inputs[0])
        else:
            found[node] = (torch.full((shape[1],), -torch.inf).double(), torch.full((shape[1],), torch.inf).double())
    return found


def is_padded(layer: nn.Module) -> bool:
    """Whether zeros around the image are among what the layer reads."""
    padding = getattr(layer, "padding", 0)
    return padding not in (0, "valid") and any(padding if isinstance(padding, tuple) else (padding,))


def mixing_weights(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """((O, I, n) weights of a convolution or linear layer, (O,) its bias), float64."""
    weight = layer.get_parameter("weight").detach().double()
    bias = layer.bias
    return weight.flatten(2) if weight.dim() > 2 else weight[..., None], (
        bias.detach().double() if isinstance(bias, Tensor) else torch.zeros(len(weight)).double()
    )


def _through(node: fx.Node, modules: dict[str, nn.Module], low: Tensor, high: Tensor) -> Interval:
    if node.op != "call_module":
        if node.target in MONOTONE_CALLS:
            return MONOTONE_CALLS[node.target](low), MONOTONE_CALLS[node.target](high)
        return (low.clamp(max=0), high.clamp(min=0)) if node.target is blurred else (low, high)
    layer = modules[str(node.target)]
    if isinstance(layer, MONOTONE):
        function = type(layer)() if isinstance(layer, nn.ReLU) else layer
        return function(low.clone()), function(high.clone())
    if isinstance(layer, OTHER_ACTIVATIONS):
        value = layer(low.clone())
        constant = low == high
        return torch.where(constant, value, -torch.inf), torch.where(constant, value, torch.inf)
    if is_padded(layer) and not isinstance(layer, nn.MaxPool2d):  # whose padding is minus infinity
        low, high = low.clamp(max=0), high.clamp(min=0)
    if isinstance(layer, nn.Conv2d | nn.Linear):
        weight, bias = mixing_weights(layer)
        up, down = weight.clamp(min=0).sum(2), weight.clamp(max=0).sum(2)
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            up, down = up[:, 0], down[:, 0]
            return _times(up, low) + _times(down, high) + bias, _times(up, high) + _times(down, low) + bias
        return (
            (_times(up, low) + _times(down, high)).sum(1) + bias,
            (_times(up, high) + _times(down, low)).sum(1) + bias,
        )
    if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
        return _normalised(layer, low, high)
    return low, high


def _normalised(layer: nn.BatchNorm2d | nn.BatchNorm1d, low: Tensor, high: Tensor) -> Interval:
    if layer.running_var is None or layer.running_mean is None:
        return torch.full_like(low, -torch.inf), torch.full_like(low, torch.inf)
    scale = (layer.running_var.double() + layer.eps).rsqrt()
    shift = -layer.running_mean.double() * scale
    if layer.affine:
        scale, shift = scale * layer.weight.detach().double(), shift * layer.weight.detach().double()
        shift = shift + layer.bias.detach().double()
    one, other = _times(scale, low) + shift, _times(scale, high) + shift
    return torch.minimum(one, other), torch.maximum(one, other)


def _times(weight: Tensor, end: Tensor) -> Tensor:
    """The product, 0 where the weight is 0: infinity times no weight is nothing."""
    return torch.where(weight == 0, 0.0, weight * end)


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta.get("shape", ())) if isinstance(node, fx.Node) else ()
