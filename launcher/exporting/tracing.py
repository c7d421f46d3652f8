"""How does a network become a graph of its layers, which can be rewritten and printed as Python?"""

from __future__ import annotations

import copy

import torch
from torch import fx, nn

from ghostmask.engine.errors import InputError
from ghostmask.models.blurpool import blurred

HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def traced(net: nn.Module) -> fx.GraphModule:
    """A copy of `net` in eval mode as torch.fx sees it: calls of torch.nn's layers and torch's functions.

    BlurPool's filters are calls of their own there. Raises InputError for a network whose forward depends on values of
    tensors, takes more than images, or has hooks, which no graph holds.
    """
    net = copy.deepcopy(net).eval()
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
        reason = str(error).strip().split("\n")[0][:200]
        raise InputError(f"the network cannot be written as a graph by torch.fx: {reason}") from error
    if len([node for node in graph.graph.nodes if node.op == "placeholder"]) != 1:
        raise InputError("the network cannot be written as a graph: it takes more than images")
    for node in list(graph.graph.nodes):
        node.type = None
        if node.op == "call_module" and node.target in filtered:
            with graph.graph.inserting_before(node):
                node.args = (graph.graph.call_function(blurred, (node.args[0],)), *node.args[1:])
    graph.recompile()
    return graph
