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
SAME_CALLS = (functional.dropout, functional.adaptive_avg_pool2d, "contiguous")
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


def role(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """What a node does to channels: "mix" (a convolution or linear layer: new ones), "each" (every channel by itself),
    "add" (channel by channel of several), or "opaque" (anything else, of which nothing is known)."""
    if node.op == "call_module":
        return _role_of_layer(modules[str(node.target)], node)
    inputs = node.all_input_nodes
    if node.op not in ("call_function", "call_method") or not inputs:
        return "opaque"
    if node.target in ADDITIONS and len(inputs) == 2 == len(node.args) and not node.kwargs:
        return "add" if _shape(inputs[0]) == _shape(inputs[1]) else "opaque"
    same = len(inputs) == 1 and _shape(inputs[0])[:2] == _shape(node)[:2]
    each = node.target is blurred or node.target in MONOTONE_CALLS or node.target in SAME_CALLS
    flat = node.target is torch.flatten and len(_shape(node)) == 2  # see note_shapes
    return "each" if same and (each or flat or _is_mean(node)) else "opaque"


def _role_of_layer(layer: nn.Module, node: fx.Node) -> str:
    if isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros":
        depthwise = layer.groups == layer.in_channels == layer.out_channels > 1
        return "each" if depthwise else "mix" if layer.groups == 1 else "opaque"
    if isinstance(layer, nn.Linear):
        return "mix" if len(_shape(node.all_input_nodes[0])) == 2 else "opaque"
    each = (*MONOTONE, *OTHER_ACTIVATIONS, *SAME, *PADDED, nn.BatchNorm2d, nn.BatchNorm1d)
    if isinstance(layer, nn.AvgPool2d) and layer.divisor_override is not None:  # no mean
        return "opaque"
    flat = isinstance(layer, nn.Flatten) and _shape(node) == _shape(node.all_input_nodes[0])[:2]
    return "each" if isinstance(layer, each) or flat else "opaque"


def _is_mean(node: fx.Node) -> bool:
    """Whether a call takes the mean of each channel's whole image."""
    if node.target not in ("mean", torch.mean) or len(_shape(node.all_input_nodes[0])) != 4:
        return False
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return isinstance(dims, list | tuple) and {d % 4 for d in dims if isinstance(d, int)} == {2, 3}


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
        function = MONOTONE_CALLS.get(node.target, lambda end: end)
        return (low.clamp(max=0), high.clamp(min=0)) if node.target is blurred else (function(low), function(high))
    layer = modules[str(node.target)]
    if isinstance(layer, MONOTONE):
        return layer(low.clone()), layer(high.clone())  # which may write in place
    if isinstance(layer, OTHER_ACTIVATIONS):
        value, constant = layer(low.clone()), low == high
        return torch.where(constant, value, -torch.inf), torch.where(constant, value, torch.inf)
    if is_padded(layer) and not isinstance(layer, nn.MaxPool2d):  # whose padding is minus infinity
        low, high = low.clamp(max=0), high.clamp(min=0)
    if isinstance(layer, nn.Conv2d | nn.Linear):
        return _mixed(layer, low, high)
    return _normalised(layer, low, high) if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d) else (low, high)


def _mixed(layer: nn.Conv2d | nn.Linear, low: Tensor, high: Tensor) -> Interval:
    weight, bias = mixing_weights(layer)
    up, down = weight.clamp(min=0).sum(2), weight.clamp(max=0).sum(2)
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:  # depthwise: (C, 1)
        low, high = low[:, None], high[:, None]
    least, most = _times(up, low) + _times(down, high), _times(up, high) + _times(down, low)
    return least.sum(1) + bias, most.sum(1) + bias


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
