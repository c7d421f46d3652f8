"""How is a network written as one Python file that needs torch alone: its layers by name, and its forward pass?"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from ghostmask.engine.errors import InputError
from ghostmask.launcher.exporting.tracing import compare, traced

FILE = "network.py"
SAME = 1e-4
"""Difference of outputs, in shares of the largest, that rounding makes."""
TENSORS = (nn.ParameterList, nn.ParameterDict)
"""Of torch.nn, and no layers."""
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
    try:
        return _source(net, title, image_shape, num_classes)
    except Exception as error:  # whatever building and calling such a network may raise
        if isinstance(error, InputError) and str(error).startswith("the network cannot be written"):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"the network cannot be written as a file of its own: {reason}") from error


def _source(net: nn.Module, title: str, image_shape: Sequence[int], num_classes: int) -> str:
    graph = net if isinstance(net, fx.GraphModule) else traced(net)
    code = graph.graph.python_code("self")
    lines = [line for line in code.src.splitlines() if not line.startswith("torch.fx._symbolic_trace.wrap(")]
    forward = "\n".join(f"    {line}".rstrip() for line in lines).strip("\n")
    source = HEAD.format(
        title=title, imports=_imports(code.globals, code.src), layers="\n".join(_layers(net)), forward=forward + "\n",
        shape=", ".join(map(str, image_shape)), classes=num_classes,
    )  # fmt: skip
    _check(net, graph, source, image_shape)
    return source


def _layers(net: nn.Module) -> list[str]:
    """A line for each layer of torch.nn, and for each tensor that lies outside of them."""
    lines, tracer = [], fx.Tracer()
    inside = ""
    for name, module in net.named_modules():
        if inside and name.startswith(inside):
            continue
        layer = (
            tracer.is_leaf_module(module, name) and not isinstance(module, TENSORS) and type(module) is not nn.Module
        )
        if name and layer and not list(module.children()):
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
    """A layer's own text, with what that leaves out."""
    text = re.sub(r"padding_mode=(\w+)", r"padding_mode='\1'", repr(module))
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        text = text.replace(", bias=True", "")  # which no torch before 2.13 knows
    for name, parameter in inspect.signature(type(module)).parameters.items():
        value = getattr(module, name, parameter.default)
        said = f"{name}=" in text or value is None or not isinstance(value, int | float | str)
        if not said and parameter.default is not inspect.Parameter.empty and value != parameter.default:
            text = f"{text[:-1]}{'' if text.endswith('()') else ', '}{name}={value!r})"
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


def _check(net: nn.Module, graph: fx.GraphModule, source: str, image_shape: Sequence[int]) -> None:
    """Raise InputError unless the file builds a network with the names, the shapes and the outputs of `net`."""
    space: dict[str, Any] = {"__name__": "network"}
    with torch.device("meta"):
        exec(compile(source, FILE, "exec"), space)
        built: nn.Module = space["Network"]()
    found, expected = ({n: t.shape for n, t in one.state_dict().items()} for one in (built, net))
    if differ := [n for n in {**found, **expected} if found.get(n) != expected.get(n)]:
        raise InputError(f"{differ[0]!r} is not kept as layers of torch.nn and state dicts keep theirs")
    known = {name for name, _ in (*built.named_parameters(), *built.named_buffers())}
    if unknown := {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"} - known:
        raise InputError(f"it reads {min(unknown)}, which stands in no state dict")
    like = next((tensor for tensor in net.state_dict().values() if tensor.is_floating_point()), torch.zeros(()))
    built = built.to_empty(device=like.device).to(like.dtype)
    built.load_state_dict(net.state_dict())
    try:
        compare(built, copy.deepcopy(net), image_shape, SAME)
    except InputError as error:
        layers = sorted({type(layer).__name__ for layer in graph.modules() if not list(layer.children())})
        raise InputError(f"{error}, or one of its layers ({', '.join(layers)}) does more than its text says") from None
