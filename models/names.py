"""Which networks can model.name mean? Ours, torchvision's, or a function of the user's own. Imports no torch itself."""

from __future__ import annotations

import ast
import difflib
import importlib.util
from functools import cache
from pathlib import Path

from ghostmask.engine.errors import InputError, bad_value
from ghostmask.models.registry import MODELS

OTHERS = {
    "mobilenet_v3_small": "and every other classification network of torchvision.models, by its name there",
    "package.module:function": "your own: function(num_classes, image_shape) or function(num_classes) -> nn.Module",
}
"""Examples of what model.name may be besides a key of MODELS -> what that is."""


def check_name(name: str, field: str = "model.name") -> None:
    """Raise InputError where `name` cannot be a network. Neither torch nor a function of the user's own is imported."""
    if name in MODELS:
        return
    if ":" in name:
        module, _, function = name.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), function)):
            raise bad_value(field, name, "write a function of your own as package.module:function")
    elif name not in torchvision_names():
        raise _unknown(name, field)


@cache
def torchvision_names() -> tuple[str, ...]:
    """The classification networks of torchvision.models, read from its source: to import it takes seconds."""
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    assert spec.origin is not None
    names = []
    for file in sorted(Path(spec.origin).with_name("models").glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and "register_model()" in map(ast.unparse, node.decorator_list):
                names.append(node.name)
    return tuple(sorted(names))


def _unknown(name: str, field: str) -> InputError:
    near = difflib.get_close_matches(name, {**MODELS, **dict.fromkeys(torchvision_names())}, n=3)
    module, dot, function = name.rpartition(".")
    if dot and not near:
        near = [f"{module}:{function}"]
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return InputError(
        f"{field} = {name!r} is not known: {hint}known: {', '.join(MODELS)}, "
        "the classification networks of torchvision, and package.module:function for your own"
    )
