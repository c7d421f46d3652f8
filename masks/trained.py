"""A trained network to start from: what mask.path names, read into the plain network."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.errors import bad_value


def load_trained(net: nn.Module, path: str) -> None:
    """Fill `net` from a run folder (its export), a .safetensors, or a .pt with a state dict. Raises InputError."""
    file = Path(path)
    if file.is_dir():
        file = file / "export" / "model.safetensors"
    if not file.is_file():
        raise bad_value(
            "mask.path", path, f"there is no {file}; give a finished run's folder, or a .safetensors or .pt file"
        )
    try:
        net.load_state_dict(_read(file), strict=True)
    except (RuntimeError, SafetensorError, OSError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise bad_value("mask.path", path, f"does not hold this network's weights ({reason})") from None


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        tensors: dict[str, Tensor] = load_file(file)
        return tensors
    content = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ValueError("not a dictionary of tensors")
    return content
