"""How is a network built that is not ours: torchvision's, or a function of the user's own?"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from ghostmask.engine.errors import InputError, bad_value

FIELD = "model.name"
IMAGES = 2
"""Of the batch that a network is tried with; batch norm refuses one image of one pixel."""

ImageShape = tuple[int, int, int]
"""(channels, height, width)."""


def find_builder(name: str) -> Callable[[int, ImageShape], object]:
    """The function (num_classes, image_shape) -> network behind a name of torchvision or "package.module:function".

    Raises InputError, naming `name`, where there is no such function or it takes neither both of them nor num_classes;
    so does what comes back, where the function raises.
    """
    if ":" not in name:
        return lambda num_classes, _: _called(name, _from_torchvision, {"name": name, "num_classes": num_classes})
    function = _own_function(name)
    passed = _passed(name, function)

    def build(num_classes: int, image_shape: ImageShape) -> object:
        offered = {"num_classes": num_classes, "image_shape": image_shape}
        return _called(name, function, {key: offered[key] for key in passed})

    return build


def check_network(net: object, name: str, num_classes: int, image_shape: ImageShape) -> nn.Module:
    """`net` itself, if it is one: float32, all its shapes known, (N, num_classes) logits of the dataset's images.

    Tried in training mode on the meta device, where nothing is computed; what only real tensors can do is tried on the
    CPU. Parameters and buffers stay as they are. Raises InputError, naming `name`.
    """
    if not isinstance(net, nn.Module):
        raise bad_value(FIELD, name, f"returns {type(net).__name__}, not a torch.nn.Module")
    for key, parameter in net.named_parameters():
        if is_lazy(parameter):
            raise bad_value(
                FIELD, name, f"{key} has no shape yet; call the network once in the function, then return it"
            )
        if parameter.dtype != torch.float32:
            raise bad_value(
                FIELD, name, f"{key} is {parameter.dtype}; build the network in float32 (autocast does bf16)"
            )
        if parameter.is_meta:
            raise bad_value(FIELD, name, f"{key} has no values (it is on the meta device); initialise the network")
        if not bool(torch.isfinite(parameter).all()):
            raise bad_value(FIELD, name, f"{key} holds nan or infinite values; initialise it, or load other weights")
    net.train()
    try:
        logits = output_of(net, image_shape, "meta")
    except Exception:  # such as a branch on a value, which the meta device does not have
        logits = _real_output(net, name, image_shape)
    if not isinstance(logits, Tensor) or logits.shape != (IMAGES, num_classes):
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"type {type(logits).__name__}"
        fix = f"gives {found} for {IMAGES} images while it trains, not logits of shape {(IMAGES, num_classes)}"
        raise bad_value(FIELD, name, f"{fix}; return a network that does from a function of your own")
    return net


def output_of(net: nn.Module, image_shape: ImageShape, device: str, images: int = IMAGES) -> object:
    """What the network gives for random images, its buffers and, on the meta device, its parameters replaced."""
    state = {key: buffer.clone().to(device) for key, buffer in net.named_buffers()}
    state.update((key, parameter.detach().to(device)) for key, parameter in net.named_parameters())
    with torch.no_grad():
        return functional_call(net, state, (torch.randn(images, *image_shape, device=device),))


def _real_output(net: nn.Module, name: str, image_shape: ImageShape) -> object:
    try:
        return output_of(net, image_shape, "cpu")
    except Exception as error:
        size = " x ".join(map(str, image_shape))
        raise bad_value(FIELD, name, f"cannot take the dataset's images of {size}: {_in_one_line(error)}") from error


def _from_torchvision(name: str, num_classes: int) -> object:
    from torchvision import models

    return models.get_model(name, weights=None, num_classes=num_classes)


def _own_function(name: str) -> Callable[..., object]:
    module_name, _, attribute = name.partition(":")
    module = _imported(name, module_name)
    function: Callable[..., object] | None = getattr(module, attribute, None)
    if not callable(function):
        near = difflib.get_close_matches(
            attribute, [key for key, value in vars(module).items() if callable(value)], n=3
        )
        hint = f": did you mean {' or '.join(map(repr, near))}?" if near else f" in {module.__file__}"
        raise bad_value(FIELD, name, f"{module_name} has no function {attribute!r}{hint}")
    return function


def _imported(name: str, module_name: str) -> ModuleType:
    # As `python -m` has it; the command `ghostmask` by itself does not look in the working directory. A job on a
    # cluster, which has a copy of the module on its path, looks there last (PYTHONSAFEPATH).
    here = os.getcwd()
    if not {"", here} & {*sys.path}:
        sys.path.insert(len(sys.path) if sys.flags.safe_path else 0, here)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            fix = f"there is no module {error.name!r} in {here} or elsewhere on the import path"
            raise bad_value(FIELD, name, fix) from error
        raise _raised(name, f"importing {module_name}", error) from error
    except (Exception, SystemExit) as error:  # a script that parses its own arguments when it is imported
        raise _raised(name, f"importing {module_name}", error) from error


def _passed(name: str, function: Callable[..., object]) -> list[str]:
    """Which of num_classes and image_shape the function takes by name, num_classes at least."""
    try:
        signature = inspect.signature(function)
        parameters = signature.parameters
        keywords = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        passed = ["num_classes"] if keywords or "num_classes" in parameters else []
        passed += ["image_shape"] if "image_shape" in parameters else []
        signature.bind(**dict.fromkeys(passed))
    except (TypeError, ValueError):  # something else is required, or there is no signature to be had
        passed = []
    if "num_classes" not in passed:
        raise bad_value(FIELD, name, "write it as function(num_classes, image_shape) or function(num_classes)")
    return passed


def _called(name: str, function: Callable[..., object], arguments: dict[str, Any]) -> object:
    try:
        return function(**arguments)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise _raised(name, "it", error) from error


def _raised(name: str, what: str, error: BaseException) -> InputError:
    return bad_value(FIELD, name, f"{what} raises {_in_one_line(error)}")


def _in_one_line(error: BaseException) -> str:
    """Type, first line and, in code of the user's, the place of an error."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_installed(f.filename)]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first}{place}" if first else f"{type(error).__name__}{place}"


def _is_installed(file: str) -> bool:
    """True for the files of libraries, of Python and of this package."""
    places = (sysconfig.get_path("stdlib"), os.path.dirname(__file__))
    return "-packages" in file or file.startswith(("<frozen", *places))
