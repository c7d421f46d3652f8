"""A trained network to start from: what mask.path names, read into the plain network."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ghostmask.engine.checkpoint.state_file import read_state_dict
from ghostmask.engine.errors import bad_value


def load_trained(net: nn.Module, path: str) -> None:
    """Fill `net` from a run folder (its export), a .safetensors, or a .pt with a state dict. Raises InputError."""
    file = Path(path)
    if file.is_dir():
        file = file / "export" / "model.safetensors"
    if not file.is_file():
        raise bad_value("mask.path", path, f"{file} is missing; give a finished run's folder, a .safetensors or a .pt")
    try:
        net.load_state_dict(read_state_dict(file, "mask.path"), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise bad_value("mask.path", path, f"does not hold this network's weights ({reason})") from None
