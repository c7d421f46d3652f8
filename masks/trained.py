"""A trained network to start from: what mask.path names, read into the plain network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ghostmask.engine.checkpoint.state_file import read_state_dict, values_of
from ghostmask.engine.errors import bad_value


def weights_file(path: str) -> Path:
    """The file that mask.path means: of a finished run's folder its export, else itself."""
    file = Path(path)
    return file / "export" / "model.safetensors" if file.is_dir() else file


def load_trained(net: nn.Module, path: str) -> None:
    """Fill `net` from a run folder (its export), or a file with a state dict (`read_state_dict`).

    Raises InputError, also for a weight that is nan or infinite.
    """
    file = weights_file(path)
    if not os.path.exists(file):
        raise bad_value("mask.path", path, f"{file} is missing; give a finished run's folder or a file with weights")
    fill(net, read_state_dict(file, "mask.path", net.state_dict()), "mask.path", path)


def fill(net: nn.Module, state: Mapping[str, Tensor], field: str, path: str) -> None:
    """Give `net` the weights of a state dict from `path`, named by `field` in the InputError for one that is another
    network's, or that holds nan or infinite values."""
    own = net.state_dict()
    state = {  # not before the shape is known: a few bytes of a file can claim any
        n: t.to_dense() if t.layout != torch.strided and n in own and own[n].shape == t.shape else t
        for n, t in state.items()
    }
    try:
        net.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise bad_value(field, path, f"does not hold this network's weights ({reason})") from None
    for name, value in net.state_dict().items():
        values_of(value, name, path, field)
