"""Which channels of a network can be taken out so that nothing changes, and what is left without them?"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from ghostmask.launcher.exporting.intervals import Interval, intervals, is_padded, mixing_weights, role
from ghostmask.launcher.exporting.tracing import uses

ROUNDS = 1000
"""More than any network has layers: each round but the last takes a channel out."""


def remove_dead_channels(graph: fx.GraphModule) -> dict[str, tuple[int, int]]:
    """Take the dead channels out of a graph, in place; returns (outputs before, after) of each layer that has fewer.

    Dead are channels that nothing reads through a weight that is not 0, and constant ones (`intervals`): what a
    constant adds to the layers that read it goes into their biases or, where they see it beside zeros around the image,
    into the weights of one constant channel that stays. Channels that are added together, or pass through the same
    layer, are kept or removed together. A layer keeps one channel at least; inputs and outputs, and what lies beside an
    operation that is not known, stay. The graph's nodes have meta["shape"].
    """
    _untie(graph)
    modules = dict(graph.named_modules())
    before = {n: _outputs(m) for n, m in modules.items() if isinstance(m, nn.Conv2d | nn.Linear)}
    for _ in range(ROUNDS):
        bounds = intervals(graph)
        _fix_constants(graph, modules, bounds)
        groups = _groups(graph, modules)
        removed = False
        for nodes in groups:
            removed = _shrink(nodes, graph, modules, bounds) or removed
        if not removed:
            break
    graph.recompile()
    after = {n: _outputs(modules[n]) for n in before}
    return {n: (before[n], after[n]) for n in before if after[n] != before[n]}


def _untie(graph: fx.GraphModule) -> None:
    """Give each layer its own weights: what is done to one that shares them must not be done to the other."""
    for module in graph.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


def _outputs(layer: nn.Module) -> int:
    return int(layer.get_parameter("weight").shape[0])


@torch.no_grad()
def _fix_constants(graph: fx.GraphModule, modules: dict[str, nn.Module], bounds: dict[fx.Node, Interval]) -> None:
    """A constant output of a layer becomes its bias, and its weights 0, so that what it read may go."""
    used = uses(graph)
    for node in graph.graph.nodes:
        if node not in bounds or role(node, modules) != "mix" or used[str(node.target)] > 1:
            continue
        layer, (low, high) = modules[str(node.target)], bounds[node]
        constant = _constant(low, high)
        if bool(constant.any()):
            weight = layer.get_parameter("weight")
            weight[constant] = 0
            _with_bias(layer)[constant] = low[constant].to(weight.dtype)


def _groups(graph: fx.GraphModule, modules: dict[str, nn.Module]) -> list[list[fx.Node]]:
    """Nodes whose channels are the same ones, of which some may go."""
    parent: dict[fx.Node, fx.Node] = {}
    pinned: set[fx.Node] = set()

    def find(node: fx.Node) -> fx.Node:
        while parent.setdefault(node, node) is not node:
            node = parent[node]
        return node

    used = uses(graph)
    for node in graph.graph.nodes:
        kind = role(node, modules)
        inputs = node.all_input_nodes
        if kind == "opaque" or used.get(str(node.target), 0) > 1:
            pinned.update([node, *inputs])
        elif kind in ("each", "add"):
            for other in inputs:
                parent[find(other)] = find(node)
        find(node)
    roots = {find(node) for node in pinned}
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if find(node) not in roots:
            found.setdefault(find(node), []).append(node)
    return list(found.values())


@torch.no_grad()
def _shrink(
    nodes: list[fx.Node], graph: fx.GraphModule, modules: dict[str, nn.Module], bounds: dict[fx.Node, Interval]
) -> bool:
    """Take the removable channels of one group out of all layers; whether there were any."""
    readers = [(bounds[node], modules[str(user.target)]) for node in nodes for user in node.users
               if role(user, modules) == "mix"]  # fmt: skip
    removable, carrier = _removable(readers, len(bounds[nodes[0]][0]))
    if not bool(removable.any()):
        return False
    keep = ~removable
    for (low, high), layer in readers:
        weight, _ = mixing_weights(layer)
        value = torch.where(removable & _constant(low, high), low, 0.0)  # 0, too, for what is not read
        if is_padded(layer):
            if carrier >= 0:
                moved = torch.einsum("oik,i->ok", weight, value / low[carrier])
                column = layer.get_parameter("weight")[:, carrier]
                column += moved.reshape(column.shape).to(column.dtype)
        elif bool(value.any()):
            bias = _with_bias(layer)
            bias += (weight.sum(2) @ value).to(bias.dtype)
        _slice(layer, "weight", keep, 1)
    for node in nodes:
        batch, _, *rest = node.meta["shape"]
        node.meta["shape"] = (batch, int(keep.sum()), *rest)
        if node.op == "call_module":
            _slice_outputs(modules[str(node.target)], keep)
    return True


def _removable(readers: list[tuple[Interval, nn.Module]], channels: int) -> tuple[Tensor, int]:
    """Which channels may go, and the one that carries the constants which padded convolutions read, or -1.

    Of several such constants one is enough: what the others add, at the image's border too, is what it adds times the
    ratio of the two, which its weights take.
    """
    whole, plain, carriers = (torch.ones(channels, dtype=torch.bool) for _ in range(3))
    size = torch.full((channels,), torch.inf, dtype=torch.float64)
    for (low, high), layer in readers:
        unread, constant = (mixing_weights(layer)[0] == 0).all(2).all(0), _constant(low, high)
        whole &= unread | constant
        plain &= unread | (constant & (low == 0) if is_padded(layer) else constant)
        if is_padded(layer):
            carriers &= constant & (low != 0)
            size = torch.minimum(size, torch.where(constant, low.abs(), 0.0))
    carriers &= whole & ~plain
    if bool(carriers.any()):
        carrier = int(torch.where(carriers, size, -1.0).argmax())
        whole[carrier] = False
        return whole, carrier
    if bool(plain.all()):
        plain[0] = False
    return plain, -1


def _constant(low: Tensor, high: Tensor) -> Tensor:
    return (low == high) & torch.isfinite(low)


def _slice_outputs(layer: nn.Module, keep: Tensor) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(layer, name, None)
        if isinstance(tensor, Tensor) and len(tensor) == len(keep):
            _slice(layer, name, keep, 0)
    left = int(keep.sum())
    if isinstance(layer, nn.Conv2d):
        layer.out_channels = left
        if layer.groups > 1:
            layer.groups = layer.in_channels = left
    elif isinstance(layer, nn.Linear):
        layer.out_features = left
    elif isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
        layer.num_features = left


def _slice(layer: nn.Module, name: str, keep: Tensor, dim: int) -> None:
    tensor = getattr(layer, name)
    new = tensor.detach().index_select(dim, keep.nonzero()[:, 0]).clone()
    setattr(layer, name, nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new)
    if name == "weight" and dim == 1:
        setattr(layer, "in_channels" if isinstance(layer, nn.Conv2d) else "in_features", int(keep.sum()))


def _with_bias(layer: nn.Module) -> Tensor:
    """The layer's bias, made where it has none."""
    if layer.bias is None:
        weight = layer.get_parameter("weight")
        layer.bias = nn.Parameter(torch.zeros(len(weight), dtype=weight.dtype), requires_grad=False)
    return layer.get_parameter("bias")
