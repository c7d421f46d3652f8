"""Format 2:4: at most two of four neighbouring input channels, packed in half the bytes, for NVIDIA's sparse cores."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ghostmask.engine.errors import InputError, bad_value
from ghostmask.launcher.export import MODEL_FILE, load_export
from ghostmask.launcher.exporting import card, load_two_four, network_file
from ghostmask.launcher.exporting.exported import FIELD, Exported, Options, Written, write_readable

FILE = "model.2_4.safetensors"


def write(exported: Exported, folder: Path, options: Options) -> Written:
    """The file, and load_two_four.py, which reads and runs it. Raises InputError where no layer is 2:4."""
    state = load_export(exported.folder / MODEL_FILE, FIELD)
    weights = [layer["name"] for layer in exported.summary["layers"]]
    packed = {name: pack_two_four(state[name], name) for name in weights if is_two_four(state[name])}
    others = [name for name in weights if name not in packed]
    if not packed:
        raise bad_value(
            "--format",
            "2:4",
            f"none of {len(weights)} layers is 2:4; train with mask.granularity=2:4",
        )
    tensors = {name: half(tensor, name) for name, tensor in state.items() if name not in packed}
    for name, (values, places) in packed.items():
        tensors |= {name: values, f"{name}.places": places}
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    content = save(tensors, metadata={"two_four": json.dumps(shapes)})
    files = write_readable(exported, folder, FILE, content, load_two_four)
    named = f": {', '.join(others)}" if others else ""
    note = f"{len(packed)} layers are 2:4, in float16; {len(others)} are not and stay dense{named}."
    return Written(files, _load(card.plain_load(exported.summary, network_file.FILE in files)), [note])


def is_two_four(weight: Tensor) -> bool:
    """Whether of each four neighbouring input channels, at every place of the kernel, at most two have a weight."""
    if weight.shape[1] % 4:
        return False
    return int(_groups(weight != 0).sum(1).max()) <= 2


def pack_two_four(weight: Tensor, name: str = "") -> tuple[Tensor, Tensor]:
    """((groups, 2) float16, (groups / 2,) uint8) of a weight that is 2:4; see load_two_four."""
    groups = _groups(half(weight, name))
    # Kept ones first, in order; a group with fewer than two is filled with zeros.
    order = (groups == 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :2]
    values = groups.gather(1, order)
    nibbles = (order[:, 0] | (order[:, 1] << 2)).to(torch.uint8)
    if len(nibbles) % 2:
        nibbles = torch.cat([nibbles, nibbles.new_zeros(1)])
    return values.contiguous(), nibbles[0::2] | (nibbles[1::2] << 4)


def half(tensor: Tensor, name: str) -> Tensor:
    """A weight in float16; batch norm, biases and integers as they are. Raises InputError for what is too large."""
    if tensor.dim() < 2 or tensor.dtype != torch.float32:
        return tensor
    rounded = tensor.half()
    if not bool(torch.isfinite(rounded).all()):
        raise InputError(f"--format = '2:4': {name} holds numbers that float16 has not; export it as safetensors")
    return rounded.contiguous()


def _groups(weight: Tensor) -> Tensor:
    """(groups, 4) neighbouring input channels: by output, place of the kernel, channel."""
    return weight.movedim(1, -1).reshape(-1, 4)


def _load(plain: str) -> str:
    """The plain network's lines, from this format's file, and with its 2:4 layers on a GPU."""
    head = "import torch\nfrom load_two_four import load_two_four, use_two_four\n"
    lines = plain.replace("from safetensors.torch import load_file\n", head)
    lines = lines.replace(f'net.load_state_dict(load_file("{MODEL_FILE}"))', "net.load_state_dict(state)")
    lines = lines.replace("\n\nnet = ", f'\n\nstate, names = load_two_four("{FILE}")\nnet = ', 1)
    return f"{lines}\nif torch.cuda.is_available():\n    net = use_two_four(net.cuda().half(), names)"
