"""How is a network written as one Python file that needs torch alone: its layers by name, and its forward pass?"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from ghostmask.engine.errors import InputError
from ghostmask.launcher.exporting.tracing import traced

FILE = "network.py"
HEAD = '''"""{title}

Network() has the weights' names of the file beside this one: net.load_state_dict(load_file("model.safetensors")).
"""

{imports}
def _place(parent: nn.Module, name: str, layer) -> None:
    """Put a layer, or a tensor, under its dotted name, in modules that hold nothing else."""
    *path, last = name.split(".")
    for part in path:
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        parent = parent._modules[part]
    if isinstance(layer, nn.Module) or isinstance(layer, nn.Parameter):
        setattr(parent, last, layer)
    else:
        parent.register_buffer(last, layer)


class Network(nn.Module):
    """Images (N, {shape}) -> logits (N, {classes})."""

    def __init__(self) -> None:
        super().__init__()
{layers}
{forward}'''


def network_source(net: nn.Module, title: str, image_shape: Sequence[int], num_classes: int) -> str:
    """The file's text: class Network without arguments, whose state dict has the names and shapes of `net`'s.

    net: in eval mode what Network() computes too; a GraphModule is taken as it is. title: the first line of the
    docstring. Raises InputError for a network that is not made of torch.nn's layers, or that cannot be traced.
    """
    graph = net if isinstance(net, fx.GraphModule) else traced(net)
    code = graph.graph.python_code("self")
    forward = "\n".join(f"    {line}".rstrip() for line in code.src.strip().splitlines())
    source = HEAD.format(
        title=title, imports=_imports(code.globals, code.src), layers="\n".join(_layers(net)), forward=forward + "\n",
        shape=", ".join(map(str, image_shape)), classes=num_classes,
    )  # fmt: skip
    _compare(_check(net, graph, source), graph, image_shape)
    return source


def _layers(net: nn.Module) -> list[str]:
    """A line for each layer of torch.nn, and for each tensor that lies outside of them."""
    lines, tracer = [], fx.Tracer()
    inside = ""
    for name, module in net.named_modules():
        if inside and name.startswith(inside):
            continue
        if name and not list(module.children()) and tracer.is_leaf_module(module, name):
            lines.append(f'        _place(self, "{name}", nn.{_constructor(module)})')
            inside = f"{name}."
            continue
        at = f"{name}." if name else ""
        for own, parameter in module.named_parameters(recurse=False):
            lines.append(f'        _place(self, "{at}{own}", nn.Parameter(torch.empty({list(parameter.shape)})))')
        for own, buffer in module.named_buffers(recurse=False):
            lines.append(f'        _place(self, "{at}{own}", torch.empty({list(buffer.shape)}, dtype={buffer.dtype}))')
    return lines


def _constructor(module: nn.Module) -> str:
    text = repr(module)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        text = text.replace(", bias=True", "")  # which no torch before 2.13 knows
    return text


def _imports(names: dict[str, Any], code: str) -> str:
    """Of what the forward pass names; a function of ours with its own text."""
    lines, functions = ["import torch", "from torch import nn"], []
    for name, what in names.items():
        if name in ("torch", "nn") or not re.search(rf"\b{re.escape(name)}\b", code):
            continue
        module = getattr(what, "__module__", "") or ""
        if isinstance(what, float):  # inf, nan
            lines.append(f"from math import {name}")
        elif module.startswith("ghostmask."):
            lines.append("from torch import Tensor")
            lines.append("from torch.nn import functional")
            functions.append(f"\n\n{inspect.getsource(what).strip()}\n\n\n{name} = {what.__name__}")
        elif module != "builtins":
            lines.append(f"from {module} import {what.__name__} as {name}")
    return "\n".join([*dict.fromkeys(lines), *functions]) + "\n\n"


def _check(net: nn.Module, graph: fx.GraphModule, source: str) -> nn.Module:
    """What the file builds, on the meta device. Raises InputError unless it has the names and shapes of `net`."""
    space: dict[str, Any] = {"__name__": "network"}
    try:
        with torch.device("meta"):
            exec(compile(source, FILE, "exec"), space)
            built: nn.Module = space["Network"]()
        found = {name: tensor.shape for name, tensor in built.state_dict().items()}
        known = {name for name, _ in (*built.named_parameters(), *built.named_buffers())}
    except Exception as error:
        raise InputError(f"the network cannot be written as a file of its own: {str(error)[:200]}") from error
    if found != {name: tensor.shape for name, tensor in net.state_dict().items()}:
        raise InputError("the network cannot be written as a file of its own: it has layers that are not torch.nn's")
    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    if not read <= known:
        raise InputError(f"the network cannot be written as a file of its own: it reads {sorted(read - known)}")
    return built


@torch.no_grad()
def _compare(built: nn.Module, graph: fx.GraphModule, image_shape: Sequence[int]) -> None:
    """Raise InputError unless both compute the same of an image: a layer's text may leave out what it does."""
    state = graph.state_dict()
    like = next((tensor for tensor in state.values() if tensor.is_floating_point()), torch.zeros(()))
    image = torch.rand(1, *image_shape, generator=torch.Generator().manual_seed(0)).to(like)
    built = built.to_empty(device=like.device).to(like.dtype).eval()
    built.load_state_dict(state)
    if not torch.allclose(built(image), graph.eval()(image), rtol=1e-4, atol=1e-5, equal_nan=True):
        layers = sorted({type(layer).__name__ for layer in graph.modules() if not list(layer.children())})
        why = f"one of its layers ({', '.join(layers)}) does something that its text leaves out"
        raise InputError(f"the network cannot be written as a file of its own: {why}")
