"""Reads the weights of a network from a file, whoever wrote it: safetensors or torch.save."""

from __future__ import annotations

import pickle
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ghostmask.engine.errors import bad_value

SUFFIXES = (".safetensors", ".pt", ".pth")
WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
"""Under which name others keep the weights in what they save."""
PREFIXES = ("module.", "_orig_mod.", "module.")
"""What DistributedDataParallel and torch.compile, in either order, put in front of every name."""


def read_state_dict(path: Path, field: str) -> dict[str, Tensor]:
    """Name -> CPU tensor of a .safetensors file, or of a .pt or .pth with a state dict or {"state_dict": ...} in it.

    Also under the other WRAPPERS; PREFIXES that all names have are taken off. Executes no code of the file
    (weights_only). Raises InputError of `field` for any other file and for a broken one.
    """
    if path.suffix not in SUFFIXES:
        raise bad_value(field, str(path), f"give a file ending in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise bad_value(field, str(path), "there is no such file")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except pickle.UnpicklingError:  # torch's own text advises to execute what the file holds
        fix = "cannot be read (it holds more than tensors, or is not whole); save net.state_dict() alone"
        raise bad_value(field, str(path), fix) from None
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise bad_value(field, str(path), f"cannot be read ({reason}); is the file whole?") from None
    if isinstance(content, Mapping):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise bad_value(field, str(path), 'holds no state dict; save net.state_dict() or {"state_dict": ...}')
    named = {str(name): tensor for name, tensor in content.items()}
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in named):
            named = {name.removeprefix(prefix): tensor for name, tensor in named.items()}
    return named


def _unpickle(path: Path) -> Any:
    # torchvision's reference scripts save their arguments too; making a Namespace executes nothing.
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)
