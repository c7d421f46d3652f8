"""How does a network become a graph of its layers, which can be rewritten and printed as Python, and is it the same?"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ghostmask.engine.errors import InputError
from ghostmask.models.blurpool import blurred

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
VIEWS = ("view", "reshape", "flatten", torch.reshape, torch.flatten)
IMAGES = 3
"""Of a comparison; another number than that of the pass which shapes are noted in."""


def traced(net: nn.Module) -> fx.GraphModule:
    """A copy of `net` in eval mode as torch.fx sees it: calls of torch.nn's layers and torch's functions.

    BlurPool's filters are calls of their own there, and whoever reads a tensor after it was written in place reads what
    wrote it. Raises InputError for a network whose forward depends on values of tensors, takes more than images, or has
    hooks, which no graph holds.
    """
    try:
        net = copy.deepcopy(net).eval()
    except Exception as error:  # weights that are computed, as by the old weight norm
        raise InputError(f"the network cannot be written as a graph: {_reason(error)}") from error
    filtered = {name for name, module in net.named_modules() if isinstance(getattr(module, "blur", None), torch.Tensor)}
    for name, module in net.named_modules():
        if name in filtered:
            module._forward_pre_hooks.clear()
            del module.blur
        elif any(getattr(module, kind) for kind in HOOKS):
            raise InputError(f"the network cannot be written as a graph: its module {name!r} has hooks")
    try:
        graph = fx.symbolic_trace(net)
    except Exception as error:  # whatever the network's own forward makes of torch.fx's proxies
        raise InputError(f"the network cannot be written as a graph by torch.fx: {_reason(error)}") from error
    if len([node for node in graph.graph.nodes if node.op == "placeholder"]) != 1:
        raise InputError("the network cannot be written as a graph: it takes more than images")
    for node in list(graph.graph.nodes):
        node.type = None
        if node.op == "call_module" and node.target in filtered:
            with graph.graph.inserting_before(node):
                node.args = (graph.graph.call_function(blurred, (node.args[0],)), *node.args[1:])
        if _writes_in_place(node, graph):
            written, seen = node.all_input_nodes[0], False
            for later in graph.graph.nodes:
                seen = seen or later is node
                if seen and later is not node:
                    later.replace_input_with(written, node)
    graph.recompile()
    return graph


def note_shapes(graph: fx.GraphModule, image_shape: Sequence[int]) -> None:
    """meta["shape"] of every node, by a pass of two images; views that only drop the image's sides of 1, however they
    name their numbers, become torch.flatten."""
    first = next((t for t in graph.state_dict().values() if t.is_floating_point()), torch.zeros(()))
    with torch.no_grad():
        ShapeProp(graph).propagate(torch.zeros(2, *image_shape, dtype=first.dtype))
    for node in list(graph.graph.nodes):
        meta = node.meta.get("tensor_meta")
        shape = node.meta["shape"] = tuple(meta.shape) if hasattr(meta, "shape") else ()
        before = node.all_input_nodes[0].meta["shape"] if node.all_input_nodes else ()
        if node.target in VIEWS and len(before) == 4 and shape == before[:2]:
            read = node.all_input_nodes
            node.op, node.target, node.args, node.kwargs = "call_function", torch.flatten, (read[0], 1), {}
            for size in read[1:]:
                if not size.users:
                    graph.graph.erase_node(size)
    graph.recompile()


def uses(graph: fx.GraphModule) -> dict[str, int]:
    """How often each layer with weights is called; once more for each weight that is read without calling it."""
    modules, found = dict(graph.named_modules()), dict[str, int]()
    for node in graph.graph.nodes:
        layer = str(node.target).rpartition(".")[0] if node.op == "get_attr" else str(node.target)
        if node.op == "get_attr" or (node.op == "call_module" and modules[layer].state_dict()):
            found[layer] = found.get(layer, 0) + 1
    return found


@torch.no_grad()
def compare(made: nn.Module, net: nn.Module, image_shape: Sequence[int], tolerance: float) -> None:
    """Raise InputError unless both compute the same logits of images, to within tolerance times the largest."""
    like = next((tensor for tensor in net.state_dict().values() if tensor.is_floating_point()), torch.zeros(()))
    images = torch.randn(IMAGES, *image_shape, generator=torch.Generator().manual_seed(0)).to(like)
    found, expected = made.eval()(images.clone()), net.eval()(images.clone())
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        raise InputError(f"it returns a {type(expected).__name__} and not the logits alone")
    if found.shape != expected.shape:
        raise InputError(f"outputs are {tuple(found.shape)} instead of {tuple(expected.shape)}")
    size = expected.abs().max() if expected.numel() else expected
    if not torch.allclose(found, expected, rtol=0, atol=tolerance * float(size), equal_nan=True):
        difference = float((found - expected).abs().max() / size)
        why = "it draws random numbers, or writes in place to what has another name too"
        raise InputError(f"outputs differ by {difference:.1g} of the largest: {why}")


def _writes_in_place(node: fx.Node, graph: fx.GraphModule) -> bool:
    if not node.all_input_nodes:
        return False
    if node.op == "call_module":
        return getattr(graph.get_submodule(str(node.target)), "inplace", False) is True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    ends = name.endswith("_") and not name.endswith("__") and getattr(operator, name, None) is not node.target  # and_
    return node.target in IN_PLACE or ends or node.kwargs.get("inplace") is True


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
